# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""DL-ViT: a small network filters the patches before the first attention.

B images · N patch tokens · D features
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.utils import logging

from .checks import (
    check_caps_fit,
    check_flag,
    check_left_out,
    check_rate,
    check_size,
    checked_caps,
    is_number,
    is_sequence,
)
from .configuration_base import ReductionConfig
from .encoders import EncoderFacts, facts_of
from .hooks import Reducer
from .multiply_adds import (
    even_share,
    largest_within,
    rounded_up_share,
)
from .packed import as_numbers
from .tokens import (
    TokenMap,
    TokenState,
    apply_map,
    ranks,
)


logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class DLViTConfig(ReductionConfig):
    """Drop the patches that a small network judges unimportant, before the first attention (DL-ViT).

    After "Predicting Token Impact Towards Efficient Vision Transformer". The network, called the filter, gives each
    embedded patch a probability to matter. It must be trained on labels.

    Args:
        threshold: Patches of a higher probability stay, so the number of tokens differs between images. 0 keeps all.
        keep_rate: Share of the patches that stay, those of the highest probability, rounded up: the same number for
            every image. If it is set, it replaces the threshold.
        hidden_size: Width of the filter's hidden layer. None: half of the backbone's width.
        trained: Whether the filter decides. As long as it is False, every patch stays.
        max_tokens: Upper limit of the tokens that stay with a threshold, prefix tokens included, whatever the image
            shows. The most probable patches stay. None: no limit.
    """

    method: ClassVar[str | None] = "dlvit"
    hook: ClassVar[str] = "before_encoder"

    threshold: float = 0.5
    keep_rate: float | None = None
    hidden_size: int | None = None
    trained: bool = False
    max_tokens: int | None = None

    def untrained(self) -> str | None:
        return (
            "DL-ViT's filter has random weights here, although trained=True says that it decides, so patches would be "
            "dropped by chance. Fit it with hf_tokenreduce.training.fit_filter, or load a model with a fitted filter."
            if self.trained
            else None
        )

    def __post_init__(self):
        if not is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ValueError(f"DLViTConfig: threshold must lie between 0 and 1, got {self.threshold!r}.")
        if self.hidden_size is not None:
            check_size("DLViTConfig", "hidden_size", self.hidden_size)
        check_flag("DLViTConfig", "trained", self.trained)
        if is_sequence(self.max_tokens):
            raise ValueError(f"DLViTConfig: max_tokens must be one number, not a list, got {self.max_tokens!r}.")
        if self.keep_rate is not None:
            check_rate("DLViTConfig", self.keep_rate)
            if self.max_tokens is not None:
                raise ValueError(
                    f"DLViTConfig: keep_rate={self.keep_rate} fixes the number of tokens, so max_tokens="
                    f"{self.max_tokens} has nothing to cap. Set one of the two to None."
                )
        self._set(
            threshold=float(self.threshold),
            keep_rate=None if self.keep_rate is None else float(self.keep_rate),
            hidden_size=None if self.hidden_size is None else int(self.hidden_size),
            max_tokens=checked_caps("DLViTConfig", self.max_tokens, None, "layer"),
        )

    def check_fit(self, facts: EncoderFacts) -> None:
        check_caps_fit("DLViTConfig", "max_tokens", self.max_tokens, facts)

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        if layer > 0 or not self.trained:
            return count
        return super().leaving(layer, count, facts) if self.keep_rate is None else self.keeps(count)

    def keeps(self, count: int) -> int:
        """Return the number of patch tokens that stay by `keep_rate`."""
        rate: Any = self.keep_rate
        return rounded_up_share(rate, count)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        if self.keep_rate is None:
            keeps_all = self.threshold == 0 and self.max_tokens is None
        else:
            keeps_all = self.keeps(count) == count
        filters = layer == 0 and self.trained and not keeps_all
        inner = self.hidden_size or facts.hidden_size // 2
        return count * inner * (2 * facts.hidden_size + 1) if filters else 0

    @classmethod
    def for_budget(cls, config: PreTrainedConfig | EncoderFacts, share: float, **settings: Any) -> "DLViTConfig":
        """Make the setting that keeps at most `share` once the filter is trained: a keep rate, in steps of 0.0001.

        `trained` is False unless the settings say otherwise, and until then every patch stays.
        """
        facts = facts_of(config)
        check_left_out(cls.__name__, settings, "keep_rate")

        def keeping(steps: int, **changes: Any) -> "DLViTConfig":
            return cls(keep_rate=(steps + 1) / 10000, **{**settings, **changes})

        return keeping(largest_within(share, 9999, lambda steps: even_share(keeping(steps, trained=True), facts)))


@torch.no_grad()
def keep_above(scores: Tensor, threshold: float, max_kept: int | None = None, min_kept: int = 0) -> TokenMap:
    """Keep the tokens whose score (B, N) is above the threshold, a number for each image. They keep their order.

    At most `max_kept` and at least `min_kept` tokens stay, those of the highest scores.
    """
    kept = ~(scores <= threshold)  # NaN stays: a broken image must give a broken answer
    if min_kept > 0:
        kept |= ranks(scores) < min_kept
    if max_kept is not None:
        kept &= ranks(scores) < max_kept
    return TokenMap(_new_places(kept), as_numbers(kept.sum(dim=1), scores.shape[1]))


@torch.no_grad()
def keep_highest(scores: Tensor, count: int) -> TokenMap:
    """Keep the `count` tokens of the highest scores (B, N), of equal ones the earlier. They keep their order."""
    return TokenMap(_new_places(ranks(scores) < count), count)


class DLViTReducer(Reducer):
    """Filter the embedded patches. The first layer's reducer holds the filter; the other reducers do nothing.

    The filter reads a token and the mean of all patch tokens of its image. It learns from labels and not through the
    model, because a dropped token has no gradient.
    """

    serves_every_setting = True

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
        """Return the logit of each patch's probability to matter: (B, N, D) -> (B, N) float32."""
        mean = patches.mean(dim=1, keepdim=True).expand_as(patches)
        return self.fc2(F.gelu(self.fc1(self.norm(torch.cat([patches, mean], dim=-1))))).squeeze(-1).float()

    forward = logits

    def before_encoder(self, state: TokenState) -> TokenState:
        setting, count = self.built_for, state.num_patch_tokens
        if not (self.has_filter and setting.trained):
            return state
        if setting.keep_rate is None and setting.threshold == 0 and self.max_kept is None:
            return state
        if setting.keep_rate is not None and setting.keeps(count) == count:
            return state
        patches = state.hidden_states[:, state.num_prefix_tokens :].detach()
        if hasattr(self.fc2.weight, "full_tensor"):  # FSDP gathers weights when a layer begins, which is later
            parameters: Any = self.named_parameters()
            logits = functional_call(self, {name: part.full_tensor() for name, part in parameters}, patches)
        else:
            logits = self.logits(patches)
        if setting.keep_rate is not None:
            return apply_map(state, keep_highest(logits, setting.keeps(count)))
        # Without prefix tokens, an image must keep at least one patch.
        min_kept = 0 if state.num_prefix_tokens > 0 else 1
        return apply_map(state, keep_above(logits, _logit(setting.threshold), self.max_kept, min_kept))


def _logit(probability: float) -> float:
    """Return the logit of a probability, infinite at 0 and 1: a threshold of 0 then keeps all, and 1 nothing."""
    if probability in (0, 1):
        return math.inf if probability else -math.inf
    return math.log(probability / (1 - probability))


def _new_places(kept: Tensor) -> Tensor:
    return torch.where(kept, kept.cumsum(dim=1) - 1, -1)
