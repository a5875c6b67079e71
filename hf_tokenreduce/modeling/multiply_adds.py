# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Multiply-adds, which papers call FLOPs, computed by arithmetic: no model runs here.

The products in the encoder's linear layers and attention are counted, and those of the method itself. Norms,
activations, embedding and head are not counted.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .checks import is_number
from .encoders import EncoderFacts, facts_of


def multiply_adds(
    config: PreTrainedConfig | EncoderFacts,
    token_counts: Tensor,
    num_tokens: int,
    reduction: Any = None,
    for_prefix: bool = False,
) -> Tensor:
    """Count the multiply-adds of the encoder for each image: (B,) float64.

    Args:
        config: Configuration of the model, or the facts of its encoder.
        token_counts: (B, L) long, the number of tokens that leave each layer, as a reduced model returns it.
        num_tokens: Number of tokens that enter the model, prefix tokens included.
        reduction: The method configuration that gave these counts. None: a dense model.
        for_prefix: Whether to count the last layer as it is computed if only prefix tokens are read: without the
            method, and with queries, output projection and MLP of prefix tokens only. Papers count the whole layer.
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
    """Return the share of a dense encoder's multiply-adds that each image costs, (B,) float64.

    The arguments are those of `multiply_adds`.
    """
    dense = multiply_adds(config, torch.full_like(token_counts[:1], num_tokens), num_tokens)
    return multiply_adds(config, token_counts, num_tokens, reduction) / dense


def even_counts(reduction: Any, config: PreTrainedConfig | EncoderFacts) -> list[int]:
    """Count the tokens that leave each layer, prefix included, for a method that keeps as many of every image."""
    facts = facts_of(config)
    count, counts = facts.num_patches, []
    for layer in range(facts.num_hidden_layers):
        count = reduction.leaving(layer, count, facts)
        counts.append(facts.num_prefix_tokens + count)
    return counts


def even_share(reduction: Any, config: PreTrainedConfig | EncoderFacts) -> float:
    """Return the share of a dense encoder's multiply-adds for a method that keeps as many tokens of every image."""
    facts = facts_of(config)
    return shares_kept(facts, torch.tensor([even_counts(reduction, facts)]), facts.num_tokens, reduction).item()


def check_share(share: Any) -> None:
    """Raise a ValueError unless `share` is a number above 0 and at most 1."""
    if not is_number(share) or not 0 < share <= 1:
        raise ValueError(f"share must be the share of multiply-adds to keep, above 0 and at most 1, got {share!r}.")


def largest_within(share: float, most: int, share_at: Callable[[int], float]) -> int:
    """Find the largest number from 0 to `most` whose share is at most `share`. Shares must grow with the number."""
    check_share(share)
    if share_at(most) <= share:
        return most
    least = share_at(0)
    if least > share:
        raise ValueError(
            f"share={share} cannot be reached: the strongest setting keeps {least:.3f} of the multiply-adds. Give a "
            "higher share. With a method that takes layers=..., you can also name more and earlier layers."
        )
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share_at(middle) <= share else (low, middle)
    return low


def class_attention_cost(count: int, facts: EncoderFacts) -> int:
    """Count the class token's query and its products with the keys of `count` patch tokens and the prefix."""
    return (facts.hidden_size + count + facts.num_prefix_tokens) * facts.hidden_size


def similarity_cost(count: int, facts: EncoderFacts) -> int:
    """Count the products of one half of the tokens with the other half, by keys averaged over the heads."""
    return products_of_keys(count // 2, count - count // 2, facts)


def products_of_keys(sources: int, receivers: int, facts: EncoderFacts) -> int:
    """Count the products of all `sources` with all `receivers`, by keys averaged over the heads."""
    return sources * receivers * (facts.hidden_size // facts.num_attention_heads)


def rounded_up_share(rate: float, count: int) -> int:
    """Return ceil(rate * count), at least 1. Rounding errors of floats are ignored: 0.55 of 100 is 55, not 56."""
    return max(1, math.ceil(rate * count - 1e-5))


def rounded_half_up(value: float) -> int:
    """Return the nearest integer, and ignore rounding errors of floats in the same way: 0.15 * 10 becomes 2."""
    return math.floor(value + 0.5 + 1e-5)
