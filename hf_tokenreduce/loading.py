"""Load models, images and settings from what a user types: a folder, a Hub id, the name of a method."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils.file_utils import xopen
from PIL import Image
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS
from transformers.utils import logging

from .blame import architecture_of, blaming, check_sizes
from .convert import stock_name
from .image_folders import SPLITS, load_image_folder
from .methods import Method, find_method
from .methods.register import register_from_folder
from .modeling.configuration_base import ReductionConfig
from .modeling.encoders import MODELS, TYPE_PREFIX, base_model_of, facts_of, stock_type, what_can_be_reduced
from .modeling.modeling_tokenreduce import reduced_model_class
from .pictures import IMAGE_SUFFIXES, find_in, is_image, read_picture, spread
from .tasks import takes_texts, task_of


logger = logging.get_logger(__name__)

# Types of a column of labels without a list of classes: indices or names of the model's classes.
LABEL_TYPES = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "string", "large_string")


def load_model(
    name: str, revision: str | None = None, trust_remote_code: bool = False, *, any_task: bool = False
) -> tuple[PreTrainedModel, Any]:
    """Load a model in eval mode and its image processor, from a folder or a Hub id.

    Args:
        name (`str`): Folder or Hub id.
        revision (`str`, *optional*): Commit, tag or branch of the Hub repository.
        trust_remote_code (`bool`): Run code that is in the model's folder or repository.
        any_task (`bool`): Allow models of any task that can be reduced. By default the model must be an image
            classifier.

    Returns:
        The model, and its image processor. For audio models this is the feature extractor.
    """
    # Without trust_remote_code a reduced model loads with the installed classes. No code of its folder runs.
    if (Path(name) / "export.json").is_file():
        raise ValueError(
            f"{name!r} is an exported model, a graph without weights of PyTorch. Label images with tokenreduce "
            "predict, or load it with hf_tokenreduce.load_exported. For other commands give the original model."
        )
    where: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code or None}
    if trust_remote_code:
        register_from_folder(name, revision)
    with no_progress_bars():
        with blaming(name, "config.json"):
            config = AutoConfig.from_pretrained(name, **where)
            architecture = architecture_of(config) or "model that its config.json does not name"
        auto_class = _auto_class_of(name, config, architecture) if any_task else AutoModelForImageClassification
        if not any_task and architecture in MODELS and task_of(architecture).name == "audio-classification":
            raise ValueError(f"{name!r} is a {architecture}, which classifies sounds. This command takes images.")
        if not any_task and architecture in MODELS and stock_type(config) not in CLASSIFIERS:
            task = task_of(architecture).name
            raise ValueError(
                f"{name!r} is a {architecture}, for {task}. It does not predict classes. Give an image classifier."
            )
        with blaming(name, "model.safetensors"):
            check_sizes(name, config)
        with blaming(name, "config.json", config):
            model, found = auto_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **where)
        takes_audio = model.main_input_name == "input_values"
        with blaming(name, "preprocessor_config.json"):
            processor = (AutoFeatureExtractor if takes_audio else AutoImageProcessor).from_pretrained(name, **where)
    if stock_name(model) is None:
        raise ValueError(f"{name!r} is a {type(model).__name__}. {what_can_be_reduced()}")
    if hasattr(config, "reduction") and not config.model_type.startswith(TYPE_PREFIX):
        raise ValueError(
            f"config.json of {name!r} has a reduction, but its model_type {config.model_type!r} is not that of a "
            "reduced model, so the reduction would do nothing. Delete it there, and reduce the model with tokenreduce "
            "reduce."
        )
    missing = set(found["missing_keys"])
    if any_task and missing and all(name.startswith("pooler.") for name in missing):
        # Many encoders were trained without a pooler, such as DINO and MAE. No pooler is better than a random one.
        model.pooler, missing = None, set()
    if missing:
        some = ", ".join(sorted(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        if all(part.split(".")[0] in ("classifier", "cls_classifier", "distillation_classifier") for part in missing):
            raise ValueError(
                f"{name!r} has no trained {some}, so its classifier would be random. Train it first with tokenreduce "
                "train."
            )
        raise ValueError(
            f"model.safetensors of {name!r} lacks {some}, which config.json asks for, so a part of the model would be "
            "random. Save or download the model again, or train it first with tokenreduce train."
        )
    # Without an accelerator, launched processes find each other only if their first state has cpu=True.
    model.to(PartialState(cpu=not torch.accelerator.is_available()).device)
    return model.eval(), processor


def _auto_class_of(name: str, config: PreTrainedConfig, architecture: str) -> Any:
    """Return the class, in most cases an Auto class, that loads the model of a configuration."""
    if architecture.endswith("ForPreTraining"):  # that of MAE has a decoder, which is left out
        architecture = base_model_of(config) or architecture
    if architecture not in MODELS:
        raise ValueError(f"{name!r} is a {architecture}. {what_can_be_reduced()}")
    task = task_of(architecture)
    if task.auto_class == "AutoBackbone":  # AutoBackbone asks the Hub even for a local folder
        reduced = config.model_type.startswith(TYPE_PREFIX)
        stock = getattr(transformers, architecture)
        return reduced_model_class(stock) if reduced else stock
    return getattr(transformers, task.auto_class)


def check_takes_images(name: str, model: PreTrainedModel) -> None:
    """Raise a ValueError if a model takes sounds."""
    if model.main_input_name == "input_values":
        raise ValueError(f"{name!r} takes sounds, and this command gives it images.")


def load_processor(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the processor of a model of images and texts, from a folder or a Hub id."""
    with blaming(name, "the processor's files"):
        return AutoProcessor.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code or None
        )


