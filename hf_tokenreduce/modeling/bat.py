# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Importance and diversity: inattentive tokens are clustered, attentive ones fused where they are alike. BAT.

B images · N patch tokens · A attentive ones, I = N - A inattentive ones · K clusters · D features
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import AttentionView, full_precision
from .checks import check_flag, is_number
from .configuration_base import KeepRateConfig
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import best_matches, map_into, pick
from .multiply_adds import class_attention_cost, rounded_half_up, rounded_up_share, similarity_cost
from .tokens import TokenMap, TokenState, apply_map


@dataclass(frozen=True)
class BATConfig(KeepRateConfig):
    """Importance and diversity, after "Beyond Attentive Tokens". Tokens the class token attends to little are
    clustered; among those it attends to much, the most similar are fused. Needs no training, gains by it.

    keep_rate: share of the patch tokens present that each of `layers` hands on, rounded up; one number, or a list
        with one number per entry of `layers`.
    layers: 0-based layers that reduce, between their attention and their MLP.
    cluster_share: of the tokens handed on, the share that are clusters of inattentive tokens. 0 drops the inattentive.
    fuse_share: how many attentive tokens are fused away, as a share of those that remain: at 0.2, 12 become 10.
    prop_attn: a token that stands for s patches counts s times as a key.
    """

    method: ClassVar[str | None] = "bat"

    cluster_share: float = 0.3
    fuse_share: float = 0.2
    prop_attn: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("cluster_share", "fuse_share"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"BATConfig: {name} must lie between 0 and 1, got {value!r}.")
            self._set(**{name: float(value)})
        check_flag("BATConfig", "prop_attn", self.prop_attn)

    def split(self, count: int, leaving: int) -> tuple[int, int, int]:
        """How `count` patch tokens become `leaving`: (attentive ones, those of them that fuse into another, clusters
        of the rest)."""
        clusters = rounded_half_up(self.cluster_share * leaving)
        fused = min(rounded_half_up(self.fuse_share * (leaving - clusters)), count - leaving)
        return leaving - clusters + fused, fused, clusters

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        leaving = self.leaving(layer, count, facts)
        if leaving == count:
            return 0
        attentive, fused, clusters = self.split(count, leaving)
        distances = (count - attentive) ** 2 * facts.hidden_size if clusters else 0
        return class_attention_cost(count, facts) + distances + (similarity_cost(attentive, facts) if fused else 0)


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
    best, match = best_matches(keys[:, ::2], keys[:, 1::2], num_fused)
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
        into = fuse_alike(pick(keys, attentive), num_fused)
        receiver = receiver.scatter(1, attentive, attentive.gather(1, into))
    else:
        receiver = receiver.scatter(1, attentive, attentive)
    if num_clusters:
        inattentive = best_first[:, num_attentive:].sort(dim=1).values
        centre = density_peaks(pick(features, inattentive).float(), num_clusters)
        receiver = receiver.scatter(1, inattentive, inattentive.gather(1, centre))
    keeps_all = num_clusters > 0 or num_attentive == num_tokens
    mass = scores.clamp(min=torch.finfo(torch.float32).tiny)
    mass = mass if size is None else mass * size
    return map_into(receiver, num_attentive - num_fused + num_clusters, mass, keeps_all=keeps_all)


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
