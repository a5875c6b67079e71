"""A slow, plain rewrite of ToMe, EViT and Top-K for one image, to hold the library against.

It shares no code with the library. A patch token is a row of `x` and the list of patches it stands for (`groups`), so
sizes and the patch map are read off that list, not tracked. Batches do not exist here, nor do masks or gathers.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import nn


@dataclass
class NaiveResult:
    logits: torch.Tensor  # (num_labels,)
    token_counts: list[int]  # tokens leaving each layer, prefix tokens included
    patch_map: list[int]  # for each patch the position in the last sequence that holds it, -1 if it was dropped
    sizes: list[list[int]]  # leaving each layer: how many patches each patch token stands for
    hidden_states: list[torch.Tensor]  # leaving each layer: (tokens, hidden size), before the final norm


def naive_forward(model: nn.Module, image: torch.Tensor, reduction: dict | None) -> NaiveResult:
    """Runs a stock ViT or DeiT image classifier on one image (C, H, W), reducing tokens in every layer as told."""
    if model.training:
        raise ValueError("the reference knows no dropout: call model.eval() first")
    body = model.base_model
    embeddings = body.embeddings
    num_patches = embeddings.patch_embeddings.num_patches
    prefix = embeddings.position_embeddings.shape[1] - num_patches  # 1: CLS; 2: CLS and the distillation token
    plan = plan_layers(reduction, len(body.layers))

    pixels = image.to(embeddings.patch_embeddings.projection.weight.dtype)
    x = embeddings(pixels[None])[0]
    groups = [[patch] for patch in range(num_patches)]
    proportional = reduction is not None and reduction["method"] == "tome" and reduction.get("prop_attn", True)

    token_counts, sizes, hidden_states = [], [], []
    for layer, amount in zip(body.layers, plan, strict=True):
        key_sizes = [1] * prefix + [len(group) for group in groups] if proportional else None
        out, keys, class_attention = attend(layer.attention, layer.layernorm_before(x), key_sizes)
        x = x + out

        if amount is not None and reduction["method"] == "tome":
            x, groups = merge_most_similar(x, groups, keys, amount, prefix)
        elif amount is not None:
            fuse = reduction["method"] == "evit" and reduction.get("fuse", True)
            x, groups = keep_most_attended(x, groups, class_attention, amount, fuse, prefix)

        x = x + layer.mlp(layer.layernorm_after(x))
        token_counts.append(len(x))
        sizes.append([len(group) for group in groups])
        hidden_states.append(x)

    patch_map = [-1] * num_patches
    for position, group in enumerate(groups, start=prefix):
        for patch in group:
            patch_map[patch] = position
    return NaiveResult(classify(model, body.layernorm(x)), token_counts, patch_map, sizes, hidden_states)


def classify(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "distillation_classifier"):
        return (model.cls_classifier(x[0]) + model.distillation_classifier(x[1])) / 2
    return model.classifier(x[0])


def plan_layers(reduction: dict | None, num_layers: int) -> list[int | Fraction | None]:
    """For every layer: None for nothing to do, how many tokens to merge (ToMe), or the share to keep (EViT, Top-K)."""
    if reduction is None:
        return [None] * num_layers
    if reduction["method"] == "tome":
        r = reduction["r"]
        if isinstance(r, list):
            if len(r) != num_layers:
                raise ValueError(f"{len(r)} values of r for {num_layers} layers")
            return list(r)
        r, inflect = r if isinstance(r, tuple) else (r, 0)
        first = int(r * (1 - inflect))
        last = 2 * r - first
        # The line runs from `first` to `last`; a fraction keeps a whole number on it from being truncated to one less.
        return [int(first + Fraction((last - first) * layer, max(num_layers - 1, 1))) for layer in range(num_layers)]
    if reduction["method"] in ("evit", "topk"):
        layers, rates = reduction["layers"], reduction["keep_rate"]
        if not isinstance(rates, list):
            rates = [rates] * len(layers)
        plan: list[int | Fraction | None] = [None] * num_layers
        for layer, rate in zip(layers, rates, strict=True):
            plan[layer] = Fraction(str(rate))  # as it is written: 0.55 of 100 is 55, not a little more
        return plan
    raise ValueError(f"unknown method {reduction['method']!r}")


def wide(x: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 if it was that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attend(
    attention: nn.Module, x: torch.Tensor, key_sizes: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the attention output, the keys' mean over heads, and the class token's attention, mean over heads."""
    heads = attention.num_attention_heads
    head_dim = attention.q_proj.out_features // heads
    queries, keys, values = wide(attention.q_proj(x)), wide(attention.k_proj(x)), wide(attention.v_proj(x))
    outputs, head_keys, class_rows = [], [], []
    for head in range(heads):
        channels = slice(head * head_dim, (head + 1) * head_dim)
        q, k, v = queries[:, channels], keys[:, channels], values[:, channels]
        scores = q @ k.T / math.sqrt(head_dim)
        if key_sizes is not None:
            scores = scores + torch.log(torch.as_tensor(key_sizes, dtype=torch.float32, device=x.device))
        probabilities = torch.softmax(scores, dim=-1)
        outputs.append(probabilities @ v)
        head_keys.append(k)
        class_rows.append(probabilities[0])
    out = attention.o_proj(torch.cat(outputs, dim=-1).to(x.dtype))
    return out, sum(head_keys) / heads, sum(class_rows) / heads


