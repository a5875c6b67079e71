# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Attention over even and packed tokens, with a bias per key, and the scores that methods read from it.

B images · T tokens, of which the first P are prefix tokens and N = T - P patch tokens · Q query tokens · H heads ·
d features per head. Packed tokens are one "image" with the rows of all images: (1, H, sum of lengths, d).
"""

import inspect
import math
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import logging

from .packed import layout_of
from .tokens import full_precision, pad, wants_gradient


logger = logging.get_logger(__name__)

varlen_attn: Any = None
AuxRequest: Any = None
with suppress(ImportError):  # exists in torch 2.10 and later
    from torch.nn.attention.varlen import AuxRequest, varlen_attn


def _takes_scale(kernel: Any) -> bool:
    """Return whether the kernel takes a scale. Its first release always divides by the root of the head size."""
    return kernel is not None and "scale" in inspect.signature(kernel).parameters


Lengths = tuple[int, ...] | None


class PairBias(NamedTuple):
    """What is added to the logits of each pair of a query and a key, by their places in the image.

    Attributes:
        table: (H, T0, T0), the bias of all pairs of places, prefix included.
        queries: (B, Q) long, the place of each query, padded to the longest image if tokens are packed. Or (1, Q), if
            they are the same in all images.
        keys: (B, T) or (1, T) long, the place of each key, padded in the same way.
    """

    table: Tensor
    queries: Tensor
    keys: Tensor

    def whole(self) -> Tensor:
        """Return the bias of all images, (B, H, Q, T), or (1, H, Q, T) if it is the same for all."""
        index = self.queries[:, :, None] * self.table.shape[1] + self.keys[:, None, :]
        return self.table.flatten(1)[:, index].transpose(0, 1)

    def of_image(self, image: int, num_queries: int, num_keys: int) -> Tensor:
        """Return the bias of one image without padding, (1, H, Q, T)."""
        queries = self.queries[image % len(self.queries), :num_queries]
        keys = self.keys[image % len(self.keys), :num_keys]
        return self.table[:, queries][:, :, keys][None]

    def of_images(self, some: slice) -> "PairBias":
        """Return the part for some of the images."""
        queries, keys = (rows if len(rows) == 1 else rows[some] for rows in (self.queries, self.keys))
        return PairBias(self.table, queries, keys)


class AttentionView(NamedTuple):
    """What a hook can read from an attention layer.

    Nothing is computed until a method is called. The methods return even tensors: if tokens are packed, they are
    padded with zeros to the longest image.

    Attributes:
        attention: The attention module.
        hidden_states: (B, T, D) or packed, the normalised input of the module.
        key: (B, H, T, d) or packed, with the rotation of their places if the encoder has one.
        value: (B, H, T, d) or packed.
        key_bias: (B, T) or packed, float32, added to the logits of each key. None: nothing is added.
        num_prefix_tokens: P.
        lengths: The number of tokens of each image if they are packed, else None.
        received: (B, T) float32, the attention that each token receives, as the mean over heads and live queries. Only
            after attention, and only for reducers with `needs_received`.
        content: (B, H, T, d) or packed, the keys without rotation, to compare tokens by. None: the same as `key`.
        pair_bias: What is added for each pair of places, or None.
    """

    attention: Any
    hidden_states: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    num_prefix_tokens: int
    lengths: Lengths = None
    received: Tensor | None = None
    content: Tensor | None = None
    pair_bias: PairBias | None = None

    def class_attention(self) -> Tensor:
        """Return how much the class token attends to each token: (B, H, T) float32.

        Only this row of each head is computed, never the whole map. In a model without prefix tokens the mean token
        takes the place of the class token; with a key bias, each token counts in it once per patch it stands for.
        """
        head_dim = self.attention.head_dim
        hidden_states, key, bias, padding = self.hidden_states, self.key, self.key_bias, None
        if self.lengths is not None:
            key = split_heads(pad(key.transpose(1, 2).flatten(2), self.lengths), head_dim)
            bias = None if bias is None else pad(bias, self.lengths)
            padding = ~layout_of(self.lengths, key.device).real
        if self.num_prefix_tokens == 0:
            asking = self._mean_token(bias, padding)
        elif self.lengths is None:
            asking = hidden_states[:, :1]
        else:
            asking = hidden_states[0].index_select(0, layout_of(self.lengths, key.device).starts[:, 0])[:, None]
        query = split_heads(self.attention.q_proj(asking), head_dim)
        with full_precision(query):
            logits = query.float() @ key.float().transpose(2, 3) * self.attention.scaling  # (B, H, 1, T)
            if bias is not None:
                logits = logits + bias[:, None, None, :]
            if self.pair_bias is not None and self.num_prefix_tokens:
                logits = logits + self.pair_bias._replace(queries=self.pair_bias.queries[:, :1]).whole().float()
            if padding is not None:
                logits = logits.masked_fill(padding[:, None, None, :], -torch.inf)
            return logits.softmax(dim=-1).squeeze(2)

    def _mean_token(self, bias: Tensor | None, padding: Tensor | None) -> Tensor:
        """Return the mean of each image's tokens, weighted by size if there is a key bias: (B, 1, D)."""
        rows = self.hidden_states if self.lengths is None else pad(self.hidden_states, self.lengths)
        weights = torch.zeros(rows.shape[:2], device=rows.device) if bias is None else bias
        if padding is not None:
            weights = weights.masked_fill(padding, -torch.inf)
        with full_precision(rows):
            return (weights.softmax(dim=1)[:, None] @ rows.float()).to(rows.dtype)

    def patch_keys(self) -> Tensor:
        """Return the keys of the patch tokens, averaged over the heads: (B, N, d) float32."""
        keys = self.key if self.content is None else self.content
        # Averaged in the order of memory, so that no runtime makes a copy in another order.
        keys = keys.transpose(1, 2).mean(dim=2, dtype=torch.float32)
        if self.lengths is not None:
            keys = pad(keys, self.lengths)
        return keys[:, self.num_prefix_tokens :]

    def value_norms(self) -> Tensor:
        """Return the length of each token's value vector in each head: (B, H, T) float32."""
        norms = self.value.transpose(1, 2).float().norm(dim=-1)  # (B, T, H), the order of memory
        if self.lengths is not None:
            norms = pad(norms, self.lengths)
        return norms.transpose(1, 2)


