# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Pruning by class attention, with what is dropped gathered in one token: EViT."""

from dataclasses import dataclass
from typing import ClassVar

from .checks import check_flag
from .encoders import EncoderFacts
from .topk import TopKConfig, TopKReducer


@dataclass(frozen=True)
class EViTConfig(TopKConfig):
    """Top-K that can gather what it drops, after "Not All Patches are What You Need". Needs no training.

    fuse: the tokens not kept become one token, their sum weighted by class attention (weights not normalised). It
        counts as an ordinary patch token afterwards.
    """

    method: ClassVar[str | None] = "evit"

    fuse: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_flag("EViTConfig", "fuse", self.fuse)

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        kept = super().leaving(layer, count, facts)
        return kept + (self.fuse and kept < count)


class EViTReducer(TopKReducer):
    """Top-K, with the tokens not kept fused into one if the configuration says so."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.fuse = facts.reduction.fuse
