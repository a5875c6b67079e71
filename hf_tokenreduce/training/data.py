"""The images that a training reads, and which class of the model each of their labels is."""

from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset
from datasets import Image as ImageFeature
from transformers.utils import logging

from ..hub.contents import short
from ..image_folders import folder_split
from ..loading import load_hub_data, of_dataset
from .augmentation import BatchTransform, readable_rows


logger = logging.get_logger(__name__)


def load_data(data_args: Any, seed: int) -> tuple[Dataset, Dataset, list[str]]:
    if name := data_args.dataset_name:
        data = dict(zip(("train", "validation"), of_dataset(load_hub_data(name), name), strict=True))
    elif data_args.train_dir:
        data = {"train": folder_split(data_args.train_dir, "train"), "validation": None}
    else:
        raise ValueError("There are no images to train on. Give --dataset_name or --train_dir.")
    if data_args.validation_dir:
        data["validation"] = folder_split(data_args.validation_dir, "validation", "train")
    train, validation = data["train"], data["validation"]
    names = class_names(train, data_args)
    if validation is None:
        # Always the same split: what one seed holds out, a model of another seed must not have seen.
        split = train.train_test_split(data_args.train_val_split, seed=0)
        train, validation = split["train"], split["test"]
    elif class_names(validation, data_args) != names:
        raise ValueError(
            f"The classes of training and validation differ: {names} and {class_names(validation, data_args)}. Both "
            "need the same class folders."
        )
    parts = []
    # All seeds are evaluated on the same images.
    for part, most, order in ((train, data_args.max_train_samples, seed), (validation, data_args.max_eval_samples, 0)):
        part = part.shuffle(seed=order).select(range(min(most, len(part)))) if most else part
        # Our transforms decode the images: an error of `datasets` would not name the file.
        part = part.cast_column(data_args.image_column_name, ImageFeature(decode=False))
        if data_args.on_error == "skip":
            readable = readable_rows(part, data_args.image_column_name)
            logger.warning(f"{len(part) - len(readable)} of {len(part)} images cannot be read and are left out.")
            part = part.select(readable)
        parts.append(part)
    return parts[0], parts[1], names


def class_names(dataset: Dataset, data_args: Any) -> list[str]:
    feature = dataset.features.get(data_args.label_column_name)
    if not isinstance(feature, ClassLabel) or not isinstance(
        dataset.features.get(data_args.image_column_name), ImageFeature
    ):
        raise ValueError(
            "The data has no classes. Make one folder per class, at least two, and no metadata file. It needs the "
            f"columns {data_args.image_column_name!r} and {data_args.label_column_name!r}, and the second must be a "
            f"ClassLabel. It has {short(dict(dataset.features), 300)}."
        )
    return feature.names


@dataclass
class Relabelled:
    """Apply a batch transform, and turn the class indices of the data into those of the model."""

    transform: BatchTransform
    order: list[int]

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        batch = self.transform(batch)
        for label in batch["labels"]:
            if not isinstance(label, int) or not 0 <= label < len(self.order):
                raise ValueError(
                    f"An image has the label {label!r}, but the model's classes are 0 to {len(self.order) - 1}. Use a "
                    "model that was made for these classes, or another --label_column_name."
                )
        return {**batch, "labels": [self.order[label] for label in batch["labels"]]}
