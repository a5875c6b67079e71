# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Token merging: similar tokens become one. ToMe.

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
from .checks import check_flag, check_layers_fit, is_integer, is_number, is_sequence
from .configuration_base import ReductionConfig
from .encoders import EncoderFacts, facts_of
from .hooks import Reducer
from .matching import best_matches, sizes_of
from .multiply_adds import even_share, largest_within, similarity_cost
from .tokens import TokenMap, TokenState, apply_map, merge


@dataclass(frozen=True)
class ToMeConfig(ReductionConfig):
    """Token merging, after "Token Merging: Your ViT But Faster". Acts in every layer; needs no training.

    r: patch tokens merged away per layer (at most half of those present). An integer, a list with one integer per
        layer, or a tuple `(r, inflect)`: a straight line over the layers from `r * (1 - inflect)` to
        `r * (1 + inflect)`, so that `(r, -1.0)` merges most in the first layers and nothing in the last.
    prop_attn: a token that stands for s patches counts s times as a key (log s is added to its attention logits).
    inflect: where a tuple's second value is kept.
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
            r, inflect = r
        if not is_number(inflect) or not -1.0 <= inflect <= 1.0:
            raise ValueError(f"{name}: inflect must lie between -1 and 1, got {inflect!r}.")
        per_layer = is_sequence(r)
        if per_layer and inflect:
            raise ValueError(f"{name}: inflect={inflect!r} shapes a single r; with a list of r set it to 0.")
        values = tuple(r) if per_layer else (r,)
        for value in values:
            if not is_integer(value) or value < 0:
                raise ValueError(f"{name}: r counts tokens, so it must be an integer of at least 0, got {value!r}.")
        check_flag(name, "prop_attn", self.prop_attn)
        # A list stays a list: as a tuple, that of two layers would read as (r, inflect).
        self._set(r=[int(value) for value in values] if per_layer else int(r), inflect=float(inflect))

    def schedule(self, num_layers: int) -> list[int]:
        """r of each layer."""
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
        """One r, or a list of r + 1 in the first layers and r in the others.

        layers: 0-based layers that merge, at more tokens each, so that fewer layers spend time on it. None: all.
        """
        facts = facts_of(config)
        places = range(facts.num_hidden_layers) if layers is None else sorted(set(layers))
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
    """Merge the r patch tokens that are most like another: `keys` (B, N, d) float32, `size` (B, N) or None for ones.

    The sequence, prefix included, is dealt into two sets by even and odd position. Each token of the even set has
    one best match in the odd set, by cosine; the r best pairs merge into their size-weighted mean, r being at most
    half of N. Output order: the even tokens left over, then the odd ones.
    """
    batch, num_tokens, _ = keys.shape
    r = min(r, num_tokens // 2)
    even = slice(num_prefix_tokens % 2, None, 2)
    odd = slice(1 - num_prefix_tokens % 2, None, 2)
    keys = F.normalize(keys, dim=-1)
    best, match = best_matches(keys[:, even], keys[:, odd], r)
    left = torch.ones_like(match, dtype=torch.bool).scatter(1, best, False)
    num_left = match.shape[1] - r
    of_even = torch.where(left, left.cumsum(dim=1) - 1, match + num_left)
    of_odd = torch.arange(num_left, num_tokens - r, device=keys.device).expand(batch, -1)
    target = _dealt_back(of_odd, of_even) if num_prefix_tokens % 2 else _dealt_back(of_even, of_odd)
    return merge(target, num_tokens - r, sizes_of(size, keys), mass_is_size=True, keeps_all=True)


def _dealt_back(first: Tensor, second: Tensor) -> Tensor:
    """Numbers of every other token, (B, N first) from the first token on and (B, N second) from the second, as those
    of all: (B, N). They are joined, because runtimes take longer to write into a tensor."""
    count = first.shape[1] + second.shape[1]
    if count % 2:
        second = F.pad(second, (0, 1))
    return torch.stack([first, second], dim=2).flatten(1)[:, :count]


class ToMeReducer(Reducer):
    """Merges similar tokens after attention."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.r = facts.reduction.schedule(facts.num_hidden_layers)[layer]
        self.prop_attn = facts.reduction.prop_attn

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        if min(self.r, state.num_patch_tokens // 2) == 0:
            return state
        token_map = match_most_similar(view.patch_keys(), state.size, self.r, state.num_prefix_tokens)
        return apply_map(state, token_map)
