"""What the tuner tries: methods, which layers reduce, how much each of them removes, and further settings."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from ..methods import METHODS, Method, find_method
from ..methods.method import spread_layers
from ..modeling.configuration_base import KeepRateConfig, ReductionConfig
from ..modeling.encoders import EncoderFacts
from ..modeling.multiply_adds import even_counts, even_share, largest_within


# Layers of a model of 12: all, every second, the later ones, and few. Few layers take less time for the same
# multiply-adds, because every layer that reduces scores, sorts and moves tokens.
SCHEDULES = (
    tuple(range(12)), (3, 6, 9), tuple(range(1, 11)), (1, 3, 5, 7, 9), (0, 2, 4, 6, 8, 10), tuple(range(3, 12)),
    (2, 5, 8), (1, 4, 7), (4, 8), (3, 7), (2, 4, 6), (4,),
)  # fmt: skip
FITTED_SCHEDULES = 2  # only so many for methods that are fitted on images, because that takes many forward passes


@dataclass(frozen=True)
class Variant:
    """A method with everything that the share of the multiply-adds does not decide.

    Attributes:
        method: Name of the method.
        settings: Fields of its configuration that differ from the defaults.
        shape: How the removed tokens are spread over the layers, as parts that sum to 1. None: as the method does it.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    shape: tuple[float, ...] | None = None

    @property
    def is_default(self) -> bool:
        """Whether only the share decides what the method does."""
        return not self.settings and self.shape is None


def searched_methods(names: Sequence[str] | None = None) -> list[Method]:
    """List the methods that a search tries.

    Args:
        names: Names of methods. By default all methods that do not have to be trained first.

    Returns:
        `list` of `Method`: By default in the order in which tables show them, else in the order of `names`.

    Example:
        >>> [method.title for method in searched_methods()]
    """
    if names is None:
        return [method for method in METHODS.values() if _why_left_out(method) is None]
    found = [find_method(name) for name in dict.fromkeys([names] if isinstance(names, str) else names)]
    for method in found:
        reason = _why_left_out(method)
        if reason is not None:
            able = ", ".join(known.name for known in searched_methods())
            raise ValueError(f"{method.title} cannot be searched: {reason}. Name some of {able}.")
    return found


def _why_left_out(method: Method) -> str | None:
    if method.tuned_settings is None:
        return "it must be trained before it is of use"
    if method.at_share is None and method.fit_share is None:
        return "it has no setting for a share of the multiply-adds"
    return None


def variants_of(method: Method, facts: EncoderFacts) -> list[Variant]:
    """List what is tried of a method: its defaults, then other layers, then one other setting at a time."""
    schedules = SCHEDULES if method.at_share is not None else SCHEDULES[:FITTED_SCHEDULES]
    layers = [spread_layers(facts, *of_twelve) for of_twelve in schedules] if method.takes_layers else []
    tried: list[dict[str, Any]] = [{}, *({"layers": some} for some in dict.fromkeys(layers))]
    tried += [{name: value} for name, values in (method.tuned_settings or {}).items() for value in values]
    return [Variant(method.name, settings) for settings in tried]


def even_setting(variant: Variant, facts: EncoderFacts, share: float) -> ReductionConfig | None:
    """Find the mildest setting of a variant that keeps at most a share of the multiply-adds.

    Args:
        variant (`Variant`): The variant. Its method must have a setting for a share without images.
        facts: Facts of the encoder for images of the size in question.
        share (`float`): Share of the multiply-adds to keep.

    Returns:
        `ReductionConfig`. None: the variant cannot keep so little, or it cannot run in this encoder.

    Example:
        >>> even_setting(Variant("tome", {"layers": (3, 6, 9)}), facts, 0.65)
    """
    method = METHODS[variant.method]
    if method.at_share is None:
        raise ValueError(f"{method.title} is fitted to a share on images, so it has no setting without images.")
    try:
        if variant.shape is not None:
            return _shaped(variant, facts, share)
        setting = method.at_share(facts, share, **variant.settings)
        setting.check_fit(facts)
    except ValueError:  # the share is out of reach, or the setting does not fit this encoder
        return None
    return setting


def shape_of(setting: ReductionConfig, facts: EncoderFacts) -> tuple[float, ...] | None:
    """Return how a setting spreads the removed tokens over the layers, as parts that sum to 1.

    Returns None if they cannot be spread differently: the setting is adaptive, removes nothing, or has one number for
    all layers.
    """
    try:
        counts = [facts.num_patches, *(count - facts.num_prefix_tokens for count in even_counts(setting, facts))]
        removed = [before - after for before, after in pairwise(counts)]
        if sum(removed) == 0 or _with_counts(setting, facts, counts[1:]) is None:
            return None
    except ValueError:
        return None
    return tuple(some / sum(removed) for some in removed)


def _shaped(variant: Variant, facts: EncoderFacts, share: float) -> ReductionConfig | None:
    """Find the mildest setting with the variant's shape that keeps at most the share."""
    method, shape = METHODS[variant.method], variant.shape or ()
    like = method.config_class(**_fitting(variant.settings, method))

    def removing(total: int) -> ReductionConfig:
        count, counts, sum_before, cumulated = facts.num_patches, [], 0, 0.0
        for part in shape:
            cumulated += part
            removed = round(total * cumulated) - sum_before
            sum_before += removed
            count = max(1, count - removed)
            counts.append(count)
        found = _with_counts(like, facts, counts)
        if found is None:
            raise ValueError(f"{method.title} has one number for all layers.")
        found.check_fit(facts)
        return found

    most = facts.num_patches - 1
    setting = removing(most - largest_within(share, most, lambda spared: even_share(removing(most - spared), facts)))
    return setting if even_share(setting, facts) <= share else None


def _fitting(settings: dict[str, Any], method: Method) -> dict[str, Any]:
    """Return the settings without `layers`, because the shape says which layers reduce."""
    return {name: value for name, value in settings.items() if name != "layers"}


def _with_counts(setting: Any, facts: EncoderFacts, counts: Sequence[int]) -> ReductionConfig | None:
    """Return the setting that leaves these numbers of patch tokens after the layers. None: there is none."""
    method = METHODS[setting.method]
    if method.at_counts is not None:
        return method.at_counts(facts, setting, counts)
    before = [facts.num_patches, *counts[:-1]]
    if isinstance(setting, KeepRateConfig):
        reduces = [layer for layer, (old, new) in enumerate(zip(before, counts, strict=True)) if new < old]
        rates = [counts[layer] / before[layer] for layer in reduces]
        return replace(setting, layers=reduces, keep_rate=rates)
    if method.key_settings == ("r",):
        return replace(setting, r=[old - new for old, new in zip(before, counts, strict=True)])
    return None
