"""One way to say a budget: a method, the share of the multiply-adds to keep, and what the method needs for it."""

from typing import Any

from transformers import PreTrainedModel

from .calibration import calibrate, load_pixel_values
from .convert import reduce_tokens
from .loading import method_setting
from .methods import find_method


MOST_IMAGES = 128


def reduce_to_share(
    model: PreTrainedModel,
    method: Any,
    share: float | None,
    images: Any,
    image_processor: Any,
    settings: dict[str, Any],
) -> PreTrainedModel:
    """`reduce_tokens` of a method by its name or configuration class."""
    found = find_method(method)
    if share is None:
        if images is not None and found.prepare is None:
            raise ValueError(f"{found.title} learns nothing from images without a share. Give one, or no images.")
    elif found.needs == "labels":
        raise ValueError(
            f"{found.title} at a share of {share}: {found.why_not(found.config_class())}. Its setting for that share "
            f"is {found.config_class.__name__}.for_budget(model.config, {share})."
        )
    elif images is None and (found.prepare is not None or found.at_share is None):
        raise ValueError(
            f"{found.title} is fitted to a share of {share} on images, without labels: pass images=, a folder or "
            "pixel values, and for a folder image_processor= (on the command line --images FOLDER)."
        )
    if share is not None and found.at_share is None:
        pixels = load_pixel_values(images, image_processor, MOST_IMAGES).to(model.device)
        setting = found.fit_share(reduce_tokens(model, None), pixels, share, **settings)  # type: ignore[misc]
        return reduce_tokens(model, setting)
    setting = method_setting(model.config, found.name, share, settings)
    reduced = reduce_tokens(model, setting)
    if images is not None and found.prepare is not None:
        calibrate(reduced, images, getattr(setting, "target", None), image_processor=image_processor)
    elif images is not None:
        raise ValueError(f"{found.title} needs no images to keep a share of {share}. Leave images out.")
    return reduced
