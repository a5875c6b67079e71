# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Importance and diversity: inattentive tokens are clustered, attentive ones fused where they are alike. BAT.

B images · N patch tokens · A attentive ones, I = N - A inattentive ones · K clusters · D features
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import AttentionView, full_precision
from .encoders import EncoderFacts
from .hooks import Reducer
from .multiply_adds import rounded_up_share
from .tokens import TokenMap, TokenState, apply_map, merge


def density_peaks(features: Tensor, num_clusters: int) -> Tensor:
    """For each token (B, I, D) float32 the token that is the centre of its cluster, itself if it is one: (B, I) long.

    A token's density is exp(-mean squared distance to all), in units of the image's mean squared distance, so that it
    can neither underflow nor depend on the features' scale. A token's peak is its distance to the nearest denser
    token; the densest gets the largest distance there is. Centres are the tokens of highest density times peak;
    others join the nearest centre. Ties go to the earlier token.
    """
    count = features.shape[1]
    natural = torch.arange(count, device=features.device)
    features = features - features.mean(dim=1, keepdim=True)  # closer to 0, where products lose fewer digits
    norms = features.pow(2).sum(dim=-1)
    with full_precision(features):
        squares = torch.baddbmm(
            norms[:, :, None] + norms[:, None, :], features, features.transpose(1, 2), alpha=-2
        ).clamp(min=0)
    squares = squares.masked_fill(natural[:, None] == natural, 0.0)
    scale = squares.mean(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    squares = squares / scale
    density = (-squares.mean(dim=-1)).exp()
    ahead, own = density[:, None, :], density[:, :, None]
    denser = (ahead > own) | ((ahead == own) & (natural < natural[:, None]))
    peak = squares.masked_fill(~denser, torch.inf).amin(dim=-1)
    peak = torch.where(peak == torch.inf, squares.amax(dim=(1, 2))[:, None], peak).sqrt()
    best = (density * peak).argsort(dim=1, descending=True, stable=True)[:, :num_clusters]
    centres = best.sort(dim=1).values
    squares = squares.masked_fill(natural[:, None] == natural, -1.0)  # a centre is its own, also beside an equal one
    nearest = squares.gather(2, centres[:, None, :].expand(-1, count, -1)).argmin(dim=-1)
    return centres.gather(1, nearest)


def fuse_alike(keys: Tensor, num_fused: int) -> Tensor:
    """For each token (B, A, d) the token it goes into, itself for most: (B, A) long.

    Tokens are dealt into two sets by even and odd position. Each of the even set has one best match in the odd set,
    by cosine; the `num_fused` best matches are made. Ties go to the earlier token.
    """
    batch, count, _ = keys.shape
    keys = F.normalize(keys, dim=-1)
    with full_precision(keys):
        similarity, match = (keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)).max(dim=-1)
    best = similarity.argsort(dim=1, descending=True, stable=True)[:, :num_fused]
    fuses = torch.zeros_like(match, dtype=torch.bool).scatter(1, best, True)
    into = torch.arange(count, device=keys.device).repeat(batch, 1)
    into[:, ::2] = torch.where(fuses, 2 * match + 1, into[:, ::2])
    return into


@torch.no_grad()
def keep_diverse(
    scores: Tensor,
    features: Tensor,
    keys: Tensor,
    size: Tensor | None,
    num_attentive: int,
    num_fused: int,
    num_clusters: int,
) -> TokenMap:
    """Keep the attentive tokens but for those that fuse, and as many clusters of the others.

    scores: (B, N) float32, class attention; features: (B, N, D); keys: (B, N, d) float32; size: (B, N), None for ones

    Every output token is the mean of what goes into it, weighted by score times size. Output order: that of the
    tokens which the others go into. Without clusters the inattentive are dropped.
    """
    num_tokens = scores.shape[1]
    best_first = scores.argsort(dim=1, descending=True, stable=True)
    attentive = best_first[:, :num_attentive].sort(dim=1).values
    receiver = torch.full_like(best_first, -1)
    if num_fused:
        into = fuse_alike(_pick(keys, attentive), num_fused)
        receiver = receiver.scatter(1, attentive, attentive.gather(1, into))
    else:
        receiver = receiver.scatter(1, attentive, attentive)
    if num_clusters:
        inattentive = best_first[:, num_attentive:].sort(dim=1).values
        centre = density_peaks(_pick(features, inattentive).float(), num_clusters)
        receiver = receiver.scatter(1, inattentive, inattentive.gather(1, centre))
    stays = receiver == torch.arange(num_tokens, device=scores.device)
    target = torch.where(receiver < 0, -1, (stays.cumsum(dim=1) - 1).gather(1, receiver.clamp(min=0)))
    mass = scores.clamp(min=torch.finfo(torch.float32).tiny)
    return merge(target, num_attentive - num_fused + num_clusters, mass if size is None else mass * size)


class BATReducer(Reducer):
    """Fuses and clusters tokens after attention. No parameters."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.keep_rate = facts.reduction.schedule().get(layer, 1.0)
        self.prop_attn = facts.reduction.prop_attn

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        count, prefix = state.num_patch_tokens, state.num_prefix_tokens
        leaving = rounded_up_share(self.keep_rate, count)
        if leaving == count:
            return state
        scores = view.class_attention().mean(dim=1)[:, prefix:]
        features = state.hidden_states[:, prefix:]
        split = self.built_for.split(count, leaving)
        return apply_map(state, keep_diverse(scores, features, view.patch_keys(), state.size, *split))


def _pick(rows: Tensor, index: Tensor) -> Tensor:
    """(B, N, D) at (B, M) -> (B, M, D)"""
    flat = index + torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1]
    return rows.reshape(-1, rows.shape[2]).index_select(0, flat.flatten()).view(*index.shape, -1)
