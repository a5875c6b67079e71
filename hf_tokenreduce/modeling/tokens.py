# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The state of the tokens in a model, and the only code that moves tokens.

B images · T tokens per image, of which the first P are prefix tokens and N = T - P patch tokens · N0 patches of the
image · M patch tokens after a map · D features

There are two layouts. Even: every image has T tokens, and rows are (B, T, D). Packed: images have different numbers of
tokens, and rows are those of all images one after the other, (1, sum of lengths, D), without padding. Small tensors,
with one number per token, are padded to the longest image in both layouts: (B, N).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .packed import Counts, layout_of


class TokenState(NamedTuple):
    """What goes into a layer and comes out of it. The hidden states come first, where transformers reads them.

    Attributes:
        hidden_states: (B, T, D), or (1, sum of lengths, D) if packed.
        size: (B, N) float32, the number of patches that each patch token stands for. None: one each.
        patch_map: (B, N0) long, the patch token that now holds each patch of the image. -1: dropped. None: not needed.
        num_prefix_tokens: P.
        num_patches: N0.
        lengths: The number of tokens of each image, prefix included, if packed. None: even.
        mask: (B, N), 1 for a live token and 0 for a masked one, with a gradient. Only while thresholds are learned.
        rank: (B, N) long, with `mask`: the place that each live token has if the masked ones are removed.
        patch_weights: (B, N, N0) float32, the weight of each patch in each patch token. It replaces `patch_map` once
            tokens are mixtures.
        origin: (B, N) long, the patch whose position each patch token has: that of its heaviest part, the last of
            equal ones. None: no layer reads positions.
        last_states: (B, N0, D), the last hidden state of the token that held each dropped patch. None: not needed.
        shift: (B, N) float32, how far the layer's MLP has moved each token. Only for reducers with `needs_shift`, and
            only between the MLP and the end of the layer.
        live: While a method merges softly to learn, the number of patch tokens that are left, which come first. The
            others have given nearly all of themselves away. None: all are left.
    """

    hidden_states: Tensor
    size: Tensor | None = None
    patch_map: Tensor | None = None
    num_prefix_tokens: int = 1
    num_patches: int = 0
    lengths: tuple[int, ...] | None = None
    mask: Tensor | None = None
    rank: Tensor | None = None
    patch_weights: Tensor | None = None
    origin: Tensor | None = None
    last_states: Tensor | None = None
    shift: Tensor | None = None
    live: int | None = None

    @property
    def num_images(self) -> int:
        """The number of images, B."""
        return self.hidden_states.shape[0] if self.lengths is None else len(self.lengths)

    @property
    def num_patch_tokens(self) -> int:
        """The number of patch tokens, N: of every image if even, of the longest image if packed."""
        length = self.hidden_states.shape[1] if self.lengths is None else max(self.lengths)
        return length - self.num_prefix_tokens

    @property
    def num_live(self) -> int:
        """The number of patch tokens, without those that a soft merge has emptied."""
        return self.num_patch_tokens if self.live is None else self.live

    def key_sizes(self, prop_attn: bool) -> Tensor | None:
        """Return how many keys each patch token counts for in attention, (B, N). None: one each.

        Without `prop_attn` a token counts once. But one that a soft merge has emptied counts for as little as is left.
        """
        if self.size is None or not (prop_attn or self.live is not None):
            return None
        return self.size if prop_attn else self.size.clamp(max=1.0)

    def valid(self) -> Tensor | None:
        """Return which patch tokens are not padding, (B, N) bool. None: all of them."""
        if self.lengths is None:
            return None
        # A copy, because a method may change its mask in place.
        return layout_of(self.lengths, self.hidden_states.device).real[:, self.num_prefix_tokens :].clone()


