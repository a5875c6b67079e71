# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""PPT: each image is pruned or merged, which depends on how much its scores vary.

B images · N patch tokens · d features of a key
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig

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
    """Drop or merge tokens in each image, as many either way (PPT).

    After "PPT: Token Pruning and Pooling for Efficient Vision Transformers". If the scores of an image vary little,
    its similar tokens merge, else its tokens of the lowest scores are dropped. Needs no training. The other arguments
    are those of `ToMeConfig`.

    Args:
        r: Number of patch tokens that each of `layers` removes, at most half of those present. Or a list with one
            integer per layer of the model, which then replaces `layers`.
        layers: 0-based indices of the layers that remove tokens. If r is a list, the layers whose number is above 0.
        threshold: An image merges if the variance of its scores is below this number. The scores sum to 1.
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

    @classmethod
    def for_budget(
        cls,
        config: PreTrainedConfig | EncoderFacts,
        share: float,
        *,
        layers: Sequence[int] | None = None,
        **settings: Any,
    ) -> "PPTConfig":
        """Do what `ToMeConfig.for_budget` does, by default with the layers of this class."""
        layers = cls.layers if layers is None else layers
        found: Any = super().for_budget(config, share, layers=layers, **settings)
        return found

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
    """Remove r patch tokens of every image: by merging if its scores vary little, else by dropping.

    scores: (B, N) float32; keys: (B, N, d) float32; size: (B, N), None for ones

    Scores are divided by their sum. An image that merges has the output order of `match_most_similar`; in other images
    the remaining tokens keep their order.
    """
    tiny = torch.finfo(torch.float32).tiny
    shares = scores / scores.sum(dim=1, keepdim=True).clamp(min=tiny)
    merges = (shares.var(dim=1) < threshold)[:, None]
    merged = match_most_similar(keys, size, r, num_prefix_tokens)
    leaving = merged.num_tokens
    assert not isinstance(leaving, tuple) and merged.target is not None and merged.weight is not None
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
    """Drop or merge tokens after attention, the same number in every image."""

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
