"""`calibrate`: what a reduced model needs to know of its images, found without labels and without training it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from .modeling.encoders import encoder_of, facts_of
from .modeling.merging import decide_by_thresholds
from .modeling.multiply_adds import even_share, multiply_adds
from .modeling.slimming import SiTReducer
from .modeling.tokens import TokenState
from .modes import evaluating
from .pictures import IMAGE_SUFFIXES, read_picture
from .tasks import image_side


logger = logging.get_logger(__name__)


def calibrate(
    model: PreTrainedModel,
    images: Tensor | str | Path,
    target: float | None = None,
    *,
    image_processor: Any = None,
    max_images: int = 128,
    merge_share: float = 0.8,
    tolerance: float = 0.005,
    steps: int = 600,
) -> float:
    """Fit the parameters of an LTMP or SiT model to sample images. Returns the share of its layers' multiply-adds that
    it then keeps on these images.

    images: pixel values (n, C, H, W), or a folder of images with or without subfolders, which needs the model's
        `image_processor`. Labels are not needed; of more than `max_images` an evenly spread part is taken.

    LTMP: sets the thresholds so that `target` of the multiply-adds is kept. One number, the tokens that each layer
    removes of an average image, is searched; given it, a forward sets every layer's thresholds to the quantiles of
    the scores that occur there.
    merge_share: share of the removed tokens that merge, the rest is pruned; of no effect for a model that only does
        one of the two.
    tolerance: how close to the target is close enough.

    SiT: teaches the slimming networks, layer by layer, to pool neighbouring tokens: a start for training from which
    the model can already be used. What it keeps is set by its `keep_rate`, so it takes no `target`.
    steps: of 16 images each, per network.

    All images go through the model at once.
    """
    method = getattr(getattr(model.config, "reduction", None), "method", None)
    if method not in ("ltmp", "sit"):
        raise ValueError(
            f"This {type(model).__name__} has nothing to calibrate. calibrate is for models reduced by LTMP "
            "(reduce_tokens(model, LTMPConfig())) or SiT."
        )
    if (target is None) != (method == "sit"):
        raise ValueError(
            "SiTConfig(keep_rate=...) says what is kept: leave target out."
            if method == "sit"
            else "target is missing: the share of the multiply-adds to keep, such as 0.65."
        )
    if isinstance(images, Tensor):
        check_inputs(model, images)
    pixels = load_images(images, image_processor, max_images).to(model.device)
    with evaluating(model):
        if method == "sit":
            return _fit_slimming(model, pixels, steps)
        return _fit_thresholds(model, pixels, target, merge_share, tolerance)


def check_inputs(model: PreTrainedModel, inputs: Tensor) -> None:
    """Raise a ValueError unless these are a batch of what the model takes: pixel values, or spectrograms."""
    encoder = encoder_of(model)
    shape = encoder.tower.inputs(encoder.config)
    if inputs.ndim != 1 + len(shape) or len(inputs) == 0:
        names = "spectrograms (n, frames, mel bins)" if len(shape) == 2 else "pixel values (n, C, H, W)"
        raise ValueError(f"images must be {names} with n above 0, got {tuple(inputs.shape)}.")


def load_images(images: Tensor | str | Path, image_processor: Any, max_images: int) -> Tensor:
    """Pixel values (n, C, H, W) as they are, or of the images in a folder; at most `max_images`, evenly spread."""
    if max_images < 1:
        raise ValueError(f"max_images must be at least 1, got {max_images}.")
    if isinstance(images, Tensor):
        return images[:: -(-len(images) // max_images)]
    folder = Path(images)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file())
    if not files:
        raise ValueError(f"No images in {folder}. Give a folder of images, with or without subfolders.")
    if image_processor is None:
        raise ValueError("A folder of images needs image_processor=, such as AutoImageProcessor.from_pretrained(...).")
    chosen = files[:: -(-len(files) // max_images)]
    return torch.cat([image_processor(read_picture(file), return_tensors="pt")["pixel_values"] for file in chosen])


@torch.no_grad()
def _fit_thresholds(
    model: PreTrainedModel, pixels: Tensor, target: Any, merge_share: float, tolerance: float
) -> float:
    if not 0 < target <= 1:
        raise ValueError(f"target is the share of multiply-adds to keep, above 0 and at most 1, got {target!r}.")
    if not 0 <= merge_share <= 1:
        raise ValueError(f"merge_share must lie between 0 and 1, got {merge_share!r}.")
    settings = model.config.reduction
    encoder = encoder_of(model)
    reducers = encoder.reducers
    num_tokens = encoder.embed(pixels).shape[1]  # these images may be of another size than the model's own
    given = [(threshold, threshold.clone()) for reducer in reducers for threshold in reducer.parameters()]
    merge_share = merge_share if settings.merge and settings.prune else float(settings.merge)
    total = multiply_adds(model.config, torch.full((1, len(reducers)), num_tokens), num_tokens)

    def share_when_removing(tokens: float) -> float:
        def fit(reducer: Any, view: Any, state: TokenState) -> None:
            _set_thresholds(reducer, view, state, tokens, merge_share)

        with _before_acting(reducers, "after_attention", fit):
            counts = image_side(model)(pixels).token_counts.cpu()
        return (multiply_adds(model.config, counts, num_tokens, settings).mean() / total).item()

    try:
        least = share_when_removing(num_tokens)
        if target < least - tolerance:
            raise ValueError(
                f"target={target} cannot be reached: removing all there is, {merge_share:.2f} of it by merging, keeps "
                f"{least:.3f} of the multiply-adds. Give a higher target, or merge less: a lower merge_share."
            )
        low, high, removed = 0.0, float(num_tokens), 0.0
        share = share_when_removing(removed)
        if share < target - tolerance:
            raise ValueError(
                f"target={target} cannot be reached: max_tokens={settings.max_tokens} keeps {share:.3f} of the "
                "multiply-adds at most. Give a lower target or a higher cap."
            )
        for _ in logging.tqdm(range(12), desc="calibrating thresholds", leave=False):
            if abs(share - target) <= tolerance:
                break
            low, high = (removed, high) if share > target else (low, removed)
            removed = (low + high) / 2
            share = share_when_removing(removed)
    except BaseException:
        for threshold, value in given:
            threshold.copy_(value)
        raise
    if abs(share - target) > tolerance:
        logger.warning(f"The closest to target={target} that these images allow is {share:.3f}; more images may help.")
    return share


@contextmanager
def _before_acting(reducers: list[Any], hook: str, fit: Any) -> Iterator[None]:
    """While a batch goes through the model, `fit(reducer, ...)` sees what each reducer's hook gets, just before it."""

    def wrapped(reducer: Any, act: Any) -> Any:
        def fit_and_act(*seen):
            fit(reducer, *seen)
            return act(*seen)

        return fit_and_act

    for reducer in reducers:
        setattr(reducer, hook, wrapped(reducer, getattr(reducer, hook)))
    try:
        yield
    finally:
        for reducer in reducers:
            delattr(reducer, hook)