class TokenMap(NamedTuple):
    """Which output token each patch token goes into. Prefix tokens are not part of it, so they always stay.

    Attributes:
        target: (B, N) long, the output token, from 0. -1: dropped, or padding. None: the first `num_tokens` stay and
            the others are dropped, which needs only a slice.
        num_tokens: M if it is the same for every image: the result is even. Else a tuple with the number of each
            image: the result is packed, or even if there is one image.
        weight: (B, N), the factor of each token in its output token. None: every output token is one input token.
        size: (B, M), the number of patches that each output token stands for, if already known. None: not known.
        keeps_all: Whether no target is -1: no token is dropped, and there is no padding.
        rows: (number of output rows,) long, the input row that each output row is, prefix tokens and all images
            included. Only without `weight`. None: not known yet.
    """

    target: Tensor | None
    num_tokens: int | tuple[int, ...]
    weight: Tensor | None = None
    size: Tensor | None = None
    keeps_all: bool = False
    rows: Tensor | None = None

    def lengths(self, num_prefix_tokens: int) -> tuple[int, ...] | None:
        if not isinstance(self.num_tokens, tuple) or len(self.num_tokens) == 1:
            return None
        if isinstance(self.num_tokens, Counts) and not torch.compiler.is_compiling():
            return self.num_tokens.plus(num_prefix_tokens)
        return tuple(num_prefix_tokens + count for count in self.num_tokens)


def start(
    hidden_states: Tensor,
    num_prefix_tokens: int,
    track_patches: bool,
    track_origin: bool = False,
    track_last_states: bool = False,
) -> TokenState:
    """Make the state of embedded images: every patch is one token."""
    batch, length, _ = hidden_states.shape
    num_patches = length - num_prefix_tokens
    each_its_own = torch.arange(num_patches, device=hidden_states.device)[None]
    return TokenState(
        hidden_states,
        patch_map=each_its_own.repeat(batch, 1) if track_patches or track_last_states else None,
        num_prefix_tokens=num_prefix_tokens,
        num_patches=num_patches,
        origin=each_its_own.expand(batch, -1) if track_origin else None,
        last_states=torch.zeros_like(hidden_states[:, num_prefix_tokens:]) if track_last_states else None,
    )


def merge(
    target: Tensor,
    num_tokens: int | tuple[int, ...],
    mass: Tensor,
    *,
    mass_is_size: bool = False,
    keeps_all: bool = False,
) -> TokenMap:
    """Make the map of a merge: every output token is the mean of its tokens, weighted by their `mass` (B, N).

    mass_is_size: whether the mass of a token is the number of patches it stands for, so that its sums are new sizes.
    keeps_all: whether no target is -1.
    """
    totals = sum_by_target(mass, target, _widest(num_tokens), keeps_all)
    weight = mass / (totals.gather(1, target) if keeps_all else follow(target, totals, fill=1.0))
    return TokenMap(target, num_tokens, weight, totals if mass_is_size else None, keeps_all)


def prefix_alone(state: TokenState) -> TokenMap:
    """Make the map that drops all patch tokens."""
    if state.lengths is None:
        return TokenMap(None, 0)
    images = len(state.lengths)
    dropped = torch.full((images, state.num_patch_tokens), -1, device=state.hidden_states.device)
    return TokenMap(dropped, (0,) * images)


def apply_map(state: TokenState, token_map: TokenMap) -> TokenState:
    """Apply a map to all that a state holds of its tokens."""
    if state.patch_weights is not None:
        raise ValueError(
            "A map cannot move tokens that are mixtures of patches (SiT), because the weights of the patches would be "
            "wrong afterwards. Let SiT reduce after all other methods."
        )
    target, num_tokens, weight, size, keeps_all, _ = token_map
    if target is None:
        return _keep_first(state, num_tokens)
    patch_map, origin = state.patch_map, state.origin
    if origin is not None:
        origin = representatives(origin, state.size, target, _widest(num_tokens))
    if size is None and (state.size is not None or weight is not None):
        sizes = torch.ones(target.shape, device=target.device) if state.size is None else state.size
        size = sum_by_target(sizes, target, _widest(num_tokens), keeps_all)
    if patch_map is not None:
        patch_map = follow(patch_map, target, fill=-1)
    return state._replace(
        hidden_states=move(state.hidden_states, token_map, state.num_prefix_tokens, state.lengths),
        size=size,
        patch_map=patch_map,
        lengths=token_map.lengths(state.num_prefix_tokens),
        origin=origin,
        last_states=remember_dropped(state, patch_map),
    )


def _keep_first(state: TokenState, count: Any) -> TokenState:
    """Keep the first `count` patch tokens of every image, in the even layout, without a copy."""
    patch_map = state.patch_map
    if patch_map is not None:
        patch_map = torch.where(patch_map < count, patch_map, -1)
    return state._replace(
        hidden_states=state.hidden_states[:, : state.num_prefix_tokens + count],
        size=None if state.size is None else state.size[:, :count],
        patch_map=patch_map,
        origin=None if state.origin is None else state.origin[:, :count],
        last_states=remember_dropped(state, patch_map),
    )


