"""What models are for: the Auto class and the pipeline of each task, and what a model gives for images alone."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .convert import stock_name
from .modeling.encoders import PREFIX, READ_PREFIX_ALONE, auto_classes_of, what_can_be_reduced


class Task(NamedTuple):
    """name: what transformers' pipeline calls it. auto_class: that loads its models."""

    name: str
    auto_class: str


# The first that knows a model's class is the model's.
TASKS = (
    Task("image-classification", "AutoModelForImageClassification"),
    Task("zero-shot-image-classification", "AutoModelForZeroShotImageClassification"),
    Task("depth-estimation", "AutoModelForDepthEstimation"),
    Task("audio-classification", "AutoModelForAudioClassification"),
    Task("image-text-to-text", "AutoModelForImageTextToText"),
    Task("image-feature-extraction", "AutoModel"),
    Task("backbone", "AutoBackbone"),  # a part of other models, which no pipeline runs
)

# In the order in which an output is asked for what it is about.
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
    """The task of a stock class, by its name."""
    found = auto_classes_of(stock_class)
    return next((task for task in TASKS if task.auto_class in found), TASKS[-2])


def task_of_model(model: PreTrainedModel) -> Task:
    """The task of a model that is, or can be, reduced."""
    name = stock_name(model)
    if name is None:
        raise ValueError(f"A {type(model).__name__} has no task that is known here. {what_can_be_reduced()}")
    return task_of(name)


def main_output(output: Any) -> Tensor:
    """Pick from a model's output the tensor that its users read: logits, depths, pooled or plain features."""
    for name in MAIN_OUTPUTS:
        value = output.get(name)
        if isinstance(value, (tuple, list)):
            return torch.stack(list(value)) if len({part.shape for part in value}) == 1 else value[-1]
        if value is not None:
            return value
    raise ValueError(f"A {type(output).__name__} has none of {', '.join(MAIN_OUTPUTS)}.")


class ImageSide(nn.Module):
    """What a model of images and texts computes of images alone: their features, and what a reduced model tells."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        model: Any = self.model
        return model.get_image_features(pixel_values, **options)


def all_layers_act(model: PreTrainedModel) -> dict[str, Any]:
    """Options of a forward in which the last layer reduces too, although nobody reads its patches. Then the counts of
    tokens are those that papers speak of, also by a method that decides for each image."""
    name = type(model).__name__
    alone = name.startswith(PREFIX) and name.removeprefix(PREFIX) in READ_PREFIX_ALONE
    return {"output_patch_map": True} if alone else {}


def image_side(model: PreTrainedModel) -> nn.Module:
    """The model itself if it takes images alone, else its `ImageSide`."""
    return ImageSide(model) if hasattr(model, "get_image_features") else model