def _set_thresholds(reducer: Any, view: Any, state: Any, tokens: float, merge_share: float) -> None:
    """So that the layer removes `tokens` of an average image."""
    prefix, num_tokens = state.num_prefix_tokens, state.num_patch_tokens
    valid = state.valid()
    if valid is None:
        valid = torch.ones(view.key.shape[0], num_tokens, dtype=torch.bool, device=view.key.device)
    keys = view.patch_keys() if reducer.settings.merge else None
    importance = torch.ones(valid.shape, device=valid.device) if view.received is None else view.received[:, prefix:]
    to_merge, to_prune = (round(share * tokens * len(valid)) for share in (merge_share, 1 - merge_share))
    threshold: Any = torch.inf
    if reducer.settings.merge:
        untouched = decide_by_thresholds(keys, importance, valid, torch.inf, -torch.inf, prefix)
        distances = 1.0 - untouched.similarity[untouched.similarity > -torch.inf]
        reducer.merge_threshold.fill_(1.0 - _cut(distances, to_merge))
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


def _fit_slimming(model: PreTrainedModel, pixels: Tensor, steps: int) -> float:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    slimming = [reducer for reducer in encoder_of(model).reducers if reducer.num_slim is not None]
    height, width = facts_of(model.config).grid
    order = torch.tensor(_neighbours_together(0, height, 0, width, width), device=model.device)
    with logging.tqdm(total=steps * len(slimming), desc="calibrating slimming", leave=False) as progress:

        def teach(reducer: SiTReducer, state: TokenState) -> None:
            _teach_pools(reducer, state, order, steps, progress)

        with torch.no_grad(), _before_acting(slimming, "after_layer", teach):
            image_side(model)(pixels)
    return even_share(model.config.reduction, model.config)


def _teach_pools(reducer: SiTReducer, state: TokenState, order: Tensor, steps: int, progress: Any) -> None:
    """Teach the network of one layer which tokens belong to each slim token: a part of the image, or, once the tokens
    are slim, a run of them, for those of neighbouring parts stand beside each other."""
    patches = state.hidden_states[:, state.num_prefix_tokens :].float()
    count, slim = patches.shape[1], reducer.fc2.out_features
    pool = torch.arange(count, device=patches.device) * slim // count
    if count == len(order):
        pool = torch.empty_like(pool).scatter(0, order, pool)
    share = F.one_hot(pool, slim).float()
    share = share / share.sum(dim=0)  # (N, K)
    generator = torch.Generator().manual_seed(0)
    student = copy.deepcopy(reducer).float().requires_grad_()  # in float32 whatever the model's type
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    with torch.enable_grad():
        for _ in range(steps):
            some = torch.randint(len(patches), (16,), generator=generator).to(patches.device)
            loss = -(student.logits(patches[some]).log_softmax(dim=1) * share).sum(dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update()
    for parameter, value in zip(reducer.parameters(), student.parameters(), strict=True):
        parameter.copy_(value)


def _neighbours_together(top: int, bottom: int, left: int, right: int, width: int) -> list[int]:
    """The patches of a part of the grid, halved again and again, so that those close in the list are close in it."""
    height, across = bottom - top, right - left
    if height * across <= 1:
        return [top * width + left] * (height * across)
    if height >= across:
        middle = top + (height + 1) // 2
        parts = (top, middle, left, right), (middle, bottom, left, right)
    else:
        middle = left + (across + 1) // 2
        parts = (top, bottom, left, middle), (top, bottom, middle, right)
    return [patch for part in parts for patch in _neighbours_together(*part, width)]
