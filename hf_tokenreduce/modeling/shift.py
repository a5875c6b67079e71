# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Representation shift: pruning by how far the MLP moves a token."""

from dataclasses import dataclass
from typing import ClassVar

from .configuration_base import KeepRateConfig
from .encoders import EncoderFacts
from .hooks import Reducer
from .multiply_adds import rounded_up_share
from .tokens import TokenState, apply_map
from .topk import keep_best


@dataclass(frozen=True)
class ShiftConfig(KeepRateConfig):
    """Keep the patch tokens that a layer's MLP moves furthest, and drop the others.

    After "Representation Shift: Unifying Token Compression with FlashAttention". It reads neither a class token nor an
    attention map. Needs no training.

    Args:
        keep_rate: Share of the patch tokens present that each of `layers` keeps, rounded up. One number, or a list
            with one number per entry of `layers`.
        layers: 0-based indices of the layers that drop tokens, after their MLP.
    """

    method: ClassVar[str | None] = "shift"
    hook: ClassVar[str] = "after_layer"


class ShiftReducer(Reducer):
    """Keep, after the layer, the share of the patch tokens that its MLP moved furthest."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.keep_rate = facts.reduction.schedule().get(layer, 1.0)
        self.needs_shift = self.keep_rate < 1

    def after_layer(self, state: TokenState) -> TokenState:
        count = rounded_up_share(self.keep_rate, state.num_patch_tokens)
        if count == state.num_patch_tokens or state.shift is None:
            return state
        return apply_map(state, keep_best(state.shift, count))
