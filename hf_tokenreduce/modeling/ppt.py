# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Pruning or merging, decided for each image by how much its scores vary: PPT.

B images · N patch tokens · d features of a key
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .ats import significance
from .attention import AttentionView
from .checks import check_layers_fit, checked_layers, is_number
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import sizes_of
from .multiply_adds import class_attention_cost
from .tokens import TokenMap, TokenState, apply_map, ranks, sum_by_target
from .tome import ToMeConfig, match_most_similar


@dataclass(frozen=True)
class PPTConfig(ToMeConfig):
    """Pruning or pooling, after "PPT: Token Pruning and Pooling for Efficient Vision Transformers". An image whose
    scores vary little merges similar tokens, another one drops those of the lowest score; both remove as many. Needs
    no training.

    r: patch tokens removed by each of `layers` (at most half of those present), or a list with one integer per layer
        of the model, which then says the layers too.
    layers: 0-based layers that remove tokens. If r is a list, they are those whose number is above 0.
    threshold: images whose scores, which sum to 1, have a variance below it merge.
    """

    method: ClassVar[str | None] = "ppt"

    r: int | Sequence[int] | tuple[int, float] = 50
    layers: Sequence[int] = (3, 6, 9)
    threshold: float = 7e-5

    def __post_init__(self):
        super().__post_init__()
        layers = self.layers if isinstance(self.r, int) else [layer for layer, r in enumerate(self.r) if r]
        if not is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ValueError(f"PPTConfig: threshold is a variance, between 0 and 1, got {self.threshold!r}.")
        self._set(layers=checked_layers("PPTConfig", layers), threshold=float(self.threshold))

    def schedule(self, num_layers: int) -> list[int]:
        return [r if layer in self.layers else 0 for layer, r in enumerate(super().schedule(num_layers))]

    def check_fit(self, facts: EncoderFacts) -> None:
        super().check_fit(facts)
        check_layers_fit("PPTConfig", self.layers, facts.num_hidden_layers)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        merging = super().own_multiply_adds(layer, count, facts)
        return merging + class_attention_cost(count, facts) if merging else 0


@torch.no_grad()
def prune_or_merge(
    scores: Tensor, keys: Tensor, size: Tensor | None, r: int, threshold: float, num_prefix_tokens: int
) -> TokenMap:
    """Remove r patch tokens of every image, by merging where its scores vary little, else by dropping.

    scores: (B, N) float32; keys: (B, N, d) float32; size: (B, N), None for ones

    Scores are taken as shares of their sum. Output order: by merging that of `match_most_similar`, by dropping that of
    the tokens which stay.
    """
    tiny = torch.finfo(torch.float32).tiny
    shares = scores / scores.sum(dim=1, keepdim=True).clamp(min=tiny)
    merges = (shares.var(dim=1) < threshold)[:, None]
    merged = match_most_similar(keys, size, r, num_prefix_tokens)
    leaving = merged.num_tokens
    assert isinstance(leaving, int) and merged.target is not None and merged.weight is not None
    assert merged.size is not None
    stays = ranks(shares) < leaving
    pruned = torch.where(stays, stays.cumsum(dim=1) - 1, -1)
    sizes = sum_by_target(sizes_of(size, keys), pruned, leaving)
    return TokenMap(
        torch.where(merges, merged.target, pruned),
        leaving,
        torch.where(merges, merged.weight, 1.0),
        torch.where(merges, merged.size, sizes),
    )


class PPTReducer(Reducer):
    """Prunes or merges tokens after attention, the same number of every image."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        reduction = facts.reduction
        self.r = reduction.schedule(facts.num_hidden_layers)[layer]
        self.prop_attn = reduction.prop_attn
        self.threshold = reduction.threshold

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        prefix = state.num_prefix_tokens
        if min(self.r, state.num_patch_tokens // 2) == 0:
            return state
        attention, norms = view.class_attention().detach(), view.value_norms().detach()
        scores = significance(attention[:, :, prefix:], norms[:, :, prefix:], "joint")
        token_map = prune_or_merge(scores, view.patch_keys(), state.size, self.r, self.threshold, prefix)
        return apply_map(state, token_map)
