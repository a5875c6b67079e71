"""Find which token holds which patch after every layer, as tensors.

B images · L layers · N patches on a grid of rows and columns · M patch tokens
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..methods import method_of
from ..modeling.encoders import encoder_of
from ..modeling.multiply_adds import shares_kept
from ..modes import evaluating
from ..tasks import image_side


class TokenMaps(NamedTuple):
    """Say which token holds which patch of each image after every layer, and what that cost.

    Attributes:
        patch_maps: For each layer, the patch token that holds each patch after the layer, (B, N) long; -1 if the
            patch was dropped. Indices count patch tokens only. None for layers whose tokens are mixtures of patches
            (SiT).
        patch_weights: For each layer whose tokens are mixtures, the weight of each patch in each patch token,
            (B, M, N) float32. None for other layers.
        counts: Number of tokens that leave each layer, prefix tokens included, (B, L) long.
        num_tokens: Number of tokens that enter the first layer, prefix tokens included.
        grid: Numbers of rows and columns of patches. Patch n is in row n // columns.
        shares: Share of the dense model's multiply-adds that each image took in the encoder's layers, (B,) float64.
        logits: Logits of the classes, (B, classes) float32. None if the model is not a classifier.
        reduction: Configuration of the method. None if the model reduces nothing.
    """

    patch_maps: tuple[Tensor | None, ...]
    patch_weights: tuple[Tensor | None, ...]
    counts: Tensor
    num_tokens: int
    grid: tuple[int, int]
    shares: Tensor
    logits: Tensor | None
    reduction: Any

    def reducing_layers(self) -> list[int]:
        """Return the layers that at least one image leaves with fewer tokens than it entered with."""
        entering = self.counts.roll(1, dims=1)
        entering[:, 0] = self.num_tokens
        return (entering > self.counts).any(dim=0).nonzero().flatten().tolist()

    def gathers_the_rest(self) -> bool:
        """Whether the method gathers patches into one token that would otherwise be dropped (EViT)."""
        return method_of(self.reduction).gathers_the_rest(self.reduction)

    def differ(self) -> bool:
        """Whether the images have different numbers of tokens."""
        return bool((self.counts != self.counts[:1]).any())


@torch.no_grad()
def token_maps(model: PreTrainedModel, pixel_values: Tensor, *, batch_size: int = 32) -> TokenMaps:
    """Run a reduced model on images, and follow every patch through its layers.

    The model runs in eval mode. If the images do not have the model's size, its position embeddings are interpolated.

    Args:
        model: A reduced model.
        pixel_values: Pixel values, (B, C, H, W).
        batch_size: Number of images that go through the model at once.

    Returns:
        `TokenMaps`: The maps, on the CPU.

    Example:
        >>> maps = token_maps(model, processor(images, return_tensors="pt")["pixel_values"])
        >>> maps.counts[0].tolist()  # number of tokens of the first image after each layer
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model.config, "reduction"):
        raise ValueError(
            f"Token maps need a reduced model, got a {type(model).__name__}. Make one by reduce_tokens(model, "
            "ToMeConfig(r=8)). If the model is wrapped (PEFT, compiled, parallel), pass the model inside."
        )
    if pixel_values.ndim != 4 or len(pixel_values) == 0:
        raise ValueError(f"pixel_values must be (B, C, H, W) with B above 0, got {tuple(pixel_values.shape)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    encoder = encoder_of(model)
    (height, width), (patch_height, patch_width) = pixel_values.shape[-2:], encoder.patch_size
    grid = height // patch_height, width // patch_width
    num_tokens = grid[0] * grid[1] + encoder.facts.num_prefix_tokens
    options = encoder.size_arguments(pixel_values)

    maps: list[list[Tensor | None]] = []
    weights: list[list[Tensor | None]] = []
    counts, logits = [], []
    with evaluating(model), _states(model) as states:
        batches = pixel_values.split(batch_size)
        for batch in logging.tqdm(batches, desc="mapping tokens", leave=False, disable=len(batches) == 1 or None):
            output = image_side(model)(batch.to(model.device, model.dtype), output_patch_map=True, **options)
            maps.append([state.patch_map for state in states])
            weights.append([state.patch_weights for state in states])
            states.clear()
            counts.append(output.token_counts.cpu())
            if output.get("logits") is not None:
                logits.append(output.logits.float().cpu())
    all_counts = torch.cat(counts)
    return TokenMaps(
        patch_maps=_per_layer(maps),
        patch_weights=_per_layer(weights),
        counts=all_counts,
        num_tokens=num_tokens,
        grid=grid,
        shares=shares_kept(model.config, all_counts, num_tokens, model.config.reduction),
        logits=torch.cat(logits) if logits else None,
        reduction=model.config.reduction,
    )


def strongest_token(patch_weights: Tensor) -> Tensor:
    """Return the token in which each patch weighs most: patch weights (..., M, N) -> (..., N) long."""
    return patch_weights.argmax(dim=-2)


def checked_layers(layers: Sequence[int] | None, maps: TokenMaps, most: int) -> list[int]:
    """Return the layers to show: those given, or else at most `most` of the layers that reduce.

    The latter are evenly spread, and the last layer that reduces is always among them.
    """
    num_layers = maps.counts.shape[1]
    if layers is not None:
        wrong = [layer for layer in layers if layer not in range(num_layers)]
        if wrong or len(layers) == 0:
            raise ValueError(f"layers must be indices from 0 to {num_layers - 1}, got {list(layers)}.")
        return list(layers)
    reducing = maps.reducing_layers() or [num_layers - 1]
    count = min(most, len(reducing))
    return [reducing[(place + 1) * len(reducing) // count - 1] for place in range(count)]


class _Tracked(NamedTuple):
    patch_map: Tensor | None
    patch_weights: Tensor | None


@contextmanager
def _states(model: PreTrainedModel) -> Iterator[list[_Tracked]]:
    """Collect where the patches are after each layer, in the order in which the layers run."""
    states: list[_Tracked] = []

    def keep(layer: Any, inputs: Any, state: Any) -> None:
        states.append(_Tracked(*(None if x is None else x.cpu() for x in (state.patch_map, state.patch_weights))))

    handles = [layer.register_forward_hook(keep) for layer in encoder_of(model).layers]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def _per_layer(batches: list[list[Tensor | None]]) -> tuple[Tensor | None, ...]:
    """Join the batches: a list of layers for each batch -> a tensor of all images for each layer."""
    layers = []
    for parts in zip(*batches, strict=True):
        tensors = [part for part in parts if part is not None]
        layers.append(torch.cat(tensors) if tensors else None)
    return tuple(layers)
