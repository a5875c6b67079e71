"""A slow, plain rewrite of ToMe and Top-K for one image of any family, to hold the library against.

It shares no code with the library, only the modules of the stock model. A token is a row and the list of patches it
stands for, so its weight is the length of that list. Whoever reads the last tokens reads each as often as it stands
for a patch: there is no grid here, no batch, and no map.

places: where in the image a token is, among prefix tokens and patches. A token that was made of several is where the
heaviest of them was, of equals the last.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class Block:
    """One layer, by what its parts do."""

    norm_before: nn.Module
    attention: nn.Module
    out: nn.Module
    after_attention: Callable[[Tensor], Tensor]
    norm_after: nn.Module
    mlp: nn.Module
    after_mlp: Callable[[Tensor], Tensor]
    bias: Tensor | None = None  # (heads, places, places)


@dataclass
class NaiveRun:
    prefix: int
    num_patches: int
    rows: list[Tensor] = field(default_factory=list)  # leaving each layer: (tokens, width), before a final norm
    groups: list[list[list[int]]] = field(default_factory=list)  # leaving each layer: the patches of each patch token
    last_rows: dict[int, Tensor] = field(default_factory=dict)  # of dropped patches, the row that was dropped
    dropped_in: dict[int, int] = field(default_factory=dict)  # of dropped patches, the layer

    def patch_map(self) -> list[int]:
        """For each patch the row of the last sequence that holds it, -1 if it was dropped."""
        where = [-1] * self.num_patches
        for place, group in enumerate(self.groups[-1], start=self.prefix):
            for patch in group:
                where[patch] = place
        return where

    def grid(self, layer: int, last_states: bool) -> Tensor:
        """Prefix tokens, and a row for every patch, of what leaves a layer."""
        rows, groups = self.rows[layer], self.groups[layer]
        found = {patch: rows[self.prefix + i] for i, group in enumerate(groups) for patch in group}
        mean = torch.stack(list(found.values())).mean(dim=0)
        patches = []
        for patch in range(self.num_patches):
            other = self.last_rows[patch] if last_states and patch not in found else mean
            patches.append(found.get(patch, other))
        return torch.stack([*rows[: self.prefix], *patches])

    def weighed(self, norm: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """The last patch tokens, as the norm makes them, and how often each is read. Dropped patches are read as the
        mean of the others."""
        rows = self.rows[-1][self.prefix :]
        rows = rows if norm is None else norm(rows)
        weights = torch.tensor([float(len(group)) for group in self.groups[-1]])
        num_dropped = self.num_patches - int(weights.sum())
        if num_dropped == 0:
            return rows, weights
        mean = (weights[:, None] * rows).sum(dim=0) / weights.sum()
        return torch.cat([rows, mean[None]]), torch.cat([weights, torch.tensor([float(num_dropped)])])


def heaviest(some: list[int], sizes: list[int]) -> int:
    """Of tokens that merge the one whose place counts: the heaviest, of equals the last."""
    return max(some, key=lambda token: (sizes[token], token))


def naive_run(
    tower: nn.Module,
    image: Tensor,
    method: str,
    amounts: list,
    proportional: bool = False,
    place_of: Callable[[list[int], list[int]], int] = heaviest,
) -> NaiveRun:
    """Runs the layers of a stock encoder on one image (C, H, W).

    method: "tome", "topk", or "told"
    amounts: for each layer how many tokens merge, the share of them that stays, or, if they are told, which tokens
        each output token is made of. None: nothing is done.
    proportional: whether attention counts a token as often as it stands for a patch
    """
    x = embed(tower, image)
    blocks, prefix, rope = anatomy(tower, image)
    run = NaiveRun(prefix, len(x) - prefix)
    groups, places = [[patch] for patch in range(run.num_patches)], list(range(len(x)))
    for index, (block, amount) in enumerate(zip(blocks, amounts, strict=True)):
        sizes = [1] * prefix + [len(group) for group in groups]
        normed = block.norm_before(x)
        out, keys, scores = attend(block, normed, places, sizes if proportional else None, rope, prefix)
        x = x + block.after_attention(out)
        if amount:
            tokens = list(range(prefix, len(x)))
            if method == "tome":
                members = pairs(keys, tokens, amount)
            elif method == "topk":
                members = [[token] for token in best(scores, tokens, amount)]
            else:
                members = amount
            for token in sorted(set(tokens) - {token for some in members for token in some}):
                for patch in groups[token - prefix]:
                    run.last_rows[patch], run.dropped_in[patch] = x[token], index
            means = [sum(sizes[i] * x[i] for i in some) / sum(sizes[i] for i in some) for some in members]
            x = torch.stack([*x[:prefix], *means])
            places = places[:prefix] + [places[place_of(some, sizes)] for some in members]
            groups = [[patch for i in some for patch in groups[i - prefix]] for some in members]
        x = x + block.after_mlp(block.mlp(block.norm_after(x)))
        run.rows.append(x)
        run.groups.append(groups)
    return run


def attend(
    block: Block,
    normed: Tensor,
    places: list[int],
    sizes: list[int] | None,
    rope: tuple[Tensor, Tensor] | None,
    prefix: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """What attention adds, the keys as they compare (mean over heads, not turned), and the scores of all tokens (mean
    over heads of what the class token attends to, or, without one, the mean of all rows)."""
    attention = block.attention
    width = attention.head_dim
    queries, keys, values = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
    mean_query = attention.q_proj(normed.mean(dim=0, keepdim=True))
    outputs, compared, scores = [], [], []
    for head in range(queries.shape[1] // width):
        channels = slice(head * width, (head + 1) * width)
        q, k, v = queries[:, channels], keys[:, channels], values[:, channels]
        compared.append(k)
        if rope is not None:
            q, k = turn(q, places, rope, prefix), turn(k, places, rope, prefix)
        logits = q @ k.T / math.sqrt(width)
        if block.bias is not None:
            logits = logits + torch.stack([block.bias[head, place, places] for place in places])
        if sizes is not None:
            logits = logits + torch.tensor(sizes, dtype=torch.float32).log()
        weights = logits.softmax(dim=-1)
        outputs.append(weights @ v)
        if prefix:
            scores.append(weights[0])
        else:
            scores.append((mean_query[0, channels] @ k.T / math.sqrt(width)).softmax(dim=-1))
    return block.out(torch.cat(outputs, dim=-1)), sum(compared) / len(compared), sum(scores) / len(scores)


def turn(rows: Tensor, places: list[int], rope: tuple[Tensor, Tensor], prefix: int) -> Tensor:
    """Channel i and channel i + d/2 of a patch are the two coordinates that are turned by the angle of its place."""
    half = rows.shape[1] // 2
    turned = []
    for row, place in zip(rows, places, strict=True):
        if place < prefix:
            turned.append(row)
            continue
        cosine, sine = rope[0][place - prefix], rope[1][place - prefix]
        first = row[:half] * cosine[:half] - row[half:] * sine[:half]
        second = row[half:] * cosine[half:] + row[:half] * sine[half:]
        turned.append(torch.cat([first, second]))
    return torch.stack(turned)


def pairs(keys: Tensor, tokens: list[int], r: int) -> list[list[int]]:
    """Which tokens each output token is made of: the r at even positions of the sequence that are most like one at an
    odd position go into that one."""
    directions = F.normalize(keys.detach(), dim=-1)
    evens, odds = [i for i in tokens if i % 2 == 0], [i for i in tokens if i % 2 == 1]
    partner, alike = {}, {}
    for even in evens:
        cosines = (directions[odds] @ directions[even]).tolist()
        alike[even] = max(cosines)
        partner[even] = odds[cosines.index(alike[even])]
    merged = sorted(evens, key=lambda even: (-alike[even], even))[: min(r, len(tokens) // 2)]
    left = [[even] for even in evens if even not in merged]
    return left + [[odd, *(even for even in evens if even in merged and partner[even] == odd)] for odd in odds]


def best(scores: Tensor, tokens: list[int], share: float) -> list[int]:
    """The tokens of highest score, the highest first."""
    values = scores.detach().tolist()
    return sorted(tokens, key=lambda i: (-values[i], i))[: math.ceil(share * len(tokens))]


def embed(tower: nn.Module, image: Tensor) -> Tensor:
    x = tower.embeddings(image[None])
    if hasattr(tower, "pre_layrnorm"):
        x = tower.pre_layrnorm(x)
    return x[0]


def anatomy(tower: nn.Module, image: Tensor) -> tuple[list[Block], int, tuple[Tensor, Tensor] | None]:
    """The layers of an encoder, its number of prefix tokens, and the cosines and sines of its patches' places."""
    family = type(tower).__name__
    if family in ("CLIPVisionModel", "SiglipVisionModel"):
        blocks = [
            Block(
                layer.layer_norm1,
                layer.self_attn,
                layer.self_attn.out_proj,
                nn.Identity(),
                layer.layer_norm2,
                layer.mlp,
                nn.Identity(),
            )
            for layer in tower.encoder.layers
        ]
        return blocks, int(family == "CLIPVisionModel"), None
    if family.startswith("Beit"):
        return beit_blocks(tower, image), 1, None
    if family == "IJepaModel":
        blocks = [
            Block(
                layer.layernorm_before,
                layer.attention,
                layer.attention.o_proj,
                nn.Identity(),
                layer.layernorm_after,
                layer.mlp,
                nn.Identity(),
            )
            for layer in tower.layers
        ]
        return blocks, 0, None
    layers = tower.model.layer if family.startswith("DINOv3") else tower.encoder.layer
    blocks = [
        Block(
            layer.norm1,
            layer.attention,
            layer.attention.o_proj,
            layer.layer_scale1,
            layer.norm2,
            layer.mlp,
            layer.layer_scale2,
        )
        for layer in layers
    ]
    rope = tower.rope_embeddings(image[None]) if family.startswith("DINOv3") else None
    return blocks, 1 + getattr(tower.config, "num_register_tokens", 0), rope


