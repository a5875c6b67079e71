"""Zero-shot classification: use a model of images and texts as an image classifier, with texts for its classes."""

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import ClassLabel, Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import ModelOutput

from ..modeling.encoders import stock_type
from ..tasks import ImageSide, main_output, task_of_model


PROMPT = "a photo of a {}"
TASK = "zero-shot-image-classification"
TEXTS_AT_ONCE = 256


@dataclass
class ZeroShotOutput(ModelOutput):
    """The output of a `ZeroShotClassifier`.

    Attributes:
        logits: (B, classes).
        token_counts: Tokens that leave each layer, (B, L). None: the model is not reduced.
    """

    logits: Tensor | None = None
    token_counts: Tensor | None = None


class ZeroShotClassifier(ImageSide):
    """A model of images and texts as a classifier of images. `zero_shot_classifier` makes it.

    Args:
        model: The model of images and texts.
        text_embeddings: Embedding of each class, (classes, D), each of length 1.
        names: Name of each class.
        labels: Index of each class, by all names that data may use for it.
    """

    text_embeddings: Tensor

    def __init__(self, model: PreTrainedModel, text_embeddings: Tensor, names: Sequence[str], labels: dict[str, int]):
        super().__init__(model)
        self.register_buffer("text_embeddings", text_embeddings)
        self.names, self.labels = list(names), labels
        self.training = model.training

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model, with the classes of this classifier."""
        config = copy.copy(self.model.config)
        config.id2label, config.label2id = dict(enumerate(self.names)), self.labels
        return config

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def around(self, model: PreTrainedModel) -> "ZeroShotClassifier":
        """Make a classifier of the same classes from a model with the same text tower, such as a reduced one."""
        return ZeroShotClassifier(model, self.text_embeddings, self.names, self.labels)

    def forward(self, pixel_values: Tensor, **options: Any) -> ZeroShotOutput:
        output = super().forward(pixel_values, **options)
        model: Any = self.model
        # In float32, because bfloat16 has only a few different numbers near 25, and classes would be equal.
        features, texts = F.normalize(main_output(output).float(), dim=-1), self.text_embeddings.float()
        logits = features @ texts.T * model.logit_scale.float().exp()
        if hasattr(model, "logit_bias"):  # SigLIP
            logits = logits + model.logit_bias.float()
        return ZeroShotOutput(logits=logits, token_counts=output.get("token_counts"))


def zero_shot_classifier(
    model: PreTrainedModel,
    processor: Any,
    class_names: Sequence[str] | Mapping[str, str],
    prompts: Sequence[str] = (PROMPT,),
) -> ZeroShotClassifier:
    """Make an image classifier from a model of images and texts. Its text tower embeds the class names once.

    Args:
        model (`PreTrainedModel`): A `CLIPModel` or `SiglipModel`, reduced or not.
        processor: The processor of the model (`AutoProcessor`), or its tokenizer.
        class_names: Name of each class; a data set may also write them with underscores. Or a mapping from the name in
            the data set to the name of the class, such as `class_names_of(dataset)`.
        prompts: Texts with `{}` where the name goes. A class is the mean of the embeddings of its texts.

    Returns:
        `ZeroShotClassifier`, which you can pass to `evaluate_model` and `compare`.

    Example:
        >>> classifier = zero_shot_classifier(model, processor, ["cat", "dog"])
        >>> report = evaluate_model(classifier, photos, processor.image_processor)
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel) or task_of_model(model).name != TASK:
        raise ValueError(f"A {name} has no text tower to compare images with. Give a CLIPModel or a SiglipModel.")
    if not isinstance(processor, (ProcessorMixin, PreTrainedTokenizerBase)):
        raise ValueError(
            f"A {type(processor).__name__} cannot read texts. Give the model's processor, "
            "AutoProcessor.from_pretrained(...), with its tokenizer."
        )
    if isinstance(class_names, str) or not class_names:
        raise ValueError(f'class_names must be a list of names, such as ["cat", "dog"], got {class_names!r}.')
    if isinstance(class_names, Mapping):
        names = list(class_names.values())
        labels = {label: index for index, label in enumerate(class_names)}
    else:
        names = list(class_names)
        labels = {name: index for index, name in enumerate(names)}
        labels |= {name.replace(" ", "_"): index for index, name in enumerate(names)}
    _check_names(names)
    _check_prompts(prompts)
    embeddings = torch.stack([_embed(model, processor, [_fill(p, name) for name in names]) for p in prompts])
    mean = F.normalize(embeddings.mean(dim=0), dim=-1)
    return ZeroShotClassifier(model, mean, names, labels)


