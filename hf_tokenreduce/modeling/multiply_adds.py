# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Multiply-adds, which is what papers call FLOPs, by arithmetic: nothing runs here.

Counted are the products of the encoder's layers, linear and in attention, and those of the method itself. Not counted
are norms, activations, embedding and head.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .encoders import EncoderFacts, facts_of


def multiply_adds(
    config: PreTrainedConfig | EncoderFacts,
    token_counts: Tensor,
    num_tokens: int,
    reduction: Any = None,
    for_prefix: bool = False,
) -> Tensor:
    """Multiply-adds of the encoder for each image: (B,) float64.

    token_counts: long (B, L), the tokens that leave each layer, as a reduced model returns them
    num_tokens: tokens that enter the model, prefix tokens included
    reduction: the method configuration that left these counts. None: a dense model.
    for_prefix: count the last layer as it is computed where nobody reads its patches: the method has nothing to do
        there, and queries, output projection and MLP are those of prefix tokens. By default as papers count.
    """
    facts = facts_of(config)
    width = facts.hidden_size
    leaving = token_counts.double()
    entering = leaving.roll(1, dims=1)
    entering[:, 0] = num_tokens
    own = torch.zeros(len(leaving), dtype=torch.float64, device=leaving.device)
    if reduction is not None:
        acting = leaving.shape[1] - (for_prefix and (reduction.hook != "before_encoder" or leaving.shape[1] > 1))
        for layer, counts in enumerate((entering - facts.num_prefix_tokens).unbind(dim=1)[:acting]):
            different, which = counts.unique(return_inverse=True)
            costs = [reduction.own_multiply_adds(layer, int(count), facts) for count in different.tolist()]
            own += torch.tensor(costs, dtype=torch.float64, device=own.device)[which]
    hook = "after_attention" if reduction is None else reduction.hook
    if hook == "before_encoder":
        entering[:, 0] = leaving[:, 0]
    queries = leaving if hook == "select_queries" else entering
    through_mlp = entering if hook == "after_layer" else leaving
    if for_prefix:
        queries, through_mlp = queries.clone(), through_mlp.clone()
        queries[:, -1] = through_mlp[:, -1] = facts.num_prefix_tokens
    attention = 2 * (entering + queries) * width**2 + 2 * queries * entering * width
    return own + (attention + through_mlp * facts.mlp_products).sum(dim=1)


def shares_kept(
    config: PreTrainedConfig | EncoderFacts, token_counts: Tensor, num_tokens: int, reduction: Any
) -> Tensor:
    """The share of a dense encoder's multiply-adds that each image costs, (B,) float64; arguments as above."""
    dense = multiply_adds(config, torch.full_like(token_counts[:1], num_tokens), num_tokens)
    return multiply_adds(config, token_counts, num_tokens, reduction) / dense


def even_counts(reduction: Any, config: PreTrainedConfig | EncoderFacts) -> list[int]:
    """The tokens that leave each layer, prefix included, by a method that keeps the same number of every image."""
    facts = facts_of(config)
    count, counts = facts.num_patches, []
    for layer in range(facts.num_hidden_layers):
        count = reduction.leaving(layer, count, facts)
        counts.append(facts.num_prefix_tokens + count)
    return counts


def even_share(reduction: Any, config: PreTrainedConfig | EncoderFacts) -> float:
    """The share of a dense model's multiply-adds that such a method keeps."""
    facts = facts_of(config)
    return shares_kept(facts, torch.tensor([even_counts(reduction, facts)]), facts.num_tokens, reduction).item()


def check_share(share: float) -> None:
    """Raise a ValueError unless it is a share of multiply-adds that can be kept."""
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"share is that of the multiply-adds to keep, above 0 and at most 1, got {share!r}.")


def largest_within(share: float, most: int, share_at: Callable[[int], float]) -> int:
    """The largest of 0, ..., most whose share, which grows with it, is at most `share`."""
    check_share(share)
    if share_at(most) <= share:
        return most
    least = share_at(0)
    if least > share:
        raise ValueError(
            f"share={share} cannot be reached: the strongest setting keeps {least:.3f} of the multiply-adds. Give a "
            "higher share, or let more and earlier layers reduce."
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share_at(middle) <= share else (low, middle)
    return low


def class_attention_cost(count: int, facts: EncoderFacts) -> int:
    """Of the class token's query, and its products with the keys of `count` patch tokens and the prefix."""
    return (facts.hidden_size + count + facts.num_prefix_tokens) * facts.hidden_size


def similarity_cost(count: int, facts: EncoderFacts) -> int:
    """Count the products of the keys, averaged over heads, of one half of the tokens with the other."""
    return products_of_keys(count // 2, count - count // 2, facts)


def products_of_keys(sources: int, receivers: int, facts: EncoderFacts) -> int:
    """Count the products of the keys, averaged over heads, of so many tokens with so many others."""
    return sources * receivers * (facts.hidden_size // facts.num_attention_heads)


def rounded_up_share(rate: float, count: int) -> int:
    """ceil(rate * count), at least 1, blind to the last digits of a float: 0.55 of 100 tokens are 55, not 56."""
    return max(1, math.ceil(rate * count - 1e-5))


def rounded_half_up(value: float) -> int:
    """The nearest integer, as blind: 0.15 * 10 becomes 2."""
    return math.floor(value + 0.5 + 1e-5)
