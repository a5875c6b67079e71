"""The description of ATS."""

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
    """Return the layers from the fourth of twelve on, in proportion, or the second half of a shallow model."""
    depth = facts.num_hidden_layers
    return tuple(range(depth // 4 if depth >= 12 else depth // 2, depth))


def untrained(facts: EncoderFacts, shares: Sequence[float]) -> list[ReductionConfig]:
    """Return grids of all tokens, of half and of a quarter of them, because shares depend on the images."""
    half = math.ceil(facts.num_patches / 2)
    return [ATSConfig(layers=usual_layers(facts), num_tokens=count) for count in (None, half, half // 2)]


@torch.no_grad()
def fit_share(model: PreTrainedModel, pixels: Tensor, share: float, **settings: Any) -> ReductionConfig:
    """Return the setting with the largest `num_tokens` that keeps at most `share` of the multiply-adds on the images.

    Args:
        model: A model that reduces nothing.
        pixels: Pixel values of the images, (B, C, H, W).
        share: Share of the multiply-adds to keep, above 0 and at most 1.
        **settings: Values of the other fields of `ATSConfig`.
    """
    facts = facts_of(model.config)
    settings = {"layers": usual_layers(facts), **settings}
    check_share(share)

    def kept(count: int | None) -> float:
        return share_on(reduce_tokens(model, ATSConfig(num_tokens=count, **settings)), pixels)

    # Images may be of another size than the model's own.
    encoder = encoder_of(model)
    low = facts.num_prefix_tokens + 1
    high = encoder.embed(pixels[:1], **encoder.size_arguments(pixels)).shape[1]
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
        "Inside the attention of some layers, patch tokens are sampled by how much the class token attends to them. "
        "Images with flat scores keep many tokens, and images with a few high scores keep few."
    ),
    paper="Adaptive Token Sampling for Efficient Vision Transformers",
    arxiv="2111.15667",
    details=(
        "In each of `layers`, the score of a patch token is the attention of the class token to it times the length "
        "of its value. The scores are summed up from low to high. An even grid of points samples these sums; it has "
        "`num_tokens` points less the prefix tokens. So an image with a few high scores keeps few tokens, and one "
        'with flat scores keeps many. `score="joint"` is what the code of the authors computes, `"per_head"` is the '
        "formula of the paper. Tokens are sampled before attention, so only the rows of sampled tokens are computed."
    ),
    limits="The cost depends on the image. A layer that samples always drops its token of the lowest score.",
    ours="the grid counts patch tokens only; `num_tokens` can be less than all tokens; `max_tokens`",
    is_adaptive=lambda config: True,
    fit_share=fit_share,
    untrained=untrained,
    key_settings=("num_tokens",),
    tuned_settings={"score": ("per_head",)},
)