def split_heads(rows: Tensor, head_dim: int) -> Tensor:
    """Split rows into heads: (B, T, H * d) -> (B, H, T, d)."""
    return rows.view(*rows.shape[:2], -1, head_dim).transpose(1, 2)


def attend(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    query_lengths: Lengths = None,
    key_lengths: Lengths = None,
    pair_bias: PairBias | None = None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attend by the implementation that the configuration names.

    Returns the output (B, Q, H, d), packed if the queries are packed. Eager attention also returns its map
    (B, H, Q, T), padded with zeros.

    Packed tokens on CUDA in half precision go through one kernel of variable length. Other packed tokens go image by
    image, which costs little on a CPU: most time is spent in the linear layers, and those see all rows at once.
    """
    if query_lengths is None:
        pairs = None if pair_bias is None else pair_bias.whole()
        # The function of transformers warns a caller who asks for attentions, so such a call must reach it.
        by_sdpa = attention.config._attn_implementation == "sdpa" and not kwargs.get("output_attentions")
        attend_to_all = _attend_by_sdpa if by_sdpa else _attend_evenly
        return attend_to_all(attention, query, key, value, join_biases(key_bias, pairs), **kwargs)
    if key_lengths is None:
        batch, length = key.shape[0], key.shape[2]
        key, value = pack_heads(key), pack_heads(value)
        key_bias = None if key_bias is None else key_bias.reshape(1, -1)
        key_lengths = (length,) * batch
    if pair_bias is None and has_varlen_kernel(attention, query):
        return attend_varlen(attention, query, key, value, key_bias, query_lengths, key_lengths)[0], None
    biases: Any = [None] * len(key_lengths)
    if key_bias is not None:  # copies, because on a GPU torch crashes unless a mask begins at a multiple of 16 bytes
        biases = [part.clone() if part.is_cuda else part for part in key_bias.split(key_lengths, dim=1)]
    attend_to_one = _attend_by_sdpa if attention.config._attn_implementation == "sdpa" else _attend_evenly
    outputs, maps = [], []
    for image, (one_query, one_key, one_value, one_bias) in enumerate(
        zip(
            query.split(query_lengths, dim=2),
            key.split(key_lengths, dim=2),
            value.split(key_lengths, dim=2),
            biases,
            strict=True,
        )
    ):
        pairs = None if pair_bias is None else pair_bias.of_image(image, one_query.shape[2], one_key.shape[2])
        bias = join_biases(one_bias, pairs)
        output, weights = attend_to_one(attention, one_query, one_key, one_value, bias, **kwargs)
        outputs.append(output)
        if weights is not None:
            maps.append(weights)
    return torch.cat(outputs, dim=1), pad_maps(maps, query_lengths, key_lengths) if maps else None


def join_biases(key_bias: Tensor | None, pairs: Tensor | None) -> Tensor | None:
    """Join the biases of keys and pairs: (B, T) if there are only keys, else (B, H, Q, T)."""
    if pairs is None:
        return key_bias
    return pairs if key_bias is None else pairs + key_bias[:, None, None, :]


def fold_key_bias(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Widen the heads so that q·k * scaling contains the key bias, for kernels that take no mask.

    Two extra channels hold bias / scaling as a high and a low part. In half types the two parts together keep at least
    16 bits of its precision. The heads grow to a multiple of 8, as flash kernels require; the caller crops the output.

    key_bias: float32, one number per key, which broadcasts to all dimensions of the keys but the last
    """
    extra = 2 + -(query.shape[-1] + 2) % 8
    wide_bias = (key_bias / scaling).expand(key.shape[:-1])[..., None]
    high = wide_bias.to(key.dtype)
    low = (wide_bias - high.float()).to(key.dtype)
    key = torch.cat([key, high, low, key.new_zeros(*key.shape[:-1], extra - 2)], dim=-1)
    ones = query.new_ones(*query.shape[:-1], 2)
    query = torch.cat([query, F.pad(ones, (0, extra - 2))], dim=-1)
    return query, key, F.pad(value, (0, extra))


def _attend_evenly(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Attend by the interface of transformers. bias: (B, T) per key or (B, H, Q, T) per pair, or None"""
    implementation = attention.config._attn_implementation
    mask = None
    head_dim = value.shape[-1]
    if bias is not None:
        if bias.ndim == 4 or implementation in ("eager", "sdpa"):
            mask = _as_mask(bias, query.dtype).expand(len(query), -1, -1, -1)
        else:  # flash kernels take no mask; with one, flex attention would recompile, and crash on a CPU
            query, key, value = fold_key_bias(query, key, value, bias[:, None], attention.scaling)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, attention.eager_attention_forward)
    output, weights = interface(
        attention,
        query,
        key,
        value,
        mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        **kwargs,
    )
    return output[..., :head_dim], weights


def _attend_by_sdpa(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """Do what transformers does for "sdpa", without its copy and checks: they take time in every layer and image."""
    dropout = attention.attention_dropout if attention.training else 0.0
    if bias is not None and bias.ndim == 2 and not dropout and _takes_own_kernel(query, key, value, bias):
        return gpu_kernels().weighted(query, key, value, bias, attention.scaling), None
    mask = None if bias is None else _as_mask(bias, query.dtype)
    output = F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=attention.scaling)
    return output.transpose(1, 2), None


def _as_mask(bias: Tensor, dtype: torch.dtype) -> Tensor:
    return bias.to(dtype) if bias.ndim == 4 else bias.to(dtype)[:, None, None, :]


def _takes_own_kernel(*tensors: Tensor) -> bool:
    """Return whether our kernel, which has no gradient, attends for query, key, value and bias. torch's kernels that
    take a mask need twice as long."""
    query = tensors[0]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 128
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not wants_gradient(*tensors)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and gpu_kernels() is not None
    )


class GpuKernels(NamedTuple):
    """Our own GPU kernels: `weighted_attention` and `received_attention` of `kernels.py`."""

    weighted: Any
    received: Any


@lru_cache
def gpu_kernels() -> Any:
    """Return our own `GpuKernels`. None: triton, which comes with torch for CUDA, is missing or fails."""
    try:  # on a CPU nothing asks for them, because the import takes time
        from .kernels import received_attention, weighted_attention
    except ImportError:
        return None
    if torch.cuda.is_available():
        try:  # triton needs a C compiler, which some machines do not have
            heads = torch.zeros(1, 1, 16, 16, device="cuda", dtype=torch.float16)
            weighted_attention(heads, heads, heads, heads[0, ..., 0].float(), 1.0)
            ends = torch.tensor([0, 16], dtype=torch.int32, device="cuda")
            received_attention(heads[0], heads[0], None, heads[0, ..., 0].float(), ends, 16, 1.0)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:
            logger.warning(
                "triton cannot make a kernel here. So attention with sizes of tokens uses torch's slower mask, and "
                f"received attention is computed from whole maps: {error}"
            )
            return None
    return GpuKernels(weighted_attention, received_attention)


def has_varlen_kernel(attention: Any, query: Tensor) -> bool:
    return (
        varlen_attn is not None
        and query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and attention.config._attn_implementation != "eager"
        and not (attention.training and attention.attention_dropout)
    )


def attend_varlen(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_bias: Tensor | None,
    query_lengths: tuple[int, ...],
    key_lengths: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend in packed tokens by one kernel. Returns the output (1, rows, H, d), the logarithm of each query's sum of
    exponentials (H, rows), and the row where each image's queries begin, with the number of all rows at the end."""
    head_dim = value.shape[-1]
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (rows, H, d), as in memory
    if key_bias is not None:
        query, key, value = fold_key_bias(query, key, value, key_bias[0, :, None], attention.scaling)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    query_ends = _ends(query_lengths, key.device)
    key_ends = query_ends if key_lengths == query_lengths else _ends(key_lengths, key.device)
    longest = max(query_lengths), max(key_lengths)
    options = {"scale": attention.scaling}
    if not _takes_scale(varlen_attn):
        query, options = query * (attention.scaling * math.sqrt(query.shape[-1])), {}
    output, log_sums = varlen_attn(
        query, key, value, query_ends, key_ends, *longest, return_aux=AuxRequest(lse=True), **options
    )
    if log_sums.shape[0] != query.shape[1]:  # the documentation of torch promises the other order
        log_sums = log_sums.t()
    return output[None, ..., :head_dim], log_sums.contiguous(), query_ends


def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the row where each image begins, and the number of all rows: (B + 1,) int32."""
    if len(set(lengths)) == 1:  # no copy from the CPU
        return torch.arange(len(lengths) + 1, dtype=torch.int32, device=device) * lengths[0]
    return layout_of(lengths, device).ends


def pack_heads(heads: Tensor) -> Tensor:
    """Pack the heads of all images: (B, H, T, d) -> (1, H, B * T, d)."""
    return heads.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def pad_maps(maps: list[Tensor], query_lengths: tuple[int, ...], key_lengths: tuple[int, ...]) -> Tensor:
    longest = max(query_lengths), max(key_lengths)
    return torch.cat([F.pad(m, (0, longest[1] - m.shape[3], 0, longest[0] - m.shape[2])) for m in maps])
