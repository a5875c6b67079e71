# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Token merging by several criteria: similarity, informativeness and size. MCTF.

B images · N patch tokens, dealt into A even and R odd ones · d features of a key
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import AttentionView, full_precision
from .checks import is_number
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import best_of, map_into, sizes_of
from .tokens import TokenMap, TokenState, apply_map
from .tome import ToMeConfig


@dataclass(frozen=True)
class MCTFConfig(ToMeConfig):
    """Token merging by several criteria, after "Multi-criteria Token Fusion with One-step-ahead Attention for
    Efficient Vision Transformers". Tokens merge that are similar, receive little attention and stand for few patches.
    Needs no training, gains by it.

    informativeness_weight: exponent of the criterion of attention received. 0 leaves it out.
    size_weight: exponent of the criterion of size. 0 leaves it out.
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
    """Merge r patch tokens: `keys` (B, N, d), attention `received` (B, N), `size` (B, N) or None for ones; float32.

    A pair's weight is its cosine, moved to between 0 and 1, times what each of both is worth: low attention received
    and low size are worth most. The sequence, prefix included, is dealt into two sets by even and odd position. Half
    of r go from the even set into their best match of the odd one; then the other half from the odd set, with what
    they received, into the best of those left over. Means are weighted by attention received times size. Output order:
    that of the tokens which the others go into.
    """
    batch, num_tokens, _ = keys.shape
    r = min(r, num_tokens // 2)
    sizes = sizes_of(size, keys)
    received = received.clamp(min=torch.finfo(torch.float32).tiny)
    worth = _inverse(received).pow(informativeness_weight) * _inverse(sizes).pow(size_weight)
    natural = torch.arange(num_tokens, device=keys.device)
    even, odd = natural[num_prefix_tokens % 2 :: 2], natural[1 - num_prefix_tokens % 2 :: 2]
    directions = F.normalize(keys, dim=-1)
    with full_precision(keys):
        cosines = torch.bmm(directions[:, even], directions[:, odd].transpose(1, 2))
    weights = (cosines + 1) / 2 * worth[:, even, None] * worth[:, None, odd]
    receiver = natural.repeat(batch, 1)
    best, match = best_of(weights, r - r // 2)
    receiver = receiver.scatter(1, even[best], odd[match.gather(1, best)])
    if r > 1:
        gone = torch.zeros_like(match, dtype=torch.bool).scatter(1, best, True)
        best, match = best_of(weights.masked_fill(gone[..., None], -torch.inf).transpose(1, 2), r // 2)
        back = natural.repeat(batch, 1).scatter(1, odd[best], even[match.gather(1, best)])
        receiver = back.gather(1, receiver)
    return map_into(receiver, num_tokens - r, received * sizes, keeps_all=True)


def _inverse(values: Tensor) -> Tensor:
    """(B, N) above 0 -> (B, N), 1 for the lowest of each image."""
    return values.amin(dim=1, keepdim=True) / values


class MCTFReducer(Reducer):
    """Merges tokens by several criteria after attention."""

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
