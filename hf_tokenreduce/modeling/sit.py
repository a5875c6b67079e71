# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Slimming: fewer tokens, each a learned mixture of all. SiT.

B images · N patch tokens · K slim ones · D features
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_base import KeepRateConfig
from .encoders import EncoderFacts, facts_of
from .hooks import Reducer
from .tokens import (
    TokenState,
    mix,
)


@dataclass(frozen=True)
class SiTConfig(KeepRateConfig):
    """Self-slimming, after "Self-slimmed Vision Transformer". After each of `layers` a small network weighs the patch
    tokens into fewer ones, softly. It needs training; `calibrate` gives it a start.

    keep_rate: what the i-th of `layers` hands on is the product of the first i rates times the patches of an image of
        the model's own size, rounded down, at least 1. One number, or a list with one number per entry of `layers`.
    layers: 0-based layers after which tokens are slimmed, ascending.
    """

    method: ClassVar[str | None] = "sit"
    hook: ClassVar[str] = "after_layer"

    keep_rate: float | Sequence[float] = 0.5
    layers: Sequence[int] = (5, 8, 9)

    def check_fit(self, facts: EncoderFacts) -> None:
        super().check_fit(facts)
        if facts_of(facts).has_places and self.layers:
            raise ValueError(
                "SiTConfig: SiT makes tokens that are mixtures of many patches and so have no place, but the "
                "attention of this encoder (DINOv3, BEiT) asks for the place of every token. Use a method that "
                "keeps, merges or samples tokens: ToMe, EViT, Top-K, BAT, ATS, LTMP or DL-ViT."
            )
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"SiTConfig: layers must ascend: each slims what the last one left. Got {self.layers}.")

    def slim_tokens(self, facts: EncoderFacts) -> dict[int, int]:
        """The patch tokens that leave each of the layers that slim."""
        num_patches = facts_of(facts).num_patches
        share, present, tokens = 1.0, num_patches, {}
        for layer, rate in self.schedule().items():
            share *= rate
            slim = max(1, int(share * num_patches + 1e-5))
            if slim < present:
                tokens[layer] = present = slim
        return tokens

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return self.slim_tokens(facts).get(layer, count)

    def untrained(self) -> str | None:
        return (
            "SiT's networks are random, so the model is of no use yet. Fit them to images, "
            "hf_tokenreduce.calibrate(model, images), or train them."
        )

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        slim, width = self.slim_tokens(facts).get(layer, 0), facts.hidden_size
        return count * (width // 2 * (width + slim) + slim * width) if slim else 0


class SiTReducer(Reducer):
    """Mixes the patch tokens into fewer after a layer. A small network gives each token a logit for each slim token;
    a softmax over the tokens, sharpened by a learned `scale`, makes them weights.
    """

    scale: nn.Parameter

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.num_slim = facts.reduction.slim_tokens(facts).get(layer)
        if self.num_slim is not None:
            width = facts.hidden_size
            self.norm = nn.LayerNorm(width, eps=1e-5)
            self.fc1 = nn.Linear(width, width // 2)
            self.fc2 = nn.Linear(width // 2, self.num_slim)
            self.scale = nn.Parameter(torch.ones(()))

    def init_weights(self) -> None:
        if self.num_slim is not None:
            init.ones_(self.scale)

    def logits(self, patches: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, K) float32: how much each token belongs to each slim token."""
        return self.fc2(F.gelu(self.fc1(self.norm(patches)))).float() * self.scale.float()

    def weights(self, patches: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, K) float32: what each token gives to each slim token, summing to 1 over the tokens."""
        return self.logits(patches).softmax(dim=1)

    def after_layer(self, state: TokenState) -> TokenState:
        if self.num_slim is None:
            return state
        patches = state.hidden_states[:, state.num_prefix_tokens :]
        if patches.shape[1] < self.num_slim:
            raise ValueError(
                f"{patches.shape[1]} patch tokens cannot be slimmed to {self.num_slim}. The images are smaller than "
                "those the model was reduced for; give it larger ones."
            )
        return mix(state, self.weights(patches))
