# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""ATS: sampling by class attention. Images with flat scores keep many tokens, images with a few high scores few.

B images · H heads · N patch tokens, padded to the longest image · G points of the sampling grid
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .attention import AttentionView
from .checks import check_caps_fit, check_layers_fit, check_size, checked_caps, checked_layers
from .configuration_base import ReductionConfig
from .encoders import EncoderFacts
from .hooks import Reducer
from .multiply_adds import class_attention_cost
from .packed import as_numbers
from .tokens import TokenMap, TokenState


@dataclass(frozen=True)
class ATSConfig(ReductionConfig):
    """Sample tokens by class attention, a number for each image that its scores decide (ATS).

    After "Adaptive Token Sampling for Efficient Vision Transformers". An image with flat scores keeps many tokens, an
    image with a few high scores keeps few. ATS has no parameters and works without training.

    Args:
        layers: 0-based indices of the layers that sample, inside their attention.
        num_tokens: Number of points of the sampling grid, prefix tokens included. A layer cannot keep more tokens.
            None: the number of tokens that enter the model, so that only the scores decide.
        score: "joint", as the authors' code computes it: attention summed over the heads, times the length of the
            whole value vector. Or "per_head", the formula of the paper: the product in each head, normalised, then
            summed over the heads.
        max_tokens: Upper limit of the tokens that leave each of `layers`, prefix tokens included, whatever the image
            shows. The tokens of the highest scores stay. One number, or a list with one number per entry of `layers`.
            None: no limit.
    """

    method: ClassVar[str | None] = "ats"
    hook: ClassVar[str] = "select_queries"

    layers: Sequence[int] = tuple(range(3, 12))
    num_tokens: int | None = None
    score: str = "joint"
    max_tokens: int | Sequence[int] | None = None

    def __post_init__(self):
        layers = checked_layers("ATSConfig", self.layers)
        if self.num_tokens is not None:
            check_size("ATSConfig", "num_tokens", self.num_tokens)
        if self.score not in ("joint", "per_head"):
            raise ValueError(f"ATSConfig: score must be 'joint' or 'per_head', got {self.score!r}.")
        self._set(
            layers=layers,
            num_tokens=None if self.num_tokens is None else int(self.num_tokens),
            max_tokens=checked_caps("ATSConfig", self.max_tokens, len(layers), "entry of layers"),
        )

    def cap(self, layer: int) -> int | None:
        """Return `max_tokens` of a layer."""
        caps: Any = self.max_tokens
        return dict(zip(self.layers, caps, strict=True)).get(layer) if isinstance(caps, tuple) else caps

    def check_fit(self, facts: EncoderFacts) -> None:
        check_layers_fit("ATSConfig", self.layers, facts.num_hidden_layers)
        check_caps_fit("ATSConfig", "max_tokens", self.max_tokens, facts)
        check_caps_fit("ATSConfig", "num_tokens", self.num_tokens, facts)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return class_attention_cost(count, facts) if layer in self.layers and count else 0


def significance(class_attention: Tensor, value_norms: Tensor, score: str) -> Tensor:
    """Score each patch token by class attention times the length of its value: (B, H, N) twice -> (B, N).

    "joint": attention summed over the heads, times the length of the concatenated values of all heads. "per_head":
    the product in each head, normalised there, then summed. Padding has attention 0, so its score is 0.
    """
    tiny = torch.finfo(torch.float32).tiny
    if score == "per_head":
        products = class_attention * value_norms
        return (products / products.sum(dim=-1, keepdim=True).clamp(min=tiny)).sum(dim=1)
    return class_attention.sum(dim=1) * value_norms.pow(2).sum(dim=1).sqrt()


@torch.no_grad()
def sample_inverse(scores: Tensor, valid: Tensor | None, num_points: int, max_kept: int | None = None) -> TokenMap:
    """Sample patch tokens by the inverse of the distribution of their scores (B, N), with G = num_points.

    The scores of an image are sorted from low to high and summed up; the sums are scaled to run from 0 to 1. G points
    lie evenly between the smallest sum above 0 and 1; a single one lies at 1. Each picks the token whose sum is
    nearest, the first of equally near ones. A token that is picked twice is kept once. Kept tokens come in ascending
    order of score. If more than `max_kept` are picked, those of the highest scores stay.
    """
    num_tokens, tiny = scores.shape[1], torch.finfo(torch.float32).tiny
    scores = scores.nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max / 1e6)
    if valid is None:
        order = scores.argsort(dim=1, stable=True)
        shares = (scores / scores.sum(dim=1, keepdim=True).clamp(min=tiny)).gather(1, order)
    else:  # padding is sorted to the end and takes no part
        order = scores.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True)
        counts = valid.sum(dim=1, keepdim=True)
        real = _all_places(scores) < counts
        total = scores.masked_fill(~valid, 0.0).sum(dim=1, keepdim=True)
        shares = (scores / total.clamp(min=tiny)).gather(1, order).masked_fill(~real, 0.0)
    sums = shares.cumsum(dim=1).cummax(dim=1).values  # a parallel sum may round one below the one before
    lowest, highest = sums[:, :1], sums[:, -1:]
    if valid is not None:
        highest = sums.gather(1, (counts - 1).clamp(min=0))
    sums = (sums - lowest) / (highest - lowest).clamp(min=tiny)
    if valid is not None:
        sums = sums.masked_fill(~real, torch.inf)

    first = sums.masked_fill(sums <= 0, torch.inf).amin(dim=1, keepdim=True).clamp(max=1.0)
    points = torch.arange(num_points, device=scores.device) / max(num_points - 1, 1)
    points = points if num_points > 1 else torch.ones_like(points)  # a single point takes the highest score
    points = first + (1 - first) * points  # (B, G)
    above = torch.searchsorted(sums, points).clamp(max=num_tokens - 1)
    upper = sums.gather(1, above)
    lower = sums.gather(1, (above - 1).clamp(min=0))
    picked = torch.searchsorted(sums, torch.where(points - lower <= upper - points, lower, upper))
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(1, picked.clamp(max=num_tokens - 1), 1)
    if valid is not None:
        kept &= real
    if max_kept is not None:
        kept &= kept.flip(1).cumsum(dim=1).flip(1) <= max_kept
    place = torch.where(kept, kept.cumsum(dim=1) - 1, -1)
    target = torch.empty_like(order).scatter_(1, order, place)
    return TokenMap(target, as_numbers(kept.sum(dim=1), num_tokens))


class ATSReducer(Reducer):
    """Sample tokens before attention, so that only the queries of sampled tokens are computed. No parameters."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        reduction = facts.reduction
        self.active = layer in reduction.layers
        self.num_tokens = reduction.num_tokens
        self.score = reduction.score
        self.max_tokens = reduction.cap(layer)

    def select_queries(self, view: AttentionView, state: TokenState) -> TokenMap | None:
        if not self.active or state.num_patch_tokens == 0:
            return None
        prefix = state.num_prefix_tokens
        class_attention = view.class_attention().detach()[:, :, prefix:]
        scores = significance(class_attention, view.value_norms().detach()[:, :, prefix:], self.score)
        budget = state.num_patches if self.num_tokens is None else self.num_tokens - prefix
        max_kept = None if self.max_tokens is None else self.max_tokens - prefix
        return sample_inverse(scores, state.valid(), budget, max_kept)


def _all_places(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)
