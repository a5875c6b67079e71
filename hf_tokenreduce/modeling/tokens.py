# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Tokens on their way through a model, and the one place that moves them.

B images · T tokens per image, of which the first P are prefix tokens and N = T - P patch tokens · N0 patches of the
image · M patch tokens after a map · D features
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class TokenState(NamedTuple):
    """What goes into a layer and comes out of it. The hidden states come first, where transformers looks for them.

    hidden_states: (B, T, D)
    size: (B, N) float32, how many patches each patch token stands for. None: one each.
    patch_map: (B, N0) long, the patch token that now holds each patch of the image, -1 if it was dropped. None: not
        asked for.
    num_prefix_tokens: P
    """

    hidden_states: Tensor
    size: Tensor | None = None
    patch_map: Tensor | None = None
    num_prefix_tokens: int = 1

    @property
    def num_patch_tokens(self) -> int:
        return self.hidden_states.shape[1] - self.num_prefix_tokens

    def counts(self) -> Tensor:
        """(B,) long, the tokens of each image, prefix tokens included."""
        batch, length, _ = self.hidden_states.shape
        return torch.full((batch,), length, dtype=torch.long, device=self.hidden_states.device)


class TokenMap(NamedTuple):
    """Which output token each patch token goes into. Prefix tokens cannot be named, so they cannot be touched.

    target: (B, N) long, from 0 to num_tokens - 1; -1: dropped
    num_tokens: M
    weight: (B, N), factor each token enters its output token with. None: every output token is one input token as
        it was.
    """

    target: Tensor
    num_tokens: int
    weight: Tensor | None = None


def start(hidden_states: Tensor, num_prefix_tokens: int, track_patches: bool) -> TokenState:
    """The state of embedded images: every patch is its own token."""
    patch_map = None
    if track_patches:
        batch, length, _ = hidden_states.shape
        patch_map = torch.arange(length - num_prefix_tokens, device=hidden_states.device).repeat(batch, 1)
    return TokenState(hidden_states, None, patch_map, num_prefix_tokens)


def merge(target: Tensor, num_tokens: int, mass: Tensor) -> TokenMap:
    """Every output token is the mean of the tokens that go into it, weighted by their `mass` (B, N)."""
    return TokenMap(target, num_tokens, mass / follow(target, _sum_by_target(mass, target, num_tokens), fill=1.0))


def apply_map(state: TokenState, token_map: TokenMap) -> TokenState:
    """Move everything a state knows of its tokens."""
    target, num_tokens, weight = token_map
    size, patch_map = state.size, state.patch_map
    if weight is not None and size is None:
        size = torch.ones(target.shape, dtype=torch.float32, device=target.device)
    if size is not None:
        size = _sum_by_target(size, target, num_tokens)
    if patch_map is not None:
        patch_map = follow(patch_map, target, fill=-1)
    hidden_states = move(state.hidden_states, token_map, state.num_prefix_tokens)
    return TokenState(hidden_states, size, patch_map, state.num_prefix_tokens)


def move(rows: Tensor, token_map: TokenMap, num_prefix_tokens: int) -> Tensor:
    """Apply a map to one row per token: (B, P + N, D) -> (B, P + M, D).

    Rows are moved in one flat (B * T, D) view, because whole-row copies and sums are several times faster there than
    gather and scatter with an index expanded to every feature. Sums are formed in float32.
    """
    batch, length, width = rows.shape
    new_length = num_prefix_tokens + token_map.num_tokens
    image = torch.arange(batch, device=rows.device)[:, None]
    flat = rows.reshape(batch * length, width)
    if token_map.weight is None:
        index = _with_prefix(_kept_index(token_map), num_prefix_tokens) + image * length
        return flat.index_select(0, index.flatten()).view(batch, new_length, width)
    target = _with_prefix(token_map.target, num_prefix_tokens) + image * new_length
    dropped = F.pad(token_map.target < 0, (num_prefix_tokens, 0))
    target = torch.where(dropped, batch * new_length, target)  # one row past the end, cut off below
    weighted = flat * F.pad(token_map.weight, (num_prefix_tokens, 0), value=1.0).view(-1, 1)
    sums = weighted.new_zeros(batch * new_length + 1, width).index_add(0, target.flatten(), weighted)
    return sums[:-1].view(batch, new_length, width).to(rows.dtype)


def follow(index: Tensor, values: Tensor, fill: float) -> Tensor:
    """`values` (B, M) at `index` (B, N), and `fill` where the index is -1. Follows one map after another."""
    return torch.where(index < 0, fill, values.gather(1, index.clamp(min=0)))


def _sum_by_target(values: Tensor, target: Tensor, num_tokens: int) -> Tensor:
    sums = values.new_zeros(target.shape[0], num_tokens + 1)
    return sums.scatter_add(1, torch.where(target < 0, num_tokens, target), values)[:, :-1]


def _kept_index(token_map: TokenMap) -> Tensor:
    target, num_tokens, _ = token_map
    slot = torch.where(target < 0, num_tokens, target)
    index = target.new_zeros(target.shape[0], num_tokens + 1)
    return index.scatter(1, slot, _positions(target, target.shape[1]))[:, :-1]


def _positions(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device).expand(like.shape[0], count)


def _with_prefix(index: Tensor, num_prefix_tokens: int) -> Tensor:
    return torch.cat([_positions(index, num_prefix_tokens), index + num_prefix_tokens], dim=1)
