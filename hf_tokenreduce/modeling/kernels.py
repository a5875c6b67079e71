# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""GPU kernels for attention with weights of keys, which the kernels of torch do slowly or not at all.

- `weighted_attention`: attention with a bias per key. Flash kernels take none, and those that take a mask are slower.
- `received_attention`: the sums of the columns of attention maps which are never stored. A flash kernel keeps of each
  row of a map the logarithm of its sum of exponentials. With it, any weight of the map can be computed again from its
  query and its key.

`attention.py` imports this file only on a GPU.
"""

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError as error:  # a try, so that transformers does not ask for triton on a CPU
    raise ImportError("kernels needs triton, which comes with torch for CUDA.") from error


LOG2_E = 1.4426950408889634  # a GPU computes powers of 2
BLOCKS = 128, 32  # queries and keys that a program of `weighted_attention` holds at once: the fastest on an H100


@triton.jit
def _attend(
    query, key, value, bias, output, num_tokens, num_queries, heads, scale,
    query_image, query_head, query_row, key_image, key_head, key_row, value_image, value_head, value_row,
    LOG2_E: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    # Each program takes a block of queries of one head of one image, and goes through the keys. It keeps the highest
    # logit so far, and scales what it has summed whenever a higher one comes.
    image, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    features = tl.arange(0, WIDTH)
    asking = tl.program_id(1) * QUERIES + tl.arange(0, QUERIES)
    real = (asking < num_queries)[:, None] & (features < HEAD_DIM)[None, :]
    queries = tl.load(
        query + image * query_image + head * query_head + asking[:, None] * query_row + features[None, :],
        mask=real,
        other=0.0,
    )
    highest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    summed = tl.zeros((QUERIES, WIDTH), tl.float32)
    for begin in range(0, num_tokens, KEYS):
        asked = begin + tl.arange(0, KEYS)
        inside = asked < num_tokens
        keys = tl.load(
            key + image * key_image + head * key_head + asked[None, :] * key_row + features[:, None],
            mask=inside[None, :] & (features < HEAD_DIM)[:, None],
            other=0.0,
        )
        added = tl.load(bias + image * num_tokens + asked, mask=inside, other=float("-inf"))
        logits = tl.dot(queries, keys) * scale + added[None, :] * LOG2_E
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        weights = tl.exp2(logits - higher[:, None])
        shrunk = tl.exp2(highest - higher)
        total = total * shrunk + tl.sum(weights, axis=1)
        values = tl.load(
            value + image * value_image + head * value_head + asked[:, None] * value_row + features[None, :],
            mask=inside[:, None] & (features < HEAD_DIM)[None, :],
            other=0.0,
        )
        summed = tl.dot(weights.to(values.dtype), values, summed * shrunk[:, None])
        highest = higher
    place = (image * num_queries + asking[:, None]) * heads + head
    tl.store(output + place * HEAD_DIM + features[None, :], (summed / total[:, None]).to(queries.dtype), mask=real)


def weighted_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, blocks: tuple[int, int] = BLOCKS
) -> Tensor:
    """Attend with a bias per key.

    Args:
        query: (B, H, Q, d) in half precision.
        key: (B, H, T, d).
        value: (B, H, T, d).
        bias: (B, T) float32, finite, added to the logits of each key.
        scale: The factor of the products.
        blocks: Numbers of queries and of keys that are computed at once.

    Returns:
        (B, Q, H, d). It has no gradient.

    Example:
        >>> weighted_attention(query, key, value, size.log(), 64**-0.5)
    """
    batch, heads, num_queries, head_dim = query.shape
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    output = torch.empty(batch, num_queries, heads, head_dim, dtype=query.dtype, device=query.device)
    queries, keys = blocks
    grid = (batch * heads, triton.cdiv(num_queries, queries))  # the second is at most 65,535
    with torch.cuda.device_of(query):  # triton runs on the current device
        _attend[grid](
            query, key, value, bias.contiguous(), output, key.shape[2], num_queries, heads, scale * LOG2_E,
            *query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
            LOG2_E=LOG2_E, HEAD_DIM=head_dim, WIDTH=max(16, triton.next_power_of_2(head_dim)),
            QUERIES=queries, KEYS=keys,
        )  # fmt: skip
    return output


@triton.jit
def _sum_columns(
    query, key, bias, log_sums, ends, sums, rows, scale,
    query_row, query_head, key_row, key_head, sums_row,
    HAS_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Each program takes a block of keys of one head of one image, goes through the queries of that image, and adds up
    # the weights of its keys. 64 bits, because the places of many large images do not fit into 32.
    image, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    first, last = tl.load(ends + image).to(tl.int64), tl.load(ends + image + 1).to(tl.int64)
    own = first + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    features = tl.arange(0, WIDTH)
    inside = own < last
    keys = tl.load(
        key + own[:, None] * key_row + head * key_head + features[None, :],
        mask=inside[:, None] & (features < HEAD_DIM)[None, :],
        other=0.0,
    )
    total = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + own, mask=inside, other=0.0)
    for begin in range(first, last, BLOCK):
        asking = begin + tl.arange(0, BLOCK)
        real = asking < last
        queries = tl.load(
            query + asking[None, :] * query_row + head * query_head + features[:, None],
            mask=real[None, :] & (features < HEAD_DIM)[:, None],
            other=0.0,
        )
        logits = tl.dot(keys, queries) * scale
        if HAS_BIAS:
            logits += added[:, None]
        log_sum = tl.load(log_sums + head * rows + asking, mask=real, other=float("inf"))
        total += tl.sum(tl.exp(logits - log_sum[None, :]), axis=1)
    tl.store(sums + head * sums_row + own, total / (last - first), mask=inside)


def received_attention(
    query: Tensor, key: Tensor, bias: Tensor | None, log_sums: Tensor, ends: Tensor, longest: int, scale: float
) -> Tensor:
    """Return how much attention each token of packed images receives, as the mean over heads and queries.

    Args:
        query: (H, sum of lengths, d) in half precision.
        key: Of the same shape.
        bias: (sum of lengths,) float32, added to the logits of each key, or None.
        log_sums: (H, sum of lengths) float32, the logarithm of the sum of exponentials of each query's logits.
        ends: (B + 1,) int32, the row where each image begins, and the number of all rows.
        longest: The number of tokens of the longest image.
        scale: The factor of the products.

    Returns:
        (sum of lengths,) float32.

    Example:
        >>> received_attention(query, key, None, log_sums, ends, 197, 64**-0.5)
    """
    heads, rows, head_dim = query.shape
    query, key = (part if part.stride(2) == 1 else part.contiguous() for part in (query, key))
    sums = torch.empty(heads, rows, dtype=torch.float32, device=query.device)
    block = 64
    grid = (len(ends) - 1, triton.cdiv(longest, block), heads)
    with torch.cuda.device_of(query):  # triton runs on the current device
        _sum_columns[grid](
            query, key, log_sums if bias is None else bias, log_sums, ends, sums, rows, scale,
            query.stride(1), query.stride(0), key.stride(1), key.stride(0), rows,
            HAS_BIAS=bias is not None, HEAD_DIM=head_dim, WIDTH=max(16, triton.next_power_of_2(head_dim)), BLOCK=block,
        )  # fmt: skip
    return sums.mean(dim=0)
