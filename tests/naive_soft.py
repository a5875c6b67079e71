"""A slow, plain rewrite of SiT's token slimming, DL-ViT's filter and DTEM's training for one image; see naive.py.

SiT turns N patch tokens into k weighted means of all of them, so no patch is held by one token: a matrix says how much
each patch weighs in each token. DL-ViT drops patch tokens once, before the first layer. While DTEM learns, tokens go
into others by parts.
"""

import math
from fractions import Fraction

import torch
from naive import NaiveResult, attend, classify, wide
from naive_adaptive import in_float32
from torch import nn
from torch.nn import functional as F


Weights = dict[str, torch.Tensor]


def naive_sit(
    model: nn.Module, image: torch.Tensor, reduction: dict, modules: dict[int, Weights]
) -> tuple[NaiveResult, torch.Tensor]:
    """Runs a stock ViT or DeiT on one image (C, H, W), slimming the tokens that leave the layers told.

    Also returns the matrix (last patch tokens, patches) of what each patch weighs in each token; a row sums to one.
    """
    if reduction["method"] != "sit":
        raise ValueError(f"unknown method {reduction['method']!r}")
    x, prefix = embed(model, image)
    body = model.base_model
    patch_weights = torch.eye(len(x) - prefix, dtype=wide(x).dtype, device=x.device)

    token_counts, hidden_states = [], []
    for index, layer in enumerate(body.layers):
        x = plain_layer(layer, x)
        if index in reduction["layers"] and index in modules:
            patches = wide(x[prefix:])
            mixing = mixing_matrix(patches, modules[index])
            x = torch.cat([x[:prefix], (mixing @ patches).to(x.dtype)])
            patch_weights = mixing @ patch_weights
        token_counts.append(len(x))
        hidden_states.append(x)
    logits = classify(model, body.layernorm(x))
    return NaiveResult(logits, token_counts, [], [], hidden_states), patch_weights


def mixing_matrix(patches: torch.Tensor, weights: Weights) -> torch.Tensor:
    """How much each of the N tokens weighs in each of the k new ones: (k, N), every row sums to one."""
    scores = weights["scale"].to(patches.dtype) * two_layer_mlp(patches, weights)  # (N, k)
    columns = [torch.softmax(scores[:, new], dim=0) for new in range(scores.shape[1])]
    return torch.stack(columns)


def naive_dlvit(model: nn.Module, image: torch.Tensor, reduction: dict, filter_weights: Weights) -> NaiveResult:
    """Runs a stock ViT or DeiT on one image (C, H, W), on the patch tokens alone that the filter lets through."""
    if reduction["method"] != "dlvit":
        raise ValueError(f"unknown method {reduction['method']!r}")
    x, prefix = embed(model, image)
    body = model.base_model
    num_patches = len(x) - prefix

    kept = passing_patches(filter_logits(x[prefix:], filter_weights), reduction, prefix)
    x = torch.stack([x[i] for i in range(prefix)] + [x[prefix + patch] for patch in kept])

    token_counts, hidden_states = [], []
    for layer in body.layers:
        x = plain_layer(layer, x)
        token_counts.append(len(x))
        hidden_states.append(x)

    patch_map = [-1] * num_patches
    for position, patch in enumerate(kept, start=prefix):
        patch_map[patch] = position
    sizes = [[1] * len(kept) for _ in body.layers]
    return NaiveResult(classify(model, body.layernorm(x)), token_counts, patch_map, sizes, hidden_states)


def filter_logits(patches: torch.Tensor, weights: Weights) -> torch.Tensor:
    """One number per patch token, from the token and the mean of all of them; no gradient, in float32."""
    patches = patches.detach().float()
    mean = sum(patches) / len(patches)
    inputs = torch.stack([torch.cat([patch, mean]) for patch in patches])
    return two_layer_mlp(inputs, weights)[:, 0].detach()


def passing_patches(logits: torch.Tensor, reduction: dict, prefix: int) -> list[int]:
    """The patches that stay, in order of position; it may be none where there is a threshold or a cap."""
    patches = range(len(logits))
    if reduction.get("keep_rate") is not None:
        keep = max(math.ceil(Fraction(str(reduction["keep_rate"])) * len(logits)), 1)
        values = logits.tolist()
        return sorted(sorted(patches, key=lambda i: (-values[i], i))[:keep])

    probabilities = torch.sigmoid(logits).tolist()
    kept = [i for i in patches if probabilities[i] > in_float32(reduction["threshold"])]
    if reduction.get("max_tokens") is not None:
        room = max(reduction["max_tokens"] - prefix, 0)
        kept = sorted(sorted(kept, key=lambda i: (-probabilities[i], i))[:room])
    return kept


