"""A slow, plain rewrite of ATS and LTMP (inference) for one image, to hold the library against; see naive.py.

Here every image ends up with its own number of tokens, which is no trouble at all when there is only one image: the
tokens that are gone are simply not in `x` any more. All decisions are taken on detached float32 values.
"""

import math

import torch
from naive import NaiveResult, classify, wide
from torch import nn


Heads = list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # per head its queries, keys, values: (tokens, head dim)
Groups = list[list[int]]  # per patch token the patches it stands for


def naive_adaptive(model: nn.Module, image: torch.Tensor, reduction: dict) -> NaiveResult:
    """Runs a stock ViT or DeiT image classifier on one image (C, H, W), removing tokens by ATS or LTMP as told."""
    if model.training:
        raise ValueError("the reference knows no dropout: call model.eval() first")
    if reduction["method"] not in ("ats", "ltmp"):
        raise ValueError(f"unknown method {reduction['method']!r}")
    body = model.base_model
    embeddings = body.embeddings
    num_patches = embeddings.patch_embeddings.num_patches
    prefix = embeddings.position_embeddings.shape[1] - num_patches  # 1: CLS; 2: CLS and the distillation token

    pixels = image.to(embeddings.patch_embeddings.projection.weight.dtype)
    x = embeddings(pixels[None])[0]
    initial_length = len(x)
    groups: Groups = [[patch] for patch in range(num_patches)]

    token_counts, sizes, hidden_states = [], [], []
    for index, layer in enumerate(body.layers):
        normed = layer.layernorm_before(x)
        if reduction["method"] == "ltmp":
            x, groups = ltmp_attention(layer.attention, x, normed, groups, index, reduction, prefix)
        elif index in reduction["layers"]:
            cap = reduction.get("max_tokens")
            cap = cap[reduction["layers"].index(index)] if isinstance(cap, list) else cap
            settings = {**reduction, "max_tokens": cap}
            x, groups = ats_attention(layer.attention, x, normed, groups, initial_length, settings, prefix)
        else:
            heads = project(layer.attention, normed)
            maps = [attention_map(q, k) for q, k, _ in heads]
            x = x + attention_output(layer.attention, maps, heads, x.dtype)

        x = x + layer.mlp(layer.layernorm_after(x))
        token_counts.append(len(x))
        sizes.append([len(group) for group in groups])
        hidden_states.append(x)

    patch_map = [-1] * num_patches
    for position, group in enumerate(groups, start=prefix):
        for patch in group:
            patch_map[patch] = position
    return NaiveResult(classify(model, body.layernorm(x)), token_counts, patch_map, sizes, hidden_states)


def project(attention: nn.Module, x: torch.Tensor) -> Heads:
    queries, keys, values = wide(attention.q_proj(x)), wide(attention.k_proj(x)), wide(attention.v_proj(x))
    head_dim = attention.q_proj.out_features // attention.num_attention_heads
    parts = [slice(head * head_dim, (head + 1) * head_dim) for head in range(attention.num_attention_heads)]
    return [(queries[:, part], keys[:, part], values[:, part]) for part in parts]


def attention_map(q: torch.Tensor, k: torch.Tensor, key_sizes: list[int] | None = None) -> torch.Tensor:
    """One head's attention of the given queries over all keys: (queries, keys), every row sums to one."""
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if key_sizes is not None:
        scores = scores + torch.log(torch.tensor(key_sizes, dtype=torch.float32, device=q.device))
    return torch.softmax(scores, dim=-1)


def attention_output(attention: nn.Module, maps: list[torch.Tensor], heads: Heads, dtype: torch.dtype) -> torch.Tensor:
    return attention.o_proj(torch.cat([a @ v for a, (_, _, v) in zip(maps, heads, strict=True)], dim=-1).to(dtype))


def ats_attention(
    attention: nn.Module,
    x: torch.Tensor,
    normed: torch.Tensor,
    groups: Groups,
    initial_length: int,
    reduction: dict,
    prefix: int,
) -> tuple[torch.Tensor, Groups]:
    """ATS: only the prefix tokens and the sampled patch tokens ask; what they ask is every token that came in."""
    heads = project(attention, normed)
    budget = initial_length if reduction.get("num_tokens") is None else reduction["num_tokens"]
    ranked, scores = rank_by_class_attention(heads, reduction.get("score", "joint"), prefix)
    chosen = [ranked[rank] for rank in sample_ranks(scores, budget - prefix)]  # lowest score first
    if reduction.get("max_tokens") is not None:
        room = max(reduction["max_tokens"] - prefix, 0)
        chosen = chosen[max(len(chosen) - room, 0) :]

    rows = [*range(prefix), *chosen]
    maps = [attention_map(q[rows], k) for q, k, _ in heads]
    return x[rows] + attention_output(attention, maps, heads, x.dtype), [groups[i - prefix] for i in chosen]


