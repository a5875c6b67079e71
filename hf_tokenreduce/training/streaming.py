"""Data sets that are read as a stream while a model trains: class folders, WebDataset shards and sets of the Hub."""

import glob
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset, IterableDataset, load_dataset
from datasets import Image as ImageFeature

from ..hub.contents import short
from ..image_folders import classes_by_folder
from ..loading import load_hub_data, of_dataset, undecoded
from ..pictures import find_in
from .augmentation import decoded


def load_streams(data_args: Any) -> tuple[IterableDataset, IterableDataset, list[str] | None]:
    """Return the streams of training and validation, and the names of the classes if the data has them."""
    if data_args.dataset_name:
        found = load_hub_data(data_args.dataset_name, streaming=True)
        train, validation = of_dataset(found, data_args.dataset_name)
    elif data_args.train_dir:
        train, validation = folder_stream(data_args.train_dir), None
    else:
        raise ValueError("There are no images to train on. Give --dataset_name or --train_dir.")
    if data_args.validation_dir:
        validation = folder_stream(data_args.validation_dir)
    if validation is None:
        raise ValueError("A stream cannot be split into training and validation. Give --validation_dir.")
    parts, names = [], []
    for part, most in ((train, data_args.max_train_samples), (validation, data_args.max_eval_samples)):
        names.append(_class_names(part, data_args))
        part = part.select_columns([data_args.image_column_name, data_args.label_column_name])
        part = part.cast_column(data_args.image_column_name, ImageFeature(decode=False))
        parts.append(part.take(most) if most else part)
    if names[0] != names[1]:
        raise ValueError(f"The classes of training and validation differ: {names[0]} and {names[1]}.")
    return parts[0], parts[1], names[0]


def folder_stream(folder: str | Path) -> IterableDataset:
    """Return the stream of a folder: of its WebDataset shards if it has any, else of its class folders."""
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder. Give a folder with .tar shards, or with one folder per class.")
    # The names are patterns to `datasets`. A link keeps its own folder, which is its class.
    shards = sorted(glob.escape(str(file.absolute())) for file in Path(folder).glob("*.tar"))
    if shards:
        return load_dataset("webdataset", data_files={"train": shards}, split="train", streaming=True)
    images = [(Path(folder), file) for file in find_in(folder)]
    if not images:
        raise ValueError(f"{folder} holds neither .tar shards nor images. Give it one folder per class.")
    # A stream is only shuffled within a buffer, and here all images of a class would be neighbours.
    found = classes_by_folder({"train": images})["train"]
    rows = list(undecoded(found, "image"))
    random.Random(0).shuffle(rows)
    # Each row is a shard, so any number of workers and processes can share them.
    return IterableDataset.from_generator(_each, features=found.features, gen_kwargs={"rows": rows})


def _each(rows: list[Any]) -> Iterator[Any]:
    yield from rows


def _class_names(stream: IterableDataset, data_args: Any) -> list[str] | None:
    features = stream.features or {}
    label = features.get(data_args.label_column_name)
    if label is None or not isinstance(features.get(data_args.image_column_name), ImageFeature):
        raise ValueError(
            f"The stream needs the columns {data_args.image_column_name!r} and {data_args.label_column_name!r}, and "
            f"the first must hold images. It has {short(dict(features), 300)}. Give --image_column_name and "
            "--label_column_name: those of a WebDataset are the endings of its files, such as jpg and cls."
        )
    return label.names if isinstance(label, ClassLabel) else None


def first_images(data: Dataset | IterableDataset, most: int, column: str, on_error: str = "stop") -> list[Any]:
    """Return the first images of a data set or of a stream, decoded, at most `most`."""
    found: list[Any] = []
    for row in data:
        if len(found) == most:
            break
        try:
            found.append(decoded(row[column]))
        except ValueError:
            if on_error == "stop":
                raise
    return found


def kept_images(stream: IterableDataset | None, count: int, seed: int, columns: list[str], folder: Path) -> Dataset:
    """Copy `count` images of a shuffled stream into a folder, and return them as a data set.

    Without a stream, the folder holds them already.
    """
    if stream is not None:
        columns_there: Any = stream.features or next(
            iter(stream), {}
        )  # streams of a function do not know their columns
        missing = [column for column in columns if column not in columns_there]
        if missing:
            raise ValueError(
                f"The stream has no column {missing[0]!r}, only {', '.join(columns_there)}. Give --image_column_name "
                "and --label_column_name."
            )
        stream = stream.select_columns(columns).shuffle(seed=seed)
        features = stream.features
        for column, feature in (features or {}).items():
            if isinstance(feature, ImageFeature):
                stream = stream.cast_column(column, ImageFeature(decode=False))
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        Dataset.from_list(list(stream.take(count)), features=features).save_to_disk(unfinished)
        os.replace(unfinished, folder)
    return Dataset.load_from_disk(folder)


@dataclass
class Seeded:
    """Apply a batch transform with random numbers that depend only on the place of the batch in the stream.

    So a resumed run, which starts the stream again and skips what it has seen, augments as the uninterrupted run.
    """

    transform: Callable[[dict[str, list]], dict[str, list]]
    seed: int

    def __call__(self, batch: dict[str, list], places: list[int]) -> dict[str, list]:
        worker = torch.utils.data.get_worker_info()  # each worker counts its own places
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hash((self.seed, places[0], worker.id if worker else 0)) % 2**63)
            return self.transform(batch)


def training_stream(stream: IterableDataset, transform: Seeded, seed: int, buffer_size: int) -> IterableDataset:
    """Return an endless stream of training rows, in another order at each pass."""
    # Endless, so that Trainer sees one long epoch and finds the place in it where a checkpoint was saved.
    stream = stream.repeat(None).shuffle(seed=seed, buffer_size=buffer_size)
    return stream.map(transform, with_indices=True, batched=True, batch_size=1, remove_columns=stream.column_names)
