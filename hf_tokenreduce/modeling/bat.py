# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""BAT: the tokens of low class attention are clustered, and similar tokens of high class attention are fused.

B images · N patch tokens · A attentive ones, I = N - A inattentive ones · K clusters · D features
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .attention import AttentionView
from .checks import check_flag, is_number
from .configuration_base import KeepRateConfig
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import best_matches, directions_of, map_into, pick
from .multiply_adds import class_attention_cost, rounded_half_up, rounded_up_share, similarity_cost
from .tokens import TokenMap, TokenState, apply_map, full_precision


@dataclass(frozen=True)
class BATConfig(KeepRateConfig):
    """Cluster the tokens of low class attention, and fuse similar tokens of high class attention (BAT).

    After "Beyond Attentive Tokens". It needs no training, but training improves it. The *attentive* tokens are those
    that the class token attends to most.

    Args:
        keep_rate: Share of the patch tokens present that leave each of `layers`, rounded up. One number, or a list
            with one number per entry of `layers`.
        layers: 0-based indices of the layers that reduce, between their attention and their MLP.
        cluster_share: Share of the leaving tokens that are clusters of inattentive tokens. 0 drops the inattentive
            tokens.
        fuse_share: Number of attentive tokens that are fused into another, as a share of the attentive tokens that
            remain: at 0.2, 12 tokens become 10.
        prop_attn: Whether a token that stands for s patches counts s times as a key.
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
        """Return (attentive tokens, those of them that fuse, clusters of the others) to leave `leaving` of `count`."""
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
    """Cluster tokens: features (B, I, D) float32 -> (B, I) long, the centre of each token's cluster.

    A token's density is exp(-mean squared distance to all tokens). Distances are divided by the image's mean squared
    distance, so that the density neither underflows nor depends on the scale of the features. A token's peak is its
    distance to the nearest denser token; the densest token gets the largest distance of the image. The tokens of
    highest density times peak are the centres, and each other token joins the nearest centre. Of equal tokens the
    earlier one wins.
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
    squares = squares.masked_fill(natural[:, None] == natural, -1.0)  # a centre joins itself, not an equal token
    nearest = squares.gather(2, centres[:, None, :].expand(-1, count, -1)).argmin(dim=-1)
    return centres.gather(1, nearest)


def fuse_alike(keys: Tensor, num_fused: int) -> Tensor:
    """Fuse the most similar tokens: keys (B, A, d) -> (B, A) long, where each token goes.

    Even and odd positions are two sets. Each token of the even set has one best match in the odd set, by cosine. The
    `num_fused` most similar of these pairs fuse. Of equal tokens the earlier one wins.
    """
    batch, count, _ = keys.shape
    keys = directions_of(keys)
    best, match = best_matches(keys[:, ::2], keys[:, 1::2], num_fused)
    fuses = torch.zeros_like(match, dtype=torch.bool).scatter_(1, best, 1)
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
    """Keep `num_attentive` tokens, fuse `num_fused` of them, and make `num_clusters` clusters of the others.

    scores: (B, N) float32, class attention; features: (B, N, D); keys: (B, N, d) float32; size: (B, N), None for ones

    Every output token is the mean of the tokens that go into it, weighted by score times size. The receiving tokens
    keep their order. Without clusters the inattentive tokens are dropped.
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
    """Fuse and cluster tokens after attention. No parameters."""

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
