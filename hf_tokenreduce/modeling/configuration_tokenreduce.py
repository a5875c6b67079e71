# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""One small frozen dataclass per reduction method, and the ViT and DeiT configurations that carry one.

A reduction travels in `config.json` under the key `reduction`, as a dictionary with the method's name:
`{"method": "tome", "r": 13, ...}`. Layer indices are 0-based everywhere.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import DeiTConfig, PreTrainedConfig, ViTConfig


REDUCTIONS: dict[str, type["ReductionConfig"]] = {}


@dataclass(frozen=True)
class ReductionConfig:
    """Base of all method configurations. A subclass names its `method`, which also registers it.

    `__post_init__` checks the values by themselves; `check_fit` checks them against a backbone.
    """

    method: ClassVar[str]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "method" not in vars(cls):
            raise TypeError(f"{cls.__name__} needs a method name of its own: method: ClassVar[str] = ...")
        REDUCTIONS[cls.method] = cls

    def to_dict(self) -> dict[str, Any]:
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        return {"method": self.method, **values}

    def check_fit(self, config: PreTrainedConfig) -> None:
        """Raise a `ValueError` if this reduction cannot run on a backbone with this configuration."""

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class ToMeConfig(ReductionConfig):
    """Token merging, after "Token Merging: Your ViT But Faster". Acts in every layer; needs no training.

    r: patch tokens merged away per layer (at most half of those present). An integer, a list with one integer per
        layer, or a tuple `(r, inflect)`: a straight line over the layers from `r * (1 - inflect)` to
        `r * (1 + inflect)`, so that `(r, -1.0)` merges most in the first layers and nothing in the last.
    prop_attn: a token that stands for s patches counts s times as a key (log s is added to its attention logits).
    inflect: where a tuple's second value is kept.
    """

    method: ClassVar[str] = "tome"

    r: int | Sequence[int] | tuple[int, float] = 8
    prop_attn: bool = True
    inflect: float = 0.0

    def __post_init__(self):
        r: Any = self.r
        inflect: Any = self.inflect
        if isinstance(r, tuple) and len(r) == 2:
            r, inflect = r
        if not _is_number(inflect) or not -1.0 <= inflect <= 1.0:
            raise ValueError(f"ToMeConfig: inflect must lie between -1 and 1, got {inflect!r}.")
        per_layer = _is_sequence(r)
        if per_layer and inflect:
            raise ValueError(f"ToMeConfig: inflect={inflect!r} shapes a single r; with a list of r set it to 0.")
        values = tuple(r) if per_layer else (r,)
        for value in values:
            if not _is_integer(value) or value < 0:
                raise ValueError(
                    f"ToMeConfig: r counts tokens, so it must be an integer of at least 0, got {value!r}."
                )
        _check_flag("ToMeConfig", "prop_attn", self.prop_attn)
        # A list stays a list: as a tuple, that of two layers would read as (r, inflect).
        self._set(r=[int(value) for value in values] if per_layer else int(r), inflect=float(inflect))

    def schedule(self, num_layers: int) -> list[int]:
        """r of each layer."""
        r: Any = self.r
        if _is_sequence(r):
            return list(r)
        first = int(r * (1 - self.inflect))
        steps = max(num_layers - 1, 1)
        return [(first * steps + 2 * (r - first) * layer) // steps for layer in range(num_layers)]

    def check_fit(self, config: PreTrainedConfig) -> None:
        if not isinstance(self.r, int) and len(self.r) != config.num_hidden_layers:
            raise ValueError(
                f"ToMeConfig: a list r needs one value per layer, got {len(self.r)} values for "
                f"{config.num_hidden_layers} layers: {list(self.r)}."
            )


@dataclass(frozen=True)
class TopKConfig(ReductionConfig):
    """Keep the patch tokens the class token attends to most; the others are dropped. Needs no training.

    keep_rate: share of the patch tokens present that each of `layers` keeps, rounded up; one number, or a list with
        one number per entry of `layers`.
    layers: 0-based layers that drop tokens, between their attention and their MLP.
    """

    method: ClassVar[str] = "topk"

    keep_rate: float | Sequence[float] = 0.7
    layers: Sequence[int] = (3, 6, 9)

    def __post_init__(self):
        name = type(self).__name__
        layers = _checked_layers(name, self.layers)
        given: Any = self.keep_rate
        per_layer = _is_sequence(given)
        rates = tuple(given) if per_layer else (given,)
        for rate in rates:
            if not _is_number(rate) or not 0 < rate <= 1:
                raise ValueError(f"{name}: keep_rate must be above 0 and at most 1 (1 keeps all), got {rate!r}.")
        if per_layer and len(rates) != len(layers):
            raise ValueError(
                f"{name}: a list keep_rate needs one value per entry of layers, got {len(rates)} values for "
                f"{len(layers)} layers: keep_rate={list(rates)}, layers={list(layers)}."
            )
        rates = tuple(float(rate) for rate in rates)
        self._set(layers=layers, keep_rate=rates if per_layer else rates[0])

    def schedule(self) -> dict[int, float]:
        """Keep rate of each layer that drops tokens."""
        rates = [self.keep_rate] * len(self.layers) if isinstance(self.keep_rate, float) else self.keep_rate
        return dict(zip(self.layers, rates, strict=True))

    def check_fit(self, config: PreTrainedConfig) -> None:
        _check_layers_fit(type(self).__name__, self.layers, config.num_hidden_layers)


@dataclass(frozen=True)
class EViTConfig(TopKConfig):
    """Top-K that can gather what it drops, after "Not All Patches are What You Need". Needs no training.

    fuse: the tokens not kept become one token, their sum weighted by class attention (weights not normalised). It
        counts as an ordinary patch token afterwards.
    """

    method: ClassVar[str] = "evit"

    fuse: bool = True

    def __post_init__(self):
        super().__post_init__()
        _check_flag("EViTConfig", "fuse", self.fuse)


@dataclass(frozen=True)
class ATSConfig(ReductionConfig):
    """Adaptive token sampling, after "Adaptive Token Sampling for Efficient Vision Transformers". Every image keeps as
    many tokens as its scores are spread over. No parameters; works without training.

    layers: 0-based layers that sample, inside their attention.
    num_tokens: points of the sampling grid, prefix tokens included: the most that a layer can keep. None: the tokens
        that enter the model, so that only the scores decide.
    score: "joint" (the authors' code: attention summed over heads times the length of the whole value vector) or
        "per_head" (the paper's formula: the product in each head, normalised, then summed).
    max_tokens: no image leaves a layer with more tokens, prefix tokens included, whatever it shows: one number, or a
        list with one number per entry of `layers`. The highest scores stay.
    """

    method: ClassVar[str] = "ats"

    layers: Sequence[int] = tuple(range(3, 12))
    num_tokens: int | None = None
    score: str = "joint"
    max_tokens: int | Sequence[int] | None = None

    def __post_init__(self):
        layers = _checked_layers("ATSConfig", self.layers)
        if self.num_tokens is not None and (not _is_integer(self.num_tokens) or self.num_tokens < 1):
            raise ValueError(f"ATSConfig: num_tokens must be at least 1, or None for all, got {self.num_tokens!r}.")
        if self.score not in ("joint", "per_head"):
            raise ValueError(f"ATSConfig: score must be 'joint' or 'per_head', got {self.score!r}.")
        self._set(
            layers=layers, max_tokens=_checked_caps("ATSConfig", self.max_tokens, len(layers), "entry of layers")
        )

    def cap(self, layer: int) -> int | None:
        caps: Any = self.max_tokens
        return dict(zip(self.layers, caps, strict=True)).get(layer) if isinstance(caps, tuple) else caps

    def check_fit(self, config: PreTrainedConfig) -> None:
        _check_layers_fit("ATSConfig", self.layers, config.num_hidden_layers)
        _check_caps_fit("ATSConfig", "max_tokens", self.max_tokens, config)
        _check_caps_fit("ATSConfig", "num_tokens", self.num_tokens, config)


@dataclass(frozen=True)
class LTMPConfig(ReductionConfig):
    """Learned thresholds, merging and pruning, after "Learned Thresholds Token Merging and Pruning for Vision
    Transformers". In every layer tokens merge whose similarity is above one threshold, and those are pruned whose
    importance is not above another: 2 numbers per layer, learned or calibrated.

    merge, prune: whether each is done.
    target: share of the multiply-adds to keep, which training aims at.
    temperature: of the sigmoid whose slope the thresholds learn by (nothing is removed while they learn).
    budget_weight: factor of the squared distance from `target` in the loss.
    merge_threshold, prune_threshold: initial values, between 0 and 1. 1.0 merges nothing, 0.0 prunes nothing.
    max_tokens: no image leaves a layer with more tokens, prefix tokens included: one number, or a list with one per
        layer. The most important stay.
    """

    method: ClassVar[str] = "ltmp"

    merge: bool = True
    prune: bool = True
    target: float = 0.75
    temperature: float = 0.1
    budget_weight: float = 10.0
    merge_threshold: float = 0.9
    prune_threshold: float = 0.0
    max_tokens: int | Sequence[int] | None = None

    def __post_init__(self):
        _check_flag("LTMPConfig", "merge", self.merge)
        _check_flag("LTMPConfig", "prune", self.prune)
        if not (self.merge or self.prune):
            raise ValueError("LTMPConfig: with merge=False and prune=False nothing is left to do; set one to True.")
        for name, low, high in (("target", 0, 1), ("merge_threshold", 0, 1), ("prune_threshold", 0, 1)):
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise ValueError(f"LTMPConfig: {name} must lie between {low} and {high}, got {value!r}.")
        for name in ("temperature", "budget_weight"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < float("inf"):
                raise ValueError(f"LTMPConfig: {name} must be a number above 0, got {value!r}.")
        self._set(max_tokens=_checked_caps("LTMPConfig", self.max_tokens, None, "layer"))

    def cap(self, layer: int) -> int | None:
        caps: Any = self.max_tokens
        return caps[layer] if isinstance(caps, tuple) else caps

    def check_fit(self, config: PreTrainedConfig) -> None:
        if isinstance(self.max_tokens, tuple) and len(self.max_tokens) != config.num_hidden_layers:
            raise ValueError(
                f"LTMPConfig: a list max_tokens needs one value per layer, got {len(self.max_tokens)} values for "
                f"{config.num_hidden_layers} layers: {list(self.max_tokens)}."
            )
        _check_caps_fit("LTMPConfig", "max_tokens", self.max_tokens, config)


def parse_reduction(value: Any) -> ReductionConfig | None:
    """A method configuration from one, from the dictionary form of one, or None for no reduction."""
    if value is None:
        return None
    if is_dataclass(value) and not isinstance(value, type) and hasattr(value, "method"):
        # Rebuilt even if it is one: a configuration made by another copy of this module is another class.
        value = {"method": value.method, **asdict(value)}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"reduction must be a method configuration such as ToMeConfig(r=13), its dictionary form such as "
            f"{{'method': 'tome', 'r': 13}}, or None for no reduction, got {value!r}."
        )
    arguments = dict(value)
    method = arguments.pop("method", None)
    if not isinstance(method, str) or method not in REDUCTIONS:
        raise ValueError(f"Unknown reduction method {method!r}. The methods are: {', '.join(sorted(REDUCTIONS))}.")
    known = [field.name for field in fields(REDUCTIONS[method])]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(f"Unknown field {unknown} for the method {method!r}. Its fields are: {', '.join(known)}.")
    return REDUCTIONS[method](**arguments)


_StockConfig: Any = object  # the mixin is only used in front of a stock configuration, whose methods it extends


class TokenReduceConfigMixin(_StockConfig):
    """What the configuration of a reduced backbone adds to the stock one.

    reduction: a method configuration, its dictionary form, or None (then the model computes what the stock one does).
        It is checked whenever it is set, and read back as a method configuration.
    """

    base_model_type: ClassVar[str]
    num_prefix_tokens: ClassVar[int]
    default_auto_map: ClassVar[dict[str, str]]
    reduction: Any
    keys_to_ignore_at_inference = ["token_counts", "patch_map", "task_loss", "auxiliary_loss"]

    def __setattr__(self, key, value):
        if key == "reduction":
            value = parse_reduction(value)
            if value is not None:
                value.check_fit(self)
        super().__setattr__(key, value)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self.reduction is not None:
            output["reduction"] = self.reduction.to_dict()
        return output

    def save_pretrained(self, save_directory, *args, **kwargs):
        # The code is saved beside the weights, so no entry may go on pointing at the repository it was loaded from.
        recorded = {name: reference.split("--")[-1] for name, reference in getattr(self, "auto_map", {}).items()}
        self.auto_map = {**self.default_auto_map, **recorded}
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = config_dict.get("model_type", cls.model_type)
        if found == cls.base_model_type:
            config_dict = {**config_dict, "model_type": cls.model_type}
        elif found != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {found!r} model, which {cls.__name__} cannot load: it takes "
                f"{cls.base_model_type!r} and {cls.model_type!r}. Use the class of the matching backbone: "
                f"TokenReduceViT... for 'vit' (this includes facebook/deit-*-patch16-*), TokenReduceDeiT... for "
                f"'deit' (the distilled ones)."
            )
        return config_dict, kwargs


