"""The task of a model: its Auto class, its pipeline, and what it computes from images alone."""

import inspect
from typing import Any, NamedTuple

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from .convert import stock_name
from .modeling.encoders import (
    PREFIX,
    READ_PREFIX_ALONE,
    EncoderFacts,
    auto_classes_of,
    encoder_of,
    what_can_be_reduced,
)


class Task(NamedTuple):
    """A task.

    Attributes:
        name: Name of the task in transformers' pipeline.
        auto_class: Auto class that loads models of the task.
    """

    name: str
    auto_class: str


# The task of a model is the first one whose Auto class knows the model's class.
TASKS = (
    Task("image-classification", "AutoModelForImageClassification"),
    Task("zero-shot-image-classification", "AutoModelForZeroShotImageClassification"),
    Task("depth-estimation", "AutoModelForDepthEstimation"),
    Task("audio-classification", "AutoModelForAudioClassification"),
    Task("image-text-to-text", "AutoModelForImageTextToText"),
    Task("image-feature-extraction", "AutoModel"),
    Task("backbone", "AutoBackbone"),  # part of other models; no pipeline runs it
)

# The main output of a model is the first of these that it has.
MAIN_OUTPUTS = (
    "logits",
    "logits_per_image",
    "predicted_depth",
    "image_embeds",
    "pooler_output",
    "feature_maps",
    "last_hidden_state",
)


def task_of(stock_class: str) -> Task:
    """Return the task of a stock class, by the name of the class."""
    found = auto_classes_of(stock_class)
    return next((task for task in TASKS if task.auto_class in found), TASKS[-2])


def takes_texts(stock_class: str) -> bool:
    """Return whether models of a stock class take texts, by the name of the class."""
    return "input_ids" in inspect.signature(getattr(transformers, stock_class).forward).parameters


def task_of_model(model: PreTrainedModel) -> Task:
    """Return the task of a model that is reduced or can be reduced."""
    name = stock_name(model)
    if name is None:
        raise ValueError(f"The task of a {type(model).__name__} is unknown. {what_can_be_reduced()}")
    return task_of(name)


def main_output(output: Any) -> Tensor:
    """Return the tensor of a model's output that its users read: logits, depths, pooled or plain features."""
    for name in MAIN_OUTPUTS:
        value = output.get(name)
        if isinstance(value, (tuple, list)):
            return torch.stack(list(value)) if len({part.shape for part in value}) == 1 else value[-1]
        if value is not None:
            return value
    raise ValueError(f"A {type(output).__name__} has none of {', '.join(MAIN_OUTPUTS)}.")


class ImageSide(nn.Module):
    """The image side of a model of images and texts. It returns the image features, and what a reduced model adds."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.training = model, model.training

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        model: Any = self.model
        return model.get_image_features(pixel_values, **options)


def is_regression(config: Any) -> bool:
    """Return whether the head of a model computes numbers, and not scores of classes."""
    return getattr(config, "problem_type", None) == "regression"


def check_has_classes(model: Any, what: str, one: bool = False) -> None:
    """Raise an error if the head of a model computes numbers or has one class, for something that compares classes.

    Args:
        model: The model.
        what: What compares classes, for the message.
        one: Whether an image must have one class, and not several labels.
    """
    if is_regression(model.config):
        raise ValueError(
            f"{what} compares classes, but the head of this model computes numbers (problem_type is 'regression'). "
            "Give a model that predicts classes, or the encoder without its head."
        )
    several = one and getattr(model.config, "problem_type", None) == "multi_label_classification"
    if hasattr(model, "classifier") and (several or model.config.num_labels == 1):
        raise ValueError(
            f"{what} compares the class of each image, but the head of this model "
            f"{'finds several labels per image' if several else 'has one logit'}. Give the encoder without its head: "
            "then features are compared."
        )


def score_text(score: float, config: Any) -> str:
    """Return a score of `class_scores` as people read it: a percentage, or the number of a regression head."""
    return f"{score:.4g}" if is_regression(config) else f"{score:.1%}"


def labelled(predictions: list[tuple[str, float]], config: Any) -> dict[str, float] | str:
    """Return predictions for a Label of gradio, which shows each number as a percentage, but a text as it is."""
    if not is_regression(config):
        return dict(predictions)
    return ", ".join(f"{name}: {score_text(score, config)}" for name, score in predictions)


def class_scores(logits: Tensor, config: Any) -> Tensor:
    """Return the score of each class, (B, classes) float32, by the rule of `pipeline`.

    A regression head gives the logit itself. A model with one logit, or trained on several labels per image, gives
    one sigmoid per class, and any other model a softmax.
    """
    if is_regression(config):
        return logits.float()
    return logits.float().sigmoid() if is_one_by_one(logits, config) else logits.float().softmax(dim=-1)


def is_one_by_one(logits: Tensor, config: Any) -> bool:
    """Return whether a classifier says of each class alone whether it is there: with one logit, or several labels."""
    return getattr(config, "problem_type", None) == "multi_label_classification" or logits.shape[-1] == 1


def same_decisions(logits: Tensor, others: Tensor, config: Any) -> Tensor:
    """Return for which images two classifiers, with logits (B, classes), decide the same: (B,) bool."""
    if is_one_by_one(logits, config):
        return ((logits > 0) == (others > 0)).all(dim=-1)
    return logits.argmax(dim=-1) == others.argmax(dim=-1)


def all_layers_act(model: PreTrainedModel) -> dict[str, Any]:
    """Return options of a forward pass in which the last layer reduces too, although its patches are not read.

    Then the counts of tokens are the same as in papers, also for adaptive methods.
    """
    name = type(model).__name__
    alone = name.startswith(PREFIX) and name.removeprefix(PREFIX) in READ_PREFIX_ALONE
    return {"output_patch_map": True} if alone else {}


def image_side(model: PreTrainedModel) -> nn.Module:
    """Return the model itself if it takes images alone, else its `ImageSide`."""
    return ImageSide(model) if hasattr(model, "get_image_features") else model


def size_made_by(image_processor: Any) -> tuple[int, ...]:
    """Return the size (C, H, W) of the images that an image processor makes, found by running it."""
    made = image_processor(Image.new("RGB", (640, 640)), return_tensors="pt")["pixel_values"]
    return tuple(made.shape[1:])


def facts_on(model: nn.Module, pixel_values: Tensor) -> EncoderFacts:
    """Return the facts of a model's encoder with the grid of these images, whose size may differ from the model's.

    Spectrograms (B, T, F) have the model's own size: no other is possible.
    """
    encoder = encoder_of(model)
    if pixel_values.ndim == 3:
        return encoder.facts
    height, width = encoder.patch_size
    return encoder.facts._replace(grid=(pixel_values.shape[-2] // height, pixel_values.shape[-1] // width))
