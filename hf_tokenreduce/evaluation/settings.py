"""Settings to try on a model: every method that runs untrained, at the shares that are asked for, and their names."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..convert import reduce_tokens
from ..methods import DENSE, METHODS, find_method, method_of
from ..modeling.configuration_base import ReductionConfig
from ..modeling.encoders import EncoderFacts, facts_of
from ..modeling.multiply_adds import check_share


logger = logging.get_logger(__name__)


def default_reductions(
    config: PreTrainedConfig | EncoderFacts,
    shares: Sequence[float] = (0.8, 0.65, 0.5),
    *,
    model: PreTrainedModel | None = None,
    pixel_values: Tensor | None = None,
    names: Sequence[Any] | None = None,
) -> list[ReductionConfig]:
    """List settings of every method that runs untrained, to try them on a checkpoint.

    Args:
        config: Configuration of the model, or the facts of its encoder.
        shares: Shares of the multiply-adds that the settings keep.
        model: The model. Methods whose cost depends on the images are fitted to the shares on it and on
            `pixel_values`. Without it such methods have fixed settings: ATS samples from all tokens, from half and
            from a quarter of them.
        pixel_values: Images for this fit.
        names: Names of the methods to take. By default all.

    Returns:
        `list`: The settings. The layers are those that the methods reduce in a model of 12 layers, scaled to the depth
            of this model. A setting that cannot keep so little, or cannot run in this encoder, is left out, and the
            log says why.

    Example:
        >>> settings = default_reductions(model.config, [0.8, 0.5])
    """
    facts = facts_of(config)
    for share in shares:
        check_share(share)
    found: list[ReductionConfig] = []
    for name, method in METHODS.items():
        if names is not None and name not in names:
            continue
        at_share: Any = method.at_share and partial(method.at_share, facts)
        if method.fit_share is not None and model is not None:
            if pixel_values is None:
                raise ValueError(
                    f"{method.title} is fitted on images. Give pixel_values with model=, or leave it out."
                )
            inputs = pixel_values.to(model.device, model.dtype)
            at_share = partial(method.fit_share, reduce_tokens(model, None), inputs)
        elif method.untrained is not None:
            found += [setting for setting in method.untrained(facts, shares) if _fits(setting, facts)]
            continue
        for share in shares if at_share is not None else ():
            try:
                setting = at_share(share)
            except ValueError as error:
                logger.warning(f"{method.title} at {share} is left out: {error}")
            else:
                found += [setting] if setting not in found and _fits(setting, facts) else []
    return found


def with_usual(
    reductions: Sequence[Any], usual: list[ReductionConfig], shares: Sequence[float]
) -> list[ReductionConfig | dict[str, Any] | None]:
    """Return the settings, where each name of a method is replaced by the settings of that method."""
    found: list[Any] = []
    for reduction in reductions:
        if not isinstance(reduction, str):
            found.append(reduction)
            continue
        method = find_method(reduction)
        named = [setting for setting in usual if setting.method == reduction]
        if not named:
            raise ValueError(
                f"{reduction} has no untrained setting for the shares {list(shares)}. Give a setting instead, such as "
                f"{method.config_class.__name__}(...)."
            )
        found += named
    return found


def _fits(setting: ReductionConfig, facts: EncoderFacts) -> bool:
    try:
        setting.check_fit(facts)
    except ValueError as error:
        logger.warning(f"{describe(setting)} is left out: {error}")
        return False
    return True


def describe(reduction: ReductionConfig | None) -> str:
    """Give a setting a short name, from the fields that differ from the method's defaults.

    Args:
        reduction: The setting. None stands for the dense model.

    Returns:
        `str`: The title of the method and its settings.

    Example:
        >>> describe(ToMeConfig(r=13))
        'ToMe r=13'
    """
    method = method_of(reduction)
    if reduction is None or method is DENSE:
        return method.title
    values, usual = reduction.to_dict(), type(reduction)().to_dict()
    parts = []
    for name, value in values.items():
        if name == "method" or value is None or (name not in method.key_settings and value == usual[name]):
            continue
        if isinstance(value, list) and len(set(value)) > 1 and name in method.key_settings:
            value = f"{min(value):.4g} to {max(value):.4g}"
        elif isinstance(value, list) and len(value) > 3 and value == list(range(value[0], value[-1] + 1)):
            value = f"({value[0]} to {value[-1]})"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        parts.append(f"{name}={value}".replace("[", "(").replace("]", ")"))
    return " ".join([method.title, ", ".join(parts)]).strip()
