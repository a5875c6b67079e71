"""A slow, plain rewrite of the newer methods for one image, to hold the library against; see naive.py.

A step says which tokens become one: lists of positions (a "family"), whose first member receives the others, in the
order in which they leave. A token in no family is dropped. All decisions are taken on detached float32 values.
"""

import math
from fractions import Fraction

import torch
from naive import NaiveResult, attend, classify, wide
from torch import nn


Families = list[list[int]]


class Step:
    """What a layer knows of its tokens, as plain numbers, when it decides.

    positions: of the patch tokens, behind the prefix; sizes: by position, the patches each stands for
    """

    def __init__(self, layer, depth, x, normed, groups, keys, class_rows, received, values, prefix):
        self.layer, self.depth, self.prefix = layer, depth, prefix
        self.normed = normed.detach()
        self.positions = list(range(prefix, len(x)))
        self.sizes = {i: len(groups[i - prefix]) for i in self.positions}
        self.keys = nn.functional.normalize(keys.detach().float(), dim=-1)
        self.rows = nn.functional.normalize(x.detach().float(), dim=-1)
        self.attention = (sum(class_rows) / len(class_rows)).detach().float().tolist()
        self.received = received.detach().float().tolist()
        self.of_heads = [
            (row.detach().float().tolist(), part.detach().float().norm(dim=-1).tolist())
            for row, part in zip(class_rows, values.chunk(len(class_rows), dim=-1), strict=True)
        ]
        self.value_lengths = values.detach().float().norm(dim=-1).tolist()

    def cosine(self, i: int, j: int) -> float:
        return (self.keys[i] * self.keys[j]).sum().item()

    def likest(self, i: int, receivers: list[int], rows: torch.Tensor | None = None) -> tuple[float, int]:
        """The highest cosine to one of the receivers, and the first one that has it."""
        rows = self.keys if rows is None else rows
        cosines = [(rows[i] * rows[j]).sum().item() for j in receivers]
        return max(cosines), receivers[cosines.index(max(cosines))]


def naive_newer(model: nn.Module, image: torch.Tensor, reduction: dict) -> NaiveResult:
    """Runs a stock ViT or DeiT image classifier on one image (C, H, W), reducing tokens as told."""
    if model.training:
        raise ValueError("the reference knows no dropout: call model.eval() first")
    body = model.base_model
    embeddings = body.embeddings
    num_patches = embeddings.patch_embeddings.num_patches
    prefix = embeddings.position_embeddings.shape[1] - num_patches
    x = embeddings(image.to(embeddings.patch_embeddings.projection.weight.dtype)[None])[0]
    groups = [[patch] for patch in range(num_patches)]
    by_size = reduction.get("prop_attn", False)
    decide = {
        "pitome": by_energy,
        "diffrate": by_rates,
        "ppt": by_variance,
        "mctf": by_criteria,
        "dtem": by_embeddings,
        "protected": by_importance,
    }.get(reduction["method"])

    token_counts, sizes, hidden_states = [], [], []
    for index, layer in enumerate(body.layers):
        normed = layer.layernorm_before(x)
        key_sizes = [1] * prefix + [len(group) for group in groups] if by_size else None
        out, keys, _ = attend(layer.attention, normed, key_sizes)
        x = x + out
        if decide is not None:
            values = layer.attention.v_proj(normed)
            maps = attention_maps(layer.attention, normed, key_sizes)
            received = sum(weights.mean(dim=0) for weights in maps) / len(maps)
            class_rows = [weights[0] for weights in maps]
            step = Step(index, len(body.layers), x, normed, groups, keys, class_rows, received, values, prefix)
            families, weights = decide(step, reduction)
            x, groups = bring_together(x, groups, families, weights, prefix)
        moved = layer.mlp(layer.layernorm_after(x))
        x = x + moved
        if reduction["method"] == "shift" and index in reduction["layers"]:
            x, groups = keep_the_moved(x, groups, moved, rate_of(reduction, index), prefix)
        token_counts.append(len(x))
        sizes.append([len(group) for group in groups])
        hidden_states.append(x)

    patch_map = [-1] * num_patches
    for position, group in enumerate(groups, start=prefix):
        for patch in group:
            patch_map[patch] = position
    return NaiveResult(classify(model, body.layernorm(x)), token_counts, patch_map, sizes, hidden_states)