def processor_of_inputs(
    model: PreTrainedModel, image_processor: Any, name: str, revision: str | None, trust_remote_code: bool
) -> Any:
    """Return what prepares all inputs of a model, to be saved beside it.

    For most models this is `image_processor`. A model that takes texts needs a tokenizer too. A classifier of CLIP or
    SigLIP does not, although the configuration of its encoder names one.
    """
    if not takes_texts(stock_name(model) or ""):
        return image_processor
    return load_processor(name, revision, trust_remote_code)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Temporarily hide the bars of transformers. Weights load quickly, and their bar would hide slower steps."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_images(
    name: str, split: str | None = None, limit: int | None = None, *, labelled: bool | None = True
) -> Dataset:
    """Load an image folder or a data set of the Hub, with the columns image and label.

    Args:
        name: Folder or Hub id.
        split: Name of the split. By default validation, test or train, in this order, or else the first split. "valid"
            and "val" are other names of validation.
        limit: Highest number of images. If there are more, an evenly spread part is returned.
        labelled: Raise an error if there are no labels. With False there may be none. With None labels do not matter,
            and a folder may hold images beside class folders, which then are none.

    Returns:
        The images of the split.
    """
    found = _load_splits(name, labelled is None)
    if split is None:
        chosen = split_of(found, "validation", "test", "train") or next(iter(found))
        if chosen == "train" and len(found) > 1:
            logger.warning(
                f"{name} has no split for validation or test, so its training images are used. Name another split: "
                f"{', '.join(found)}."
            )
    else:
        chosen = split_of(found, split, SPLITS.get(split, split)) or split
    if chosen not in found:
        raise ValueError(f"{name} has no split {split!r}, only {', '.join(found)}.")
    dataset = found[chosen]
    feature = dataset.features.get("label")
    if labelled and not isinstance(feature, ClassLabel) and getattr(feature, "dtype", "") not in LABEL_TYPES:
        raise ValueError(
            f"{name} has no classes. Make one folder per class, at least two, or name a data set with a label column. "
            "If there is a metadata file among the images, move it away, because it replaces the classes."
        )
    return dataset if limit is None else dataset.select(spread(len(dataset), limit))


def load_bank(name: str, images: Dataset, limit: int | None = None) -> Dataset | None:
    """Load the training images that belong to images of another split. None: there are none, or no labels."""
    found = _load_splits(name)
    if "label" not in images.column_names or "train" not in found or str(images.split) == "train":
        return None
    return load_images(name, "train", limit)


def split_of(found: Iterable[str], *wanted: str) -> str | None:
    """Return the first of the wanted splits that a data set has, under its name there: "valid" is a validation."""
    names = list(found)
    for split in wanted:
        others = [name for name in names if SPLITS.get(name) == split]
        if split in names or others:
            return split if split in names else others[0]
    return None


