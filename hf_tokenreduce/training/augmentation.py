"""From photographs to training batches with Pillow, NumPy and torch alone: augmentation, mixing, finding broken files.

Everything random is drawn from torch's global generator: a seed repeats a run, also through the workers of a
DataLoader, which torch seeds anew per worker and epoch.
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

from ..pictures import as_rgb


logger = logging.get_logger(__name__)

POINTWISE = {"do_resize": False, "do_center_crop": False, "do_pad": False}
Range = tuple[float, float]  # least, greatest


@dataclass
class EvalTransform:
    """An image of any 8-bit mode -> float32 pixel_values (C, H, W), just as the image processor makes them."""

    image_processor: BaseImageProcessor

    def __call__(self, image: Image.Image) -> Tensor:
        return self.image_processor(_rgb(image, self.image_processor), return_tensors="pt").pixel_values[0].float()


@dataclass
class TrainTransform:
    """As `EvalTransform`, but of a random crop, resized to what the processor puts out.

    scale, ratio: the crop's share of the area and its width / height. flip: the probability of mirroring.
    color_jitter: brightness, contrast and saturation change by factors from 1 - color_jitter to 1 + color_jitter, in
    random order. erasing: the probability that noise replaces a rectangle of 2-33 % of the result.
    """

    image_processor: BaseImageProcessor
    _: KW_ONLY
    scale: Range = (0.35, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.5
    color_jitter: float = 0.0
    erasing: float = 0.0
    size: tuple[int, int] = field(init=False)  # height, width
    table: np.ndarray = field(init=False, repr=False, compare=False)  # (3, 256): what becomes of each 8-bit value

    def __post_init__(self):
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale={self.scale}: give the crop's least and greatest share of the area, in (0, 1].")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio={self.ratio}: give the crop's least and greatest width / height, above 0.")
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
    """(left, top, right, bottom) of a share in `scale` of the area and a width / height in `ratio`, uniform in its
    logarithm; None if ten draws do not fit.
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
    """A `random_box`, or else the greatest central box that is neither narrower nor wider than `ratio`."""
    w, h = min(width, max(1, round(height * ratio[1]))), min(height, max(1, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return random_box(width, height, scale, ratio) or (left, top, left + w, top + h)


@dataclass
class BatchTransform:
    """For `dataset.with_transform`: a batch's columns -> {"pixel_values": [...], "labels": [...]}.

    An unreadable image stops with a `ValueError`, or its row is left out with a warning. An `Image()` column raises
    inside `datasets`, before this sees it: to skip, cast it to `Image(decode=False)`, which is decoded here, or select
    the `readable_rows` beforehand. Without a row its batch is shorter, and `dataset[i]` of it alone an IndexError.
    A `Trainer` needs remove_unused_columns=False to leave the image column in place.
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
                f"No {sorted(missing)} among the columns {list(batch)}: name the columns of images and labels "
                "(None for no labels); under a Trainer, set remove_unused_columns=False."
            )
        pixel_values, kept = [], []
        for index, image in enumerate(batch[self.image_column_name]):
            try:
                picture = decoded(image)
            except ValueError as error:
                if self.on_error == "stop":
                    raise ValueError(
                        f"{error}. Select the readable_rows of the dataset, or skip it (--on_error skip)."
                    ) from error
                logger.warning(f"{error}: left out")
                continue
            pixel_values.append(self.transform(picture))
            kept.append(index)
        if self.label_column_name is None:
            return {"pixel_values": pixel_values}
        return {"pixel_values": pixel_values, "labels": [batch[self.label_column_name][index] for index in kept]}


def readable_rows(dataset: Dataset, image_column_name: str = "image") -> list[int]:
    """The indices of the rows whose image decodes to its last byte, for `dataset.select`. Reads every image once."""
    if not isinstance(dataset, Dataset) or not isinstance(dataset.features.get(image_column_name), ImageFeature):
        raise ValueError(
            f"Give one split with an Image() column {image_column_name!r}, for instance "
            f"readable_rows(dataset['train'].cast_column('image', datasets.Image())), not {dataset}."
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
    """Rows with pixel_values and labels -> {"pixel_values": (B, C, H, W), "labels": (B,)}.

    mixup, cutmix: the Beta distribution's parameter, 0 for none; with both, each batch draws one of them. With either,
    or with label_smoothing, the labels are soft: float (B, num_labels). Take their loss by F.cross_entropy(logits,
    labels): a Hugging Face model given float labels computes a multi-label loss instead. For training batches only: a
    `Trainer` evaluates with the same collator unless told otherwise.
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
            raise ValueError("mixup, cutmix and label_smoothing make soft labels: give num_labels, how many classes.")

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        shapes = {tuple(row["pixel_values"].shape) for row in rows}
        if len(shapes) != 1:
            raise ValueError(
                f"A batch needs images of one shape, but these have {sorted(shapes)}: let the image processor crop or "
                "resize to a fixed size; none at all means that every image of the batch was skipped."
            )
        pixel_values = torch.stack([row["pixel_values"] for row in rows])
        soft = bool(self.mixup or self.cutmix or self.label_smoothing)
        if "labels" not in rows[0]:
            if soft:
                raise ValueError("These rows have no labels to mix or smooth: collate them with a plain Collator().")
            return {"pixel_values": pixel_values}
        labels = torch.as_tensor([row["labels"] for row in rows])
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
        share = torch.distributions.Beta(beta, beta).sample().item()  # of the neighbour in the batch
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
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return as_rgb(image)
    if image_processor.do_convert_rgb:  # in its own way: some put what is transparent on white
        as_it_is = image_processor(image, **POINTWISE, do_rescale=False, do_normalize=False).pixel_values[0]
        return Image.fromarray(np.ascontiguousarray(np.asarray(as_it_is).transpose(1, 2, 0)))
    return as_rgb(image)


def _output_size(image_processor: BaseImageProcessor) -> tuple[int, int]:
    """The (height, width) that the processor gives every image; asking it covers all the ways to configure them."""
    wide, tall = (image_processor(Image.new("RGB", size)).pixel_values[0].shape for size in ((64, 48), (48, 64)))
    if wide != tall or len(wide) != 3:
        raise ValueError(
            f"The image processor makes {wide} of a wide, {tall} of a tall image, but training needs one (C, H, W): "
            "set its size to a height and a width, or do_center_crop and crop_size."
        )
    return wide[1], wide[2]


def _value_table(image_processor: BaseImageProcessor) -> np.ndarray:
    """Its rescaling and normalisation as (3, 256): bit for bit the same, in a third of the time."""
    ramp = np.arange(256, dtype=np.uint8)
    images = [np.stack(channels, -1)[None] for channels in ([ramp] * 3, [ramp, ramp[::-1], np.roll(ramp, 85)])]
    grey, coloured = (np.asarray(image_processor(Image.fromarray(i), **POINTWISE).pixel_values[0]) for i in images)
    table = grey.reshape(3, 256).astype(np.float32)
    if not np.array_equal(_look_up(table, images[1]), coloured):
        raise ValueError("The image processor mixes or swaps channels, which is not supported: use EvalTransform.")
    return table


def _look_up(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    found = np.empty((3, *values.shape[:2]), dtype=np.float32)
    for channel in range(3):  # "clip", though nothing is out of range, because checking makes NumPy buffer the output
        np.take(table[channel], values[..., channel], out=found[channel], mode="clip")
    return found


def decoded(image: Any) -> Image.Image:
    """Decode an image as `datasets` does it, to the last byte; a `ValueError` says which image is unreadable."""
    name = image.get("path") or f"{len(image.get('bytes') or b'')} bytes" if isinstance(image, dict) else image
    try:
        if image is None:
            raise ValueError("the row holds none")
        if isinstance(image, (dict, str)):  # before 5.2, datasets does not take what is decoded already
            image = ImageFeature().decode_example(image)
        image.load()
    except Exception as error:  # Pillow raises whatever its parsers trip over: OSError, SyntaxError, struct.error, ...
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
