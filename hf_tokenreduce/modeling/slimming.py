# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Slimming: fewer tokens, each a learned mixture of all. SiT.

B images · N patch tokens · K slim ones · D features
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .encoders import EncoderFacts
from .hooks import Reducer
from .tokens import TokenState, mix


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
