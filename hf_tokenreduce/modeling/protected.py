# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Protected merging: important tokens stay, of the others the similar ones merge and the least important ones go.

B images · N patch tokens · D features
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .attention import AttentionView
from .checks import check_flag, is_number
from .configuration_base import KeepRateConfig
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import into_most_similar, map_into, sizes_of
from .multiply_adds import class_attention_cost, rounded_half_up, rounded_up_share
from .tokens import TokenMap, TokenState, apply_map


class Split(NamedTuple):
    """What becomes of the patch tokens of a layer, in falling importance: the first are protected, the last dropped,
    and of those between every second is a source, of which some merge."""

    protected: int
    sources: int
    merged: int
    dropped: int


@dataclass(frozen=True)
class ProtectedConfig(KeepRateConfig):
    """Protected merging, our own method. Important tokens stay as they are; of the others, similar ones merge and the
    least important are dropped. Needs no training.

    keep_rate: share of the patch tokens present that each of `layers` hands on, rounded up; one number, or a list
        with one number per entry of `layers`.
    layers: 0-based layers that reduce, between their attention and their MLP.
    protect_share: the share of the tokens present that can only receive others: the most important ones.
    drop_share: the share of the removed tokens that are dropped: the least important ones. More are
        dropped if not enough can merge.
    prop_attn: a token that stands for s patches counts s times as a key.
    """

    method: ClassVar[str | None] = "protected"

    layers: tuple[int, ...] = (3, 5, 7, 9)
    protect_share: float = 0.25
    drop_share: float = 0.2
    prop_attn: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("protect_share", "drop_share"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"ProtectedConfig: {name} must lie between 0 and 1, got {value!r}.")
            self._set(**{name: float(value)})
        check_flag("ProtectedConfig", "prop_attn", self.prop_attn)

    def split(self, count: int, leaving: int) -> Split:
        """How `count` patch tokens become `leaving`."""
        removed, protected = count - leaving, int(self.protect_share * count)
        # A source more needs two movable tokens: of fewer than 2 * merged + dropped the rest has to be dropped.
        dropped = min(removed, max(rounded_half_up(self.drop_share * removed), 2 * removed - (count - protected)))
        sources = (count - protected - dropped) // 2 if dropped < removed else 0
        return Split(protected, sources, removed - dropped, dropped)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        leaving = self.leaving(layer, count, facts)
        if leaving == count:
            return 0
        split = self.split(count, leaving)
        receivers = count - split.dropped - split.sources
        return class_attention_cost(count, facts) + split.sources * receivers * facts.hidden_size


@torch.no_grad()
def merge_unprotected(importance: Tensor, features: Tensor, size: Tensor | None, split: Split) -> TokenMap:
    """Drop the least important tokens, and let the sources that are most like another token go into it.

    importance: (B, N) float32; features: (B, N, D), compared by cosine in float32; size: (B, N), None for ones

    Sources are every second of the tokens that are neither protected nor dropped, in their natural order; all tokens
    that are neither sources nor dropped receive. Means are weighted by size. Output order: that of the tokens which
    the others go into.
    """
    count = importance.shape[1]
    best_first = importance.argsort(dim=1, descending=True, stable=True)
    last = count - split.dropped
    receiver = torch.arange(count, device=importance.device).repeat(importance.shape[0], 1)
    if split.merged:
        movable = best_first[:, split.protected : last].sort(dim=1).values
        sources, others = movable[:, 1::2], movable[:, ::2]
        receivers = torch.cat([best_first[:, : split.protected], others], dim=1).sort(dim=1).values
        receiver, _ = into_most_similar(features.float(), sources, receivers, split.merged)
    if split.dropped:
        receiver = receiver.scatter(1, best_first[:, last:], -1)
    leaving = count - split.dropped - split.merged
    sizes = sizes_of(size, importance)
    return map_into(receiver, leaving, sizes, mass_is_size=True, keeps_all=split.dropped == 0)


class ProtectedReducer(Reducer):
    """Merges and drops tokens that are not protected, after attention. No parameters."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.keep_rate = facts.reduction.schedule().get(layer, 1.0)
        self.prop_attn = facts.reduction.prop_attn

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        count, prefix = state.num_patch_tokens, state.num_prefix_tokens
        leaving = rounded_up_share(self.keep_rate, count)
        if leaving == count:
            return state
        importance = (view.class_attention() * view.value_norms()).detach().sum(dim=1)[:, prefix:]
        features = state.hidden_states[:, prefix:].detach()
        return apply_map(
            state, merge_unprotected(importance, features, state.size, self.built_for.split(count, leaving))
        )
