"""Find settings that pay: a reduction that is not faster than the dense model on a device is of no use there."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from ..convert import with_reduction
from ..methods import method_of
from ..modeling.configuration_base import ReductionConfig
from ..modeling.encoders import EncoderFacts
from ..modeling.multiply_adds import even_share
from ..tasks import facts_on, image_side
from ..timing import median_ratio


STEP = 0.05  # how far the share falls from one try to the next
LEAST_SHARE = 0.3  # lower shares are not tried
LEAST_REPEATS = 6  # with fewer, the interval of a median covers less than 95 %


def weaker_first(reduction: ReductionConfig, facts: EncoderFacts) -> Iterator[ReductionConfig]:
    """Generate settings of the same method that take less time, the nearest first.

    If the method reduces in all layers by default, the first of them reaches the same share of the multiply-adds with
    fewer layers that reduce. Then the share falls step by step. There are no settings for adaptive methods, where the
    setting alone does not decide what is kept, and for methods whose networks were trained for one setting.
    """
    method = method_of(reduction)
    if method.at_share is None or method.is_adaptive(reduction) or method.prepare is not None:
        return
    kept = {one.name: getattr(reduction, one.name) for one in fields(reduction) if one.name not in method.key_settings}
    layers = facts.num_hidden_layers
    # A method that takes layers reduces in all of them by default.
    takes_layers = "layers" in inspect.signature(method.at_share).parameters
    few = tuple(sorted({layers // 4, layers // 2, 3 * layers // 4}))
    share = even_share(reduction, facts)
    while share > LEAST_SHARE:
        for options in ({"layers": few}, {}) if takes_layers else ({},):
            try:
                setting = method.at_share(facts, share, **kept, **options)
            except ValueError:  # this share is out of reach, at least with so few layers
                continue
            if setting != reduction:
                yield setting
        share -= STEP


def nearest_that_pays(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Tensor],
    repeats: int,
    times: Callable[[Callable[[], Any]], float],
) -> tuple[dict[str, Any], float] | None:
    """Find the nearest setting of a model's method that is faster than the dense model.

    Of many settings, some look faster by chance. So one that looks faster is timed once more before it is named.

    Args:
        model: The reduced model.
        dense: The dense model.
        batches: Images, batch by batch.
        repeats: Number of times that each setting is timed, at least 6.
        times: Calls a function once and returns the seconds that it took.

    Returns:
        The setting as a dictionary, and its speed-up over dense. None: no setting that was tried is faster.
    """
    for setting in weaker_first(model.config.reduction, facts_on(model, batches[0])):
        candidate = with_reduction(dense, setting).eval()
        for again in (False, True):
            speedup, low = _speedup(candidate, dense, batches, max(repeats, LEAST_REPEATS), times)
            if low <= 1:
                break
            if again:
                return setting.to_dict(), speedup
    return None


def _speedup(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    batches: Sequence[Tensor],
    repeats: int,
    times: Callable[[Callable[[], Any]], float],
) -> tuple[float, float]:
    """Return the speed-up over dense, in turns with it, and the lower end of its interval."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(-1, repeats):
        for run, spent in zip((image_side(dense), image_side(model)), seconds, strict=True):
            images = batches[max(repeat, 0) % len(batches)]
            taken = times(lambda run=run, images=images: run(images))  # type: ignore[misc]
            if repeat >= 0:
                spent.append(taken)
    speedup, (low, _) = median_ratio(*seconds)
    return speedup, low