def representatives(
    origin: Tensor, size: Tensor | None, target: Tensor, num_tokens: int, order: Tensor | None = None
) -> Tensor:
    """Return the origin of the heaviest token in each output token, (B, N) -> (B, M). Of equally heavy ones it is the
    last one by `order` (B, N), which holds different numbers below N, or by index if it is None."""
    count = target.shape[1]
    order = _positions(target, count) if order is None else order
    weight = order if size is None else size.round().long() * count + order
    slot = torch.where(target < 0, num_tokens, target)
    heaviest = weight.new_full((target.shape[0], num_tokens + 1), -1).scatter_reduce_(1, slot, weight, "amax")
    chosen = torch.where(heaviest.gather(1, slot) == weight, slot, num_tokens)
    return torch.zeros_like(heaviest).scatter_(1, chosen, origin)[:, :-1]


def remember_dropped(state: TokenState, patch_map: Tensor | None) -> Tensor | None:
    """Return `last_states` after the state's patches have moved by the new `patch_map`."""
    if state.last_states is None or state.patch_map is None or patch_map is None:
        return state.last_states
    dropped = (patch_map < 0) & (state.patch_map >= 0)
    rows = even_rows(state)[:, state.num_prefix_tokens :]
    return torch.where(dropped[..., None], rows_at(rows, state.patch_map), state.last_states)


def even_rows(state: TokenState) -> Tensor:
    """Return the hidden states in the even layout, padded if they are packed: (B, T, D)."""
    return state.hidden_states if state.lengths is None else pad(state.hidden_states, state.lengths)


def rows_at(rows: Tensor, index: Tensor) -> Tensor:
    """Pick rows (B, N, D) at index (B, M), where -1 picks any row: (B, M, D)."""
    if rows.shape[1] == 0:
        return rows.new_zeros(*index.shape, rows.shape[2])
    flat = _even_starts(rows.shape[0], rows.shape[1], rows.device) + index.clamp(min=0)
    return rows.flatten(0, 1).index_select(0, flat.flatten()).view(*index.shape, -1)


def mix(state: TokenState, weights: Tensor, size: Tensor | None = None, num_live: int | None = None) -> TokenState:
    """Replace the patch tokens by mixtures of all of them, by weights (B, N, M). Even layout only.

    size: (B, M), the number of patches that each mixture stands for. None: this has no meaning, so no token may have a
        size or a position.
    num_live: the new value of `state.live`
    """
    if size is None and (state.size is not None or state.origin is not None):
        raise ValueError(
            "Tokens that stand for several patches, or that have a position, cannot be mixed, because sizes and "
            "positions would be wrong afterwards. Let SiT reduce a model in which no method has merged tokens before."
        )
    prefix = state.num_prefix_tokens
    patches = state.hidden_states[:, prefix:]
    patch_weights = state.patch_weights
    with full_precision(patches):
        mixtures = weights.transpose(1, 2).to(patches.dtype) @ patches
        if patch_weights is None and state.patch_map is not None:
            if state.size is None and patches.shape[1] == state.num_patches:  # every token is one patch
                patch_weights = weights.detach().transpose(1, 2)
            else:
                held = torch.arange(patches.shape[1], device=patches.device)[:, None] == state.patch_map[:, None]
                means = held / held.sum(dim=2, keepdim=True)  # a token is the mean of its patches
                patch_weights = weights.detach().transpose(1, 2) @ means
        elif patch_weights is not None:
            patch_weights = weights.detach().transpose(1, 2) @ patch_weights
    return state._replace(
        hidden_states=torch.cat([state.hidden_states[:, :prefix], mixtures], dim=1),
        size=size,
        patch_map=None,
        patch_weights=patch_weights,
        origin=None if state.origin is None else state.origin.gather(1, weights.argmax(dim=1)),
        live=num_live,
    )


