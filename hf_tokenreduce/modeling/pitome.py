# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""PiToMe: token merging that protects tokens which are not like others.

B images · N patch tokens · d features of a key
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import AttentionView
from .checks import is_number
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import directions_of, into_most_similar, map_into, sizes_of
from .multiply_adds import products_of_keys, similarity_cost
from .tokens import TokenMap, TokenState, apply_map, full_precision
from .tome import ToMeConfig


@dataclass(frozen=True)
class PiToMeConfig(ToMeConfig):
    """Merge similar tokens of high energy, and protect the tokens of low energy (PiToMe).

    After "Accelerating Transformers with Spectrum-Preserving Token Merging". The energy of a token is high if many
    other tokens are like it. Needs no training. The other arguments are those of `ToMeConfig`.

    Args:
        margin: Similarity above which two tokens count as alike in the first layer. It falls linearly over the layers
            and would reach 0 after the last one.
    """

    method: ClassVar[str | None] = "pitome"

    margin: float = 0.75

    def __post_init__(self):
        super().__post_init__()
        if not is_number(self.margin) or not 0 <= self.margin <= 1:
            raise ValueError(f"PiToMeConfig: margin must lie between 0 and 1, got {self.margin!r}.")
        self._set(margin=float(self.margin))

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        removed = count - self.leaving(layer, count, facts)
        if removed == 0:
            return 0
        matched = 2 * removed if protects(layer, facts) else count
        return products_of_keys(count, count, facts) + similarity_cost(matched, facts)


def protects(layer: int, facts: EncoderFacts) -> bool:
    """Return whether a layer matches only the tokens of highest energy. The layers of the second half do."""
    return 2 * layer >= facts.num_hidden_layers


@torch.no_grad()
def match_by_energy(keys: Tensor, size: Tensor | None, r: int, margin: float, protect: bool) -> TokenMap:
    """Merge r patch tokens that have many tokens like them, at most half of N.

    keys: (B, N, d) float32; size: (B, N), None for ones

    The energy of a token is the mean of ELU(cosine - margin) over all tokens. Sorted by
    falling energy, tokens are sources and receivers in turn. The r sources most like a receiver merge into it. With
    `protect` only the first 2r tokens take part, and all their sources merge. Means are weighted by size. The
    receiving tokens keep their order.
    """
    num_tokens = keys.shape[1]
    r = min(r, num_tokens // 2)
    directions = directions_of(keys)
    with full_precision(keys):
        similarity = torch.bmm(directions, directions.transpose(1, 2))
    order = F.elu(similarity - margin).mean(dim=-1).argsort(dim=1, descending=True, stable=True)
    order = order[:, : 2 * r] if protect else order
    receiver, _ = into_most_similar(keys, order[:, ::2], order[:, 1::2], r)
    return map_into(receiver, num_tokens - r, sizes_of(size, keys), mass_is_size=True, keeps_all=True)


class PiToMeReducer(Reducer):
    """Merge similar tokens of high energy, after attention."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        reduction, depth = facts.reduction, facts.num_hidden_layers
        self.r = reduction.schedule(depth)[layer]
        self.prop_attn = reduction.prop_attn
        self.margin = reduction.margin * (1 - layer / depth)
        self.protect = protects(layer, facts)

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        if min(self.r, state.num_patch_tokens // 2) == 0:
            return state
        token_map = match_by_energy(view.patch_keys(), state.size, self.r, self.margin, self.protect)
        return apply_map(state, token_map)