def rank_by_class_attention(heads: Heads, score: str, prefix: int) -> tuple[list[int], torch.Tensor]:
    """The positions of the patch tokens, lowest score first (of equals the earlier), and their scores in that order.

    A token scores by how much the class token looks at it and how long its value vector is; scores sum to one.
    """
    class_rows = [attention_map(q[:1], k)[0, prefix:].detach().float() for q, k, _ in heads]
    values = [v[prefix:].detach().float() for _, _, v in heads]
    if score == "joint":
        scores = sum(class_rows) * torch.cat(values, dim=-1).norm(dim=-1)
    elif score == "per_head":
        products = [row * v.norm(dim=-1) for row, v in zip(class_rows, values, strict=True)]
        scores = sum(product / product.sum() for product in products)
    else:
        raise ValueError(f"unknown score {score!r}")
    scores = scores / scores.sum()
    order = sorted(range(len(scores)), key=scores.tolist().__getitem__)
    return [prefix + i for i in order], scores[order]


def sample_ranks(scores: torch.Tensor, points: int) -> list[int]:
    """Inverse transform sampling on an even grid: which of the tokens, sorted by score, are hit at least once."""
    if points <= 0 or len(scores) == 0:
        return []
    cdf = torch.cumsum(scores, dim=0)
    span = cdf[-1] - cdf[0]
    if not span > 0:
        return [0]  # a single token, or none with any score: the curve is flat and every point is nearest to its start
    cdf = (cdf - cdf[0]) / span
    start = cdf[cdf > 0][0]
    hit = set()
    for m in range(points):
        y = start + (1 - start) * (m / (points - 1) if points > 1 else 1)  # a single point: the highest score
        distances = (cdf - y).abs().tolist()
        hit.add(distances.index(min(distances)))  # the first of equals
    return sorted(hit)


def ltmp_attention(
    attention: nn.Module,
    x: torch.Tensor,
    normed: torch.Tensor,
    groups: Groups,
    index: int,
    reduction: dict,
    prefix: int,
) -> tuple[torch.Tensor, Groups]:
    """LTMP: attention and its residual, then merge what is alike, then prune what gets little attention."""
    heads = project(attention, normed)
    key_sizes = [1] * prefix + [len(group) for group in groups] if reduction["merge"] else None
    maps = [attention_map(q, k, key_sizes) for q, k, _ in heads]
    x = x + attention_output(attention, maps, heads, x.dtype)
    received = sum(a.detach().float().mean(dim=0) for a in maps) / len(maps)  # over all queries, the prefix too

    # Each cluster is a list of positions; its first member is the token the others are merged into.
    clusters = [[i] for i in range(prefix, len(x))]
    if reduction["merge"]:
        mean_keys = sum(k.detach().float() for _, k, _ in heads) / len(heads)
        clusters = merge_alike(mean_keys, reduction["merge_thresholds"][index], prefix)
    importance = {cluster[0]: max(received[i].item() for i in cluster) for cluster in clusters}

    if reduction["prune"]:
        threshold = in_float32(reduction["prune_thresholds"][index])
        clusters = [cluster for cluster in clusters if importance[cluster[0]] > threshold]
    cap = reduction.get("max_tokens")
    cap = cap[index] if isinstance(cap, list) else cap
    if cap is not None:
        best_first = sorted((cluster[0] for cluster in clusters), key=lambda i: (-importance[i], i))
        stay = set(best_first[: max(cap - prefix, 0)])
        clusters = [cluster for cluster in clusters if cluster[0] in stay]

    rows, new_groups = [x[i] for i in range(prefix)], []
    for cluster in clusters:
        total = sum(len(groups[i - prefix]) for i in cluster)
        mean = sum(len(groups[i - prefix]) * wide(x[i]) for i in cluster) / total
        rows.append(mean.to(x.dtype) if len(cluster) > 1 else x[cluster[0]])
        new_groups.append([patch for i in cluster for patch in groups[i - prefix]])
    return torch.stack(rows), new_groups


def merge_alike(keys: torch.Tensor, threshold: float, prefix: int) -> list[list[int]]:
    """Patch tokens at even positions join the most similar one at an odd position if that is more than `threshold`."""
    directions = nn.functional.normalize(keys, dim=-1)
    evens = [i for i in range(prefix, len(keys)) if i % 2 == 0]
    odds = [i for i in range(prefix, len(keys)) if i % 2 == 1]
    joined: dict[int, list[int]] = {odd: [] for odd in odds}
    left = []
    for even in evens:
        cosines = (directions[odds] * directions[even]).sum(dim=-1).clamp(max=1).tolist()
        if cosines and max(cosines) > in_float32(threshold):
            joined[odds[cosines.index(max(cosines))]].append(even)  # the first of equals
        else:
            left.append(even)
    if len(left) == len(evens):
        return [[i] for i in range(prefix, len(keys))]  # nothing merges: no token is moved
    return [[even] for even in left] + [[odd, *joined[odd]] for odd in odds]


def in_float32(number: float) -> float:
    return torch.tensor(number, dtype=torch.float32).item()
