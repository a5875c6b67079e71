# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Attention that also returns how much attention each token receives.

B images · T tokens · H heads · d features per head. Packed tokens are one "image" with the rows of all images:
(1, H, sum of lengths, d).

A token's received attention is the mean of its column of the attention map. It is computed in one of three ways. In
float32 they agree.

- On a CPU, image by image. The map of one image fits into the cache, and two maps never exist at once.
- On a GPU, in groups of images that are padded to the longest, because a GPU is slow with many small products.
- On a GPU in half precision, without a map. A flash kernel computes the output, and a kernel of `kernels` the columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention import (
    Lengths,
    PairBias,
    attend_varlen,
    gpu_kernels,
    has_varlen_kernel,
    join_biases,
    pack_heads,
    pad_maps,
)
from .packed import layout_of
from .tokens import full_precision, pad, unpad


MOST_WEIGHTS = 2**24  # of a map that a GPU computes at once: 64 MiB in float32

Attended = tuple[Tensor, Tensor | None, Tensor]


def attend_with_map(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    lengths: Lengths = None,
    pair_bias: PairBias | None = None,
) -> Attended:
    """Attend for methods that read received attention: returns (output, map if eager, received attention (B, T)).

    A graph for any number of images has no loop over images, so it computes the maps of all images together.
    """
    compiling = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if lengths is None and compiling:
        return _attend_at_once(attention, query, key, value, key_bias, None, pair_bias)
    without_map = pair_bias is None and not compiling and has_varlen_kernel(attention, query)
    if without_map and gpu_kernels() is not None:
        return _attend_without_map(attention, query, key, value, key_bias, lengths)
    if query.is_cuda:
        return _attend_by_groups(attention, query, key, value, key_bias, lengths, pair_bias)
    return _attend_one_by_one(attention, query, key, value, key_bias, lengths, pair_bias)


def _attend_one_by_one(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    lengths: Lengths,
    pair_bias: PairBias | None,
) -> Attended:
    keep_maps = attention.config._attn_implementation == "eager"
    if lengths is None:
        images = zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
        biases: Any = [None] * len(query) if key_bias is None else key_bias.unbind()
    else:
        images = zip(*(tensor[0].split(lengths, dim=1) for tensor in (query, key, value)), strict=True)
        biases = [None] * len(lengths) if key_bias is None else key_bias[0].split(lengths)
    outputs, received, maps = [], [], []
    with full_precision(query):
        for image, ((one_query, one_key, one_value), bias) in enumerate(zip(images, biases, strict=True)):
            if pair_bias is not None:
                pairs = pair_bias.of_image(image, one_query.shape[1], one_key.shape[1])[0].float()
                bias = pairs if bias is None else pairs + bias
            weights = _logits(one_query, one_key, bias, attention.scaling).softmax(dim=-1)  # (H, T, T)
            received.append(weights.detach().sum(dim=(0, 1)) / weights[..., 0].numel())
            if keep_maps:
                maps.append(weights[None])
            if attention.training:
                weights = F.dropout(weights, attention.attention_dropout)
            outputs.append((weights.to(value.dtype) @ one_value).transpose(0, 1))
    if lengths is None:
        return torch.stack(outputs), torch.cat(maps) if keep_maps else None, torch.stack(received)
    padded_maps = pad_maps(maps, lengths, lengths) if keep_maps else None
    return torch.cat(outputs)[None], padded_maps, pad(torch.cat(received)[None], lengths)


def _attend_at_once(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    live: Tensor | None,
    pair_bias: PairBias | None,
) -> Attended:
    """Attend in even images. live: (B, T) bool, which tokens are not padding, or None: all of them. Rows of padding
    are computed too, but their attention does not count as received."""
    with full_precision(query):
        bias = join_biases(key_bias, None if pair_bias is None else pair_bias.whole().float())
        logits = _logits(query, key, bias, attention.scaling)
        if live is not None:
            logits = logits.masked_fill(~live[:, None, None, :], -torch.inf)
        weights = logits.softmax(dim=-1)  # (B, H, T, T)
        if live is None:
            received = weights.detach().mean(dim=(1, 2))
        else:
            received = weights.detach().masked_fill(~live[:, None, :, None], 0.0).sum(dim=2).mean(dim=1)
            received = received / live.sum(dim=1, keepdim=True).clamp(min=1)
        dropped = F.dropout(weights, attention.attention_dropout, attention.training)
        output = (dropped.to(value.dtype) @ value).transpose(1, 2)
    return output, weights if attention.config._attn_implementation == "eager" else None, received


