"""`calibrate`: fit a reduced model to images, without labels and without training its weights."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .methods import METHODS
from .modeling.encoders import encoder_of, facts_of
from .modes import evaluating
from .pictures import check_one_size, find_in, is_image, read_picture, spread
from .tasks import facts_on, image_side, main_output


logger = logging.get_logger(__name__)


def calibrate(
    model: PreTrainedModel,
    images: Tensor | str | Path,
    target: float | None = None,
    *,
    image_processor: Any = None,
    max_images: int = 128,
    **options: Any,
) -> float:
    """Fit what a reduced model learns from images without labels, such as LTMP's thresholds or SiT's networks.

    Args:
        model (`PreTrainedModel`): A model that is reduced by a method that learns from images.
        images (`Tensor`, `str` or `Path`): Pixel values (n, C, H, W), or a folder of images with or without
            subfolders. All images go through the model in one batch.
        target (`float`, *optional*): Share of the multiply-adds to keep, for methods that learn to keep a share.
        image_processor: Image processor of the model. It is needed if `images` is a folder.
        max_images (`int`): Highest number of images. If there are more, an evenly spread part is used.
        options: Further arguments of the method. LTMP takes `merge_share`, the share of the removed tokens that are
            merged (0.8), `first_layer`, the first layer that removes tokens (a quarter of the layers come before it),
            and `tolerance`, the allowed distance from the target (0.005). SiT takes `steps`, the number of training
            steps per network (600).

    Returns:
        `float`: Share of the multiply-adds of its layers that the model now keeps on these images.

    Example:
        >>> model = reduce_tokens(model, LTMPConfig())
        >>> calibrate(model, "photos", 0.65, image_processor=processor)
    """
    reduction = getattr(model.config, "reduction", None)
    method = METHODS.get(str(getattr(reduction, "method", None)))
    if method is None or method.prepare is None:
        able = ", ".join(known.title for known in METHODS.values() if known.prepare is not None)
        raise ValueError(
            f"This {type(model).__name__} has nothing to calibrate. calibrate is for models that are reduced by one "
            f"of {able}, such as reduce_tokens(model, LTMPConfig())."
        )
    known = [name for name, p in inspect.signature(method.prepare).parameters.items() if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"The calibration of {method.title} takes no {', '.join(unknown)}. Its options are {', '.join(known)}."
        )
    pixels = load_pixel_values(model, images, image_processor, max_images).to(model.dtype)
    own = given = facts_of(model.config).grid
    if pixels.ndim == 4:  # no spectrograms
        given = facts_on(model, pixels).grid
    if not method.any_image_size and own != given:
        raise ValueError(
            f"The networks of {method.title} are made for {own[0]} x {own[1]} patches, the image size in the "
            f"configuration, but these images have {given[0]} x {given[1]}. Prepare them at the size in the "
            "configuration, or take another method."
        )
    if own != given and not encoder_of(model).tower.any_size:
        logger.warning(
            f"These images have {given[0]} x {given[1]} patches, and those of the model's own size have {own[0]} x "
            f"{own[1]}. What {method.title} learns from them holds for images of the same size as these, with "
            "interpolate_pos_encoding=True."
        )
    with evaluating(model):
        _check_finite(model, pixels)
        kept = method.prepare(model, pixels, target, **options)
    model.config.calibrated_share = round(kept, 4)  # the folder of a saved model tells this, as it has no images
    return kept


@torch.no_grad()
def _check_finite(model: PreTrainedModel, pixels: Tensor) -> None:
    if not pixels.isfinite().all():
        raise ValueError("The prepared images are not finite. Check the settings of the image processor.")
    size = encoder_of(model).size_arguments(pixels)  # images may have another size than the model's own
    first: Any = main_output(image_side(model)(pixels[:1], **size))
    if not first.isfinite().all():
        raise ValueError(
            "What the model computes for the first image is not finite, so nothing can be fitted. Maybe its weights "
            "are broken, or a half type overflows. Try to load it in float32."
        )


def check_inputs(model: PreTrainedModel, inputs: Tensor) -> None:
    """Raise a ValueError unless the inputs are a batch of what the model takes: pixel values, or spectrograms."""
    encoder = encoder_of(model)
    shape = encoder.tower.inputs(encoder.config)
    if inputs.ndim != 1 + len(shape) or len(inputs) == 0:
        names = "spectrograms (n, frames, mel bins)" if len(shape) == 2 else "pixel values (n, C, H, W)"
        raise ValueError(f"images must be {names} with n above 0, got {tuple(inputs.shape)}.")


def load_pixel_values(
    model: PreTrainedModel, images: Tensor | str | Path, image_processor: Any, max_images: int
) -> Tensor:
    """Return pixel values (n, C, H, W) on the model's device, either the given ones or those of images in a folder.

    If there are more than `max_images`, an evenly spread part is returned.
    """
    if max_images < 1:
        raise ValueError(f"max_images must be at least 1, got {max_images}.")
    if isinstance(images, Tensor):
        check_inputs(model, images)
        return images[spread(len(images), max_images)].to(model.device)
    if not isinstance(images, (str, Path)):
        raise ValueError(
            f"images must be a folder or pixel values, got a {type(images).__name__}. To make pixel values from "
            'pictures, call image_processor(pictures, return_tensors="pt")["pixel_values"].'
        )
    folder = Path(images)
    files = [folder] if is_image(folder) else sorted(find_in(folder))
    if not files:
        raise ValueError(f"No images in {folder}. Give a folder that holds images, with or without subfolders.")
    if image_processor is None:
        raise ValueError("A folder of images needs image_processor=, such as AutoImageProcessor.from_pretrained(...).")
    chosen = [files[place] for place in spread(len(files), max_images)]
    found = [image_processor(read_picture(file), return_tensors="pt")["pixel_values"] for file in chosen]
    check_one_size(found, "a method is fitted to one")
    return torch.cat(found).to(model.device)
