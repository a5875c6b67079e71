"""From what a user types, a folder, a Hub id, a method's name, to models, images and settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from .modeling.configuration_base import REDUCTIONS, ReductionConfig


def load_model(name: str, revision: str | None = None, trust_remote_code: bool = False) -> tuple[PreTrainedModel, Any]:
    """A classifier in eval mode and its image processor, of a folder or a Hub id."""
    # Without the flag our own classes load from their folders by what is installed: no code of the folder runs.
    where: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code or None}
    with no_progress_bars():
        try:
            model = AutoModelForImageClassification.from_pretrained(name, use_safetensors=True, **where)
            processor = AutoImageProcessor.from_pretrained(name, **where)
        except OSError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{name!r} could not be loaded: {reason} It must be a folder with config.json, model.safetensors and "
                "preprocessor_config.json, or the id of such a repository on the Hub."
            ) from error
    return model.eval(), processor


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Weights are read in a moment: their bar would only hide what takes long."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_images(name: str, model: PreTrainedModel, split: str | None = None, revision: str | None = None) -> Dataset:
    """An image folder or a data set on the Hub, with columns image and label, whose labels are the model's classes.

    split: by default the one there is, or what is called validation, test, or train, in this order.
    """
    if Path(name).is_dir():
        found = load_dataset("imagefolder", data_dir=name)
    else:
        found = load_dataset(name, revision=revision)
    assert isinstance(found, DatasetDict)
    if split is None:
        split = next((known for known in ("validation", "test", "train") if known in found), next(iter(found)))
    if split not in found:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(found)}.")
    dataset = found[split]
    feature = dataset.features.get("label")
    if not isinstance(feature, ClassLabel):
        raise ValueError(f"{name} has no classes: make one folder per class, or name a data set with a label column.")
    classes = [class_index(name, model.config.label2id) for name in feature.names]
    if classes == list(range(len(classes))):
        return dataset
    labels = [classes[label] for label in dataset["label"]]
    return dataset.remove_columns("label").add_column("label", labels)


def class_index(name: str, label2id: dict[str, int]) -> int:
    """The model's number for a class folder, which is named by a label or begins with the number: 0001_goldfish."""
    if name in label2id:
        return int(label2id[name])
    index = name.split("_")[0]
    if not index.isdecimal() or int(index) >= len(label2id):
        raise ValueError(
            f"The class folder {name!r} is no label of the model, nor does it begin with the number of one. The model "
            f"knows {', '.join(list(label2id)[:8])}{', ...' if len(label2id) > 8 else ''}."
        )
    return int(index)


def method_setting(
    config: PreTrainedConfig, name: str, share: float | None = None, settings: dict[str, Any] | None = None
) -> ReductionConfig:
    """A method's configuration by its name. settings: its fields; share: of the multiply-adds to keep."""
    if name not in REDUCTIONS:
        raise ValueError(f"There is no method {name!r}. The methods are: {', '.join(REDUCTIONS)}.")
    method, settings = REDUCTIONS[name], dict(settings or {})
    unknown = sorted(set(settings) - set(method.__dataclass_fields__))
    if unknown:
        known = ", ".join(method.__dataclass_fields__)
        raise ValueError(f"{method.__name__} has no {', '.join(unknown)}. Its settings are: {known}.")
    if share is None:
        return method(**settings)
    if name == "ltmp":  # its budget is learned, or calibrated
        return method(**{"target": share, **settings})
    return method.for_budget(config, share, **settings)