def _attend_by_groups(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    lengths: Lengths,
    pair_bias: PairBias | None,
) -> Attended:
    live = None
    if lengths is not None:
        query, key, value = (pad(rows.transpose(1, 2), lengths).transpose(1, 2) for rows in (query, key, value))
        key_bias = None if key_bias is None else pad(key_bias, lengths)
        live = layout_of(lengths, query.device).real
    batch, heads, length, _ = query.shape
    step = max(1, MOST_WEIGHTS // (heads * length * length))
    parts = []
    for first in range(0, batch, step):
        group = slice(first, first + step)
        one_bias, one_live = (None if of_all is None else of_all[group] for of_all in (key_bias, live))
        pairs = None if pair_bias is None else pair_bias.of_images(group)
        parts.append(_attend_at_once(attention, query[group], key[group], value[group], one_bias, one_live, pairs))
    outputs, maps, received = zip(*parts, strict=True)
    output = torch.cat(outputs)
    if lengths is None or live is None:
        return output, None if maps[0] is None else torch.cat(maps), torch.cat(received)
    whole = None
    if maps[0] is not None:  # a row of padding attends to nothing
        whole = torch.cat(maps).masked_fill(~live[:, None, :, None], 0.0)
    return unpad(output, lengths), whole, torch.cat(received)


def _attend_without_map(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, lengths: Lengths
) -> Attended:
    batch, _, length, _ = query.shape
    packed = lengths
    if packed is None:
        packed = (length,) * batch
        query, key, value = pack_heads(query), pack_heads(key), pack_heads(value)
        key_bias = None if key_bias is None else key_bias.reshape(1, -1)
    output, log_sums, ends = attend_varlen(attention, query, key, value, key_bias, packed, packed)
    received = gpu_kernels().received(
        query[0].detach(),
        key[0].detach(),
        None if key_bias is None else key_bias[0].detach(),
        log_sums.detach(),
        ends,
        max(packed),
        attention.scaling,
    )
    if lengths is None:
        return output.view(batch, length, *output.shape[2:]), None, received.view(batch, length)
    return output, None, pad(received[None], lengths)


def attend_masked(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    mask: Tensor,
    pair_bias: PairBias | None = None,
) -> Attended:
    """Attend as `attend_with_map` does, with tokens that are masked instead of removed.

    mask: (B, T), 1 for a live token and 0 for a masked one. It weighs the keys and has a gradient. Masked queries
    still attend, but their attention does not count as received.
    """
    bias = join_biases(key_bias, None if pair_bias is None else pair_bias.whole().float())
    with full_precision(query):
        logits = _logits(query, key, bias, attention.scaling)  # (B, H, T, T)
        highest = logits.detach().masked_fill((mask <= 0.5)[:, None, None, :], -torch.inf).amax(dim=-1, keepdim=True)
        weights = (logits - highest).clamp(max=30).exp() * mask[:, None, None, :]  # a masked one can be far higher
        weights = weights / weights.sum(dim=-1, keepdim=True)
        live = (mask > 0.5).float()
        received = (weights.detach().mean(dim=1) * live[:, :, None]).sum(dim=1) / live.sum(dim=1, keepdim=True)
        dropped = F.dropout(weights, attention.attention_dropout, attention.training)
        output = (dropped.to(value.dtype) @ value).transpose(1, 2)
    return output, weights if attention.config._attn_implementation == "eager" else None, received


def _logits(query: Tensor, key: Tensor, bias: Tensor | None, scaling: float) -> Tensor:
    """Compute the logits (..., H, Q, T) float32. bias: per key, (T,) or (B, T), or per pair, (..., H, Q, T)"""
    if query.ndim == 3 and query.dtype == torch.float32 and bias is not None:
        # scaling and bias are part of the product, which saves two passes over the map
        bias = bias if bias.ndim == 3 else bias.expand(len(query), 1, -1)
        return torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scaling)
    logits = (query * scaling @ key.transpose(-1, -2)).float()
    if bias is None:
        return logits
    return logits + (bias[:, None, None, :] if bias.ndim == 2 else bias)
