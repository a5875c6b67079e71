"""The description of LTMP, and how its thresholds are found without training."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from ..modeling.checks import is_integer, is_number
from ..modeling.configuration_base import ReductionConfig
from ..modeling.encoders import EncoderFacts, encoder_of
from ..modeling.ltmp import LTMPConfig, decide_by_thresholds
from ..modeling.multiply_adds import shares_kept
from ..modeling.tokens import TokenState
from ..tasks import all_layers_act, image_side
from .fitting import before_acting
from .method import Method


logger = logging.get_logger(__name__)


@torch.no_grad()
def fit_thresholds(
    model: PreTrainedModel,
    pixels: Tensor,
    target: Any,
    *,
    merge_share: float = 0.8,
    first_layer: int | None = None,
    tolerance: float = 0.005,
) -> float:
    """Set the thresholds of a model so that it keeps `target` of the multiply-adds on images.

    It searches one number: the share of the tokens that each layer removes from an average image. For each number that
    it tries, a forward sets the thresholds of every layer to quantiles of the scores in that layer. The first layers
    remove nothing: tokens that are removed early cost more accuracy than they save work.

    Args:
        model: A model that LTMP reduces.
        pixels: Pixel values of the images, (B, C, H, W).
        target: Share of the multiply-adds to keep, above 0 and at most 1.
        merge_share: Share of the removed tokens that merge; the others are pruned. It has no effect if the model only
            merges or only prunes.
        first_layer: 0-based index of the first layer that removes tokens. By default a quarter of the layers come
            before it, or fewer where a low target asks for that.
        tolerance: Largest accepted distance from the target.

    Returns:
        The share that the model keeps.
    """
    if target is None:
        raise ValueError("target is missing. Give the share of the multiply-adds to keep, such as 0.65.")
    if not is_number(target) or not 0 < target <= 1:
        raise ValueError(f"target must be the share of multiply-adds to keep, above 0 and at most 1, got {target!r}.")
    if not is_number(merge_share) or not 0 <= merge_share <= 1:
        raise ValueError(f"merge_share must lie between 0 and 1, got {merge_share!r}.")
    settings = model.config.reduction
    encoder = encoder_of(model)
    reducers = encoder.reducers
    size = encoder.size_arguments(pixels)  # images may have another size than the model's own
    num_tokens = encoder.embed(pixels[:1], **size).shape[1]
    given = [(threshold, threshold.clone()) for reducer in reducers for threshold in reducer.parameters()]
    merge_share = merge_share if settings.merge and settings.prune else float(settings.merge)
    starts = (len(reducers) // 4, 0) if target >= 0.5 else (0,)
    if first_layer is not None and (not is_integer(first_layer) or not 0 <= first_layer < len(reducers)):
        raise ValueError(
            f"first_layer must be the index of a layer, from 0 to {len(reducers) - 1}, got {first_layer}."
        )
    place = {id(reducer): layer for layer, reducer in enumerate(reducers)}

    def share_when_removing(part: float, first: int) -> float:
        def fit(reducer: Any, view: Any, state: TokenState) -> None:
            _set_thresholds(reducer, view, state, part if place[id(reducer)] >= first else 0.0, merge_share)

        with before_acting(reducers, "after_attention", fit):
            counts = image_side(model)(pixels, **all_layers_act(model), **size).token_counts.cpu()
        return shares_kept(model.config, counts, num_tokens, settings).mean().item()

    try:
        for first in starts if first_layer is None else (first_layer,):
            least = share_when_removing(1.0, first)
            if target >= least - tolerance:
                break
        else:
            raise ValueError(
                f"target={target} cannot be reached: when all tokens are removed from layer {first} on, "
                f"{merge_share:.2f} of them by merging, {least:.3f} of the multiply-adds are kept. Give a higher "
                "target, a lower merge_share or an earlier first_layer."
            )
        low, high, removed = 0.0, 1.0, 0.0
        share = share_when_removing(removed, first)
        if share < target - tolerance:
            raise ValueError(
                f"target={target} cannot be reached: max_tokens={settings.max_tokens} keeps {share:.3f} of the "
                "multiply-adds at most. Give a lower target or a higher cap."
            )
        tried = {removed: share}
        for _ in logging.tqdm(range(12), desc="calibrating thresholds", leave=False):
            if abs(share - target) <= tolerance:
                break
            low, high = (removed, high) if share > target else (low, removed)
            removed = (low + high) / 2
            tried[removed] = share = share_when_removing(removed, first)
        closest = min(tried, key=lambda part: abs(tried[part] - target))
        if closest != removed:  # the share jumps over the target, and the last try was on the farther side
            share = share_when_removing(closest, first)
    except BaseException:
        for threshold, value in given:
            threshold.copy_(value)
        raise
    aim_at(model, target)
    if abs(share - target) > tolerance:
        logger.warning(f"target={target} was not met exactly: {share:.3f} is the closest. More images may help.")
    return share


def aim_at(model: PreTrainedModel, target: float) -> None:
    """Set the target of a model's setting, which a later training aims at. The thresholds stay as they are."""
    setting = dataclasses.replace(model.config.reduction, target=target)
    model.config.reduction = setting
    for reducer in encoder_of(model).reducers:
        reducer.built_for = setting


