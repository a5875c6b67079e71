# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Filtering: patches are judged before the first attention. DL-ViT.

B images · N patch tokens · D features
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from .encoders import EncoderFacts
from .hooks import Reducer
from .tokens import TokenMap, TokenState, apply_map, ranks


logger = logging.get_logger(__name__)


@torch.no_grad()
def keep_above(scores: Tensor, threshold: float, max_kept: int | None = None, min_kept: int = 0) -> TokenMap:
    """Keep the tokens whose score (B, N) is above the threshold, at most `max_kept` and at least `min_kept`, the
    highest first. They stay in the order they have; images differ in their number."""
    kept = ~(scores <= threshold)  # NaN stays: a broken image shall give a broken answer
    if min_kept > 0:
        kept |= ranks(scores) < min_kept
    if max_kept is not None:
        kept &= ranks(scores) < max_kept
    return TokenMap(_places(kept), tuple(kept.sum(dim=1).tolist()))


@torch.no_grad()
def keep_highest(scores: Tensor, count: int) -> TokenMap:
    """Keep the `count` tokens of highest score (B, N), the earlier of equals, in the order they have."""
    return TokenMap(_places(ranks(scores) < count), count)


class DLViTReducer(Reducer):
    """Filters the embedded patches, once. The first layer's reducer holds the filter; the others have nothing to do.

    The filter judges a token beside the mean of all patch tokens of its image. It learns from labels, not through
    the model: what is dropped has no gradient.
    """

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.has_filter = layer == 0
        if self.has_filter:
            self.max_kept = None
            if facts.reduction.max_tokens is not None:
                self.max_kept = facts.reduction.max_tokens - facts.num_prefix_tokens
            width, inner = facts.hidden_size, facts.reduction.hidden_size or facts.hidden_size // 2
            self.norm = nn.LayerNorm(2 * width, eps=1e-5)
            self.fc1 = nn.Linear(2 * width, inner)
            self.fc2 = nn.Linear(inner, 1)
            self.requires_grad_(False)
            if not facts.reduction.trained:
                logger.warning_once("DL-ViT's filter is not trained yet, so the model keeps every token.")

    def logits(self, patches: Tensor) -> Tensor:
        """(B, N, D) -> (B, N) float32, the logit of each patch's probability to matter."""
        mean = patches.mean(dim=1, keepdim=True).expand_as(patches)
        return self.fc2(F.gelu(self.fc1(self.norm(torch.cat([patches, mean], dim=-1))))).squeeze(-1).float()

    def before_encoder(self, state: TokenState) -> TokenState:
        setting, count = self.built_for, state.num_patch_tokens
        if not (self.has_filter and setting.trained):
            return state
        if setting.keep_rate is None and setting.threshold == 0 and self.max_kept is None:
            return state
        if setting.keep_rate is not None and setting.keeps(count) == count:
            return state
        logits = self.logits(state.hidden_states[:, state.num_prefix_tokens :].detach())
        if setting.keep_rate is not None:
            return apply_map(state, keep_highest(logits, setting.keeps(count)))
        # Without a prefix token, an image without any patch could not go on.
        min_kept = 0 if state.num_prefix_tokens > 0 else 1
        return apply_map(state, keep_above(logits, _logit(setting.threshold), self.max_kept, min_kept))


def _logit(probability: float) -> float:
    """At the ends infinite, so that a threshold of 0 keeps whatever the filter says, and 1 nothing."""
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability / (1 - probability))


def _places(kept: Tensor) -> Tensor:
    return torch.where(kept, kept.cumsum(dim=1) - 1, -1)