def class_names_of(dataset: Dataset, label_column: str = "label") -> dict[str, str]:
    """Return a readable name for each class of a data set.

    Args:
        dataset: The data set.
        label_column: Column that holds the classes.

    Returns:
        `dict`: From the name in the data set, such as `0001_great_white_shark`, to the name of the class, `great white
            shark`.

    Raises:
        ValueError: The classes have no names, or their names are numbers.

    Example:
        >>> classifier = zero_shot_classifier(model, processor, class_names_of(photos))
    """
    feature = dataset.features.get(label_column)
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            f"The column {label_column!r} of the data set names no classes. Give their names, in the order of the "
            "labels: class_names=[...], or --class-names a,b,c."
        )
    for label in feature.names:
        if re.fullmatch(r"n\d{8}|\d{3,}", plain_name(label)):
            raise ValueError(
                f"The class {label!r} is a number, and a text tower does not know what the number stands for. Give "
                "the names of all classes, in their order: --class-names a,b,c, or a file with one name per line; in "
                "Python class_names=[...]. A folder belongs to a class by its name, or by the index at its beginning."
            )
    return {label: plain_name(label) for label in feature.names}


def plain_name(label: str) -> str:
    """Return a label without the index in front, and with spaces instead of underscores."""
    return re.sub(r"^\d+_+(?=.)", "", label).replace("_", " ").strip()


def typed_names(text: str) -> list[str]:
    """Read the class names that a user typed: names with commas between them, or a file with one name per line."""
    # Path.is_file would raise an error for a text that is too long to be a path.
    # Editors on Windows put a byte order mark in front, which utf-8-sig leaves out.
    parts = Path(text).read_text(encoding="utf-8-sig").splitlines() if os.path.isfile(text) else text.split(",")
    return [part.strip() for part in parts if part.strip()]


def as_classifier(
    model: PreTrainedModel,
    load_processor: Callable[[], Any],
    dataset: Dataset,
    class_names: str | None = None,
    prompts: Sequence[str] = (),
) -> PreTrainedModel | ZeroShotClassifier:
    """Return a model ready to be evaluated: a `ZeroShotClassifier` if it reads texts, else the model itself.

    Args:
        model: The model.
        load_processor: Loads the processor that reads texts. It is called only if it is needed.
        dataset: The images. Their classes are used if `class_names` is None.
        class_names: What the user typed for --class-names.
        prompts: What the user typed for --prompt.
    """
    check_typed(model, class_names, prompts)
    if task_of_model(model).name != TASK:
        return model
    named = class_names_of(dataset) if class_names is None else typed_names(class_names)
    return zero_shot_classifier(model, load_processor(), named, prompts or (PROMPT,))


def check_typed(model: PreTrainedModel, class_names: str | None, prompts: Sequence[str]) -> None:
    """Raise a ValueError if a user typed names or prompts for a model that reads no texts."""
    if (class_names is not None or prompts) and task_of_model(model).name != TASK:
        raise ValueError(
            "--class-names and --prompt are for models that compare images with texts, such as CLIP and SigLIP. A "
            f"{type(model).__name__} reads no texts. Leave these options out."
        )


def inside(model: Any) -> PreTrainedModel:
    """Return the model of transformers, which may be inside a `ZeroShotClassifier`."""
    return model.model if isinstance(model, ZeroShotClassifier) else model


def converted(model: Any, convert: Callable[[PreTrainedModel], PreTrainedModel]) -> Any:
    """Convert a model, or the model inside a `ZeroShotClassifier`, which keeps its classes."""
    return model.around(convert(model.model)) if isinstance(model, ZeroShotClassifier) else convert(model)


@torch.no_grad()
def _embed(model: Any, processor: Any, texts: list[str]) -> Tensor:
    """Return the embeddings of texts: (texts, D), each of length 1."""
    # SigLIP reads the last position, and was trained with all texts padded to the same length.
    padding = "max_length" if stock_type(model.config) == "siglip" else True
    longest = model.config.text_config.max_position_embeddings
    options = {"padding": padding, "max_length": longest, "truncation": True, "return_tensors": "pt"}
    found = []
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        tokens = processor(text=texts[start : start + TEXTS_AT_ONCE], **options)
        found.append(main_output(model.get_text_features(**tokens.to(model.device))))
    return F.normalize(torch.cat(found), dim=-1)


def _fill(prompt: str, name: str) -> str:
    return prompt.replace("{}", name)


def _check_names(names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"Two classes are called {', '.join(map(repr, twice))}, so their texts would be the same. Give them "
            "different names with --class-names, or class_names=[...]."
        )


def _check_prompts(prompts: Sequence[str]) -> None:
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f'prompts must be a list of texts, such as ["{PROMPT}"], got {prompts!r}.')
    for prompt in prompts:
        if "{}" not in prompt:
            raise ValueError(f'The prompt {prompt!r} has no {{}} where the name of a class goes. Write "{PROMPT}".')
