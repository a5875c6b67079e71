# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The configurations of the methods, one small frozen dataclass each."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from .checks import (
    check_caps_fit,
    check_flag,
    check_layers_fit,
    check_rate,
    check_size,
    checked_caps,
    checked_layers,
    is_integer,
    is_number,
    is_sequence,
)
from .configuration_base import REDUCTIONS, KeepRateConfig, ReductionConfig
from .encoders import EncoderFacts, facts_of
from .multiply_adds import (
    class_attention_cost,
    even_share,
    largest_within,
    rounded_half_up,
    rounded_up_share,
    similarity_cost,
)


@dataclass(frozen=True)
class ToMeConfig(ReductionConfig):
    """Token merging, after "Token Merging: Your ViT But Faster". Acts in every layer; needs no training.

    r: patch tokens merged away per layer (at most half of those present). An integer, a list with one integer per
        layer, or a tuple `(r, inflect)`: a straight line over the layers from `r * (1 - inflect)` to
        `r * (1 + inflect)`, so that `(r, -1.0)` merges most in the first layers and nothing in the last.
    prop_attn: a token that stands for s patches counts s times as a key (log s is added to its attention logits).
    inflect: where a tuple's second value is kept.
    """

    method: ClassVar[str | None] = "tome"

    r: int | Sequence[int] | tuple[int, float] = 8
    prop_attn: bool = True
    inflect: float = 0.0

    def __post_init__(self):
        r: Any = self.r
        inflect: Any = self.inflect
        if isinstance(r, tuple) and len(r) == 2:
            r, inflect = r
        if not is_number(inflect) or not -1.0 <= inflect <= 1.0:
            raise ValueError(f"ToMeConfig: inflect must lie between -1 and 1, got {inflect!r}.")
        per_layer = is_sequence(r)
        if per_layer and inflect:
            raise ValueError(f"ToMeConfig: inflect={inflect!r} shapes a single r; with a list of r set it to 0.")
        values = tuple(r) if per_layer else (r,)
        for value in values:
            if not is_integer(value) or value < 0:
                raise ValueError(
                    f"ToMeConfig: r counts tokens, so it must be an integer of at least 0, got {value!r}."
                )
        check_flag("ToMeConfig", "prop_attn", self.prop_attn)
        # A list stays a list: as a tuple, that of two layers would read as (r, inflect).
        self._set(r=[int(value) for value in values] if per_layer else int(r), inflect=float(inflect))

    def schedule(self, num_layers: int) -> list[int]:
        """r of each layer."""
        r: Any = self.r
        if is_sequence(r):
            return list(r)
        first = int(r * (1 - self.inflect))
        steps = max(num_layers - 1, 1)
        return [(first * steps + 2 * (r - first) * layer) // steps for layer in range(num_layers)]

    def check_fit(self, facts: EncoderFacts) -> None:
        if not isinstance(self.r, int) and len(self.r) != facts.num_hidden_layers:
            raise ValueError(
                f"ToMeConfig: a list r needs one value per layer, got {len(self.r)} values for "
                f"{facts.num_hidden_layers} layers: {list(self.r)}."
            )

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return count - min(self.schedule(facts.num_hidden_layers)[layer], count // 2)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return similarity_cost(count, facts) if self.leaving(layer, count, facts) < count else 0

    @classmethod
    def for_budget(cls, config: PreTrainedConfig | EncoderFacts, share: float, **settings: Any) -> "ToMeConfig":
        """One r, or a list of r + 1 in the first layers and r in the others."""
        facts = facts_of(config)
        layers = facts.num_hidden_layers

        def merging(total: int) -> "ToMeConfig":
            r, more = divmod(total, layers)
            return cls(r=[r + 1] * more + [r] * (layers - more) if more else r, **settings)

        most = layers * (facts.num_patches // 2)
        return merging(most - largest_within(share, most, lambda spared: even_share(merging(most - spared), facts)))


@dataclass(frozen=True)
class TopKConfig(KeepRateConfig):
    """Keep the patch tokens the class token attends to most; the others are dropped. Needs no training.

    keep_rate: share of the patch tokens present that each of `layers` keeps, rounded up; one number, or a list with
        one number per entry of `layers`.
    layers: 0-based layers that drop tokens, between their attention and their MLP.
    """

    method: ClassVar[str | None] = "topk"

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        kept = rounded_up_share(self.schedule().get(layer, 1.0), count)
        return class_attention_cost(count, facts) if kept < count else 0


@dataclass(frozen=True)
class EViTConfig(TopKConfig):
    """Top-K that can gather what it drops, after "Not All Patches are What You Need". Needs no training.

    fuse: the tokens not kept become one token, their sum weighted by class attention (weights not normalised). It
        counts as an ordinary patch token afterwards.
    """

    method: ClassVar[str | None] = "evit"

    fuse: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_flag("EViTConfig", "fuse", self.fuse)

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        kept = super().leaving(layer, count, facts)
        return kept + (self.fuse and kept < count)


@dataclass(frozen=True)
class BATConfig(KeepRateConfig):
    """Importance and diversity, after "Beyond Attentive Tokens". Tokens the class token attends to little are
    clustered; among those it attends to much, the most similar are fused. Needs no training, gains by it.

    keep_rate: share of the patch tokens present that each of `layers` hands on, rounded up; one number, or a list
        with one number per entry of `layers`.
    layers: 0-based layers that reduce, between their attention and their MLP.
    cluster_share: of the tokens handed on, the share that are clusters of inattentive tokens. 0 drops the inattentive.
    fuse_share: how many attentive tokens are fused away, as a share of those that remain: at 0.2, 12 become 10.
    prop_attn: a token that stands for s patches counts s times as a key.
    """

    method: ClassVar[str | None] = "bat"

    cluster_share: float = 0.3
    fuse_share: float = 0.2
    prop_attn: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("cluster_share", "fuse_share"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 1:
                raise ValueError(f"BATConfig: {name} must lie between 0 and 1, got {value!r}.")
            self._set(**{name: float(value)})
        check_flag("BATConfig", "prop_attn", self.prop_attn)

    def split(self, count: int, leaving: int) -> tuple[int, int, int]:
        """How `count` patch tokens become `leaving`: (attentive ones, those of them that fuse into another, clusters
        of the rest)."""
        clusters = rounded_half_up(self.cluster_share * leaving)
        fused = min(rounded_half_up(self.fuse_share * (leaving - clusters)), count - leaving)
        return leaving - clusters + fused, fused, clusters

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        leaving = self.leaving(layer, count, facts)
        if leaving == count:
            return 0
        attentive, fused, clusters = self.split(count, leaving)
        distances = (count - attentive) ** 2 * facts.hidden_size if clusters else 0
        return class_attention_cost(count, facts) + distances + (similarity_cost(attentive, facts) if fused else 0)


@dataclass(frozen=True)
class ATSConfig(ReductionConfig):
    """Adaptive token sampling, after "Adaptive Token Sampling for Efficient Vision Transformers". Every image keeps as
    many tokens as its scores are spread over. No parameters; works without training.

    layers: 0-based layers that sample, inside their attention.
    num_tokens: points of the sampling grid, prefix tokens included: the most that a layer can keep. None: the tokens
        that enter the model, so that only the scores decide.
    score: "joint" (the authors' code: attention summed over heads times the length of the whole value vector) or
        "per_head" (the paper's formula: the product in each head, normalised, then summed).
    max_tokens: no image leaves one of `layers` with more tokens, prefix tokens included, whatever it shows: one
        number, or a list with one number per entry of `layers`. The highest scores stay.
    """

    method: ClassVar[str | None] = "ats"
    hook: ClassVar[str] = "select_queries"

    layers: Sequence[int] = tuple(range(3, 12))
    num_tokens: int | None = None
    score: str = "joint"
    max_tokens: int | Sequence[int] | None = None

    def __post_init__(self):
        layers = checked_layers("ATSConfig", self.layers)
        if self.num_tokens is not None:
            check_size("ATSConfig", "num_tokens", self.num_tokens)
        if self.score not in ("joint", "per_head"):
            raise ValueError(f"ATSConfig: score must be 'joint' or 'per_head', got {self.score!r}.")
        self._set(
            layers=layers,
            num_tokens=None if self.num_tokens is None else int(self.num_tokens),
            max_tokens=checked_caps("ATSConfig", self.max_tokens, len(layers), "entry of layers"),
        )

    def cap(self, layer: int) -> int | None:
        caps: Any = self.max_tokens
        return dict(zip(self.layers, caps, strict=True)).get(layer) if isinstance(caps, tuple) else caps

    def check_fit(self, facts: EncoderFacts) -> None:
        check_layers_fit("ATSConfig", self.layers, facts.num_hidden_layers)
        check_caps_fit("ATSConfig", "max_tokens", self.max_tokens, facts)
        check_caps_fit("ATSConfig", "num_tokens", self.num_tokens, facts)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return class_attention_cost(count, facts) if layer in self.layers and count else 0


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

    method: ClassVar[str | None] = "ltmp"

    merge: bool = True
    prune: bool = True
    target: float = 0.75
    temperature: float = 0.1
    budget_weight: float = 10.0
    merge_threshold: float = 0.9
    prune_threshold: float = 0.0
    max_tokens: int | Sequence[int] | None = None

    def __post_init__(self):
        check_flag("LTMPConfig", "merge", self.merge)
        check_flag("LTMPConfig", "prune", self.prune)
        if not (self.merge or self.prune):
            raise ValueError("LTMPConfig: with merge=False and prune=False nothing is left to do; set one to True.")
        for name, low, high in (("target", 0, 1), ("merge_threshold", 0, 1), ("prune_threshold", 0, 1)):
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                raise ValueError(f"LTMPConfig: {name} must lie between {low} and {high}, got {value!r}.")
        for name in ("temperature", "budget_weight"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < float("inf"):
                raise ValueError(f"LTMPConfig: {name} must be a number above 0, got {value!r}.")
        for name in ("target", "merge_threshold", "prune_threshold", "temperature", "budget_weight"):
            self._set(**{name: float(getattr(self, name))})
        self._set(max_tokens=checked_caps("LTMPConfig", self.max_tokens, None, "layer"))

    def cap(self, layer: int) -> int | None:
        caps: Any = self.max_tokens
        return caps[layer] if isinstance(caps, tuple) else caps

    def check_fit(self, facts: EncoderFacts) -> None:
        if isinstance(self.max_tokens, tuple) and len(self.max_tokens) != facts.num_hidden_layers:
            raise ValueError(
                f"LTMPConfig: a list max_tokens needs one value per layer, got {len(self.max_tokens)} values for "
                f"{facts.num_hidden_layers} layers: {list(self.max_tokens)}."
            )
        check_caps_fit("LTMPConfig", "max_tokens", self.max_tokens, facts)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return similarity_cost(count, facts) if self.merge else 0


@dataclass(frozen=True)
class SiTConfig(KeepRateConfig):
    """Self-slimming, after "Self-slimmed Vision Transformer". After each of `layers` a small network weighs the patch
    tokens into fewer ones, softly. It needs training; `calibrate` gives it a start.

    keep_rate: what the i-th of `layers` hands on is the product of the first i rates times the patches of an image of
        the model's own size, rounded down, at least 1. One number, or a list with one number per entry of `layers`.
    layers: 0-based layers after which tokens are slimmed, ascending.
    """

    method: ClassVar[str | None] = "sit"
    hook: ClassVar[str] = "after_layer"

    keep_rate: float | Sequence[float] = 0.5
    layers: Sequence[int] = (5, 8, 9)

    def check_fit(self, facts: EncoderFacts) -> None:
        super().check_fit(facts)
        if facts_of(facts).has_places and self.layers:
            raise ValueError(
                "SiTConfig: SiT makes tokens that are mixtures of many patches and so have no place, but the "
                "attention of this encoder (DINOv3, BEiT) asks for the place of every token. Use a method that "
                "keeps, merges or samples tokens: ToMe, EViT, Top-K, BAT, ATS, LTMP or DL-ViT."
            )
        if list(self.layers) != sorted(self.layers):
            raise ValueError(f"SiTConfig: layers must ascend: each slims what the last one left. Got {self.layers}.")

    def slim_tokens(self, facts: EncoderFacts) -> dict[int, int]:
        """The patch tokens that leave each of the layers that slim."""
        num_patches = facts_of(facts).num_patches
        share, present, tokens = 1.0, num_patches, {}
        for layer, rate in self.schedule().items():
            share *= rate
            slim = max(1, int(share * num_patches + 1e-5))
            if slim < present:
                tokens[layer] = present = slim
        return tokens

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return self.slim_tokens(facts).get(layer, count)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        slim, width = self.slim_tokens(facts).get(layer, 0), facts.hidden_size
        return count * (width // 2 * (width + slim) + slim * width) if slim else 0


@dataclass(frozen=True)
class DLViTConfig(ReductionConfig):
    """Token filtering, after "Predicting Token Impact Towards Efficient Vision Transformer". Before the first
    attention a small network judges each embedded patch; those that do not matter are dropped.

    threshold: patches of a higher probability stay, so images differ in their number of tokens; 0 keeps all.
    keep_rate: instead of a threshold: the share of the patches with the highest probability stays, rounded up, the
        same number for every image.
    hidden_size: width of the filter's hidden layer. None: half the backbone's.
    trained: whether the filter decides. As long as it is False, every patch stays.
    max_tokens: with a threshold: no more tokens, prefix tokens included, whatever an image shows. The most probable
        stay.
    """

    method: ClassVar[str | None] = "dlvit"
    hook: ClassVar[str] = "before_encoder"

    threshold: float = 0.5
    keep_rate: float | None = None
    hidden_size: int | None = None
    trained: bool = False
    max_tokens: int | None = None

    def __post_init__(self):
        if not is_number(self.threshold) or not 0 <= self.threshold <= 1:
            raise ValueError(f"DLViTConfig: threshold must lie between 0 and 1, got {self.threshold!r}.")
        if self.hidden_size is not None:
            check_size("DLViTConfig", "hidden_size", self.hidden_size)
        check_flag("DLViTConfig", "trained", self.trained)
        if is_sequence(self.max_tokens):
            raise ValueError(f"DLViTConfig: max_tokens is one number, for it filters once, got {self.max_tokens!r}.")
        if self.keep_rate is not None:
            check_rate("DLViTConfig", self.keep_rate)
            if self.max_tokens is not None:
                raise ValueError(
                    f"DLViTConfig: keep_rate={self.keep_rate} fixes the number of tokens, so max_tokens="
                    f"{self.max_tokens} has nothing to cap. Set one of the two to None."
                )
        self._set(
            threshold=float(self.threshold),
            keep_rate=None if self.keep_rate is None else float(self.keep_rate),
            hidden_size=None if self.hidden_size is None else int(self.hidden_size),
            max_tokens=checked_caps("DLViTConfig", self.max_tokens, None, "layer"),
        )

    def check_fit(self, facts: EncoderFacts) -> None:
        check_caps_fit("DLViTConfig", "max_tokens", self.max_tokens, facts)

    def leaving(self, layer: int, count: int, facts: EncoderFacts) -> int:
        if layer > 0 or not self.trained:
            return count
        return super().leaving(layer, count, facts) if self.keep_rate is None else self.keeps(count)

    def keeps(self, count: int) -> int:
        """Patch tokens that stay by `keep_rate`."""
        rate: Any = self.keep_rate
        return rounded_up_share(rate, count)

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        filters = layer == 0 and self.trained and (self.keep_rate is None or self.keeps(count) < count)
        inner = self.hidden_size or facts.hidden_size // 2
        return count * inner * (2 * facts.hidden_size + 1) if filters else 0

    @classmethod
    def for_budget(cls, config: PreTrainedConfig | EncoderFacts, share: float, **settings: Any) -> "DLViTConfig":
        """A keep rate, in steps of 0.0001. It counts as trained."""
        facts = facts_of(config)

        def keeping(steps: int, **changes: Any) -> "DLViTConfig":
            return cls(keep_rate=(steps + 1) / 10000, **{**settings, **changes})

        return keeping(largest_within(share, 9999, lambda steps: even_share(keeping(steps, trained=True), facts)))


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
