"""A slow, plain rewrite of BAT for one image, to hold the library against; see naive.py.

In a layer that reduces, every patch token ends up in one list of positions (a "family"), whose first member is the
token that receives the others, or in none and is dropped. All decisions are taken on detached float32 values.
"""

import math
from fractions import Fraction

import torch
from naive import NaiveResult, attend, classify, plan_layers, wide
from torch import nn


Groups = list[list[int]]  # per patch token the patches it stands for
Families = list[list[int]]  # positions that become one token, the receiver first


def naive_bat(model: nn.Module, image: torch.Tensor, reduction: dict) -> NaiveResult:
    """Runs a stock ViT or DeiT image classifier on one image (C, H, W), clustering and fusing tokens by BAT."""
    if model.training:
        raise ValueError("the reference knows no dropout: call model.eval() first")
    if reduction["method"] != "bat":
        raise ValueError(f"unknown method {reduction['method']!r}")
    body = model.base_model
    embeddings = body.embeddings
    num_patches = embeddings.patch_embeddings.num_patches
    prefix = embeddings.position_embeddings.shape[1] - num_patches  # 1: CLS; 2: CLS and the distillation token
    plan = plan_layers({**reduction, "method": "topk"}, len(body.layers))  # the share to keep, as Top-K has it

    pixels = image.to(embeddings.patch_embeddings.projection.weight.dtype)
    x = embeddings(pixels[None])[0]
    groups: Groups = [[patch] for patch in range(num_patches)]

    token_counts, sizes, hidden_states = [], [], []
    for layer, rate in zip(body.layers, plan, strict=True):
        key_sizes = [1] * prefix + [len(group) for group in groups] if reduction["prop_attn"] else None
        out, keys, class_attention = attend(layer.attention, layer.layernorm_before(x), key_sizes)
        x = x + out
        if rate is not None:
            scores = class_attention.detach().float().tolist()
            counts = split_counts(rate, reduction["cluster_share"], reduction["fuse_share"], len(groups))
            x, groups = reduce_tokens(x, groups, keys.detach().float(), scores, counts, prefix)
        x = x + layer.mlp(layer.layernorm_after(x))
        token_counts.append(len(x))
        sizes.append([len(group) for group in groups])
        hidden_states.append(x)

    patch_map = [-1] * num_patches
    for position, group in enumerate(groups, start=prefix):
        for patch in group:
            patch_map[patch] = position
    return NaiveResult(classify(model, body.layernorm(x)), token_counts, patch_map, sizes, hidden_states)


def split_counts(rate: Fraction, cluster_share: float, fuse_share: float, num_tokens: int) -> tuple[int, int, int]:
    """How many patch tokens leave the layer, how many of them are clusters, how many attentive ones are fused away."""
    keep = max(math.ceil(rate * num_tokens), 1)
    clusters = round_half_up(Fraction(str(cluster_share)) * keep)
    fused = round_half_up(Fraction(str(fuse_share)) * (keep - clusters))
    return keep, clusters, min(fused, num_tokens - keep)


def round_half_up(number: Fraction) -> int:
    return math.floor(number + Fraction(1, 2))


def reduce_tokens(
    x: torch.Tensor,
    groups: Groups,
    keys: torch.Tensor,
    scores: list[float],
    counts: tuple[int, int, int],
    prefix: int,
) -> tuple[torch.Tensor, Groups]:
    """Splits the patch tokens by class attention, fuses attentive ones, clusters the others and averages each family.

    The weights of the mean are class attention times size. They are numbers: gradient flows through `x` alone.
    """
    keep, clusters, fused = counts
    if keep >= len(groups):
        return x, groups  # nothing to remove: no token is moved
    ranked = sorted(range(prefix, len(x)), key=lambda i: (-scores[i], i))
    num_attentive = keep - clusters + fused
    attentive, inattentive = sorted(ranked[:num_attentive]), sorted(ranked[num_attentive:])
    families = fuse_alike(keys, attentive, fused)
    if clusters > 0:
        families = families + cluster_by_density(x.detach().float(), inattentive, clusters)

    smallest = torch.finfo(torch.float32).tiny
    rows, new_groups = [x[i] for i in range(prefix)], []
    for family in sorted(families, key=lambda family: family[0]):
        weights = [max(scores[i], smallest) * len(groups[i - prefix]) for i in family]
        mean = sum(weight / sum(weights) * wide(x[i]) for weight, i in zip(weights, family, strict=True))
        rows.append(mean.to(x.dtype) if len(family) > 1 else x[family[0]])
        new_groups.append([patch for i in family for patch in groups[i - prefix]])
    return torch.stack(rows), new_groups


def fuse_alike(keys: torch.Tensor, positions: list[int], fused: int) -> Families:
    """The `fused` tokens among the 1st, 3rd, ... that are most like one of the 2nd, 4th, ... go into that token."""
    if fused == 0:
        return [[i] for i in positions]
    directions = nn.functional.normalize(keys, dim=-1)
    a_set, b_set = positions[0::2], positions[1::2]
    best_cosine, best_b = {}, {}
    for a in a_set:
        cosines = [(directions[a] * directions[b]).sum().item() for b in b_set]
        best_cosine[a] = max(cosines)
        best_b[a] = b_set[cosines.index(max(cosines))]  # the first of equals
    gone = sorted(a_set, key=lambda a: (-best_cosine[a], a))[:fused]
    stay = [[a] for a in a_set if a not in gone]
    return stay + [[b] + [a for a in a_set if a in gone and best_b[a] == b] for b in b_set]


def cluster_by_density(x: torch.Tensor, positions: list[int], amount: int) -> Families:
    """Density peaks: the centres lie where it is dense and far from anything denser; the others join the nearest."""
    points = torch.stack([x[i] for i in positions])
    squared = torch.stack([((points - point) ** 2).sum(dim=-1) for point in points])
    scale = squared.mean()  # over all ordered pairs, a token and itself included
    scaled = squared / scale if scale > 0 else torch.zeros_like(squared)
    density = torch.exp(-scaled.mean(dim=1))
    distances, squares = scaled.sqrt().tolist(), squared.tolist()

    rho = density.tolist()
    everyone = range(len(positions))
    delta = []
    for i in everyone:
        denser = [j for j in everyone if rho[j] > rho[i] or (rho[j] == rho[i] and j < i)]
        delta.append(min(distances[i][j] for j in denser) if denser else max(max(row) for row in distances))
    peaks = (density * torch.tensor(delta, device=x.device)).tolist()

    centres = sorted(sorted(everyone, key=lambda i: (-peaks[i], i))[:amount])
    families = {centre: [positions[centre]] for centre in centres}
    for i in everyone:
        if i not in families:
            nearest = min(centres, key=lambda centre: (squares[i][centre], centre))  # roots would tie sooner
            families[nearest].append(positions[i])
    return list(families.values())
