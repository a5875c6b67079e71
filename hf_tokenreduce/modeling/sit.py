# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""SiT: slimming to fewer tokens, each of which is a learned mixture of all.

B images · N patch tokens · K slim ones · D features
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
    """Replace the patch tokens by fewer mixtures of them, which a small network learns (SiT).

    After "Self-slimmed Vision Transformer". It needs training; `calibrate` gives the networks a start.

    Args:
        keep_rate: The i-th of `layers` leaves the product of the first i rates times the number of patches of an
            image of the model's own size, rounded down, but at least 1. One number, or a list with one number per
            entry of `layers`.
        layers: 0-based indices of the layers after which tokens are slimmed, in ascending order.
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
                "attention of this encoder (DINOv3, BEiT) needs the place of every token. Use a method that "
                "keeps, merges or samples tokens: ToMe, EViT, Top-K, BAT, ATS, LTMP or DL-ViT."
            )
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"SiTConfig: layers must be in ascending order, got {list(self.layers)}.")

    def slim_tokens(self, facts: EncoderFacts) -> dict[int, int]:
        """Return the number of patch tokens that leave each layer that slims."""
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
            "SiT's networks are random, so the model is of no use yet. Fit them to images by "
            "hf_tokenreduce.calibrate(model, images), or train them."
        )

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        slim, width = self.slim_tokens(facts).get(layer, 0), facts.hidden_size
        return count * (width // 2 * (width + slim) + slim * width) if slim else 0


class SiTReducer(Reducer):
    """Mix the patch tokens into fewer ones, after a layer. A small network gives each token a logit for each slim
    token, a learned `scale` sharpens the logits, and a softmax over the tokens turns them into weights.
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

    def init_weights(self, attention: Any) -> None:
        if self.num_slim is not None:
            init.ones_(self.scale)

    def logits(self, patches: Tensor) -> Tensor:
        """Return how much each token belongs to each slim token: (B, N, D) -> (B, N, K) float32."""
        return self.fc2(F.gelu(self.fc1(self.norm(patches)))).float() * self.scale.float()

    def weights(self, patches: Tensor) -> Tensor:
        """Return the weight of each token in each slim token, (B, N, D) -> (B, N, K) float32. They sum to 1 over N."""
        return self.logits(patches).softmax(dim=1)

    def after_layer(self, state: TokenState) -> TokenState:
        if self.num_slim is None:
            return state
        patches = state.hidden_states[:, state.num_prefix_tokens :]
        if patches.shape[1] < self.num_slim:
            raise ValueError(
                f"{patches.shape[1]} patch tokens cannot be slimmed to {self.num_slim}. The images are smaller than "
                "those the model was reduced for. Give it larger images."
            )
        return mix(state, self.weights(patches))
