# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The places of a model where a method can act."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .attention import AttentionView
from .encoders import EncoderFacts
from .tokens import TokenMap, TokenState


class Reducer(nn.Module):
    """Base class of the part of a method that runs in a layer. By itself it reduces nothing.

    A method subclasses it and overrides the hook where it acts:

        pixels -> embeddings -> before_encoder -> layer x L -> norm -> head
        layer:    norm -> k, v -> select_queries -> attention -> + residual -> after_attention -> norm -> MLP
                  -> + residual -> after_layer

    A hook makes a `TokenMap` with a pure function, and returns the state with the map applied (`apply_map`).
    `select_queries` returns the map itself. A hook must not change the state that it is given, and must not keep
    anything between calls, because gradient checkpointing runs layers twice. Learned parts are ordinary parameters and
    submodules of the reducer.

    Every layer has one reducer. `before_encoder` is called for the first layer's reducer only. If a classifier reads
    only the prefix tokens, its last layer computes no patches, and the other hooks of that layer are usually not
    called (see `ReducedLayer`).

    Args:
        facts: Facts of the encoder. `facts.reduction` is the configuration of the method.
        layer: 0-based index of the layer.

    Attributes:
        in_float32: Names of parameters that stay float32 when the model is loaded in a half type.
        prop_attn: Whether attention in this layer counts a token once per patch it stands for.
        needs_received: Whether `after_attention` reads `view.received`, which costs a CPU the whole attention map.
        needs_shift: Whether `after_layer` reads `state.shift`.
        serves_every_setting: Whether what it has learned is of use for every setting of the method. Then a new setting
            keeps it, if it has as many parameters.
    """

    in_float32: tuple[str, ...] = ()
    prop_attn = False
    needs_received = False
    needs_shift = False
    serves_every_setting = False

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__()
        self.built_for = facts.reduction
        self._facts, self._layer = facts, layer

    def init_weights(self, attention: Any) -> None:
        """Set the initial values of the reducer's own parameters, by `transformers.initialization`.

        Stock submodules such as `nn.Linear` are initialised before, as in the rest of the model.

        Args:
            attention: The attention module of the layer, whose weights can be a start.
        """

    def before_encoder(self, state: TokenState) -> TokenState:
        """Act on the embedded tokens, before the first layer."""
        return state

    def select_queries(self, view: AttentionView, state: TokenState) -> TokenMap | None:
        """Choose the tokens that stay before attention, so that only their queries are computed. None: all stay."""
        return None

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        """Act between attention and MLP. The tokens of `view` are those of `state`, unless queries were selected."""
        return state

    def after_layer(self, state: TokenState) -> TokenState:
        """Act on the output of the layer."""
        return state

    def leaving(self, count: int) -> int:
        """Return how many of `count` patch tokens this layer would keep: all of them if that depends on the image."""
        try:
            return count if self.built_for is None else self.built_for.leaving(self._layer, count, self._facts)
        except ValueError:
            return count

    def auxiliary_loss(self, kept: Tensor, num_tokens: int) -> Tensor:
        """Return the method's own loss in training, for methods that mask tokens instead of removing them.

        The reducer of the first layer is asked for it. `kept` (L,) is the mean share of the `num_tokens` tokens that
        leaves each layer.
        """
        raise NotImplementedError


def take_over(new: Sequence[Reducer], old: Sequence[Reducer]) -> bool:
    """Let reducers share what others of their method have learned, if it serves every setting.

    Args:
        new: The reducers of all layers, for the new setting.
        old: Those of the model before.

    Returns:
        Whether all parts of the new reducers have learned. A layer of the new setting can have parts that the same
        layer did not have before.
    """
    if type(new[0]).__name__ != type(old[0]).__name__ or not new[0].serves_every_setting:
        return False
    complete = True
    for reducer, before in zip(new, old, strict=True):
        known = {name: parameter.shape for name, parameter in before.named_parameters()}
        if any(known.get(name) != parameter.shape for name, parameter in reducer.named_parameters()):
            complete = False
            continue
        for name, module in reducer.named_modules():
            if module._parameters:
                module._parameters.update(before.get_submodule(name)._parameters)
    return complete
