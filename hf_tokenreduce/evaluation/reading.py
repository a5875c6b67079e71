"""Read images of a data set as batches of pixel values, only those that are needed."""

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.utils import logging

from ..loading import undecoded
from ..pictures import as_rgb, check_one_size, decoded_picture, spread


def batches(
    dataset: Dataset,
    rows: list[int],
    processor: Any,
    *,
    batch_size: int,
    image_column: str,
    num_workers: int = 0,
    title: str = "",
    progress: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield rows of a data set batch by batch, with their pixel values (B, C, H, W), and show a progress bar."""
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    reader = _Reader(dataset.with_format(None), parts, image_column, processor)
    loader: Any = DataLoader(reader, batch_size=None, num_workers=min(num_workers, len(parts)))
    with logging.tqdm(total=len(rows), desc=title, leave=False, disable=not progress) as bar:
        for some, pixel_values in loader:
            yield some, pixel_values
            bar.update(len(some))


def sample_pixels(dataset: Dataset, processor: Any, image_column: str, most: int) -> Tensor:
    """Return the pixel values of at most `most` images, evenly spread over the data set."""
    rows = spread(len(dataset), most)
    return _Reader(dataset.with_format(None), [rows], image_column, processor)[0][1]


class _Reader(torch.utils.data.Dataset):
    """Batches of rows as pixel values, for a `DataLoader`."""

    def __init__(self, dataset: Dataset, batches: list[list[int]], image_column: str, processor: Any):
        self.dataset, self.batches = undecoded(dataset, image_column), batches
        self.image_column, self.processor = image_column, processor

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[list[int], Tensor]:
        rows = self.batches[number]
        photos = [_picture(self.dataset, row, self.image_column) for row in rows]
        try:
            return rows, self.processor(photos, return_tensors="pt")["pixel_values"]
        except ValueError:
            found = [self.processor(photo, return_tensors="pt")["pixel_values"] for photo in photos]
            check_one_size(found, "the images of a batch need one")
            raise


def check_pictures(dataset: Dataset, image_column: str, progress: bool = True) -> None:
    """Decode every image of a data set. Raise a ValueError that names the first one that cannot be read."""
    images = undecoded(dataset.with_format(None), image_column).select_columns(image_column)
    for row in logging.tqdm(range(len(images)), desc="reading images", leave=False, disable=not progress):
        _picture(images, row, image_column)


def _picture(images: Dataset, row: int, image_column: str) -> Any:
    """Return an image as RGB, from a data set that does not decode its images."""
    image = images[row][image_column]
    try:
        return as_rgb(decoded_picture(image) if isinstance(image, dict) else image)
    except Exception as error:  # Pillow raises whatever its parsers trip over
        path = image.get("path") if isinstance(image, dict) else None
        raise ValueError(
            f"Row {row} of the data set holds no readable image in its column {image_column!r} ({error}). Repair or "
            f"remove {f'the file {path}' if path else 'it'}."
        ) from error


def check_data(dataset: Any, batch_size: int, **columns: str) -> None:
    """Raise a ValueError unless this is one split with rows and the given columns, such as `image_column="image"`."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"dataset must be one split of a data set, got a {type(dataset).__name__}. Load one with "
            'load_dataset("imagefolder", data_dir=..., split="validation").'
        )
    missing = [name for name in columns.values() if name not in dataset.column_names]
    if missing or len(dataset) == 0:
        wanted = ", ".join(f"{option}={name!r}" for option, name in columns.items())
        raise ValueError(
            f"The data set has {len(dataset)} rows and the columns {dataset.column_names}. It must have rows, and the "
            f"columns {wanted}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