def merge_most_similar(
    x: torch.Tensor, groups: list[list[int]], keys: torch.Tensor, r: int, prefix: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """ToMe: the r tokens at even positions that are most like a token at an odd position go into that token."""
    r = min(r, len(groups) // 2)
    if r <= 0:
        return x, groups  # no token is moved, where the split would have sorted them into even and odd

    directions = nn.functional.normalize(keys.detach().float(), dim=-1)
    evens = [i for i in range(prefix, len(x)) if i % 2 == 0]
    odds = [i for i in range(prefix, len(x)) if i % 2 == 1]
    best_cosine, best_odd = {}, {}
    for even in evens:
        cosines = (directions[odds] * directions[even]).sum(dim=-1).tolist()
        best_cosine[even] = max(cosines)
        best_odd[even] = odds[cosines.index(max(cosines))]  # the first of equals
    merged = set(sorted(evens, key=lambda even: (-best_cosine[even], even))[:r])

    rows = [x[i] for i in range(prefix)]
    new_groups = []
    for even in evens:
        if even not in merged:
            rows.append(x[even])
            new_groups.append(groups[even - prefix])
    for odd in odds:
        members = [odd] + [even for even in evens if even in merged and best_odd[even] == odd]
        total = sum(len(groups[i - prefix]) for i in members)
        mean = sum(len(groups[i - prefix]) * wide(x[i]) for i in members) / total
        rows.append(mean.to(x.dtype))
        new_groups.append([patch for i in members for patch in groups[i - prefix]])
    return torch.stack(rows), new_groups


def keep_most_attended(
    x: torch.Tensor, groups: list[list[int]], class_attention: torch.Tensor, rate: Fraction, fuse: bool, prefix: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """EViT: the best share of the patch tokens, best first, then (if `fuse`) the sum of the others. Top-K: no sum."""
    keep = math.ceil(rate * len(groups))
    if keep >= len(groups):
        return x, groups  # nothing to remove: no token is moved

    scores = class_attention.detach().float().tolist()
    ranked = sorted(range(prefix, len(x)), key=lambda i: (-scores[i], i))
    kept, rest = ranked[:keep], ranked[keep:]

    rows = [x[i] for i in range(prefix)] + [x[i] for i in kept]
    new_groups = [groups[i - prefix] for i in kept]
    if fuse:
        # The attention is not made to sum to one over the rest, and it carries gradient.
        fused = sum(class_attention[i] * wide(x[i]) for i in rest)
        rows.append(fused.to(x.dtype))
        new_groups.append([patch for i in rest for patch in groups[i - prefix]])
    return torch.stack(rows), new_groups
