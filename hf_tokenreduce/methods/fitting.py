"""Shared functions of the methods that learn from unlabelled images."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling.encoders import encoder_of
from ..modeling.multiply_adds import shares_kept
from ..modes import evaluating
from ..tasks import all_layers_act, image_side


@torch.no_grad()
def share_on(model: PreTrainedModel, pixels: Tensor, batch_size: int = 64) -> float:
    """Return the mean share of its encoder's multiply-adds that a reduced model keeps on images (B, C, H, W)."""
    encoder = encoder_of(model)
    with evaluating(model):
        size = encoder.size_arguments(pixels)  # images may have another size than the model's own
        num_tokens = encoder.embed(pixels[:1], **size).shape[1]
        run, options = image_side(model), {**all_layers_act(model), **size}
        counts = torch.cat([run(part, **options).token_counts.cpu() for part in pixels.split(batch_size)])
    return shares_kept(encoder.facts, counts, num_tokens, encoder.facts.reduction).mean().item()


@contextmanager
def before_acting(reducers: list[Any], hook: str, fit: Any) -> Iterator[None]:
    """Inside the `with` block, call `fit(reducer, *arguments)` before each call of a reducer's hook."""

    def wrapped(reducer: Any, act: Any) -> Any:
        def fit_and_act(*arguments):
            fit(reducer, *arguments)
            return act(*arguments)

        return fit_and_act

    for reducer in reducers:
        setattr(reducer, hook, wrapped(reducer, getattr(reducer, hook)))
    try:
        yield
    finally:
        for reducer in reducers:
            delattr(reducer, hook)