def attention_maps(attention: nn.Module, x: torch.Tensor, key_sizes: list[int] | None) -> list[torch.Tensor]:
    """How much each token attends to each, a map for every head."""
    heads, maps = attention.num_attention_heads, []
    queries, keys = wide(attention.q_proj(x)), wide(attention.k_proj(x))
    for q, k in zip(queries.chunk(heads, dim=-1), keys.chunk(heads, dim=-1), strict=True):
        scores = q @ k.T / math.sqrt(q.shape[-1])
        if key_sizes is not None:
            scores = scores + torch.log(torch.tensor(key_sizes, dtype=torch.float32))
        maps.append(torch.softmax(scores, dim=-1))
    return maps


def bring_together(x, groups, families: Families, weights: dict[int, float], prefix: int):
    """Every family becomes the mean of its members, by their weights, which carry no gradient."""
    rows, new_groups = [x[i] for i in range(prefix)], []
    for family in families:
        total = sum(weights[i] for i in family)
        mean = sum(weights[i] / total * wide(x[i]) for i in family)
        rows.append(mean.to(x.dtype) if len(family) > 1 else x[family[0]])
        new_groups.append([patch for i in family for patch in groups[i - prefix]])
    return torch.stack(rows), new_groups


def in_natural_order(step: Step, into: dict[int, int], dropped: list[int] = ()) -> Families:
    """`into`: who goes where. Tokens that go nowhere stay where they are."""
    stay = [i for i in step.positions if i not in into and i not in dropped]
    return [[i, *[source for source in into if into[source] == i]] for i in stay]


