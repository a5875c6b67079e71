"""What happens beside the steps of a training: what a terminal shows, and how the keep rate falls."""

from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel, ProgressCallback, TrainerCallback


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


class WarmUpKeepRate(TrainerCallback):
    """Let the keep rate fall from 1 to its value over the first `share` of the training steps, 0.01 at a time."""

    def __init__(self, model: PreTrainedModel, share: float):
        self.model, self.share = model, share
        self.goal: Any = None  # the setting that was asked for, while the model trains

    def on_train_begin(self, args, state, control, **kwargs):
        self.goal = self.model.config.reduction

    def end(self) -> None:
        """Return to the setting that was asked for."""
        if self.goal not in (None, self.model.config.reduction):
            self.model.set_reduction(self.goal)
        self.goal = None

    def on_step_begin(self, args, state, control, **kwargs):
        progress = min(1.0, state.global_step / max(1.0, self.share * state.max_steps))
        given = self.goal.keep_rate

        def rate(goal: float) -> float:
            return goal if progress == 1 else round(1 - (1 - goal) * progress, 2)

        rates = rate(given) if isinstance(given, float) else [rate(goal) for goal in given]
        reduction = replace(self.goal, keep_rate=rates)
        if reduction != self.model.config.reduction:
            self.model.set_reduction(reduction)
