# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Pruning by class attention: Top-K and EViT.

B images · N patch tokens
"""

import torch
from torch import Tensor

from .attention import AttentionView
from .encoders import EncoderFacts
from .hooks import Reducer
from .multiply_adds import rounded_up_share
from .tokens import TokenMap, TokenState, apply_map, ranks


def keep_best(scores: Tensor, count: int, fuse: bool = False) -> TokenMap:
    """Keep the `count` patch tokens of highest score (B, N), the highest first; equal scores keep their order.

    With `fuse` the others become one more token, the last: their sum, each weighted by its score.
    """
    rank = ranks(scores.detach())
    kept = rank < count
    if not fuse:
        return TokenMap(torch.where(kept, rank, -1), count)
    return TokenMap(rank.clamp(max=count), count + 1, torch.where(kept, 1.0, scores))


class TopKReducer(Reducer):
    """Keeps, after attention, the share of patch tokens that the class token attends to most."""

    fuse = False

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.keep_rate = facts.reduction.schedule().get(layer, 1.0)

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        count = rounded_up_share(self.keep_rate, state.num_patch_tokens)
        if count == state.num_patch_tokens:
            return state
        scores = view.class_attention().mean(dim=1)[:, state.num_prefix_tokens :]
        return apply_map(state, keep_best(scores, count, self.fuse))


class EViTReducer(TopKReducer):
    """Top-K, with the tokens not kept fused into one if the configuration says so."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.fuse = facts.reduction.fuse