def removed_in(reduction: dict, layer: int, count: int, depth: int) -> int:
    """How many of so many patch tokens a layer removes, by r."""
    r = reduction["r"]
    r = r[layer] if isinstance(r, list) else r
    if reduction["inflect"]:
        first = int(r * (1 - reduction["inflect"]))
        r = int(first + Fraction(2 * (r - first) * layer, depth - 1))
    return min(r, count // 2)


def by_energy(step: Step, reduction: dict):
    """PiToMe."""
    r = removed_in(reduction, step.layer, len(step.positions), step.depth)
    if r == 0:
        return [[i] for i in step.positions], step.sizes
    margin = reduction["margin"] * (1 - step.layer / step.depth)
    energy = {}
    for i in step.positions:
        gaps = [step.cosine(i, j) - margin for j in step.positions]
        energy[i] = sum(gap if gap > 0 else math.exp(gap) - 1 for gap in gaps) / len(gaps)
    order = sorted(step.positions, key=lambda i: (-energy[i], i))
    if step.layer >= step.depth / 2:
        order = order[: 2 * r]
    sources, receivers = order[0::2], order[1::2]
    matches = {i: step.likest(i, receivers) for i in sources}
    going = sorted(sources, key=lambda i: -matches[i][0])[:r]
    return in_natural_order(step, {i: matches[i][1] for i in going}), step.sizes


def by_rates(step: Step, reduction: dict):
    """DiffRate. Its mean is a plain one: a token counts once, whatever it stands for."""
    r = removed_in(reduction, step.layer, len(step.positions), step.depth)
    share = reduction["prune_share"]
    share = share[step.layer] if isinstance(share, list) else share
    num_dropped = math.floor(Fraction(str(share)) * r + Fraction(1, 2))
    order = sorted(step.positions, key=lambda i: (-step.attention[i], i))
    last = len(order) - num_dropped
    stay, sources, dropped = order[: len(order) - r], order[len(order) - r : last], order[last:]
    into = {i: step.likest(i, stay, step.rows)[1] for i in sources}
    return in_natural_order(step, into, dropped), dict.fromkeys(step.positions, 1)


def by_variance(step: Step, reduction: dict):
    """PPT."""
    r = removed_in(reduction, step.layer, len(step.positions), step.depth)
    if step.layer not in reduction["layers"] or r == 0:
        return [[i] for i in step.positions], step.sizes
    scores = {i: step.attention[i] * step.value_lengths[i] for i in step.positions}
    total = sum(scores.values())
    shares = {i: score / total for i, score in scores.items()}
    mean = 1 / len(shares)
    if sum((share - mean) ** 2 for share in shares.values()) / (len(shares) - 1) >= reduction["threshold"]:
        stay = sorted(step.positions, key=lambda i: (-shares[i], i))[: len(shares) - r]
        return [[i] for i in sorted(stay)], step.sizes
    return most_similar(step, step.keys, r), step.sizes


def most_similar(step: Step, rows: torch.Tensor, r: int) -> Families:
    """ToMe."""
    evens, odds = ([i for i in step.positions if i % 2 == parity] for parity in (0, 1))
    matches = {i: step.likest(i, odds, rows) for i in evens}
    going = sorted(evens, key=lambda i: (-matches[i][0], i))[:r]
    stay = [[i] for i in evens if i not in going]
    return stay + [[odd, *[i for i in going if matches[i][1] == odd]] for odd in odds]


def by_embeddings(step: Step, reduction: dict):
    """DTEM, when it runs. `linears`: weight and bias of the linear layer in each layer, or nothing."""
    r = removed_in(reduction, step.layer, len(step.positions), step.depth)
    if r == 0:
        return [[i] for i in step.positions], step.sizes
    linear = reduction["linears"][step.layer]
    rows = nn.functional.linear(step.normed, linear["metric.weight"], linear["metric.bias"])
    return most_similar(step, nn.functional.normalize(rows.detach().float(), dim=-1), r), step.sizes


def by_criteria(step: Step, reduction: dict):
    """MCTF. What a token of the second set received goes with it into one of the first."""
    r = removed_in(reduction, step.layer, len(step.positions), step.depth)
    masses = {i: step.received[i] * step.sizes[i] for i in step.positions}
    if r == 0:
        return [[i] for i in step.positions], masses
    least = min(step.received[i] for i in step.positions), min(step.sizes.values())

    def worth(i: int) -> float:
        informative = (least[0] / step.received[i]) ** reduction["informativeness_weight"]
        return informative * (least[1] / step.sizes[i]) ** reduction["size_weight"]

    def best(sources: list[int], receivers: list[int], count: int) -> dict[int, int]:
        found = {}
        for i in sources:
            weights = [(step.cosine(i, j) + 1) / 2 * worth(i) * worth(j) for j in receivers]
            found[i] = max(weights), receivers[weights.index(max(weights))]
        return {i: found[i][1] for i in sorted(sources, key=lambda i: (-found[i][0], i))[:count]}

    evens, odds = ([i for i in step.positions if i % 2 == parity] for parity in (0, 1))
    there = best(evens, odds, r - r // 2)
    back = best(odds, [i for i in evens if i not in there], r // 2)
    into = back | {i: back.get(target, target) for i, target in there.items()}
    return in_natural_order(step, into), masses


def by_importance(step: Step, reduction: dict):
    """Protected merging."""
    count = len(step.positions)
    rate = rate_of(reduction, step.layer) if step.layer in reduction["layers"] else 1
    removed = count - math.ceil(rate * count)
    if removed == 0:
        return [[i] for i in step.positions], step.sizes
    importance = dict.fromkeys(step.positions, 0.0)
    for row, lengths in step.of_heads:
        for i in step.positions:
            importance[i] += row[i] * lengths[i]
    order = sorted(step.positions, key=lambda i: (-importance[i], i))
    num_protected = math.floor(Fraction(str(reduction["protect_share"])) * count)
    num_dropped = math.floor(Fraction(str(reduction["drop_share"])) * removed + Fraction(1, 2))
    while removed - num_dropped > max(count - num_protected - num_dropped, 0) // 2:
        num_dropped += 1  # too few can merge
    movable, dropped = sorted(order[num_protected : count - num_dropped]), order[count - num_dropped :]
    sources = movable[1::2]
    receivers = [i for i in step.positions if i not in sources and i not in dropped]
    matches = {i: step.likest(i, receivers, step.rows) for i in sources}
    going = sorted(sources, key=lambda i: (-matches[i][0], i))[: removed - num_dropped]
    return in_natural_order(step, {i: matches[i][1] for i in going}, dropped), step.sizes


def rate_of(reduction: dict, layer: int) -> Fraction:
    rates = reduction["keep_rate"]
    rate = rates[reduction["layers"].index(layer)] if isinstance(rates, list) else rates
    return Fraction(str(rate))


def keep_the_moved(x, groups, moved: torch.Tensor, rate: Fraction, prefix: int):
    """Representation shift: of the patch tokens those that the MLP moved furthest, the furthest first."""
    keep = math.ceil(rate * len(groups))
    if keep == len(groups):
        return x, groups
    lengths = moved.detach().float().norm(dim=-1).tolist()
    stay = sorted(range(prefix, len(x)), key=lambda i: (-lengths[i], i))[:keep]
    return torch.stack([*x[:prefix], *[x[i] for i in stay]]), [groups[i - prefix] for i in stay]
