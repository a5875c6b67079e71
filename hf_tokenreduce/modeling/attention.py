# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Attention with a weight per key, and the scores that reduction methods read from it.

B images · T tokens · Q query tokens · H heads · d features per head
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.vit.modeling_vit import eager_attention_forward


class AttentionView(NamedTuple):
    """What a hook may ask an attention layer for. Nothing is computed until a method is called.

    attention: the attention module
    hidden_states: (B, T, D), its normalised input
    key, value: (B, H, T, d)
    key_bias: (B, T) float32 added to the logits of each key, or None
    num_prefix_tokens: P
    """

    attention: Any
    hidden_states: Tensor
    key: Tensor
    value: Tensor
    key_bias: Tensor | None
    num_prefix_tokens: int

    def class_attention(self) -> Tensor:
        """How much the class token attends to each token: (B, H, T) float32. One row per head, never the whole map."""
        query = split_heads(self.attention.q_proj(self.hidden_states[:, :1]), self.attention.head_dim)
        with full_precision(query):
            logits = query.float() @ self.key.float().transpose(2, 3) * self.attention.scaling  # (B, H, 1, T)
            if self.key_bias is not None:
                logits = logits + self.key_bias[:, None, None, :]
            return logits.softmax(dim=-1).squeeze(2)

    def patch_keys(self) -> Tensor:
        """The keys of the patch tokens, averaged over the heads: (B, N, d) float32."""
        return self.key[:, :, self.num_prefix_tokens :].mean(dim=1, dtype=torch.float32)


def split_heads(rows: Tensor, head_dim: int) -> Tensor:
    """(B, T, H * d) -> (B, H, T, d)"""
    return rows.view(*rows.shape[:2], -1, head_dim).transpose(1, 2)


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context in which float32 tensors stay float32, also under autocast."""
    return torch.autocast(tensor.device.type, enabled=False)


def attend(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Attention by the implementation the configuration names: (B, Q, H, d) and, from eager, the map (B, H, Q, T)."""
    implementation = attention.config._attn_implementation
    mask = None
    head_dim = value.shape[-1]
    if key_bias is not None:
        if implementation in ("eager", "sdpa"):
            mask = key_bias.to(query.dtype)[:, None, None, :]
        else:  # flash kernels take no mask; flex attention would recompile, and on CPU crash, with one
            query, key, value = fold_key_bias(query, key, value, key_bias, attention.scaling)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
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


def fold_key_bias(
    query: Tensor, key: Tensor, value: Tensor, key_bias: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Widen the heads so that q·k * scaling carries the key bias, for kernels that take no mask.

    Two extra channels hold bias / scaling, a high and a low part: together they keep float32's precision in half
    types as well as 16 bits of it can. The heads grow to a multiple of 8, as flash kernels want; the caller crops
    the output.
    """
    extra = 2 + -(query.shape[-1] + 2) % 8
    wide_bias = key_bias[:, None, :, None] / scaling
    high = wide_bias.to(key.dtype)
    low = (wide_bias - high.float()).to(key.dtype)
    heads = key.shape[1]
    channels = torch.cat([high, low], dim=-1).expand(-1, heads, -1, -1)  # (B, H, T, 2)
    key = torch.cat([key, F.pad(channels, (0, extra - 2))], dim=-1)
    ones = query.new_ones(*query.shape[:-1], 2)
    query = torch.cat([query, F.pad(ones, (0, extra - 2))], dim=-1)
    return query, key, F.pad(value, (0, extra))