def naive_dtem_training(
    model: nn.Module, image: torch.Tensor, reduction: dict, linears: list[Weights]
) -> tuple[NaiveResult, torch.Tensor]:
    """Runs a stock ViT or DeiT on one image (C, H, W) as DTEM does while it learns: no token is removed.

    Also returns the matrix (tokens, patches) of what each patch weighs in each token; a row sums to one.
    """
    x, prefix = embed(model, image)
    left = len(x) - prefix
    sizes = [torch.ones(()) for _ in range(left)]
    patch_weights = torch.eye(left)
    token_counts, hidden_states = [], []
    for index, layer in enumerate(model.base_model.layers):
        normed = layer.layernorm_before(x)
        # Without prop_attn a token counts once, but one that is nearly empty must not count as a whole one.
        counts = sizes if reduction["prop_attn"] else [size.clamp(max=1) for size in sizes]
        key_sizes = torch.stack([torch.ones(())] * prefix + counts)
        x = x + attend(layer.attention, normed, key_sizes)[0]
        r = min(reduction["r"][index], left // 2)
        if r:
            rows = F.linear(normed.detach(), linears[index]["metric.weight"], linears[index]["metric.bias"])
            x, sizes, patch_weights = give_parts(x, sizes, patch_weights, rows, left, r, prefix)
            left -= r
        x = x + layer.mlp(layer.layernorm_after(x))
        token_counts.append(prefix + left)
        hidden_states.append(x)
    logits = classify(model, model.base_model.layernorm(x))
    return NaiveResult(logits, token_counts, [], [], hidden_states), patch_weights


def give_parts(x, sizes, patch_weights, rows, left: int, r: int, prefix: int):
    """The even ones of the first tokens give parts of themselves to odd ones; then the largest tokens come first."""
    directions = F.normalize(rows, dim=-1)
    evens, odds = ([i for i in range(prefix, prefix + left) if i % 2 == parity] for parity in (0, 1))
    pairs = []
    for i in evens:
        cosines = {j: directions[i] @ directions[j] for j in odds}
        pairs += [(i, j, cosines[j]) for j in sorted(odds, key=lambda j: -cosines[j].item())[:3]]
    scores = torch.stack([cosine / 0.1 for *_, cosine in pairs])
    given = torch.zeros(len(pairs))
    of_source = torch.tensor([[i == other for other, *_ in pairs] for i, *_ in pairs]).float()  # pairs of one source
    for _ in range(r):
        picked = torch.softmax(scores / 0.1, dim=0)
        given = given + picked
        scores = scores + torch.log(torch.clamp(1 - of_source @ picked, min=2**-23))
    given = given / torch.clamp((of_source @ given).detach(), min=1)

    new_sizes, new_rows, new_weights = list(sizes), list(x), list(patch_weights)
    for j in odds:
        parts = [(part, i) for part, (i, receiver, _) in zip(given, pairs, strict=True) if receiver == j]
        parts = [(torch.ones(()), j), *parts]
        total = sum(part * sizes[i - prefix] for part, i in parts)
        new_sizes[j - prefix] = total
        new_rows[j] = sum(part * sizes[i - prefix] / total * x[i] for part, i in parts)
        new_weights[j - prefix] = sum(
            part * sizes[i - prefix] / total * patch_weights[i - prefix] for part, i in parts
        )
    for i in evens:
        rest = 1 - sum(part for part, (source, *_) in zip(given, pairs, strict=True) if source == i)
        rest = rest + (torch.clamp(rest, min=2**-23) - rest).detach()  # all of it may be gone
        new_sizes[i - prefix] = sizes[i - prefix] * rest
    order = sorted(range(len(sizes)), key=lambda place: (-new_sizes[place].item(), place))
    x = torch.stack(new_rows[:prefix] + [new_rows[prefix + place] for place in order])
    return x, [new_sizes[place] for place in order], torch.stack([new_weights[place].detach() for place in order])


def two_layer_mlp(x: torch.Tensor, weights: Weights) -> torch.Tensor:
    """Norm, linear, exact GELU, linear, in the type of `x`."""
    w = {name: weight.to(x.dtype) for name, weight in weights.items()}
    normed = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"], eps=1e-5)
    hidden = F.gelu(F.linear(normed, w["fc1.weight"], w["fc1.bias"]))
    return F.linear(hidden, w["fc2.weight"], w["fc2.bias"])


def embed(model: nn.Module, image: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The tokens that enter the first layer, and how many of them are prefix tokens."""
    if model.training:
        raise ValueError("the reference knows no dropout: call model.eval() first")
    embeddings = model.base_model.embeddings
    prefix = embeddings.position_embeddings.shape[1] - embeddings.patch_embeddings.num_patches
    pixels = image.to(embeddings.patch_embeddings.projection.weight.dtype)
    return embeddings(pixels[None])[0], prefix


def plain_layer(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = x + attend(layer.attention, layer.layernorm_before(x), None)[0]
    return x + layer.mlp(layer.layernorm_after(x))
