# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The places of a model where a method can act."""

from torch import Tensor, nn

from .attention import AttentionView
from .encoders import EncoderFacts
from .tokens import TokenMap, TokenState


class Reducer(nn.Module):
    """Reduces nothing. A method subclasses it and overrides the hook it uses:

        pixels -> embeddings -> before_encoder -> layer x L -> norm -> head
        layer:    norm -> k, v -> select_queries -> attention -> + residual -> after_attention -> norm -> MLP
                  -> + residual -> after_layer

    Every layer owns one reducer, built with the facts of the encoder, its reduction among them, and its own 0-based
    index; `before_encoder` is asked of the first layer's. A hook decides, with a pure function, on a `TokenMap`, and
    returns the state with the map applied (`apply_map`). It must not change the state it is given, nor keep anything
    between calls: gradient checkpointing runs layers twice. Where a classifier reads the prefix tokens alone, its last
    layer computes no patches, so the hooks of that layer's reducer are not asked, unless somebody looks (see
    `ReducedLayer`). Learned parts are ordinary parameters and submodules of
    the reducer.

    in_float32: names of its parameters that stay float32 when the model is loaded in a half type.
    """

    in_float32: tuple[str, ...] = ()

    prop_attn = False
    """Whether attention in this layer counts a token once per patch it stands for."""

    needs_received = False
    """Whether `after_attention` reads `view.received`, for which the whole attention map is computed."""

    needs_shift = False
    """Whether `after_layer` reads `state.shift`."""

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__()
        self.built_for = facts.reduction
        self._facts, self._layer = facts, layer

    def init_weights(self) -> None:
        """Give parameters of the reducer itself their initial values, by `transformers.initialization`. Those of
        stock submodules such as `nn.Linear` get theirs as in the rest of the model.
        """

    def before_encoder(self, state: TokenState) -> TokenState:
        return state

    def select_queries(self, view: AttentionView, state: TokenState) -> TokenMap | None:
        """The tokens that go on, decided before attention: only their queries are computed. None: all."""
        return None

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        """`view` is of this layer's attention and its tokens are those of `state`, unless queries were selected."""
        return state

    def after_layer(self, state: TokenState) -> TokenState:
        return state

    def leaving(self, count: int) -> int:
        """Say how many of `count` patch tokens this layer would leave: all of them if that depends on the image."""
        try:
            return count if self.built_for is None else self.built_for.leaving(self._layer, count, self._facts)
        except ValueError:
            return count

    def auxiliary_loss(self, kept: Tensor, num_tokens: int) -> Tensor:
        """A method's own loss in training, asked of the first layer's reducer when a method masks tokens instead of
        removing them. `kept`: (L,), the mean share of the `num_tokens` that each layer passes on.
        """
        raise NotImplementedError
