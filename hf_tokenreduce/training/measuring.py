"""What the record of a training says besides the training: the dense accuracy, and what the reduction saves."""

from typing import Any

import numpy as np
import torch

from ..convert import restore, restored
from ..modeling.multiply_adds import shares_kept
from ..pictures import spread
from ..tasks import all_layers_act, facts_on
from ..timing import in_turns, median_ratio
from .trainer import TokenReduceTrainer


@torch.no_grad()
def evaluate_dense(dense: Any, trainer: TokenReduceTrainer) -> float:
    """Return the top-1 accuracy, in percent, of the model as it was given, without reduction."""
    # With LoRA the model may have its adapters already, which add nothing before the training.
    plain = (restored(dense) if hasattr(dense.config, "reduction") else dense).to(trainer.args.device).eval()
    right = []
    for batch in trainer.get_eval_dataloader():
        with trainer.accelerator.autocast():  # the reduced model is evaluated in this type too
            logits = plain(batch["pixel_values"].to(trainer.args.device)).logits
        predictions = logits.float().argmax(dim=-1)
        right.append(trainer.accelerator.gather_for_metrics(predictions == batch["labels"].to(predictions.device)))
    return 100 * torch.cat(right).double().mean().item()


def how_long(trainer: TokenReduceTrainer, streaming: bool) -> dict[str, Any]:
    """Return for how many epochs the saved model was trained. A stream has no epochs; then also how many images.

    `chosen_by_evaluation` says that it is the best of several epochs on the images that it was evaluated on.
    """
    state, args = trainer.state, trainer.args
    found: dict[str, Any] = {"epochs": round(state.epoch or 0, 2)}
    if streaming:
        in_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        found["streamed_images"] = state.global_step * in_step
    if args.load_best_model_at_end and state.best_global_step:
        found["epochs"] = round((state.epoch or 0) * state.best_global_step / state.global_step, 2)
        found["chosen_by_evaluation"] = True
    return found


def last_metrics(trainer: TokenReduceTrainer) -> dict[str, Any] | None:
    """Return the results of the evaluation after the last step, if the trainer keeps the model of that step."""
    if trainer.args.load_best_model_at_end:
        return None
    now = [log for log in trainer.state.log_history if log.get("step") == trainer.state.global_step]
    return next((log for log in reversed(now) if "eval_accuracy" in log), None)


@torch.no_grad()
def describe(
    model: Any, pixels: torch.Tensor, device: torch.device, repeats: int = 7, batch_size: int = 32
) -> dict[str, Any]:
    """Measure what the reduction saves: multiply-adds on all images, time on one batch in turns with the dense one."""
    device = device if device.type == "cuda" else torch.device("cpu")  # the record names one of these two
    model = model.to(device).eval()
    plain = restore(model).eval()
    acting = all_layers_act(model)
    counts = torch.cat([model(part.to(device), **acting).token_counts.cpu() for part in pixels.split(batch_size)])
    batch = pixels[spread(len(pixels), batch_size)].to(device)
    reduction = model.config.reduction
    share = shares_kept(model.config, counts, facts_on(model, pixels).num_tokens, reduction).mean().item()
    seconds, dense_seconds = in_turns([lambda: model(batch), lambda: plain(batch)], repeats, device)
    where = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        where = f"{torch.cuda.get_device_name(device)}, {str(model.dtype).removeprefix('torch.')}"
    return {
        "method": None if reduction is None else reduction.method,
        "settings": None if reduction is None else reduction.to_dict(),
        "mult_adds_ratio": round(share, 4),
        "speedup": round(median_ratio(dense_seconds, seconds)[0], 3),
        "speed_batch_size": len(batch),
        "machine": f"{where}, torch {torch.__version__}",
        "tokens_per_layer": np.round(counts.double().mean(dim=0).numpy(), 1).tolist(),
    }
