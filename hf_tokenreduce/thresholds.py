"""`save_thresholds` and `load_thresholds`: LTMP's thresholds in a separate file."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from .modeling.encoders import encoder_of, stock_type
from .modeling.ltmp import LTMPConfig


KINDS = ("merge_threshold", "prune_threshold")


def save_thresholds(model: PreTrainedModel, path: str | Path) -> None:
    """Write the thresholds of an LTMP model, 2 numbers per layer, to a safetensors file.

    Training may move a threshold slightly out of the range from 0 to 1. It then acts like the end of the range, and
    the file has that end.

    Args:
        model (`PreTrainedModel`): A model that is reduced by LTMP.
        path (`str` or `Path`): The file. Missing folders are made.

    Example:
        >>> save_thresholds(model, "thresholds.safetensors")
    """
    reducers = _reducers(model)
    thresholds = {
        kind: torch.cat([getattr(reducer, kind).detach().float().cpu() for reducer in reducers]).clamp(0, 1)
        for kind in KINDS
        if hasattr(reducers[0], kind)
    }
    metadata = {
        "format": "pt",
        "reduction": json.dumps(model.config.reduction.to_dict()),
        "backbone": json.dumps({"model_type": stock_type(model.config), "fingerprint": _fingerprint(model)}),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(thresholds, path, metadata=metadata)


@torch.no_grad()
def load_thresholds(model: PreTrainedModel, path: str | Path, *, check_backbone: bool = True) -> None:
    """Set the thresholds of an LTMP model from a file that `save_thresholds` wrote.

    Args:
        model (`PreTrainedModel`): A model that is reduced by LTMP.
        path (`str` or `Path`): The file.
        check_backbone (`bool`): Check that the thresholds were made for the same weights, in any dtype. Without the
            check you can use thresholds of another model of the same depth, such as one before fine-tuning.

    Raises:
        ValueError: The file does not fit the model.

    Example:
        >>> model = reduce_tokens(model, LTMPConfig())
        >>> load_thresholds(model, "thresholds.safetensors")
    """
    reducers = _reducers(model)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        thresholds = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    kinds = [kind for kind in KINDS if hasattr(reducers[0], kind)]
    if sorted(thresholds) != sorted(kinds):
        raise ValueError(
            f"{path} holds {sorted(thresholds) or 'nothing'}, the model has {kinds}. Reduce the model with the "
            f"setting of the file: {metadata.get('reduction', 'unknown')}."
        )
    for kind, values in thresholds.items():
        if values.shape != (len(reducers),):
            raise ValueError(f"{path} has {values.numel()} values of {kind}, the model has {len(reducers)} layers.")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{path} has a {kind} that is not between 0 and 1: {values.tolist()}.")
    if check_backbone:
        own = {"model_type": stock_type(model.config), "fingerprint": _fingerprint(model)}
        of_file = json.loads(metadata.get("backbone", "{}"))
        if not _same_backbone(own, of_file):
            raise ValueError(
                f"{path} was made for other weights than this model's. Load the model that it was made for, or pass "
                "check_backbone=False if the weights are similar, for example after fine-tuning."
            )
    for kind, values in thresholds.items():
        for reducer, value in zip(reducers, values, strict=True):
            getattr(reducer, kind).copy_(value)
    model.config.__dict__.pop("calibrated_share", None)  # it was that of the thresholds before


def _reducers(model: PreTrainedModel) -> list[Any]:
    reduction = getattr(model.config, "reduction", None)
    if reduction is None or reduction.method != LTMPConfig.method:
        raise ValueError(
            f"This {type(model).__name__} has no thresholds, because it is not reduced by LTMP. Reduce it first: "
            "reduce_tokens(model, LTMPConfig())."
        )
    return encoder_of(model).reducers


def _fingerprint(model: PreTrainedModel) -> list[float]:
    """Return two numbers for each weight that scores depend on most. They are nearly the same in any dtype.

    The numbers are the projection of the weight on a fixed direction, relative to its norm, and its norm.
    """
    numbers = []
    encoder = encoder_of(model)
    weights = [encoder.patch_projection.weight]
    for layer in encoder.layers:
        attention = encoder.attention(layer)
        # Without the parts of an adapter: the last of them begins with zeros, which have no direction.
        parts = [part for name, part in layer.mlp.named_modules() if "lora_" not in name]
        *_, last_of_mlp = [part for part in parts if isinstance(part, nn.Linear)]
        weights += [attention.q_proj.weight, attention.k_proj.weight, last_of_mlp.weight]
    for weight in weights:
        values = weight.detach().float().flatten().cpu()
        direction = torch.sin(torch.arange(values.numel(), dtype=torch.float64) * 12.9898).sign().float()
        numbers.append((values @ direction / values.norm()).item())
        numbers.append(values.norm().item())
    return numbers


def _same_backbone(own: dict[str, Any], of_file: dict[str, Any]) -> bool:
    """Return whether two backbones have the same type and nearly the same fingerprint."""
    if own["model_type"] != of_file.get("model_type"):
        return False
    if len(own["fingerprint"]) != len(of_file.get("fingerprint", [])):
        return False
    pairs = zip(own["fingerprint"], of_file["fingerprint"], strict=True)
    return all(abs(a - b) <= 0.005 * max(1.0, abs(a)) for a, b in pairs)