def _set_thresholds(reducer: Any, view: Any, state: Any, part: float, merge_share: float) -> None:
    """Set a reducer's thresholds so that its layer removes a part of the tokens that are present, from 0 to 1."""
    prefix, num_tokens = state.num_prefix_tokens, state.num_patch_tokens
    valid = state.valid()
    if valid is None:
        valid = torch.ones(view.key.shape[0], num_tokens, dtype=torch.bool, device=view.key.device)
    keys = view.patch_keys() if reducer.settings.merge else None
    importance = torch.ones(valid.shape, device=valid.device) if view.received is None else view.received[:, prefix:]
    present = int(valid.sum())
    to_merge, to_prune = (round(share * part * present) for share in (merge_share, 1 - merge_share))
    threshold: Any = torch.inf
    if reducer.settings.merge:
        untouched = decide_by_thresholds(keys, importance, valid, torch.inf, -torch.inf, prefix)
        similarity = untouched.similarity(prefix)
        distances = 1.0 - similarity[similarity > -torch.inf]
        reducer.merge_threshold.fill_(1.0 - _cut(distances, to_merge))
        threshold = reducer.merge_threshold.float()
    if reducer.settings.prune:
        merged = decide_by_thresholds(keys, importance, valid, threshold, -torch.inf, prefix)
        stays = valid & (merged.receiver == torch.arange(num_tokens, device=valid.device))
        reducer.prune_threshold.fill_(_cut(merged.merged_importance[stays], to_prune))


def _cut(values: Tensor, count: int) -> float:
    """Return a number between 0 and 1 halfway between the `count` smallest values and the next one."""
    if count <= 0 or values.numel() == 0:
        return 0.0
    ascending = values.sort().values
    if count >= values.numel():
        return min(max(ascending[-1].item(), 0.0), 1.0)
    return min(max((ascending[count - 1].item() + ascending[count].item()) / 2, 0.0), 1.0)


class ClampThresholds(TrainerCallback):
    """Keep the thresholds between 0 and 1 in training."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    @torch.no_grad()
    def on_optimizer_step(self, args, state, control, **kwargs):
        for reducer in encoder_of(self.model).reducers:
            for threshold in reducer.parameters():
                threshold.clamp_(0, 1)


def at_share(facts: EncoderFacts, share: float, **settings: Any) -> ReductionConfig:
    return LTMPConfig(target=share, **settings)


def learned_numbers(model: PreTrainedModel) -> dict[str, list[float]]:
    reducers = [dict(reducer.named_parameters()) for reducer in encoder_of(model).reducers]
    return {
        label: [reducer[name].item() for reducer in reducers]
        for name, label in (("merge_threshold", "merges above"), ("prune_threshold", "prunes up to"))
        if name in reducers[0]
    }


THRESHOLDS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 128,
    "freeze_backbone": True,
    "merge_learning_rate": 5e-3,
    "prune_learning_rate": 5e-6,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "label_smoothing_factor": 0.1,
    "optim": "sgd",
}

QUICK_THRESHOLDS = {**THRESHOLDS, "per_device_train_batch_size": 32, "prune_learning_rate": 2e-6}

LTMP = Method(
    LTMPConfig,
    title="LTMP",
    family="merging and pruning",
    summary=(
        "In every layer tokens merge if their similarity is above one learned threshold, and are pruned if their "
        "importance is not above another. Images keep different numbers of tokens. The settings hold the initial "
        "thresholds; the learned ones, two per layer, are stored with the weights."
    ),
    paper="Learned Thresholds Token Merging and Pruning for Vision Transformers",
    arxiv="2307.10780",
    details=(
        "In every layer tokens merge if their similarity is above one threshold. They are pruned if their importance, "
        "the attention they receive, is not above another threshold. Training masks tokens instead of removing them. "
        "It learns two numbers per layer, with a loss that brings the share of the multiply-adds close to `target`. "
        "`calibrate` finds thresholds without training. At targets "
        "of 0.5 and more it removes nothing in the first quarter of the layers."
    ),
    limits=(
        "The cost depends on the image. LTMP must know how much attention each token receives. On a CPU, and in "
        "float32, this takes the attention map of every layer, so its attention is slower than that of most other "
        "methods."
    ),
    ours=(
        "tokens that were removed before take no part when tokens are paired and scored, so that training computes "
        "what inference computes; an image in which nothing merges keeps its order; `max_tokens`; calibration"
    ),
    needs="images",
    is_adaptive=lambda config: True,
    at_share=at_share,
    prepare=fit_thresholds,
    # A small data set has few steps in one epoch: `quick` has smaller batches, and a prune learning rate for them.
    recipes={
        "paper": THRESHOLDS,
        "quick": QUICK_THRESHOLDS,
        "demo": QUICK_THRESHOLDS,
    },
    paper_recipe=(
        "The authors' code gives one epoch, the frozen backbone, SGD without momentum, the batch, the learning rates "
        "and the label smoothing. Our own decisions are the constant learning rate and no limit on gradients."
    ),
    callbacks=lambda model: [ClampThresholds(model)],
    key_settings=("target",),
    shown_settings=("merge", "prune", "max_tokens"),
    learned_numbers=learned_numbers,
)
