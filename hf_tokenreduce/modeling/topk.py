# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Top-K: pruning by class attention.

B images · N patch tokens
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .attention import AttentionView
from .configuration_base import KeepRateConfig
from .encoders import EncoderFacts
from .hooks import Reducer
from .multiply_adds import class_attention_cost, rounded_up_share
from .tokens import TokenMap, TokenState, apply_map, ranks


@dataclass(frozen=True)
class TopKConfig(KeepRateConfig):
    """Keep the patch tokens that the class token attends to most, and drop the others. Needs no training.

    Args:
        keep_rate: Share of the patch tokens present that each of `layers` keeps, rounded up. One number, or a list
            with one number per entry of `layers`.
        layers: 0-based indices of the layers that drop tokens, between their attention and their MLP.
    """

    method: ClassVar[str | None] = "topk"

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        kept = rounded_up_share(self.schedule().get(layer, 1.0), count)
        return class_attention_cost(count, facts) if kept < count else 0


def keep_best(scores: Tensor, count: int, fuse: bool = False) -> TokenMap:
    """Keep the `count` patch tokens of the highest scores (B, N), the highest first. Equal scores keep their order.

    With `fuse` the others become one more token, the last one: their sum, each weighted by its score.
    """
    rank = ranks(scores.detach())
    kept = rank < count
    if not fuse:
        return TokenMap(torch.where(kept, rank, -1), count)
    return TokenMap(rank.clamp(max=count), count + 1, torch.where(kept, 1.0, scores), keeps_all=True)


class TopKReducer(Reducer):
    """Keep, after attention, the share of the patch tokens that the class token attends to most."""

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
