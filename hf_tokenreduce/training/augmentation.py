"""Turn photographs into training batches: augmentation, mixing, and the search for broken files.

Only Pillow, NumPy and torch are used. All random numbers come from torch's global generator, so a seed repeats a run.
This also holds with the workers of a `DataLoader`, because torch gives each worker a new seed in each epoch.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageEnhance
from torch import Tensor
from torch.nn import functional as F
from transformers import BaseImageProcessor
from transformers.utils import logging

from ..pictures import as_rgb, decoded_picture, is_too_narrow, upright


logger = logging.get_logger(__name__)

POINTWISE = {"do_resize": False, "do_center_crop": False, "do_pad": False}
Range = tuple[float, float]  # smallest, largest


@dataclass
class EvalTransform:
    """Turn an image into pixel values, exactly as the image processor does.

    Call it with an image of any 8-bit mode. It returns float32 pixel values (C, H, W).

    Args:
        image_processor: The image processor of the model.

    Example:
        >>> pixel_values = EvalTransform(processor)(Image.open("cat.jpg"))
    """

    image_processor: BaseImageProcessor

    def __call__(self, image: Image.Image) -> Tensor:
        return self.image_processor(_rgb(image, self.image_processor), return_tensors="pt").pixel_values[0].float()


@dataclass
class TrainTransform:
    """Turn an image into pixel values of a random crop, changed at random, for training.

    The crop is resized to the output size of the image processor, and its values are rescaled and normalised as the
    image processor does it. Call it with an image; it returns float32 pixel values (C, H, W).

    Args:
        image_processor: The image processor of the model.
        scale: Smallest and largest share of the image's area that the crop takes, in (0, 1].
        ratio: Smallest and largest width / height of the crop.
        flip: Probability that the image is mirrored left to right.
        color_jitter: Brightness, contrast and saturation are multiplied by random factors from `1 - color_jitter` to
            `1 + color_jitter`, in random order. 0 turns it off.
        erasing: Probability that noise replaces a rectangle of 2 to 33 % of the result.

    Example:
        >>> train = train.with_transform(BatchTransform(TrainTransform(processor, scale=(0.5, 1.0))))
    """

    image_processor: BaseImageProcessor
    _: KW_ONLY
    scale: Range = (0.35, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.0
    erasing: float = 0.0
    size: tuple[int, int] = field(init=False)  # height, width
    table: np.ndarray = field(init=False, repr=False, compare=False)  # (3, 256): the result for each 8-bit value

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(
                f"scale={self.scale}: give the smallest and the largest share of the area for the crop, in (0, 1]."
            )
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(
                f"ratio={self.ratio}: give the smallest and the largest width / height of the crop, above 0."
            )
        _check_shares(flip=self.flip, color_jitter=self.color_jitter, erasing=self.erasing)
        self.size, self.table = _output_size(self.image_processor), _value_table(self.image_processor)

    def __call__(self, image: Image.Image) -> Tensor:
        height, width = self.size
        image = _rgb(image.crop(random_crop(*image.size, self.scale, self.ratio)), self.image_processor)
        image = image.resize((width, height), self.image_processor.resample)
        if _uniform(0, 1) < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter:
            enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
            for index in torch.randperm(3).tolist():
                image = enhancers[index](image).enhance(_uniform(1 - self.color_jitter, 1 + self.color_jitter))
        pixel_values = torch.from_numpy(_look_up(self.table, np.asarray(image)))
        if _uniform(0, 1) < self.erasing and (box := random_box(width, height, (0.02, 0.33), (0.3, 3.3))):
            left, top, right, bottom = box
            pixel_values[:, top:bottom, left:right].normal_()
        return pixel_values


def random_box(width: int, height: int, scale: Range, ratio: Range) -> tuple[int, int, int, int] | None:
    """Draw a box (left, top, right, bottom) whose share of the area is in `scale` and whose width / height is in
    `ratio`, the latter uniform in its logarithm. Return None if ten draws do not fit into the image.
    """
    for _ in range(10):
        area = width * height * _uniform(*scale)
        aspect = math.exp(_uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = _below(width - w + 1), _below(height - h + 1)
            return left, top, left + w, top + h
    return None


def random_crop(width: int, height: int, scale: Range, ratio: Range) -> tuple[int, int, int, int]:
    """Draw a `random_box`; if none fits, take the largest central box whose width / height is in `ratio`."""
    w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return random_box(width, height, scale, ratio) or (left, top, left + w, top + h)


@dataclass
class BatchTransform:
    """Apply a transform to the images of a batch, for `dataset.with_transform`.

    The columns of the batch become `{"pixel_values": [...], "labels": [...]}`. Set `remove_unused_columns=False` in
    the arguments of a `Trainer`, or it removes the image column.

    To skip unreadable images, cast the column to `Image(decode=False)`, so that the images are decoded here, or
    select the `readable_rows` before. An `Image()` column is decoded inside `datasets`, which raises an error before
    this class sees the image. If a row is skipped, its batch is shorter, and `dataset[i]` of that row alone raises an
    `IndexError`.

    Args:
        transform: A function from an image to its pixel values, such as `TrainTransform` or `EvalTransform`.
        image_column_name: Column that holds the images.
        label_column_name: Column that holds the labels. None: the batch has no labels.
        on_error: "stop" raises a `ValueError` at an unreadable image. "skip" leaves its row out, with a warning.

    Example:
        >>> validation = validation.with_transform(BatchTransform(EvalTransform(processor)))
    """

    transform: Callable[[Image.Image], Tensor]
    _: KW_ONLY
    image_column_name: str = "image"
    label_column_name: str | None = "label"
    on_error: Literal["stop", "skip"] = "stop"

    def __post_init__(self):
        if self.on_error not in ("stop", "skip"):
            raise ValueError(f'on_error={self.on_error!r}: use "stop" or "skip".')

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        if missing := {self.image_column_name, self.label_column_name or self.image_column_name} - set(batch):
            raise ValueError(
                f"No {sorted(missing)} among the columns {list(batch)}. Give the names of the columns with images and "
                "labels (None for no labels). With a Trainer, set remove_unused_columns=False."
            )
        pixel_values, kept = [], []
        for index, image in enumerate(batch[self.image_column_name]):
            try:
                picture = decoded(image)
            except ValueError as error:
                if self.on_error == "stop":
                    raise ValueError(
                        f"{error}. Select the readable_rows of the dataset, or skip the image (--on_error skip)."
                    ) from error
                logger.warning(f"{error}. Its row is left out.")
                continue
            pixel_values.append(self.transform(picture))
            kept.append(index)
        if self.label_column_name is None:
            return {"pixel_values": pixel_values}
        return {"pixel_values": pixel_values, "labels": [batch[self.label_column_name][index] for index in kept]}


def readable_rows(dataset: Dataset, image_column_name: str = "image") -> list[int]:
    """Find the rows of a data set whose images can be read to the last byte. Every image is read once.

    Args:
        dataset: One split of a data set.
        image_column_name: Column that holds the images, an `Image()` feature.

    Returns:
        The indices of the readable rows. The others are named in warnings.

    Example:
        >>> train = train.select(readable_rows(train))
    """
    if not isinstance(dataset, Dataset) or not isinstance(dataset.features.get(image_column_name), ImageFeature):
        raise ValueError(
            f"Give one split with an Image() column {image_column_name!r}, for instance "
            f"readable_rows(dataset['train'].cast_column('image', datasets.Image())). Got {dataset}."
        )
    encoded = dataset.with_format(None).select_columns(image_column_name)
    encoded = encoded.cast_column(image_column_name, ImageFeature(decode=False))
    readable = []
    for index, row in enumerate(logging.tqdm(encoded, desc="Reading the images", unit=" images")):
        try:
            decoded(row[image_column_name])
            readable.append(index)
        except ValueError as error:
            logger.warning(f"Row {index}: {error}")
    return readable


@dataclass
class Collator:
    """Put rows together into a batch, and mix the images of training batches.

    Rows with `pixel_values` and `labels` become `{"pixel_values": (B, C, H, W), "labels": (B,)}`. With `mixup`,
    `cutmix` or `label_smoothing` the labels are soft: float, (B, num_labels). Compute the loss of soft labels by
    `F.cross_entropy(logits, labels)`, because a Hugging Face model computes a multi-label loss for float labels.

    Use a collator that mixes for training batches only. `TokenReduceTrainer` sees to that; a plain `Trainer` uses the
    same collator for evaluation.

    Args:
        mixup: Parameter of the Beta distribution that draws how strongly two images are blended. 0 turns it off.
        cutmix: Parameter of the Beta distribution that draws how large a box of one image replaces that of another. 0
            turns it off. If both are on, each batch draws one of them, with equal probability.
        num_labels: Number of classes. It is needed for soft labels.
        label_smoothing: Share of each label that is spread evenly over all classes, from 0 to 1.

    Example:
        >>> batch = Collator(mixup=0.8, cutmix=1.0, num_labels=1000)([dataset[index] for index in range(8)])
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    num_labels: int | None = None
    label_smoothing: float = 0.0

    def __post_init__(self):
        if not (0 <= self.mixup < math.inf and 0 <= self.cutmix < math.inf):
            raise ValueError(f"mixup={self.mixup}, cutmix={self.cutmix}: give Beta parameters above 0, or 0 for none.")
        _check_shares(label_smoothing=self.label_smoothing)
        if (self.mixup or self.cutmix or self.label_smoothing) and self.num_labels is None:
            raise ValueError(
                "mixup, cutmix and label_smoothing make soft labels: give num_labels, the number of classes."
            )

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        shapes = {tuple(row["pixel_values"].shape) for row in rows}
        if len(shapes) != 1:
            raise ValueError(
                f"A batch needs images of one shape, but these have {sorted(shapes)}. Let the image processor crop or "
                "resize to a fixed size. If there is no shape at all, every image of the batch was skipped."
            )
        pixel_values = torch.stack([row["pixel_values"] for row in rows])
        soft = bool(self.mixup or self.cutmix or self.label_smoothing)
        if "labels" not in rows[0]:
            if soft:
                raise ValueError("These rows have no labels to mix or smooth. Use a plain Collator() for them.")
            return {"pixel_values": pixel_values}
        labels = torch.stack([torch.as_tensor(row["labels"]) for row in rows])
        if soft:
            labels = self._soft(labels)
        if self.mixup or self.cutmix:
            pixel_values, labels = self._mixed(pixel_values, labels)
        return {"pixel_values": pixel_values, "labels": labels}

    def _soft(self, labels: Tensor) -> Tensor:
        assert self.num_labels is not None
        if labels.is_floating_point() or labels.ndim != 1 or labels.min() < 0 or labels.max() >= self.num_labels:
            raise ValueError(f"labels={labels.tolist()}: give class indices below num_labels={self.num_labels}.")
        return F.one_hot(labels, self.num_labels) * (1 - self.label_smoothing) + self.label_smoothing / self.num_labels

    def _mixed(self, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        cut = self.cutmix and (not self.mixup or _uniform(0, 1) < 0.5)
        beta = torch.tensor(self.cutmix if cut else self.mixup, dtype=torch.float64)
        share = torch.distributions.Beta(beta, beta).sample().item()  # weight of the neighbour in the batch
        neighbours = pixel_values.roll(1, 0)
        if cut:
            height, width = pixel_values.shape[-2:]
            h, w = round(height * math.sqrt(share)), round(width * math.sqrt(share))
            top, left = _below(height) - h // 2, _below(width) - w // 2
            box = (..., slice(max(top, 0), top + h), slice(max(left, 0), left + w))
            pixel_values[box] = neighbours[box]
            share = pixel_values[box][0, 0].numel() / (height * width)  # the border may have cut the box
        else:
            pixel_values = pixel_values.lerp(neighbours, share)
        return pixel_values, labels.lerp(labels.roll(1, 0), share)


def _rgb(image: Image.Image, image_processor: BaseImageProcessor) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info and not is_too_narrow(image):
        return upright(image)
    if image.mode.startswith("I") or image.mode == "F" or is_too_narrow(image):
        return as_rgb(image)
    if image_processor.do_convert_rgb:  # the processor converts: some put transparent pixels on white
        as_it_is = image_processor(image, **POINTWISE, do_rescale=False, do_normalize=False).pixel_values[0]
        return Image.fromarray(np.ascontiguousarray(np.asarray(as_it_is).transpose(1, 2, 0)))
    return as_rgb(image)


def _output_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """Return the (height, width) of the processor's output, found by running it: there are many ways to set it."""
    wide, tall = (image_processor(Image.new("RGB", size)).pixel_values[0].shape for size in ((64, 48), (48, 64)))
    if wide != tall or len(wide) != 3:
        raise ValueError(
            f"The image processor turns a wide image into {wide} and a tall one into {tall}, but training needs one "
            "shape (C, H, W). In the processor, set its size to a height and a width, or do_center_crop and crop_size."
        )
    return wide[1], wide[2]


def _value_table(image_processor: BaseImageProcessor) -> np.ndarray:
    """Return a table (3, 256) of the processor's rescaling and normalisation.

    Looking values up gives bit for bit the same result in a third of the time.
    """
    ramp = np.arange(256, dtype=np.uint8)
    images = [np.stack(channels, -1)[None] for channels in ([ramp] * 3, [ramp, ramp[::-1], np.roll(ramp, 85)])]
    grey, coloured = (np.asarray(image_processor(Image.fromarray(i), **POINTWISE).pixel_values[0]) for i in images)
    table = grey.reshape(3, 256).astype(np.float32)
    if not np.array_equal(_look_up(table, images[1]), coloured):
        raise ValueError(
            "The image processor mixes or swaps channels, which TrainTransform does not support. Use EvalTransform."
        )
    return table


def _look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    found = np.empty((3, *values.shape[:2]), dtype=np.float32)
    for channel in range(3):  # nothing is out of range; "clip", because the default makes NumPy buffer the output
        np.take(table[channel], values[..., channel], out=found[channel], mode="clip")
    return found


def decoded(image: Any) -> Image.Image:
    """Decode an image to the last byte. A `ValueError` names an image that cannot be read."""
    name = image.get("path") or f"{len(image.get('bytes') or b'')} bytes" if isinstance(image, dict) else image
    try:
        if image is None:
            raise ValueError("the row holds no image")
        if isinstance(image, (dict, str)):  # before 5.2, datasets refuses images that are decoded already
            image = decoded_picture(image)
        image.load()
        if image.mode.startswith("I") or image.mode == "F" or is_too_narrow(image):
            return as_rgb(image)  # which refuses some of them
    except Exception as error:  # parsers of Pillow raise many kinds: OSError, SyntaxError, struct.error, ...
        raise ValueError(f"The image {name} cannot be read: {error}") from error
    return image


def _check_shares(**settings: float) -> None:
    for name, value in settings.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: give a number from 0 to 1.")


def _uniform(low: float, high: float) -> float:
    return torch.empty((), dtype=torch.float64).uniform_(low, high).item()


def _below(bound: int) -> int:
    return int(torch.randint(bound, ()).item())
