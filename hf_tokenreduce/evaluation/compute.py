"""Count the multiply-adds of a whole model, by arithmetic or on a real forward pass, and its parameters.

Papers on vision transformers call a multiply-add a FLOP: DeiT-S has 4.6 G of them. The number of floating-point
operations is twice as high. The counts here include the patch embedding and the head, as in papers. The share that
`hf_tokenreduce.modeling.multiply_adds` computes for a reduction is about the encoder's layers alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.utils import logging

from ..methods import method_of
from ..modeling.encoders import PREFIX, READ_PREFIX_ALONE, encoder_of, facts_of
from ..modeling.methods import parse_reduction
from ..modeling.multiply_adds import even_counts, even_share, multiply_adds
from ..modes import evaluating
from ..tasks import facts_on, image_side, size_made_by, task_of_model


# Parts of larger models that do not read the encoder, or do not run once per image.
WITH_CLASSES = ("image-classification", "audio-classification")  # tasks of models with labels of their own
OTHER_PARTS = ("text_", "language_", "lm_head", "multi_modal", "neck", "head")


def measured_multiply_adds(model: PreTrainedModel, pixel_values: Tensor, *, progress: bool = False) -> Tensor:
    """Count the multiply-adds of each image with torch's counter in a real forward pass, embedding and head included.

    The images go through the model one by one, so that each has its own count. Attention runs as plain matrix
    products meanwhile, because the counter does not know every fused kernel. The number of products is the same.

    Args:
        model: The model, stock or reduced.
        pixel_values: Images (B, C, H, W).
        progress: Show a progress bar.

    Returns:
        The multiply-adds of each image: (B,), float64.

    Example:
        >>> measured_multiply_adds(model, pixel_values).mean()
    """
    if pixel_values.ndim != 4 or len(pixel_values) == 0:
        raise ValueError(f"pixel_values must be (B, C, H, W) with B above 0, got {tuple(pixel_values.shape)}.")
    counts = []
    images = pixel_values.to(model.device, model.dtype).split(1)
    with evaluating(model), plain_attention(model), torch.no_grad():
        for image in logging.tqdm(images, desc="counting multiply-adds", leave=False, disable=not progress):
            with FlopCounterMode(display=False) as counter:
                image_side(model)(image)
            counts.append(counter.get_total_flops() / 2)
    return torch.tensor(counts, dtype=torch.float64)


def total_multiply_adds(
    model: PreTrainedModel,
    token_counts: Tensor | None = None,
    reduction: Any = None,
    num_tokens: int | None = None,
    *,
    as_in_papers: bool = False,
) -> Tensor:
    """Compute the multiply-adds of each image by arithmetic, without running the model, embedding and head included.

    Args:
        model: The model, stock or reduced.
        token_counts: Tokens that leave each layer, long (B, L), as a reduced model returns them. By default the counts
            of a dense model or of a method that keeps the same number of tokens in every image; then B is 1.
        reduction: A method configuration, or its dictionary form, to use instead of the model's own. With it you can
            ask a dense model what it would cost after a reduction.
        num_tokens: Number of tokens that enter the model, prefix tokens included. By default that of an image of the
            model's own size.
        as_in_papers: Count the whole last layer. By default a reduced classifier that reads only prefix tokens is
            counted as it really computes: its last layer has no queries, output projection and MLP for the patches.

    Returns:
        The multiply-adds of each image: (B,), float64.

    Raises:
        ValueError: The method is adaptive and `token_counts` is missing. Its cost depends on the images.

    Example:
        >>> total_multiply_adds(model, reduction=ToMeConfig(r=13)).item()
    """
    facts = facts_of(model.config)
    is_dense = reduction is None and not type(model).__name__.startswith(PREFIX)
    reduction = parse_reduction(facts.reduction if reduction is None else reduction)
    if num_tokens is None:
        num_tokens = facts.num_tokens
    if token_counts is None:
        if reduction is not None:
            reduction.check_fit(facts)
            if num_tokens != facts.num_tokens:
                if not method_of(reduction).any_image_size:
                    raise ValueError(f"{type(reduction).__name__} takes images of one size, so leave num_tokens out.")
                facts = facts._replace(grid=(1, num_tokens - facts.num_prefix_tokens))
            token_counts = torch.tensor([even_counts(reduction, facts)])
        else:
            token_counts = torch.full((1, facts.num_hidden_layers), num_tokens)
    alone = type(model).__name__.removeprefix(PREFIX) in READ_PREFIX_ALONE
    for_prefix = alone and not is_dense and not as_in_papers
    encoder = multiply_adds(facts, token_counts.cpu(), num_tokens, reduction, for_prefix)
    return encoder + outside_multiply_adds(model, num_tokens - facts.num_prefix_tokens)


def dense_multiply_adds(model: PreTrainedModel, num_tokens: int | None = None) -> float:
    """Compute the multiply-adds of the whole model for one image, without its reduction.

    Args:
        model: The model, stock or reduced.
        num_tokens: Number of tokens that enter the model, prefix tokens included. By default that of an image of the
            model's own size.

    Returns:
        The multiply-adds, embedding and head included.
    """
    facts = facts_of(model.config)
    if num_tokens is None:
        num_tokens = facts.num_tokens
    encoder = multiply_adds(facts, torch.full((1, facts.num_hidden_layers), num_tokens), num_tokens)
    return encoder.item() + outside_multiply_adds(model, num_tokens - facts.num_prefix_tokens)


def outside_multiply_adds(model: PreTrainedModel, patches: int) -> int:
    """Count the multiply-adds of the patch embedding and of what reads the encoder's output: pooler, pooling, heads.

    Other parts of a larger model, such as a text tower, are not counted.
    """
    encoder = encoder_of(model)
    total = patches * encoder.patch_projection.weight.numel()
    for name, part in model.named_children():
        if not name.startswith(OTHER_PARTS):
            total += _read_once(part, patches, skipped={id(encoder.module.embeddings), id(encoder.layers)})
    return total


def _read_once(part: nn.Module, patches: int, skipped: set[int]) -> int:
    """Count the multiply-adds of a module that runs once per image."""
    if id(part) in skipped:
        return 0
    if isinstance(part, nn.MultiheadAttention):  # pooling: one query attends to all patches
        return (2 * patches + 2) * part.embed_dim**2 + 2 * patches * part.embed_dim
    if isinstance(part, nn.Linear):
        return part.weight.numel()
    return sum(_read_once(child, patches, skipped) for child in part.children())


def tokens_entering(model: nn.Module, pixel_values: Tensor) -> int:
    """Return how many tokens of such an image enter the first layer, prefix tokens included."""
    return facts_on(model, pixel_values).num_tokens


def describe_compute(model: PreTrainedModel, pixel_values: Tensor | None = None, *, progress: bool = False) -> dict:
    """Describe what a model computes.

    Args:
        model: The model, stock or reduced.
        pixel_values: Images (B, C, H, W) on which the multiply-adds are counted. By default they are computed by
            arithmetic, which is not possible for adaptive methods.
        progress: Show a progress bar.

    Returns:
        `dict`: `parameters`, their number; `multiply_adds`, summarised over the images (mean, quantiles, least and
            most); `dense_multiply_adds`; and `share`, the mean of the multiply-adds divided by the dense model's. All
            are about the whole model.

    Example:
        >>> describe_compute(model, pixel_values)["multiply_adds"]["mean"]
    """
    if pixel_values is None:
        counts, tokens = total_multiply_adds(model), None
    else:
        counts = measured_multiply_adds(model, pixel_values, progress=progress)
        tokens = encoder_of(model).embed(pixel_values[:1].to(model.device, model.dtype)).shape[1]
    dense = dense_multiply_adds(model, tokens)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "multiply_adds": summary(counts),
        "dense_multiply_adds": dense,
        "share": counts.mean().item() / dense,
    }


def summary(values: Tensor) -> dict[str, float]:
    """Summarise one number per image: mean, quantiles, least and most."""
    values = values.double()
    return {
        "mean": values.mean().item(),
        "p50": values.quantile(0.5).item(),
        "p95": values.quantile(0.95).item(),
        "min": values.min().item(),
        "max": values.max().item(),
    }


@contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Temporarily switch to eager attention."""
    implementation = model.config._attn_implementation
    model.config._attn_implementation = "eager"
    try:
        yield
    finally:
        model.config._attn_implementation = implementation


