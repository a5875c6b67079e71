# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""One GPU kernel that sums the columns of attention maps which are never stored.

A flash kernel keeps of each row of a map the logarithm of its sum of exponentials. With it, any weight of the map can
be computed again from its query and its key. Each program takes a block of keys of one head of one image, goes through
the queries of that image, and adds up the weights of its keys. `received.py` imports this file only on a GPU.
"""

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError as error:  # a try, so that transformers does not ask for triton on a CPU
    raise ImportError("received_kernel needs triton, which comes with torch for CUDA.") from error


@triton.jit
def _sum_columns(
    query, key, bias, log_sums, ends, sums, rows, scale,
    query_row, query_head, key_row, key_head, sums_row,
    HAS_BIAS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # 64 bits, because the places of many large images do not fit into 32.
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
