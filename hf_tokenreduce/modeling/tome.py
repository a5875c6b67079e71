# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""ToMe: token merging, which turns similar tokens into one.

B images · N patch tokens · d features of a key
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .attention import AttentionView
from .checks import check_flag, check_layers_fit, check_left_out, checked_layers, is_integer, is_number, is_sequence
from .configuration_base import ReductionConfig
from .encoders import EncoderFacts, facts_of
from .hooks import Reducer
from .matching import best_matches, directions_of, sizes_of
from .multiply_adds import even_share, largest_within, similarity_cost
from .tokens import TokenMap, TokenState, apply_map, merge


@dataclass(frozen=True)
class ToMeConfig(ReductionConfig):
    """Merge the most similar tokens in every layer (ToMe).

    After "Token Merging: Your ViT But Faster". Needs no training.

    Args:
        r: Number of patch tokens that each layer removes by merging, at most half of those present. An integer, a list
            with one integer per layer, or a tuple `(r, inflect)`. With a tuple the number changes linearly from
            `r * (1 - inflect)` in the first layer to `r * (1 + inflect)` in the last, so `(r, -1.0)` merges most in
            the first layers and nothing in the last.
        prop_attn: Whether a token that stands for s patches counts s times as a key (log s is added to its attention
            logits).
        inflect: How `r` changes from the first layer to the last, from -1 to 1. `r=(8, -1.0)` is the same as `r=8,
            inflect=-1.0`.
    """

    method: ClassVar[str | None] = "tome"

    r: int | Sequence[int] | tuple[int, float] = 8
    prop_attn: bool = True
    inflect: float = 0.0

    def __post_init__(self):
        name = type(self).__name__
        r: Any = self.r
        inflect: Any = self.inflect
        if isinstance(r, tuple) and len(r) == 2:
            if inflect not in (0.0, r[1]):
                raise ValueError(f"{name}: r={r!r} says inflect, so inflect={inflect!r} must be left out.")
            r, inflect = r
        if not is_number(inflect) or not -1.0 <= inflect <= 1.0:
            raise ValueError(f"{name}: inflect must lie between -1 and 1, got {inflect!r}.")
        per_layer = is_sequence(r)
        if per_layer and inflect:
            raise ValueError(f"{name}: inflect={inflect!r} needs a single r. With a list of r, set it to 0.")
        values = tuple(r) if per_layer else (r,)
        for value in values:
            if not is_integer(value) or value < 0:
                raise ValueError(f"{name}: r must be an integer of at least 0 (a number of tokens), got {value!r}.")
        check_flag(name, "prop_attn", self.prop_attn)
        # A list stays a list: a tuple of two numbers would be read as (r, inflect).
        self._set(r=[int(value) for value in values] if per_layer else int(r), inflect=float(inflect))

    def schedule(self, num_layers: int) -> list[int]:
        """Return the r of each layer."""
        r: Any = self.r
        if is_sequence(r):
            return list(r)
        first = int(r * (1 - self.inflect))
        steps = max(num_layers - 1, 1)
        return [(first * steps + 2 * (r - first) * layer) // steps for layer in range(num_layers)]

    def check_fit(self, facts: EncoderFacts) -> None:
        if not isinstance(self.r, int) and len(self.r) != facts.num_hidden_layers:
            raise ValueError(
                f"{type(self).__name__}: a list r needs one value per layer, got {len(self.r)} values for "
                f"{facts.num_hidden_layers} layers: {list(self.r)}."
            )

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return count - min(self.schedule(facts.num_hidden_layers)[layer], count // 2)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return similarity_cost(count, facts) if self.leaving(layer, count, facts) < count else 0

    @classmethod
    def for_budget(
        cls,
        config: PreTrainedConfig | EncoderFacts,
        share: float,
        *,
        layers: Sequence[int] | None = None,
        **settings: Any,
    ) -> "ToMeConfig":
        """Make the mildest setting that keeps at most a share of the multiply-adds of the encoder's layers.

        The setting has one r, or a list with r + 1 in the first layers and r in the others.

        Args:
            config: Configuration of the model, stock or reduced, or the facts of its encoder.
            share: Share of the multiply-adds to keep, above 0 and at most 1.
            layers: 0-based indices of the layers that merge. With fewer layers each merges more tokens, and less time
                is spent on finding them. None: all layers.
            **settings: Values of the other fields.
        """
        facts = facts_of(config)
        check_left_out(cls.__name__, settings, "r", *(["inflect"] if settings.get("inflect") else []))
        places = range(facts.num_hidden_layers) if layers is None else sorted(checked_layers(cls.__name__, layers))
        if not places:
            raise ValueError(f"{cls.__name__}: layers is empty, so nothing could be removed. Name some layers.")
        check_layers_fit(cls.__name__, places, facts.num_hidden_layers)

        def merging(total: int) -> "ToMeConfig":
            r, more = divmod(total, len(places))
            if layers is None and not more:
                return cls(r=r, **settings)
            at = {layer: r + (order < more) for order, layer in enumerate(places)}
            return cls(r=[at.get(layer, 0) for layer in range(facts.num_hidden_layers)], **settings)

        most = len(places) * (facts.num_patches // 2)
        return merging(most - largest_within(share, most, lambda spared: even_share(merging(most - spared), facts)))


@torch.no_grad()
def match_most_similar(keys: Tensor, size: Tensor | None, r: int, num_prefix_tokens: int) -> TokenMap:
    """Merge the r patch tokens that are most like another one, at most half of N.

    keys: (B, N, d) float32; size: (B, N), None for ones

    Even and odd positions of the sequence, prefix included, are two sets. Each token of the even set has one best
    match in the odd set, by cosine. The r most similar of these pairs merge into their size-weighted mean. The output
    has the remaining even tokens first, then the odd ones.
    """
    batch, num_tokens, _ = keys.shape
    r = min(r, num_tokens // 2)
    even = slice(num_prefix_tokens % 2, None, 2)
    odd = slice(1 - num_prefix_tokens % 2, None, 2)
    keys = directions_of(keys)
    best, match = best_matches(keys[:, even], keys[:, odd], r)
    left = torch.ones_like(match, dtype=torch.bool).scatter_(1, best, 0)  # False would stop torch.jit.trace
    num_left = match.shape[1] - r
    of_even = torch.where(left, left.cumsum(dim=1) - 1, match + num_left)
    of_odd = torch.arange(num_left, num_tokens - r, device=keys.device).expand(batch, -1)
    target = _dealt_back(of_odd, of_even) if num_prefix_tokens % 2 else _dealt_back(of_even, of_odd)
    return merge(target, num_tokens - r, sizes_of(size, keys), mass_is_size=True, keeps_all=True)


def _dealt_back(first: Tensor, second: Tensor) -> Tensor:
    """Interleave the numbers of the first, third, ... token and those of the second, fourth, ... into (B, N).

    They are stacked, because runtimes take longer to write into a tensor.
    """
    count = first.shape[1] + second.shape[1]
    if count % 2:
        second = F.pad(second, (0, 1))
    return torch.stack([first, second], dim=2).flatten(1)[:, :count]


class ToMeReducer(Reducer):
    """Merge similar tokens, after attention."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.r = facts.reduction.schedule(facts.num_hidden_layers)[layer]
        self.prop_attn = facts.reduction.prop_attn

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        if min(self.r, state.num_patch_tokens // 2) == 0:
            return state
        token_map = match_most_similar(view.patch_keys(), state.size, self.r, state.num_prefix_tokens)
        return apply_map(state, token_map)
