# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Sampling: as many tokens as an image's scores are spread over. ATS.

B images · H heads · N patch tokens, padded to the longest image · G points of the sampling grid
"""

import torch
from torch import Tensor

from .attention import AttentionView
from .encoders import EncoderFacts
from .hooks import Reducer
from .tokens import TokenMap, TokenState


def significance(class_attention: Tensor, value_norms: Tensor, score: str) -> Tensor:
    """Score of each patch token, (B, H, N) twice -> (B, N): class attention times the length of the value.

    "joint": attention summed over heads times the length of all heads' values concatenated. "per_head": the product
    in each head, normalised there, and summed. Padding has attention 0 and so score 0.
    """
    tiny = torch.finfo(torch.float32).tiny
    if score == "per_head":
        products = class_attention * value_norms
        return (products / products.sum(dim=-1, keepdim=True).clamp(min=tiny)).sum(dim=1)
    return class_attention.sum(dim=1) * value_norms.pow(2).sum(dim=1).sqrt()


@torch.no_grad()
def sample_inverse(scores: Tensor, valid: Tensor | None, num_points: int, max_kept: int | None = None) -> TokenMap:
    """Sample patch tokens by the inverse of their scores' distribution: (B, N), G = num_points.

    The scores of an image, ascending, are summed up and stretched to run from 0 to 1. G points, evenly from the
    smallest sum above 0 to 1, each pick the token whose sum is nearest (of equals the first); a token picked twice
    is kept once. Kept tokens come in ascending order of score. Of more than `max_kept`, those of highest score stay.
    """
    num_tokens = scores.shape[1]
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    scores = scores.nan_to_num(nan=0.0, posinf=torch.finfo(torch.float32).max / 1e6)
    order = scores.masked_fill(~valid, torch.inf).argsort(dim=1, stable=True)  # padding last
    counts = valid.sum(dim=1, keepdim=True)
    real = _places(scores) < counts
    tiny = torch.finfo(torch.float32).tiny
    scores = scores / scores.masked_fill(~valid, 0.0).sum(dim=1, keepdim=True).clamp(min=tiny)
    sums = scores.gather(1, order).masked_fill(~real, 0.0).cumsum(dim=1)
    sums = sums.cummax(dim=1).values  # summed in parallel, one may be a rounding below the one before
    lowest = sums[:, :1]
    sums = (sums - lowest) / (sums.gather(1, (counts - 1).clamp(min=0)) - lowest).clamp(min=tiny)
    sums = sums.masked_fill(~real, torch.inf)

    first = sums.masked_fill(sums <= 0, torch.inf).amin(dim=1, keepdim=True).clamp(max=1.0)
    points = torch.arange(num_points, device=scores.device) / max(num_points - 1, 1)
    points = first + (1 - first) * points  # (B, G)
    above = torch.searchsorted(sums, points).clamp(max=num_tokens - 1)
    upper = sums.gather(1, above)
    lower = sums.gather(1, (above - 1).clamp(min=0))
    picked = torch.searchsorted(sums, torch.where(points - lower <= upper - points, lower, upper))
    kept = torch.zeros_like(real).scatter(1, picked.clamp(max=num_tokens - 1), True) & real
    if max_kept is not None:
        kept &= kept.flip(1).cumsum(dim=1).flip(1) <= max_kept
    place = torch.where(kept, kept.cumsum(dim=1) - 1, -1)
    target = torch.empty_like(order).scatter(1, order, place)
    return TokenMap(target, tuple(kept.sum(dim=1).tolist()))


class ATSReducer(Reducer):
    """Samples tokens between softmax and values: only the sampled tokens' queries are computed. No parameters."""

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


def _places(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).expand_as(like)