def beit_blocks(tower: nn.Module, image: Tensor) -> list[Block]:
    window = tuple(side // tower.config.patch_size for side in image.shape[1:])
    blocks = []
    for layer in tower.layers:
        tables = [own for own in (tower.shared_position_bias, layer.relative_position_bias) if own is not None]
        blocks.append(
            Block(
                layer.layernorm_before,
                layer.attention,
                layer.attention.o_proj,
                layer.lambda_1.mul,
                layer.layernorm_after,
                layer.mlp,
                layer.lambda_2.mul,
                sum(table(window)[0] for table in tables) if tables else None,
            )
        )
    return blocks


def weighted_mean(rows: Tensor, weights: Tensor) -> Tensor:
    return (weights[:, None] * rows).sum(dim=0) / weights.sum()


def naive_answer(model: nn.Module, run: NaiveRun) -> Tensor:
    """The main output of a stock model for the image of a run, read off its last tokens by their weights."""
    name = type(model).__name__
    if name == "CLIPVisionModel":
        return model.post_layernorm(run.rows[-1][0])
    if name == "CLIPForImageClassification":
        return model.classifier(weighted_mean(*run.weighed()))
    if name == "SiglipVisionModel":
        return pooled_by_attention(model.head, *run.weighed(model.post_layernorm))
    if name == "SiglipForImageClassification":
        return model.classifier(weighted_mean(*run.weighed(model.vision_model.post_layernorm)))
    if name == "IJepaForImageClassification":
        return model.classifier(weighted_mean(*run.weighed(model.ijepa.layernorm)))
    if name in ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification"):
        norm = model.base_model.layernorm
        return model.classifier(torch.cat([norm(run.rows[-1][0]), weighted_mean(*run.weighed(norm))]))
    if name == "DINOv3ViTModel":
        return model.norm(run.rows[-1][0])
    if name == "BeitForImageClassification":
        if model.config.use_mean_pooling:
            return model.classifier(model.beit.pooler.layernorm(weighted_mean(*run.weighed())))
        return model.classifier(model.beit.layernorm(run.rows[-1][0]))
    raise ValueError(f"how a {name} reads tokens is not written here")


def pooled_by_attention(head: nn.Module, rows: Tensor, weights: Tensor) -> Tensor:
    """The attention-pooling head of SigLIP, in which a token counts by its weight."""
    width = rows.shape[1]
    inner = head.attention
    query, key, value = (
        F.linear(x, inner.in_proj_weight[i * width : (i + 1) * width], inner.in_proj_bias[i * width : (i + 1) * width])
        for i, x in enumerate((head.probe[0], rows, rows))
    )
    outputs = []
    for channels in torch.arange(width).chunk(inner.num_heads):
        logits = query[:, channels] @ key[:, channels].T / math.sqrt(len(channels)) + weights.log()
        outputs.append(logits.softmax(dim=-1) @ value[:, channels])
    pooled = inner.out_proj(torch.cat(outputs, dim=-1))
    return (pooled + head.mlp(head.layernorm(pooled)))[0]
