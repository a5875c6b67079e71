"""LTMP's thresholds: found on sample images without training, and kept in a file of their own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .evaluation.compute import encoder_multiply_adds
from .modeling.merging import decide_by_thresholds


KINDS = ("merge_threshold", "prune_threshold")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    images: Tensor | str | Path,
    target: float,
    *,
    image_processor: Any = None,
    max_images: int = 128,
    merge_share: float = 0.8,
    tolerance: float = 0.005,
) -> float:
    """Set the thresholds of an LTMP model so that on sample images it keeps `target` of its layers' multiply-adds.

    images: pixel values (n, C, H, W), or a folder of images with or without subfolders, which needs the model's
        `image_processor`. Labels are not needed; of more than `max_images` an evenly spread part is taken.
    merge_share: share of the removed tokens that merge, the rest is pruned; of no effect for a model that only does
        one of the two.

    No training: one number, the tokens that each layer removes of an average image, is searched. Given it, a single
    forward sets every layer's thresholds to the quantiles of the scores that occur there. All images go through the
    model at once. Returns the share reached on these images.
    """
    reducers = _reducers(model)
    if not 0 < target <= 1:
        raise ValueError(f"target is the share of multiply-adds to keep, above 0 and at most 1, got {target!r}.")
    if not 0 <= merge_share <= 1:
        raise ValueError(f"merge_share must lie between 0 and 1, got {merge_share!r}.")
    pixels = _load(images, image_processor, max_images).to(model.device)
    settings = model.config.reduction
    merge_share = merge_share if settings.merge and settings.prune else float(settings.merge)
    num_tokens = model.base_model.embeddings.patch_embeddings.num_patches + model.config.num_prefix_tokens
    dense = torch.full((1, len(reducers)), num_tokens)
    total = encoder_multiply_adds(model.config, dense, num_tokens)
    training = model.training
    model.eval()

    def share_when_removing(tokens: float) -> float:
        with _fitting(reducers, tokens, merge_share):
            counts = model(pixels).token_counts.cpu()
        return (encoder_multiply_adds(model.config, counts, num_tokens).mean() / total).item()

    try:
        low, high = 0.0, float(num_tokens)
        least = share_when_removing(high)
        if target < least:
            raise ValueError(
                f"target={target} cannot be reached: with all removed that the method can remove, {least:.3f} of the "
                "multiply-adds remain. Give a higher target."
            )
        removed = low
        share = share_when_removing(removed)
        for _ in logging.tqdm(range(12), desc="calibrating thresholds", leave=False):
            if abs(share - target) <= tolerance:
                break
            low, high = (removed, high) if share > target else (low, removed)
            removed = (low + high) / 2
            share = share_when_removing(removed)
    finally:
        model.train(training)
    return share


def save_thresholds(model: PreTrainedModel, path: str | Path) -> None:
    """Write an LTMP model's thresholds, 2 numbers per layer, to a safetensors file."""
    reducers = _reducers(model)
    thresholds = {
        kind: torch.stack([getattr(reducer, kind).detach().float().cpu() for reducer in reducers])
        for kind in KINDS
        if hasattr(reducers[0], kind)
    }
    metadata = {
        "format": "pt",
        "reduction": json.dumps(model.config.reduction.to_dict()),
        "backbone": json.dumps({"model_type": model.config.base_model_type, "fingerprint": _fingerprint(model)}),
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(thresholds, path, metadata=metadata)


@torch.no_grad()
def load_thresholds(model: PreTrainedModel, path: str | Path, *, check_backbone: bool = True) -> None:
    """Set an LTMP model's thresholds from a file of `save_thresholds`.

    The file must come from the same backbone, whatever its dtype; `check_backbone=False` takes thresholds of another
    one of the same depth, such as one fine-tuned since.
    """
    reducers = _reducers(model)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        thresholds = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    kinds = [kind for kind in KINDS if hasattr(reducers[0], kind)]
    if sorted(thresholds) != sorted(kinds):
        raise ValueError(
            f"{path} holds {sorted(thresholds) or 'nothing'}, the model has {kinds}. Reduce it with the setting the "
            f"file was made with: {metadata.get('reduction', 'unknown')}."
        )
    for kind, values in thresholds.items():
        if values.shape != (len(reducers),):
            raise ValueError(f"{path} has {values.numel()} values of {kind}, the model has {len(reducers)} layers.")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{path} has a {kind} that is not between 0 and 1: {values.tolist()}.")
    if check_backbone:
        ours = {"model_type": model.config.base_model_type, "fingerprint": _fingerprint(model)}
        theirs = json.loads(metadata.get("backbone", "{}"))
        if not _same_backbone(ours, theirs):
            raise ValueError(
                f"{path} was made for other weights than this model's. Load the model they were made for, or pass "
                "check_backbone=False if they are close relatives."
            )
    for kind, values in thresholds.items():
        for reducer, value in zip(reducers, values, strict=True):
            getattr(reducer, kind).copy_(value)


def _reducers(model: PreTrainedModel) -> list[Any]:
    reduction = getattr(model.config, "reduction", None)
    if reduction is None or reduction.method != "ltmp":
        raise ValueError(
            f"This {type(model).__name__} has no thresholds: it is not reduced by LTMP. Reduce it first: "
            "reduce_tokens(model, LTMPConfig())."
        )
    return [layer.reducer for layer in model.base_model.layers]


@contextmanager
def _fitting(reducers: list[Any], tokens: float, merge_share: float) -> Iterator[None]:
    """While a batch goes through the model, every layer sets its thresholds to remove `tokens` of an average image."""

    def fit(reducer: Any, act: Any) -> Any:
        def after_attention(view, state):
            _fit(reducer, view, state, tokens, merge_share)
            return act(view, state)

        return after_attention

    for reducer in reducers:
        reducer.after_attention = fit(reducer, reducer.after_attention)
    try:
        yield
    finally:
        for reducer in reducers:
            del reducer.after_attention


def _fit(reducer: Any, view: Any, state: Any, tokens: float, merge_share: float) -> None:
    prefix, num_tokens = state.num_prefix_tokens, state.num_patch_tokens
    valid = state.valid()
    if valid is None:
        valid = torch.ones(view.key.shape[0], num_tokens, dtype=torch.bool, device=view.key.device)
    keys = view.patch_keys() if reducer.settings.merge else None
    importance = torch.ones(valid.shape, device=valid.device) if view.received is None else view.received[:, prefix:]
    to_merge, to_prune = (round(share * tokens * len(valid)) for share in (merge_share, 1 - merge_share))
    threshold = torch.inf
    if reducer.settings.merge:
        untouched = decide_by_thresholds(keys, importance, valid, torch.inf, -torch.inf, prefix)
        threshold = 1.0 - _cut(1.0 - untouched.similarity[untouched.similarity > -torch.inf], to_merge)
        reducer.merge_threshold.fill_(threshold)
        threshold = reducer.merge_threshold.float()
    if reducer.settings.prune:
        merged = decide_by_thresholds(keys, importance, valid, threshold, -torch.inf, prefix)
        stays = valid & (merged.receiver == torch.arange(num_tokens, device=valid.device))
        reducer.prune_threshold.fill_(_cut(merged.importance[stays], to_prune))


def _cut(values: Tensor, count: int) -> float:
    """A number between 0 and 1 that has the `count` smallest values at or below it, halfway to the next."""
    if count <= 0 or values.numel() == 0:
        return 0.0
    ascending = values.sort().values
    if count >= values.numel():
        return min(max(ascending[-1].item(), 0.0), 1.0)
    return min(max((ascending[count - 1].item() + ascending[count].item()) / 2, 0.0), 1.0)


def _fingerprint(model: PreTrainedModel) -> list[float]:
    """A few weights, each projected on a fixed direction, in units of its length: close in any dtype."""
    first, last = model.base_model.layers[0], model.base_model.layers[-1]
    numbers = []
    for weight in (
        first.attention.q_proj.weight,
        first.mlp.fc1.weight,
        last.attention.k_proj.weight,
        last.mlp.fc2.weight,
    ):
        values = weight.detach().float().flatten().cpu()
        direction = torch.sin(torch.arange(values.numel(), dtype=torch.float64) * 12.9898).sign().float()
        numbers.append((values @ direction / values.norm()).item())
        numbers.append(values.norm().item())
    return numbers


def _same_backbone(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    if ours["model_type"] != theirs.get("model_type") or len(ours["fingerprint"]) != len(
        theirs.get("fingerprint", [])
    ):
        return False
    pairs = zip(ours["fingerprint"], theirs["fingerprint"], strict=True)
    return all(abs(a - b) <= 0.02 * max(1.0, abs(a)) for a, b in pairs)


def _load(images: Tensor | str | Path, image_processor: Any, max_images: int) -> Tensor:
    if isinstance(images, Tensor):
        if images.ndim != 4 or len(images) == 0:
            raise ValueError(f"images must be pixel values (n, C, H, W) with n above 0, got {tuple(images.shape)}.")
        return images[:: -(-len(images) // max_images)]
    folder = Path(images)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"No images in {folder}. Give a folder of images, with or without subfolders.")
    if image_processor is None:
        raise ValueError("A folder of images needs image_processor=, such as AutoImageProcessor.from_pretrained(...).")
    files = files[:: -(-len(files) // max_images)]
    return image_processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt").pixel_values