def move(rows: Tensor, token_map: TokenMap, num_prefix_tokens: int, lengths: tuple[int, ...] | None = None) -> Tensor:
    """Apply a map to rows of tokens, even or packed by `lengths`: (B, P + N, D) -> (B, P + M, D), or packed.

    Rows are moved in one flat view of all images, because copies and sums of whole rows are several times faster
    there than gather and scatter with an index for every feature. Sums are computed in float32.
    """
    target, num_tokens, weight, _, keeps_all, _ = token_map
    if target is None:
        return rows[:, : num_prefix_tokens + _widest(num_tokens)]
    new_lengths = token_map.lengths(num_prefix_tokens)
    if weight is None:
        index = locate(token_map, num_prefix_tokens, lengths).rows
        assert index is not None
        images = target.shape[0] if new_lengths is None else 1
        return rows.flatten(0, 1).index_select(0, index).view(images, -1, rows.shape[-1])
    if lengths is None and new_lengths is None:
        merge_rows = _merge_all_evenly if keeps_all else _merge_evenly
        return merge_rows(rows, target, _widest(num_tokens), weight, num_prefix_tokens)
    slot, shape = _slots(token_map, num_prefix_tokens, rows.device)
    weight = F.pad(weight, (num_prefix_tokens, 0), value=1.0)
    if lengths is not None:
        slot, weight = unpad(slot, lengths), unpad(weight, lengths)
    weighted = rows.flatten(0, 1) * weight.view(-1, 1)
    sums = weighted.new_zeros(shape[0] * shape[1] + 1, rows.shape[-1]).index_add_(0, slot.flatten(), weighted)
    return sums[:-1].view(*shape, rows.shape[-1]).to(rows.dtype)


def locate(token_map: TokenMap, num_prefix_tokens: int, lengths: tuple[int, ...] | None = None) -> TokenMap:
    """Return the map with its `rows`, so that they are computed once if `move` is called for several tensors."""
    target, weight = token_map.target, token_map.weight
    if target is None or weight is not None or token_map.rows is not None:
        return token_map
    batch, count = target.shape
    if lengths is None and token_map.lengths(num_prefix_tokens) is None:
        # One more place, the first, takes what is dropped.
        picked = target.new_zeros(batch, _widest(token_map.num_tokens) + 1)
        picked = picked.scatter_(1, target + 1, _positions(target, count))[:, 1:] + num_prefix_tokens
        if num_prefix_tokens:
            picked = torch.cat([_positions(target, num_prefix_tokens), picked], dim=1)
        if batch > 1 or torch.jit.is_tracing():  # a trace of one image runs with any number
            picked = picked + _even_starts(batch, num_prefix_tokens + count, target.device)
        return token_map._replace(rows=picked.flatten())
    slot, shape = _slots(token_map, num_prefix_tokens, target.device)
    starts = _even_starts(batch, slot.shape[1], target.device)
    if lengths is not None:
        starts = layout_of(lengths, target.device).starts
    source = starts + _positions(slot, slot.shape[1])
    index = target.new_zeros(shape[0] * shape[1] + 1).scatter_(0, slot.flatten(), source.flatten())[:-1]
    return token_map._replace(rows=index)


def _slots(token_map: TokenMap, num_prefix_tokens: int, device: torch.device) -> tuple[Tensor, tuple[int, int]]:
    """Return the output row of each token, (B, P + N) long, and the shape (images, tokens) of all output rows. What is
    dropped gets one row past the end."""
    target, new_lengths = token_map.target, token_map.lengths(num_prefix_tokens)
    assert target is not None
    if new_lengths is None:
        shape = (target.shape[0], num_prefix_tokens + _widest(token_map.num_tokens))
        total, starts = shape[0] * shape[1], _even_starts(*shape, device)
    else:
        total, starts = sum(new_lengths), layout_of(new_lengths, device).starts
        shape = (1, total)
    patches = torch.where(target < 0, total, starts + num_prefix_tokens + target)
    return torch.cat([starts + _positions(target, num_prefix_tokens), patches], dim=1), shape


def _merge_evenly(rows: Tensor, target: Tensor, num_tokens: int, weight: Tensor, num_prefix_tokens: int) -> Tensor:
    """Do `move` for an even result. This needs a third of the operations, and for a single image most of the time goes
    into starting them."""
    # One more row, the first, takes what is dropped.
    sums = merge_by_sums(rows[:, num_prefix_tokens:], target + 1, num_tokens + 1, weight)
    return torch.cat([rows[:, :num_prefix_tokens], sums[:, 1:]], dim=1)


