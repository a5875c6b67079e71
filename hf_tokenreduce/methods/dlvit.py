"""The description of DL-ViT. Its labels and its filter are made in `training/`."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..modeling.dlvit import DLViTConfig
from .method import QUICK_FINE_TUNE, RECIPES, Method


def why_not(config: Any) -> str | None:
    if config.trained:
        return None
    return (
        "its filter is not trained, so it would keep every token; fit it with hf_tokenreduce.training.fit_filter, or "
        "run examples/run_delta_loss.py and use the model that it writes"
    )


def learn_from_labels(
    model: PreTrainedModel, dataset: Any, folder: str | Path, image_processor: Any, **options: Any
) -> None:
    """Label patches by how much the loss rises without them, and fit the filter to the labels."""
    from ..training import fit_filter, make_labels

    make_labels(model, dataset, folder, image_processor=image_processor, **options)
    fit_filter(model, folder, dataset, image_processor=image_processor)


DLVIT = Method(
    DLViTConfig,
    title="DL-ViT",
    family="filtering before the first layer",
    summary=(
        "Before the first layer a small network judges every embedded patch. Patches that it judges unimportant never "
        "enter the encoder."
    ),
    paper="Predicting Token Impact Towards Efficient Vision Transformer",
    arxiv="2305.14840",
    details=(
        "For every patch of some training images, a trained classifier shows how much the loss rises without the "
        "patch. A small network, the filter, learns from the embeddings which patches raise it. When the model runs, "
        "the filter drops the other patches before the first layer. It keeps a fixed share of the patches "
        "(`keep_rate`), or those above a `threshold`."
    ),
    limits=(
        "Its labels need a trained classifier and labelled images. An untrained filter keeps every patch, and the "
        "model then logs a warning."
    ),
    ours=(
        "the authors published no code, so: the shape of the filter, the mask and the threshold of the labels, the "
        "schedule of the fine-tuning"
    ),
    needs="labels",
    tuned_settings=None,
    is_adaptive=lambda config: config.keep_rate is None,
    at_share=DLViTConfig.for_budget,
    untrained=lambda facts, shares: [],
    learn_from_labels=learn_from_labels,
    why_not=why_not,
    paper_recipe="The authors published no schedule. All values are our own: those of EViT's fine-tuning of DeiT.",
    recipes={**RECIPES, "demo": {**QUICK_FINE_TUNE, "num_train_epochs": 1, "learning_rate": 2e-4}},
)
