# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Merging: similar tokens become one. ToMe.

B images · N patch tokens · d features of a key
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .attention import AttentionView, full_precision
from .hooks import Reducer
from .tokens import TokenMap, TokenState, apply_map, merge


@torch.no_grad()
def match_most_similar(keys: Tensor, size: Tensor | None, r: int, num_prefix_tokens: int) -> TokenMap:
    """Merge the r patch tokens that are most like another: `keys` (B, N, d) float32, `size` (B, N) or None for ones.

    The sequence, prefix included, is dealt into two sets by even and odd position. Each token of the even set has
    one best match in the odd set, by cosine; the r best pairs merge into their size-weighted mean, r being at most
    half of N. Output order: the even tokens left over, then the odd ones.
    """
    batch, num_tokens, _ = keys.shape
    r = min(r, num_tokens // 2)
    even = slice(num_prefix_tokens % 2, None, 2)
    odd = slice(1 - num_prefix_tokens % 2, None, 2)
    keys = F.normalize(keys, dim=-1)
    with full_precision(keys):
        similarity, match = (keys[:, even] @ keys[:, odd].transpose(1, 2)).max(dim=-1)  # (B, N even)
    best = similarity.argsort(dim=-1, descending=True, stable=True)[:, :r]
    merged = torch.zeros_like(match, dtype=torch.bool).scatter(1, best, True)
    num_left = match.shape[1] - r
    target = torch.empty(batch, num_tokens, dtype=torch.long, device=keys.device)
    target[:, even] = torch.where(merged, num_left + match, (~merged).cumsum(dim=1) - 1)
    target[:, odd] = torch.arange(num_left, num_tokens - r, device=keys.device)
    mass = torch.ones(target.shape, dtype=torch.float32, device=keys.device) if size is None else size
    return merge(target, num_tokens - r, mass)


class ToMeReducer(Reducer):
    """Merges similar tokens after attention."""

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__(config, layer)
        self.r = config.reduction.schedule(config.num_hidden_layers)[layer]
        self.prop_attn = config.reduction.prop_attn

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        if min(self.r, state.num_patch_tokens // 2) == 0:
            return state
        token_map = match_most_similar(view.patch_keys(), state.size, self.r, state.num_prefix_tokens)
        return apply_map(state, token_map)
