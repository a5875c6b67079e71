# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""What every method configuration is: a small frozen dataclass that checks itself.

A reduction travels in `config.json` under the key `reduction`, as a dictionary with the method's name:
`{"method": "tome", "r": 13, ...}`. Layer indices are 0-based everywhere.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .checks import check_layers_fit, check_rate, checked_layers, is_sequence
from .encoders import EncoderFacts, facts_of
from .multiply_adds import even_share, largest_within, rounded_up_share


@dataclass(frozen=True)
class ReductionConfig:
    """Base of all method configurations. A subclass names its `method`, or None if it is a base itself.

    `__post_init__` checks the values by themselves; `check_fit` checks them against the facts of an encoder. `hook`
    is where the method acts: the method of `Reducer` it overrides.
    """

    method: ClassVar[str | None] = None
    hook: ClassVar[str] = "after_attention"

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "method" not in vars(cls):
            raise TypeError(f"{cls.__name__} needs a method name of its own: method: ClassVar[str | None] = ...")

    def to_dict(self) -> dict[str, Any]:
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"method": self.method, **values}

    def check_fit(self, facts: EncoderFacts) -> None:
        """Raise a `ValueError` if this reduction cannot run in an encoder with these facts."""

    def untrained(self) -> str | None:
        """What a model that starts with this setting has yet to learn, and how. None: nothing."""
        return None

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        """How many patch tokens leave a layer if `count` enter it. Adaptive methods cannot say."""
        raise ValueError(
            f"How many tokens {type(self).__name__} keeps depends on the image: run the model on images and look at "
            "token_counts."
        )

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        """What the method itself computes in a layer which `count` patch tokens of an image enter."""
        return 0

    @classmethod
    def for_budget(cls, config: PreTrainedConfig | EncoderFacts, share: float, **settings: Any) -> "ReductionConfig":
        """The mildest setting that keeps at most `share` of the multiply-adds of a backbone's layers, what the method
        itself computes included. `settings` are the other fields, such as `layers`. For methods that keep the same
        number of tokens of every image.
        """
        raise ValueError(
            f"{cls.__name__} has no setting for a budget: what it keeps depends on the images. LTMP is fitted to a "
            "budget on images by hf_tokenreduce.calibrate."
        )

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class KeepRateConfig(ReductionConfig):
    """Base of methods that keep a share of the patch tokens in some layers, the same number of every image.

    keep_rate: share of the patch tokens present that each of `layers` keeps, rounded up; one number, or a list with
        one number per entry of `layers`.
    layers: 0-based layers that reduce.
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
        """Keep rate of each layer that reduces."""
        rates = [self.keep_rate] * len(self.layers) if isinstance(self.keep_rate, float) else self.keep_rate
        return dict(zip(self.layers, rates, strict=True))

    def check_fit(self, facts: EncoderFacts) -> None:
        check_layers_fit(type(self).__name__, self.layers, facts.num_hidden_layers)

    def untrained(self) -> str | None:
        """What a model that starts with this setting has yet to learn, and how. None: nothing."""
        return None

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return rounded_up_share(self.schedule().get(layer, 1.0), count)

    @classmethod
    def for_budget(cls, config: PreTrainedConfig | EncoderFacts, share: float, **settings: Any) -> "KeepRateConfig":
        """One keep rate for all layers, in steps of 0.0001."""
        facts = facts_of(config)

        def keeping(steps: int) -> "KeepRateConfig":
            reduction = cls(keep_rate=(steps + 1) / 10000, **settings)
            reduction.check_fit(facts)
            return reduction

        return keeping(largest_within(share, 9999, lambda steps: even_share(keeping(steps), facts)))
