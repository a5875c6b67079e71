# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Stock layers that return fewer tokens than they get.

A stock encoder runs its layers in a loop: each layer gets what the layer before returned. A reduced layer returns a
`Passage`, and the last one returns what the code after the encoder reads. So the loop and everything around it stay
stock. Layers and their attention keep the names of their parameters; a method's own are `reducer.*` of each layer.
"""

import sys
from collections import namedtuple
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import AttentionView, PairBias, attend, split_heads
from .encoders import Encoder, EncoderFacts, Layout
from .grid import dropped_patches, fill_by_mean, on_grid
from .hooks import Reducer
from .methods import build_reducer
from .packed import for_each_row, on_device, same_of_all
from .received import attend_masked, attend_with_map
from .recording import RECORDER, Encoded
from .tokens import TokenMap, TokenState, apply_map, locate, move, pad, prefix_alone, representatives, start, unpad


try:
    from transformers.utils.output_capturing import _active_collector
except ImportError:  # it is no public name
    _active_collector = None

Rotary = tuple[Tensor, Tensor]  # cosines and sines of each token, (B, T, d) or packed


class Passage(NamedTuple):
    """What a layer returns to the next one.

    Attributes:
        shown: What is captured as hidden states.
        state: The tokens.
        counts: The number of tokens that left each layer so far.
        kept: While tokens are masked, the mean share of the tokens that left each layer so far.
    """

    shown: Tensor
    state: TokenState
    counts: tuple[Any, ...] = ()
    kept: tuple[Tensor, ...] = ()


# `shown` of a `Passage`, and the fields of a `TokenState`.
LayerOutput = namedtuple("LayerOutput", ("shown", *TokenState._fields))  # type: ignore[misc]


class Role(NamedTuple):
    """What a layer needs to know of its encoder. See `Tower` and `READ_EVERY_PATCH`."""

    is_last: bool
    num_prefix_tokens: int
    wants_grid: bool
    reads_every_patch: bool


class ReducedAttention(nn.Module):
    """The stock attention, with these additions: a reducer can select the queries, keys can have a bias, and tokens
    know their places."""

    layout: ClassVar[Layout]
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int

    def forward(
        self,
        hidden_states: Tensor,
        state: TokenState,
        reducer: Reducer,
        rotary: Rotary | None = None,
        pair_bias: PairBias | None = None,
        for_prefix: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, AttentionView, TokenMap | None]:
        content = split_heads(self.k_proj(hidden_states), self.head_dim)
        value = split_heads(self.v_proj(hidden_states), self.head_dim)
        key = content if rotary is None else rotate(content, rotary)
        prefix, lengths = state.num_prefix_tokens, state.lengths
        sizes = state.key_sizes(reducer.prop_attn)
        key_bias = None if sizes is None else F.pad(sizes.log(), (prefix, 0))
        if key_bias is not None and lengths is not None:
            key_bias = unpad(key_bias, lengths)
        view = AttentionView(
            self, hidden_states, key, value, key_bias, prefix, lengths, content=content, pair_bias=pair_bias
        )
        selected = prefix_alone(state) if for_prefix else reducer.select_queries(view, state)
        rows, query_lengths = hidden_states, lengths
        if selected is not None:
            selected = locate(selected, prefix, lengths)
            rows, query_lengths = move(hidden_states, selected, prefix, lengths), selected.lengths(prefix)
            if rotary is not None:
                rotary = move(rotary[0], selected, prefix, lengths), move(rotary[1], selected, prefix, lengths)
            if pair_bias is not None:
                pair_bias = pair_bias._replace(queries=_selected_places(state, selected))
        query = split_heads(self.q_proj(rows), self.head_dim)
        if rotary is not None:
            query = rotate(query, rotary)
        if state.mask is not None:
            mask = F.pad(state.mask, (prefix, 0), value=1.0)
            output, weights, received = attend_masked(self, query, key, value, key_bias, mask, pair_bias)
            view = view._replace(received=received)
        elif reducer.needs_received and not for_prefix:
            output, weights, received = attend_with_map(self, query, key, value, key_bias, lengths, pair_bias)
            view = view._replace(received=received)
        else:
            output, weights = attend(self, query, key, value, key_bias, query_lengths, lengths, pair_bias, **kwargs)
        return self.o_proj(output.flatten(2)), weights, view, selected


class ReducedLayer(nn.Module):
    """The stock layer with the hooks of its reducer. It takes and returns a `Passage`. But the first layer takes
    embedded tokens, and the last layer returns what the code after the encoder reads.

    If that code reads only the prefix tokens, the last layer computes only them, from the keys and values of all
    tokens. It gives the same numbers without the patches' queries, output projection and MLP. Its reducer then has
    nothing to do.
    """

    layout: ClassVar[Layout]
    role: Role
    reducer: Reducer

    def init_reducer(self) -> None:
        """Set the initial values of the reducer's own parameters."""
        self.reducer.init_weights(getattr(self, self.layout.attention))

    def __call__(self, hidden_states: Any, attention_mask: Tensor | None = None, **kwargs) -> Any:
        passage = hidden_states if isinstance(hidden_states, Passage) else self._enter(hidden_states)
        for_prefix = self._is_for_prefix(passage.state)
        if for_prefix:
            kwargs["for_prefix"] = True
        output = super().__call__(passage.shown, *passage.state, attention_mask=attention_mask, **kwargs)
        state = TokenState(*output[1:])
        counts = self._counts_of_papers(passage.state) if for_prefix else _counts(state)
        kept = passage.kept
        if state.mask is not None:
            kept = (*kept, F.pad(state.mask, (state.num_prefix_tokens, 0), value=1.0).mean())
        passage = Passage(output[0], state, (*passage.counts, counts), kept)
        return self._leave(passage) if self.role.is_last else passage

    def _is_for_prefix(self, state: TokenState) -> bool:
        recorder = RECORDER.get() if self.role.is_last and state.mask is None else None
        if recorder is None or not recorder.reads_prefix_alone:
            return False
        if self.training and any(parameter.requires_grad for parameter in self.reducer.parameters()):
            return False  # these parameters would have no gradient
        return not is_watched(*self.modules())  # a hook may read more than the prefix

    def _counts_of_papers(self, state: TokenState) -> Any:
        """Return the number of tokens that would leave the layer if all of it were computed."""
        built_for = self.reducer.built_for
        has_acted = built_for is not None and built_for.hook == "before_encoder"
        if state.lengths is not None or has_acted:
            return _counts(state)
        return state.num_prefix_tokens + self.reducer.leaving(state.num_live)

    def forward(
        self,
        shown: Tensor,
        *state_fields: Any,
        attention_mask: Tensor | None = None,
        for_prefix: bool = False,
        **kwargs,
    ) -> LayerOutput:
        # A stock model that is traced makes an attention_mask that masks nothing. Any other mask was refused before.
        state = self._attention_block(TokenState(*state_fields), attention_mask, for_prefix, **kwargs)
        hidden_states = state.hidden_states
        branch = self.mlp(getattr(self, self.layout.norm_after)(hidden_states))  # type: ignore[operator]
        grown = self._through(self.layout.after_mlp, branch, state.lengths)
        state = state._replace(hidden_states=hidden_states + grown)
        if not for_prefix:
            if self.reducer.needs_shift:  # drop path and dropout would hide how far a token moves
                shift = self._through(self.layout.after_mlp, branch.detach(), state.lengths, drops=False)
                state = state._replace(shift=_lengths_of_patch_rows(shift, state))
            state = self.reducer.after_layer(state)
            if state.shift is not None:
                state = state._replace(shift=None)
        return LayerOutput(self._shown(state), *state)  # type: ignore[call-arg]

    def _attention_block(
        self, state: TokenState, attention_mask: Tensor | None, for_prefix: bool, **kwargs
    ) -> TokenState:
        # This is a separate method so that keys and values are freed before the MLP needs its memory.
        layout = self.layout
        rotary = None
        if layout.rotary:
            rotary = _rotary_rows(kwargs.pop("position_embeddings"), state)
        pair_bias = None
        if layout.pair_bias is not None:
            pair_bias = self._pair_bias(state, attention_mask, **kwargs)
            kwargs = {name: kwargs[name] for name in kwargs if name not in ("resolution", "interpolate_pos_encoding")}
        rows = getattr(self, layout.norm_before)(state.hidden_states)
        output, _, view, selected = getattr(self, layout.attention)(
            rows, state, self.reducer, rotary, pair_bias, for_prefix, **kwargs
        )
        if selected is not None:
            state = apply_map(state, selected)
        branch = self._through(layout.after_attention, output, state.lengths)
        state = state._replace(hidden_states=state.hidden_states + branch)
        return state if for_prefix else self.reducer.after_attention(view, state)

    def _through(self, names: tuple[str, ...], branch: Tensor, lengths: Any, drops: bool = True) -> Tensor:
        for name in names:
            part = getattr(self, name)
            if type(part) is nn.Dropout and not (part.training or part._forward_hooks or part._forward_pre_hooks):
                continue  # it does nothing, and to call it would take time in every layer
            if not drops and (isinstance(part, nn.Dropout) or hasattr(part, "drop_prob")):
                continue
            if not isinstance(part, nn.Module):
                branch = part * branch
            elif lengths is not None and self.training and hasattr(part, "drop_prob"):
                # One draw for each image, although all packed images are one row.
                branch = branch * for_each_row(part(branch.new_ones(len(lengths), 1)), lengths)
            else:
                branch = part(branch)
        return branch

    def _pair_bias(
        self,
        state: TokenState,
        shared: Tensor | None,
        resolution: Any = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> PairBias | None:
        """Add the layer's own bias and the one that all layers share, for the places of the tokens."""
        heads = getattr(self, self.layout.attention).num_attention_heads
        if shared is not None:  # in tracing, it can be a mask that masks nothing
            shared = shared[:1] if shared.shape[1] == heads and shared.is_floating_point() else None
        table, own = shared, getattr(self, str(self.layout.pair_bias))
        if own is not None:
            window = (resolution[0] // self.patch_size, resolution[1] // self.patch_size)
            full = state.num_prefix_tokens + state.num_patches
            bias = own(window, interpolate_pos_encoding, dim_size=full)
            table = bias if shared is None else bias + shared
        if table is None:
            return None
        places = _token_places(state)
        return PairBias(table[0], places, places)

    def _enter(self, hidden_states: Tensor) -> Passage:
        hidden_states = self.entrance(hidden_states)
        recorder, role = RECORDER.get(), self.role
        tracks = role.wants_grid or role.reads_every_patch or (recorder is not None and recorder.track_patches)
        state = start(hidden_states, role.num_prefix_tokens, tracks, self.layout.has_places, role.reads_every_patch)
        state = self.reducer.before_encoder(state)
        return Passage(self._shown(state), state)

    def entrance(self, hidden_states: Tensor) -> Tensor:
        """Return what enters the encoder. `Encoder` replaces this method to see or change it."""
        return hidden_states

    def _shown(self, state: TokenState) -> Tensor:
        """Return what is captured as hidden states: `_result`, but only if a forward hook reads it."""
        return self._result(state) if is_watched(self) else state.hidden_states

    def _result(self, state: TokenState) -> Tensor:
        """Return a row per patch where the code after the encoder reads that, else the tokens, padded with zeros."""
        if self.role.wants_grid or self.role.reads_every_patch:
            return on_grid(state)
        return state.hidden_states if state.lengths is None else pad(state.hidden_states, state.lengths)

    def _leave(self, passage: Passage) -> Tensor:
        recorder, state = RECORDER.get(), passage.state
        if recorder is not None:
            patch_map = None
            if recorder.track_patches and state.patch_map is not None:
                patch_map = torch.where(state.patch_map < 0, -1, state.patch_map + state.num_prefix_tokens)
            encoded = Encoded(
                _stack_counts(passage.counts, state),
                patch_map,
                state.patch_weights if recorder.track_patches else None,
                state.last_states if recorder.track_patches else None,
                state.lengths,
                torch.stack(passage.kept) if passage.kept else None,
                state.num_prefix_tokens + state.num_patches,
                dropped_patches(state) if self.role.wants_grid else None,
            )
            recorder.encoded.append(encoded)
        result = self._result(state)
        if recorder is None and self.role.wants_grid and not torch.compiler.is_compiling():
            result.dropped = dropped_patches(state)  # type: ignore[attr-defined]  # for an encoder that is called alone
        return result


def is_watched(*modules: nn.Module) -> bool:
    """Return whether a hook reads what modules take or return.

    transformers leaves its own hooks in place after a call that reads hidden states. They read only in such calls."""
    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
    names = [getattr(hook, "__name__", "") for it in modules for kind in kinds for hook in getattr(it, kind).values()]
    # A checkpointed layer runs again in the backward, after such a call, and must then do the same.
    if not names or modules[0].training or any(name != "output_capturing_hook" for name in names):
        return bool(names)
    return _active_collector is None or bool(_active_collector.get())


def _lengths_of_patch_rows(rows: Tensor, state: TokenState) -> Tensor:
    """Return the length of the row of each patch token, (B, N) float32."""
    norms = rows.float().norm(dim=-1)
    norms = norms if state.lengths is None else pad(norms, state.lengths)
    return norms[:, state.num_prefix_tokens :]


def _counts(state: TokenState) -> Any:
    """Count the tokens of each image: one number, a tuple with one per image, or a tensor (B,) if they are masked."""
    if state.mask is not None:
        return state.num_prefix_tokens + (state.mask > 0.5).sum(dim=1)
    return state.num_prefix_tokens + state.num_live if state.lengths is None else state.lengths


def _stack_counts(counts: tuple[Any, ...], state: TokenState) -> Tensor:
    """Make a tensor (B, L) long of the counts of all layers. It is made once, at the end, because a small operation
    in each layer would take more time to start than to run."""
    if state.mask is not None:
        return torch.stack(list(counts), dim=1)
    if not any(isinstance(count, tuple) for count in counts):
        return same_of_all(counts, state.num_images, state.hidden_states.device)
    rows = [count if isinstance(count, tuple) else (count,) * state.num_images for count in counts]
    return on_device(rows, state.hidden_states.device).t().contiguous()


class FilledNorm(nn.Module):
    """The stock norm after the last layer, for a row per patch. A dropped patch gets the mean of the normed rows of
    the others. The norm of their mean would be different, and would change a mean over all patches."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows, recorder = super().forward(hidden_states), RECORDER.get()
        dropped = getattr(hidden_states, "dropped", None)
        if recorder is not None:
            dropped = recorder.encoded[-1].dropped if recorder.encoded else None
        if dropped is None:
            return rows
        prefix = rows.shape[1] - dropped.shape[1]
        return torch.cat([rows[:, :prefix], fill_by_mean(rows[:, prefix:], dropped)], dim=1)


def rotate(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotate (B, H, T, d) by cosines and sines (B, T, d), whose halves belong to the halves of a head."""
    cosines, sines = (rows[:, None] for rows in rotary)
    first, second = heads.chunk(2, dim=-1)
    return heads * cosines + torch.cat([-second, first], dim=-1) * sines


def _rotary_rows(tables: Rotary, state: TokenState) -> Rotary:
    """Pick the tokens' rows, (B, T, d) or packed, from those of all places (N0, d). Prefix tokens are not rotated."""
    assert state.origin is not None
    rows = []
    for table, unturned in zip(tables, (1.0, 0.0), strict=True):
        row = F.pad(table[state.origin], (0, 0, state.num_prefix_tokens, 0), value=unturned)
        rows.append(row if state.lengths is None else unpad(row, state.lengths))
    return rows[0], rows[1]


def _token_places(state: TokenState) -> Tensor:
    """Return the place of each token among prefix tokens and patches, (B, T) long, or (1, T) if no token has moved."""
    assert state.origin is not None
    origin = state.origin[:1] if state.origin.stride(0) == 0 else state.origin  # `start` expands one row
    return _behind_prefix(origin, state.num_prefix_tokens)


def _selected_places(state: TokenState, selected: TokenMap) -> Tensor:
    """Return the places of the selected queries, (B, Q) long."""
    assert state.origin is not None
    count = max(selected.num_tokens) if isinstance(selected.num_tokens, tuple) else selected.num_tokens
    origin = state.origin[:, :count]
    if selected.target is not None:
        origin = representatives(state.origin, state.size, selected.target, count)
    return _behind_prefix(origin, state.num_prefix_tokens)


def _behind_prefix(origin: Tensor, num_prefix_tokens: int) -> Tensor:
    prefix = torch.arange(num_prefix_tokens, device=origin.device).expand(origin.shape[0], -1)
    return torch.cat([prefix, origin + num_prefix_tokens], dim=1)


_classes: dict[Any, type[nn.Module]] = {}


def _reduced_class(stock: type[nn.Module], base: type[nn.Module], layout: Layout) -> type[nn.Module]:
    """Make a subclass of a stock part with the forward of `base`: `ReducedLayer`, `ReducedAttention` or `FilledNorm`.

    It keeps the stock name, because `_no_split_modules` and the capture of hidden states and attentions look for it.
    """
    key = stock, base, layout
    if key not in _classes:
        body: dict[str, Any] = {"layout": layout, "__module__": __name__}
        body["__reduce_ex__"] = _reduce_to(key)
        if base is ReducedAttention:
            # Every family names these differently, and has an eager attention of its own.
            for name in ("o_proj", "scaling", "attention_dropout"):
                stock_name = getattr(layout, name)
                if stock_name != name:
                    body[name] = _named(stock_name)
            body["eager_attention_forward"] = staticmethod(sys.modules[stock.__module__].eager_attention_forward)
        _classes[key] = type(stock.__name__, (base, stock), body)
    return _classes[key]


def _named(name: str) -> property:
    return property(lambda self: getattr(self, name))


def _reduce_to(key: tuple[type[nn.Module], type[nn.Module], Layout]) -> Any:
    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, key, self.__dict__

    return reduce_ex


def _rebuild(stock: type[nn.Module], base: type[nn.Module], layout: Layout) -> nn.Module:
    """Make the class of a pickled part again, because pickle cannot find it by its name."""
    reduced = _reduced_class(stock, base, layout)
    return reduced.__new__(reduced)


def inject(encoder: Encoder, facts: EncoderFacts, reads_every_patch: bool) -> None:
    """Turn the layers of an encoder into reduced ones, in place. Weights and their names stay the same."""
    layout, layers = encoder.tower.layout, list(encoder.layers)
    for index, layer in enumerate(layers):
        attention = encoder.attention(layer)
        attention.__class__ = _reduced_class(type(attention), ReducedAttention, layout)
        layer.__class__ = _reduced_class(type(layer), ReducedLayer, layout)
        layer.role = Role(
            is_last=index == len(layers) - 1,
            num_prefix_tokens=facts.num_prefix_tokens,
            wants_grid=encoder.tower.wants_grid,
            reads_every_patch=reads_every_patch,
        )
        layer.reducer = build_reducer(facts, index)
    if encoder.tower.norm is not None and not reads_every_patch:
        norm = encoder.module.get_submodule(encoder.tower.norm)
        norm.__class__ = _reduced_class(type(norm), FilledNorm, layout)