@strict
class TokenReduceViTConfig(TokenReduceConfigMixin, ViTConfig):
    """A `ViTConfig` with a `reduction`."""

    model_type = "tokenreduce_vit"
    base_model_type = "vit"
    num_prefix_tokens = 1
    default_auto_map = {
        "AutoConfig": "configuration_tokenreduce.TokenReduceViTConfig",
        "AutoModel": "modeling_tokenreduce_vit.TokenReduceViTModel",
        "AutoModelForImageClassification": "modeling_tokenreduce_vit.TokenReduceViTForImageClassification",
    }

    reduction: Any = None


@strict
class TokenReduceDeiTConfig(TokenReduceConfigMixin, DeiTConfig):
    """A `DeiTConfig` with a `reduction`. The class and the distillation token are prefix tokens."""

    model_type = "tokenreduce_deit"
    base_model_type = "deit"
    num_prefix_tokens = 2
    default_auto_map = {
        "AutoConfig": "configuration_tokenreduce.TokenReduceDeiTConfig",
        "AutoModel": "modeling_tokenreduce_deit.TokenReduceDeiTModel",
        "AutoModelForImageClassification": "modeling_tokenreduce_deit.TokenReduceDeiTForImageClassification",
    }

    reduction: Any = None


TokenReduceViTConfig.register_for_auto_class()
TokenReduceDeiTConfig.register_for_auto_class()


