# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""DiffRate: pruning and merging in one step, with a number of tokens for each in every layer.

B images · N patch tokens · D features
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .attention import AttentionView
from .checks import is_number, is_sequence
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import into_most_similar, map_into
from .multiply_adds import class_attention_cost, rounded_half_up
from .tokens import TokenMap, TokenState, apply_map
from .tome import ToMeConfig


@dataclass(frozen=True)
class DiffRateConfig(ToMeConfig):
    """Drop the tokens of the lowest class attention, and merge the next ones into the others (DiffRate).

    After "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers". Needs no training. The other
    arguments are those of `ToMeConfig`.

    Args:
        r: Number of patch tokens that each layer removes, by dropping and by merging, at most half of those present.
            An integer, a list with one integer per layer, or a tuple `(r, inflect)` as in `ToMeConfig`.
        prune_share: Share of the removed tokens that are dropped; the others merge. One number, or a list with one
            number per layer.
    """

    method: ClassVar[str | None] = "diffrate"

    prune_share: float | Sequence[float] = 0.2

    def __post_init__(self):
        super().__post_init__()
        given: Any = self.prune_share
        shares = tuple(given) if is_sequence(given) else (given,)
        for share in shares:
            if not is_number(share) or not 0 <= share <= 1:
                raise ValueError(f"DiffRateConfig: prune_share must lie between 0 and 1, got {share!r}.")
        shares = tuple(float(share) for share in shares)
        self._set(prune_share=shares if is_sequence(given) else shares[0])

    def check_fit(self, facts: EncoderFacts) -> None:
        super().check_fit(facts)
        if isinstance(self.prune_share, tuple) and len(self.prune_share) != facts.num_hidden_layers:
            raise ValueError(
                f"DiffRateConfig: a list prune_share needs one value per layer, got {len(self.prune_share)} values "
                f"for {facts.num_hidden_layers} layers: {list(self.prune_share)}."
            )

    def split(self, layer: int, count: int, facts: EncoderFacts) -> tuple[int, int]:
        """Return how many patch tokens a layer (drops, merges) if `count` enter it."""
        removed = count - self.leaving(layer, count, facts)
        share: Any = self.prune_share
        dropped = rounded_half_up((share[layer] if isinstance(share, tuple) else share) * removed)
        return dropped, removed - dropped

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        dropped, merged = self.split(layer, count, facts)
        if dropped + merged == 0:
            return 0
        return class_attention_cost(count, facts) + merged * (count - dropped - merged) * facts.hidden_size


@torch.no_grad()
def prune_and_merge(scores: Tensor, features: Tensor, num_dropped: int, num_merged: int) -> TokenMap:
    """Drop the tokens of the lowest scores, and merge each of the next ones into the remaining token most like it.

    scores: (B, N) float32; features: (B, N, D), compared by cosine in float32

    Every output token is the plain mean of the tokens that go into it. The remaining tokens keep their order.
    """
    count = scores.shape[1]
    leaving, last = count - num_dropped - num_merged, count - num_dropped
    best_first = scores.argsort(dim=1, descending=True, stable=True)
    receiver = torch.arange(count, device=scores.device).repeat(scores.shape[0], 1)
    if num_merged:
        sources, receivers = best_first[:, leaving:last], best_first[:, :leaving]
        receiver, _ = into_most_similar(features.float(), sources, receivers, num_merged)
    if num_dropped:
        receiver = receiver.scatter(1, best_first[:, last:], -1)
    return map_into(receiver, leaving, torch.ones_like(scores), keeps_all=num_dropped == 0)


class DiffRateReducer(Reducer):
    """Drop and merge tokens by class attention, after attention."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.prop_attn = facts.reduction.prop_attn

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        count, prefix = state.num_patch_tokens, state.num_prefix_tokens
        num_dropped, num_merged = self.built_for.split(self._layer, count, self._facts)
        if num_dropped + num_merged == 0:
            return state
        scores = view.class_attention().detach().mean(dim=1)[:, prefix:]
        return apply_map(
            state, prune_and_merge(scores, state.hidden_states[:, prefix:].detach(), num_dropped, num_merged)
        )