def _merge_all_evenly(rows: Tensor, target: Tensor, num_tokens: int, weight: Tensor, num_prefix_tokens: int) -> Tensor:
    """Do the same without dropped tokens."""
    length = num_prefix_tokens + num_tokens
    slot = target + num_prefix_tokens
    if num_prefix_tokens:  # they are summed too, so that no runtime has to split and join the rows
        one = num_prefix_tokens == 1  # the usual number, which needs fewer operations
        slot = F.pad(slot, (1, 0)) if one else torch.cat([_positions(slot, num_prefix_tokens), slot], dim=1)
        weight = F.pad(weight, (num_prefix_tokens, 0), value=1.0)
    merge_rows = merge_by_product if _product_is_faster(rows) else merge_by_sums
    return merge_rows(rows, slot, length, weight)


def _product_is_faster(rows: Tensor) -> bool:
    """Return whether rows (B, T, D) merge faster by a product: on a GPU in half precision, if there are not more
    tokens than features. A product keeps its matrix for the gradient, so it is not taken if there will be one."""
    half = rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16)
    return half and rows.shape[1] <= rows.shape[2] and not wants_gradient(rows)


def wants_gradient(*tensors: Tensor) -> bool:
    """Return whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def merge_by_sums(rows: Tensor, slot: Tensor, length: int, weight: Tensor) -> Tensor:
    """Merge rows (B, T, D) into (B, length, D), with the slot and the weight of each, (B, T), in float32."""
    batch, _, width = rows.shape
    if batch > 1 or torch.jit.is_tracing():  # a trace of one image runs with any number
        slot = slot + _even_starts(batch, length, rows.device)
    weighted = rows * weight[..., None]
    sums = weighted.new_zeros(batch * length, width).index_add_(0, slot.flatten(), weighted.flatten(0, 1))
    return sums.view(batch, length, width).to(rows.dtype)


def merge_by_product(rows: Tensor, slot: Tensor, length: int, weight: Tensor) -> Tensor:
    """Do the same by one product with a matrix of the weights, for a GPU in half precision.

    It moves fewer bytes than sums in float32, and always sums in the same order. A weight is rounded as the rows are.
    """
    aligned = length + -length % 8  # fast kernels for products need rows that begin at a multiple of 16 bytes
    weights = rows.new_zeros(*slot.shape, aligned).scatter_(2, slot[..., None], weight.to(rows.dtype)[..., None])
    return torch.bmm(weights[..., :length].transpose(1, 2), rows).to(rows.dtype)  # autocast may have another type


def pad(rows: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Pad packed rows (1, sum of lengths, ...) -> (B, longest, ...), with zeros after shorter images."""
    shape = (len(lengths), max(lengths))
    padded = rows.new_zeros(shape[0] * shape[1], *rows.shape[2:])
    return padded.index_copy(0, layout_of(lengths, rows.device).places, rows[0]).unflatten(0, shape)


def unpad(padded: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Pack padded rows (B, longest, ...) -> (1, sum of lengths, ...)."""
    return padded.flatten(0, 1).index_select(0, layout_of(lengths, padded.device).places)[None]


def follow(index: Tensor, values: Tensor, fill: float) -> Tensor:
    """Pick `values` (B, M) at `index` (B, N), and `fill` where the index is -1. It joins one map to another."""
    return F.pad(values, (1, 0), value=fill).gather(1, index + 1)


def sum_by_target(values: Tensor, target: Tensor, num_tokens: int, keeps_all: bool = False) -> Tensor:
    """Sum the values of the tokens in each output token: (B, N) -> (B, M). keeps_all: no target is -1."""
    if keeps_all:
        return values.new_zeros(target.shape[0], num_tokens).scatter_add_(1, target, values)
    # One more place, the first, takes what is dropped.
    return values.new_zeros(target.shape[0], num_tokens + 1).scatter_add_(1, target + 1, values)[:, 1:]


def ranks(scores: Tensor) -> Tensor:
    """Rank scores (B, N) -> (B, N) long, 0 for the highest. Of equal scores the earlier comes first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(1, order, _positions(order, order.shape[1]))


def full_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a context in which float32 tensors stay float32, also under autocast."""
    if not torch.is_autocast_enabled(tensor.device.type):
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def _widest(num_tokens: int | tuple[int, ...]) -> int:
    return max(num_tokens) if isinstance(num_tokens, tuple) else num_tokens


def _even_starts(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device)[:, None] * length


def _positions(like: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=like.device).expand(like.shape[0], count)
