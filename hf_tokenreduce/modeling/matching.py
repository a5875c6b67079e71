# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Which token merges into which: best matches by similarity, and the map that follows from them.

B images · N patch tokens · A sources, R receivers among them · d features
"""

import torch
from torch import Tensor

from .tokens import TokenMap, full_precision, merge


def pick(rows: Tensor, index: Tensor) -> Tensor:
    """Pick rows (B, N, d) at index (B, M) -> (B, M, d)."""
    flat = index + torch.arange(rows.shape[0], device=rows.device)[:, None] * rows.shape[1]
    return rows.reshape(-1, rows.shape[2]).index_select(0, flat.flatten()).view(*index.shape, -1)


def directions_of(features: Tensor) -> Tensor:
    """Divide features (..., d) by their length. It does what `F.normalize` does, with fewer operations. This saves
    time for a single image."""
    return features / torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp(min=1e-12)


def best_matches(sources: Tensor, receivers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the `count` sources that are most like a receiver, given directions (B, A, d) and (B, R, d) float32.

    Returns their places among the sources, (B, count) long, the most similar first, and for every source the place of
    its best match among the receivers, (B, A) long. Of equal ones the earlier wins.
    """
    with full_precision(sources):
        return best_of(torch.bmm(sources, receivers.transpose(1, 2)), count)


def best_of(similarity: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Do the same for any similarities of sources and receivers (B, A, R)."""
    best, match = similarity.max(dim=-1)
    return best.sort(dim=-1, descending=True, stable=True).indices[:, :count], match


def into_most_similar(features: Tensor, sources: Tensor, receivers: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Let the `count` most similar sources go into their best matches.

    features: (B, N, d) float32; sources, receivers: (B, A) and (B, R) long, different tokens

    Returns for each token the one that it goes into, which is itself for most, (B, N) long; and the tokens that go
    into another, (B, count), the most similar first.
    """
    batch, num_tokens, _ = features.shape
    directions = directions_of(features)
    best, match = best_matches(pick(directions, sources), pick(directions, receivers), count)
    going = sources.gather(1, best)
    itself = torch.arange(num_tokens, device=features.device).repeat(batch, 1)
    return itself.scatter(1, going, receivers.gather(1, match.gather(1, best))), going


def map_into(
    receiver: Tensor, num_tokens: int, mass: Tensor, *, mass_is_size: bool = False, keeps_all: bool = False
) -> TokenMap:
    """Make the map by which each token goes into its `receiver` (B, N). -1 drops a token.

    A receiver is its own receiver. The `num_tokens` receivers stay and keep their order. mass, mass_is_size and
    keeps_all are those of `merge`.
    """
    stays = receiver == torch.arange(receiver.shape[1], device=receiver.device)
    place = (stays.cumsum(dim=1) - 1).clamp(min=0)  # values that are not finite can leave no token
    if keeps_all:
        target = place.gather(1, receiver)
    else:
        target = torch.where(receiver < 0, -1, place.gather(1, receiver.clamp(min=0)))
    return merge(target, num_tokens, mass, mass_is_size=mass_is_size, keeps_all=keeps_all)


def sizes_of(size: Tensor | None, like: Tensor) -> Tensor:
    """Return `size`, or ones (B, N) float32 if it is None: every token of `like` (B, N, ...) is then one patch."""
    return torch.ones(like.shape[:2], dtype=torch.float32, device=like.device) if size is None else size
