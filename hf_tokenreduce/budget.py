"""Reduce a model by a method and a share of the multiply-adds, for `reduce_tokens` and for the command line."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .calibration import calibrate, load_pixel_values
from .convert import reduce_tokens, with_reduction
from .loading import check_decided, method_setting
from .methods import find_method
from .modeling.encoders import EncoderFacts, encoder_of, facts_of
from .modeling.multiply_adds import check_share
from .tasks import facts_on, size_made_by


MOST_IMAGES = 128

logger = logging.get_logger(__name__)


def _facts_of_inputs(model: PreTrainedModel, images: Any, image_processor: Any) -> EncoderFacts:
    """Return the facts of an encoder for inputs of the size that it will get: DINOv2 says 518 and is given 224."""
    if isinstance(images, Tensor):
        return facts_on(model, images)
    facts = facts_of(model.config)
    if image_processor is not None:
        return facts_on(model, torch.empty(1, *size_made_by(image_processor)))
    height, width = (side * patch for side, patch in zip(facts.grid, encoder_of(model).patch_size, strict=True))
    logger.warning(
        f"The share is that of images of {height} x {width} pixels, the size in the configuration. If the image "
        "processor makes another size, pass image_processor=."
    )
    return facts


def reduce_to_share(
    model: PreTrainedModel,
    method: Any,
    share: float | None,
    images: Any,
    image_processor: Any,
    settings: dict[str, Any],
) -> PreTrainedModel:
    """Reduce a model by a method that is given by its name or configuration class, see `reduce_tokens`."""
    found = find_method(method)
    if share is not None:
        check_share(share)
    if share is None and images is not None and found.prepare is None:
        raise ValueError(
            f"{found.title} learns nothing from images without a share. Give a share, or leave images out."
        )
    # What is fitted begins with the dense form. Else it would share its learned parts with the given model.
    given, model = model, reduce_tokens(model, None)
    own: Any = getattr(given.config, "reduction", None)
    if getattr(own, "method", None) == found.name and hasattr(own, "trained"):  # one filter serves every setting
        settings = {"trained": own.trained, **settings}
    fitted = share is not None and found.at_share is None and found.fit_share is not None
    facts = facts_of(model.config)
    if share is not None and encoder_of(model).tower.any_size:
        facts = _facts_of_inputs(model, images, image_processor)
    setting = method_setting(facts, found.name, None if fitted else share, settings)
    if fitted:
        check_decided(found, share, settings)
    reason = found.why_not(setting)
    if share is not None and reason is not None:
        raise ValueError(
            f"{found.title} cannot run at a share of {share}: {reason}. Its setting for that share is "
            f"{found.config_class.__name__}.for_budget(model.config, {share})."
        )
    if share is not None and images is None and (found.prepare is not None or fitted):
        raise ValueError(
            f"{found.title} is fitted to a share of {share} on images without labels. Pass images=, a folder or "
            "pixel values, and for a folder image_processor= (on the command line --images FOLDER)."
        )
    if images is not None and found.prepare is None and not fitted:
        raise ValueError(f"{found.title} needs no images to keep a share of {share}. Leave images out.")
    if fitted:
        pixels = load_pixel_values(model, images, image_processor, MOST_IMAGES).to(model.dtype)
        setting = found.fit_share(model, pixels, share, **settings)  # type: ignore[misc]
    if images is None or found.prepare is None:
        return reduce_tokens(given, setting)
    reduced = with_reduction(model, setting)
    calibrate(reduced, images, getattr(setting, "target", None), image_processor=image_processor)
    return reduced