def describe_model(model: PreTrainedModel, name: str, image_processor: Any = None) -> dict[str, Any]:
    """Describe a model: backbone, task, method, settings, tokens per layer, multiply-adds, size.

    Args:
        model: The model, stock or reduced.
        name: Name of the model in the description.
        image_processor: The image processor of the model. Some encoders, such as DINOv2, are given images of another
            size than the configuration says. Then tokens and multiply-adds are those of the processor's size.

    Returns:
        `dict`: The entries. `multiply_adds` and `tokens_per_layer` are None if they depend on the image.

    Example:
        >>> describe_model(model, "vit-tome")["share"]
    """
    encoder = encoder_of(model)
    facts, size = encoder.facts, getattr(encoder.config, "image_size", None)
    if image_processor is not None and encoder.tower.any_size:
        made = size_made_by(image_processor)
        facts, size = facts_on(model, torch.empty(1, *made)), list(made[1:])
    reduction = facts.reduction
    learned = method_of(reduction).learned_numbers(model)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = facts.num_tokens
    described: dict[str, Any] = {
        "name": name,
        "class": type(model).__name__,
        "backbone": f"{facts.num_hidden_layers} layers of width {facts.hidden_size}, {tokens} tokens",
        "image_size": size,
        "task": task_of_model(model).name,
        "labels": model.config.num_labels if task_of_model(model).name in WITH_CLASSES else None,
        "parameters": parameters,
        "megabytes": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6, 1),
        "method": None if reduction is None else reduction.method,
        "settings": None if reduction is None else reduction.to_dict(),
        "learned": {name: [round(value, 4) for value in values] for name, values in learned.items()} or None,
        "share_when_calibrated": getattr(model.config, "calibrated_share", None),
        "dense_multiply_adds": round(dense_multiply_adds(model, tokens)),
        "multiply_adds": None,
        "tokens_per_layer": None,
    }
    try:
        described["tokens_per_layer"] = (
            [tokens] * facts.num_hidden_layers if reduction is None else even_counts(reduction, facts)
        )
    except ValueError:  # the method is adaptive: both numbers depend on the image
        return described
    counts = torch.tensor([described["tokens_per_layer"]])
    described["multiply_adds"] = round(total_multiply_adds(model, counts, num_tokens=tokens).item())
    as_in_papers = total_multiply_adds(model, counts, num_tokens=tokens, as_in_papers=True)
    described["multiply_adds_as_in_papers"] = round(as_in_papers.item())
    # The share is about the encoder alone, as everywhere. The numbers above include patch embedding and head.
    described["share"] = 1.0 if reduction is None else round(even_share(reduction, facts), 4)
    return described