def _is_sequence(value: Any) -> bool:
    """Whether it is a list of values, in an order that means something (a 0-d array is iterable by type alone)."""
    return (
        isinstance(value, Iterable) and not isinstance(value, (str, Mapping, Set)) and getattr(value, "ndim", 1) == 1
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_flag(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{owner}: {name} must be True or False, got {value!r}.")


def _checked_layers(owner: str, layers: Any) -> tuple[int, ...]:
    if not _is_sequence(layers):
        raise ValueError(f"{owner}: layers must be a list of 0-based layer indices, got {layers!r}.")
    layers = tuple(layers)
    for layer in layers:
        if not _is_integer(layer) or layer < 0:
            raise ValueError(f"{owner}: layers holds 0-based layer indices, got {layer!r} in {list(layers)}.")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{owner}: layers names a layer twice: {list(layers)}.")
    return tuple(int(layer) for layer in layers)


def _checked_caps(owner: str, caps: Any, count: int | None, per: str) -> Any:
    if caps is None:
        return None
    values = tuple(caps) if _is_sequence(caps) else (caps,)
    for value in values:
        if not _is_integer(value) or value < 1:
            raise ValueError(f"{owner}: max_tokens counts tokens: an integer of at least 1, or None, got {value!r}.")
    if not _is_sequence(caps):
        return int(caps)
    if count is not None and len(values) != count:
        raise ValueError(f"{owner}: a list max_tokens needs one value per {per}, got {len(values)} for {count}.")
    return tuple(int(value) for value in values)


def _check_caps_fit(owner: str, name: str, caps: Any, config: PreTrainedConfig) -> None:
    for cap in caps if isinstance(caps, tuple) else (caps,):
        if cap is not None and cap < config.num_prefix_tokens:
            raise ValueError(
                f"{owner}: {name}={cap} is less than the {config.num_prefix_tokens} prefix tokens, which always stay; "
                f"set it to {config.num_prefix_tokens} or more."
            )


def _check_layers_fit(owner: str, layers: Sequence[int], num_layers: int) -> None:
    for layer in layers:
        if layer >= num_layers:
            raise ValueError(
                f"{owner}: there is no layer {layer} in a model of {num_layers} layers; layer indices are 0-based, "
                f"so they end at {num_layers - 1}. Got layers={list(layers)}."
            )
