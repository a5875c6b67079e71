"""What training shows in a terminal: a progress bar with the time that is left, and one line per epoch."""

from typing import Any

from transformers import ProgressCallback


class EpochLines(ProgressCallback):
    """Show the progress bars of `Trainer`, but print one line per epoch instead of dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        super().on_evaluate(args, state, control, **kwargs)
        bar = self.training_bar
        if bar is None or not state.is_world_process_zero:
            return
        parts = [f"loss {self.losses[-1]:.3f}"] if self.losses else []
        if metrics and "eval_accuracy" in metrics:
            parts.append(f"top-1 {100 * metrics['eval_accuracy']:.1f} %")
        spent = bar.format_interval(bar.format_dict["elapsed"])
        done = state.global_step / max(1, state.max_steps)
        left = bar.format_interval(bar.format_dict["elapsed"] * (1 / done - 1)) if done else "?"
        epoch = f"epoch {state.epoch:g} of {args.num_train_epochs:g}"
        bar.write(f"{epoch}: {', '.join(parts)}; {spent} so far, about {left} left")
