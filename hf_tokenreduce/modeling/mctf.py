# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""MCTF: token merging by several criteria, which are similarity, attention received and size.

B images · N patch tokens, A even and R odd ones · d features of a key
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .attention import AttentionView
from .checks import is_number
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import best_of, directions_of, map_into, sizes_of
from .tokens import TokenMap, TokenState, apply_map, full_precision
from .tome import ToMeConfig


@dataclass(frozen=True)
class MCTFConfig(ToMeConfig):
    """Merge tokens that are similar, receive little attention and stand for few patches (MCTF).

    After "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers". It needs no
    training, but training improves it. The other arguments are those of `ToMeConfig`.

    Args:
        informativeness_weight: Exponent of the criterion of attention received. 0 leaves this criterion out.
        size_weight: Exponent of the criterion of size. 0 leaves this criterion out.
    """

    method: ClassVar[str | None] = "mctf"

    informativeness_weight: float = 1 / 20
    size_weight: float = 1 / 40

    def __post_init__(self):
        super().__post_init__()
        for name in ("informativeness_weight", "size_weight"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"MCTFConfig: {name} must lie between 0 and 1, got {value!r}.")
            self._set(**{name: float(value)})


@torch.no_grad()
def match_by_criteria(
    keys: Tensor,
    received: Tensor,
    size: Tensor | None,
    r: int,
    informativeness_weight: float,
    size_weight: float,
    num_prefix_tokens: int,
) -> TokenMap:
    """Merge r patch tokens, at most half of N.

    keys: (B, N, d); received: (B, N), attention; size: (B, N), None for ones; all float32

    The weight of a pair is its cosine, scaled to lie between 0 and 1, times the worth of both tokens. Tokens of low
    attention received and low size are worth most. Even and odd positions of the sequence, prefix included, are two
    sets. First, half of r tokens go from the even set into their best match of the odd set. Then the other half goes
    from the odd set, with the tokens merged into them, into the best of the remaining even tokens. Means are weighted
    by attention received times size. The receiving tokens keep their order.
    """
    batch, num_tokens, _ = keys.shape
    r = min(r, num_tokens // 2)
    sizes = sizes_of(size, keys)
    received = received.clamp(min=torch.finfo(torch.float32).tiny)
    worth = _inverse(received).pow(informativeness_weight) * _inverse(sizes).pow(size_weight)
    natural = torch.arange(num_tokens, device=keys.device)
    even, odd = natural[num_prefix_tokens % 2 :: 2], natural[1 - num_prefix_tokens % 2 :: 2]
    directions = directions_of(keys)
    with full_precision(keys):
        cosines = torch.bmm(directions[:, even], directions[:, odd].transpose(1, 2))
    weights = (cosines + 1) / 2 * worth[:, even, None] * worth[:, None, odd]
    receiver = natural.repeat(batch, 1)
    best, match = best_of(weights, r - r // 2)
    receiver = receiver.scatter(1, even[best], odd[match.gather(1, best)])
    if r > 1:
        gone = torch.zeros_like(match, dtype=torch.bool).scatter_(1, best, 1)
        best, match = best_of(weights.masked_fill(gone[..., None], -torch.inf).transpose(1, 2), r // 2)
        back = natural.repeat(batch, 1).scatter(1, odd[best], even[match.gather(1, best)])
        receiver = back.gather(1, receiver)
    return map_into(receiver, num_tokens - r, received * sizes, keeps_all=True)


def _inverse(values: Tensor) -> Tensor:
    """Invert values (B, N) above 0 and scale them, so that the lowest value of each image becomes 1."""
    return values.amin(dim=1, keepdim=True) / values


class MCTFReducer(Reducer):
    """Merge tokens by several criteria, after attention."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        reduction = facts.reduction
        self.r = reduction.schedule(facts.num_hidden_layers)[layer]
        self.prop_attn = reduction.prop_attn
        self.needs_received = self.r > 0
        self.weights = reduction.informativeness_weight, reduction.size_weight

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        prefix = state.num_prefix_tokens
        if min(self.r, state.num_patch_tokens // 2) == 0 or view.received is None:
            return state
        received = view.received[:, prefix:]
        token_map = match_by_criteria(view.patch_keys(), received, state.size, self.r, *self.weights, prefix)
        return apply_map(state, token_map)
