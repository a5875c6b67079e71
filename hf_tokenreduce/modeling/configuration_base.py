# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Base classes of the method configurations, which are small frozen dataclasses that check their values.

`config.json` holds a reduction under the key `reduction`, as a dictionary with the method's name:
`{"method": "tome", "r": 13, ...}`. Layer indices are 0-based everywhere.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .checks import check_layers_fit, check_left_out, check_rate, checked_layers, is_sequence
from .encoders import EncoderFacts, facts_of
from .multiply_adds import even_share, largest_within, rounded_up_share


@dataclass(frozen=True)
class ReductionConfig:
    """Base class of all method configurations.

    A subclass is a frozen dataclass. Its fields are the settings of the method, each with a default. It checks its
    values in `__post_init__`, and checks them against the facts of an encoder in `check_fit`.

    Attributes:
        method: The name of the method. None for a base class, which is no method itself.
        hook: Where the method acts: the name of the method of `Reducer` that it overrides.
    """

    method: ClassVar[str | None] = None
    hook: ClassVar[str] = "after_attention"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "method" not in vars(cls):
            raise TypeError(f"{cls.__name__} needs a method name of its own: method: ClassVar[str | None] = ...")

    def to_dict(self) -> dict[str, Any]:
        """Return the method's name and its settings, as `config.json` holds them."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"method": self.method, **values}

    def check_fit(self, facts: EncoderFacts) -> None:
        """Raise a `ValueError` if this reduction cannot run in an encoder with these facts."""

    def untrained(self) -> str | None:
        """Say what a new model with this setting still has to learn, and how. None if it has nothing to learn."""
        return None

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        """Return the number of patch tokens that leave a layer if `count` patch tokens enter it.

        Adaptive methods raise a `ValueError`, because their number depends on the image.
        """
        raise ValueError(
            f"How many tokens {type(self).__name__} keeps depends on the image: run the model on images and look at "
            "token_counts."
        )

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        """Count the method's own multiply-adds in a layer if `count` patch tokens of an image enter it."""
        return 0

    @classmethod
    def for_budget(cls, config: PreTrainedConfig | EncoderFacts, share: float, **settings: Any) -> "ReductionConfig":
        """Make the mildest setting that keeps at most a share of the multiply-adds of the encoder's layers.

        The multiply-adds of the method itself are counted too. Only methods that keep the same number of tokens for
        every image have such a setting; the others raise a `ValueError`.

        Args:
            config: Configuration of the model, stock or reduced, or the facts of its encoder.
            share: Share of the multiply-adds to keep, above 0 and at most 1.
            **settings: Values of the other fields, such as `layers`.

        Example:
            >>> BATConfig.for_budget(model.config, 0.65)
        """
        raise ValueError(
            f"{cls.__name__} has no setting for a budget, because what it keeps depends on the images. To fit LTMP to "
            "a budget on images, use hf_tokenreduce.calibrate."
        )

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class KeepRateConfig(ReductionConfig):
    """Base class of methods that keep a share of the patch tokens in some layers, the same number for every image.

    Args:
        keep_rate: Share of the patch tokens present that each of `layers` keeps, rounded up. One number, or a list
            with one number per entry of `layers`.
        layers: 0-based indices of the layers that reduce.
    """

    method: ClassVar[str | None] = None

    keep_rate: float | Sequence[float] = 0.7
    layers: Sequence[int] = (3, 6, 9)

    def __post_init__(self):
        name = type(self).__name__
        layers = checked_layers(name, self.layers)
        given: Any = self.keep_rate
        per_layer = is_sequence(given)
        rates = tuple(given) if per_layer else (given,)
        for rate in rates:
            check_rate(name, rate)
        if per_layer and len(rates) != len(layers):
            raise ValueError(
                f"{name}: a list keep_rate needs one value per entry of layers, got {len(rates)} values for "
                f"{len(layers)} layers: keep_rate={list(rates)}, layers={list(layers)}."
            )
        rates = tuple(float(rate) for rate in rates)
        self._set(layers=layers, keep_rate=rates if per_layer else rates[0])

    def schedule(self) -> dict[int, float]:
        """Return the keep rate of each layer that reduces."""
        rates = [self.keep_rate] * len(self.layers) if isinstance(self.keep_rate, float) else self.keep_rate
        return dict(zip(self.layers, rates, strict=True))

    def check_fit(self, facts: EncoderFacts) -> None:
        check_layers_fit(type(self).__name__, self.layers, facts.num_hidden_layers)

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return rounded_up_share(self.schedule().get(layer, 1.0), count)

    @classmethod
    def for_budget(cls, config: PreTrainedConfig | EncoderFacts, share: float, **settings: Any) -> "KeepRateConfig":
        """Make the setting that keeps at most `share` of the multiply-adds: one keep rate, in steps of 0.0001."""
        facts = facts_of(config)
        check_left_out(cls.__name__, settings, "keep_rate")

        def keeping(steps: int) -> "KeepRateConfig":
            reduction = cls(keep_rate=(steps + 1) / 10000, **settings)
            reduction.check_fit(facts)
            return reduction

        return keeping(largest_within(share, 9999, lambda steps: even_share(keeping(steps), facts)))
