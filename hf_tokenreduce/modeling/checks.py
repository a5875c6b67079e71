# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Checks of the values of method configurations. Errors say what was given and what to do."""

from collections.abc import Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any

from .encoders import EncoderFacts


MOST_LAYERS = 1024  # longest list of layers: no model has as many, and an error must not print a million numbers
MOST = 2**16  # most points of a sampling grid, or features: far more than any model needs would only fill the memory


def is_sequence(value: Any) -> bool:
    """Return whether the value is an ordered list of values. A 0-d array is none, although its type is iterable."""
    return (
        isinstance(value, Iterable) and not isinstance(value, (str, Mapping, Set)) and getattr(value, "ndim", 1) == 1
    )


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_left_out(owner: str, settings: Mapping[str, Any], *names: str) -> None:
    """Raise a ValueError if settings are given that a share decides."""
    for name in names:
        if name in settings:
            raise ValueError(f"{owner}: a share decides {name}, so leave {name} out.")


def check_flag(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name} must be True or False, got {value!r}.")


def check_size(owner: str, name: str, value: Any) -> None:
    if not is_integer(value) or not 1 <= value <= MOST:
        raise ValueError(f"{owner}: {name} must be an integer from 1 to {MOST}, got {value!r}.")


def check_rate(owner: str, rate: Any) -> None:
    if not is_number(rate) or not 0 < rate <= 1:
        raise ValueError(f"{owner}: keep_rate must be above 0 and at most 1 (1 keeps all), got {rate!r}.")


def checked_layers(owner: str, layers: Any) -> tuple[int, ...]:
    if not is_sequence(layers):
        raise ValueError(f"{owner}: layers must be a list of 0-based layer indices, got {layers!r}.")
    layers = tuple(layers)
    if len(layers) > MOST_LAYERS:
        raise ValueError(f"{owner}: layers lists {len(layers)} layers, more than any model has.")
    for layer in layers:
        if not is_integer(layer) or layer < 0:
            raise ValueError(f"{owner}: layers must hold 0-based layer indices, got {layer!r} in {list(layers)}.")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{owner}: layers lists a layer twice: {list(layers)}.")
    return tuple(int(layer) for layer in layers)


def checked_caps(owner: str, caps: Any, count: int | None, per: str) -> Any:
    if caps is None:
        return None
    values = tuple(caps) if is_sequence(caps) else (caps,)
    for value in values:
        if not is_integer(value) or value < 1:
            raise ValueError(f"{owner}: max_tokens must be an integer of at least 1, or None, got {value!r}.")
    if not is_sequence(caps):
        return int(caps)
    if count is not None and len(values) != count:
        raise ValueError(f"{owner}: a list max_tokens needs one value per {per}, got {len(values)} for {count}.")
    return tuple(int(value) for value in values)


def check_caps_fit(owner: str, name: str, caps: Any, facts: EncoderFacts) -> None:
    for cap in caps if isinstance(caps, tuple) else (caps,):
        prefix = facts.num_prefix_tokens
        if cap is not None and cap < prefix:
            raise ValueError(
                f"{owner}: {name}={cap} is less than the {prefix} prefix tokens, which always stay; set it to "
                f"{prefix} or more."
            )


def check_layers_fit(owner: str, layers: Sequence[int], num_layers: int) -> None:
    for layer in layers:
        if layer >= num_layers:
            raise ValueError(
                f"{owner}: there is no layer {layer} in a model of {num_layers} layers; layer indices are 0-based, "
                f"so they end at {num_layers - 1}. Got layers={list(layers)}. Name other layers, or give a share "
                "of the multiply-adds, which chooses layers that the model has."
            )