def of_dataset(found: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Return the images of a data set to train on, and those to validate on, or None if it has none."""
    train, validation = split_of(found, "train"), split_of(found, "validation", "test")
    if train is None:
        raise ValueError(f"{name} has no split train, only {', '.join(found)}. Give a data set with one.")
    return found[train], None if validation is None else found[validation]


def _load_splits(name: str, any_depth: bool = False) -> DatasetDict:
    if Path(name).is_dir():
        return load_image_folder(name, any_depth)
    return load_hub_data(name)


def load_hub_data(name: str, streaming: bool = False) -> Any:
    """Load all splits of a data set of the Hub, or open them as streams."""
    try:
        return load_dataset(name, streaming=True) if streaming else load_dataset(name)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(f"{name!r} is no folder here, and the Hub has no such data set: {error}") from error
    except (RuntimeError, DatasetGenerationError) as error:  # a script, which `datasets` no longer runs, or damage
        raise ValueError(f"The data set {name!r} cannot be loaded: {error.__cause__ or error}") from error


def load_pictures(names: list[str], limit: int) -> tuple[list[Image.Image], list[str]]:
    """Read images, and folders of images with or without subfolders. Returns pictures and their names.

    If there are more than `limit`, an evenly spread part is read.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        found = sorted(find_in(path)) if path.is_dir() else [path] if is_image(path) else []
        if not found:
            raise ValueError(
                f"{name} is neither an image nor a folder of images ({', '.join(sorted(IMAGE_SUFFIXES))})."
            )
        files += found
    files = [files[place] for place in spread(len(files), limit)]
    return [read_picture(file) for file in files], [file.stem for file in files]


def parse_settings(text: str) -> dict[str, Any]:
    """Read the settings of a method from JSON."""
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"The method's settings are not JSON ({error}). Write them like '{{\"keep_rate\": 0.5}}'."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(
            f"The method's settings must be a JSON object, got {text!r}. Write them like '{{\"keep_rate\": 0.5}}'."
        )
    return settings


def method_setting(
    config: PreTrainedConfig, name: str, share: float | None = None, settings: dict[str, Any] | None = None
) -> ReductionConfig:
    """Make the configuration of a method from the method's name.

    Args:
        config: Configuration of the model.
        name (`str`): Name of the method.
        share (`float`, *optional*): Share of the multiply-adds to keep.
        settings (`dict`, *optional*): Fields of the method's configuration.

    Returns:
        `ReductionConfig`: The configuration.
    """
    method, settings = find_method(name), dict(settings or {})
    known = [field.name for field in fields(method.config_class)]
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(
            f"{method.config_class.__name__} has no {', '.join(unknown)}. Its settings are: {', '.join(known)}."
        )
    if share is None:
        return method.config_class(**settings)
    check_decided(method, share, settings)
    if method.at_share is None and method.fit_share is None:
        raise ValueError(f"{method.title} has no setting for a share of the multiply-adds. Give its own settings.")
    if method.at_share is None:
        raise ValueError(
            f"{method.config_class.__name__} has no setting for a share, because what it keeps depends on the images. "
            f'Fit it on images: reduce_tokens(model, "{name}", share={share}, images=..., image_processor=...).'
        )
    return method.at_share(facts_of(config), share, **settings)


def check_decided(method: Method, share: float | None, settings: dict[str, Any]) -> None:
    """Raise a ValueError if settings are given together with the share that decides them."""
    both = sorted(set(settings) & set(method.key_settings))
    if both:
        raise ValueError(
            f"A share of {share} decides {', '.join(both)} of {method.title}. Give the share or the setting, not both."
        )


def contents(dataset: Dataset, image_column: str = "image") -> list[str]:
    """Return a digest of each image's file. It is the same for the same image under another name."""
    files = dataset.select_columns(image_column).cast_column(image_column, ImageFeature(decode=False))
    return [hashlib.sha256(_bytes_of(row[image_column])).hexdigest() for row in files]


def _bytes_of(file: dict[str, Any]) -> bytes:
    if file.get("bytes"):
        return file["bytes"]
    if "://" not in file["path"]:
        return Path(file["path"]).read_bytes()
    with xopen(file["path"], "rb") as stream:  # inside an archive
        return stream.read()


def undecoded(dataset: Dataset, image_column: str) -> Dataset:
    """Return a data set whose images are files or bytes, for `decoded_picture`. An error can then name the file."""
    if not isinstance(dataset.features.get(image_column), ImageFeature):
        return dataset
    return dataset.cast_column(image_column, ImageFeature(decode=False))


def image_names(dataset: Dataset, image_column: str = "image") -> list[str]:
    """Return a name for each image of a data set: its folder and file, or its row."""
    files = dataset.cast_column(image_column, ImageFeature(decode=False))[image_column]
    paths = [Path(file["path"]) if file and file.get("path") else None for file in files]
    return [f"row {row}" if path is None else "/".join(path.parts[-2:]) for row, path in enumerate(paths)]
