# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""EViT: pruning by class attention, where one more token can hold the dropped ones."""

from dataclasses import dataclass
from typing import ClassVar

from .checks import check_flag
from .encoders import EncoderFacts
from .topk import TopKConfig, TopKReducer


@dataclass(frozen=True)
class EViTConfig(TopKConfig):
    """Keep the patch tokens that the class token attends to most, and fuse the others into one token (EViT).

    After "Not All Patches are What You Need". Needs no training. The other arguments are those of `TopKConfig`.

    Args:
        fuse: Whether the tokens that are not kept become one token: their sum weighted by class attention, whose
            weights are not normalised. Later layers treat it as an ordinary patch token. False drops these tokens.
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
    """Top-K, with the other tokens fused into one if the configuration says so."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.fuse = facts.reduction.fuse
