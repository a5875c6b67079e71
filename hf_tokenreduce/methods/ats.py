"""ATS, described."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..convert import reduce_tokens
from ..modeling.ats import ATSConfig
from ..modeling.configuration_base import ReductionConfig
from ..modeling.encoders import EncoderFacts, encoder_of, facts_of
from ..modeling.multiply_adds import check_share
from .fitting import share_on
from .method import Method


def usual_layers(facts: EncoderFacts) -> tuple[int, ...]:
    """All from the fourth of twelve layers on, in proportion; of a shallow model the later half."""
    depth = facts.num_hidden_layers
    return tuple(range(depth // 4 if depth >= 12 else depth // 2, depth))


def untrained(facts: EncoderFacts, shares: Sequence[float]) -> list[ReductionConfig]:
    """It samples from all tokens, from half and from a quarter of them: shares depend on the images."""
    half = math.ceil(facts.num_patches / 2)
    return [ATSConfig(layers=usual_layers(facts), num_tokens=count) for count in (None, half, half // 2)]


@torch.no_grad()
def fit_share(model: PreTrainedModel, pixels: Tensor, share: float, **settings: Any) -> ReductionConfig:
    """Find the largest `num_tokens` with which the images keep at most `share` of the multiply-adds."""
    facts = facts_of(model.config)
    settings = {"layers": usual_layers(facts), **settings}
    check_share(share)

    def kept(count: int | None) -> float:
        return share_on(reduce_tokens(model, ATSConfig(num_tokens=count, **settings)), pixels)

    # Images may be of another size than the model's own.
    low, high = facts.num_prefix_tokens + 1, encoder_of(model).embed(pixels[:1]).shape[1]
    if kept(low) > share:
        raise ValueError(
            f"share={share} cannot be reached: with the smallest num_tokens={low} these images keep {kept(low):.3f} "
            "of the multiply-adds. Give a higher share, or let earlier layers sample."
        )
    if kept(None) <= share:
        return ATSConfig(num_tokens=None, **settings)  # the scores alone keep less
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if kept(middle) <= share else (low, middle)
    return ATSConfig(num_tokens=low, **settings)


ATS = Method(
    ATSConfig,
    title="ATS",
    family="sampling",
    summary=(
        "Inside the attention of some layers tokens are sampled by how much the class token attends to them. Every "
        "image keeps as many as its scores are spread over."
    ),
    paper="Adaptive Token Sampling for Efficient Vision Transformers",
    arxiv="2111.15667",
    details=(
        "In each of `layers`, the attention of the class token times the length of the values scores the patch "
        "tokens. The cumulated scores are sampled at an even grid of points, `num_tokens` less the prefix tokens. "
        'So a few high scores take few tokens, and flat scores take many. `score="joint"` is what the code of its '
        'authors computes, `"per_head"` is the formula of the paper. Sampling happens before attention: only rows '
        "that stay are computed."
    ),
    limits="What it costs depends on the image. A layer that samples always drops its token of the lowest score.",
    ours="the grid counts patch tokens only; a budget other than all; caps",
    is_adaptive=lambda config: True,
    fit_share=fit_share,
    untrained=untrained,
    key_settings=("num_tokens",),
    tuned_settings={"score": ("per_head",)},
)
