# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Protected merging: important tokens stay, similar ones of the others merge, the least important ones are dropped.

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
    """How many patch tokens of a layer are protected, sources, merged and dropped.

    By falling importance, the first tokens are protected and the last ones dropped. Every second token between them is
    a source, and some of the sources merge.
    """

    protected: int
    sources: int
    merged: int
    dropped: int


@dataclass(frozen=True)
class ProtectedConfig(KeepRateConfig):
    """Protect important tokens, merge similar ones of the others, and drop the least important ones.

    This is our own method. Needs no training.

    Args:
        keep_rate: Share of the patch tokens present that leave each of `layers`, rounded up. One number, or a list
            with one number per entry of `layers`.
        layers: 0-based indices of the layers that reduce, between their attention and their MLP.
        protect_share: Share of the tokens present that can only receive others: the most important ones.
        drop_share: Share of the removed tokens that are dropped: the least important ones. More are dropped if not
            enough tokens can merge.
        prop_attn: Whether a token that stands for s patches counts s times as a key.
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
        """Split `count` patch tokens so that `leaving` of them leave the layer."""
        removed, protected = count - leaving, int(self.protect_share * count)
        # Each merge needs two unprotected tokens. If there are fewer than 2 * merged + dropped, more are dropped.
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
    """Drop the least important tokens, and merge the sources that are most like another token into it.

    importance: (B, N) float32; features: (B, N, D), compared by cosine in float32; size: (B, N), None for ones

    Every second token that is neither protected nor dropped is a source, in the order of the image. All tokens that
    are neither sources nor dropped can receive. Means are weighted by size. The receiving tokens keep their order.
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
    """Merge and drop tokens that are not protected, after attention. No parameters."""

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
