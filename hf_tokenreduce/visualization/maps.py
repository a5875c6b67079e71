"""Which token holds which patch after every layer: data, no pictures.

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
    """patch_maps: for each layer (B, N) long, the patch token that holds each patch when the layer is done, -1 if it
        was dropped; indices count patch tokens only. None where tokens are mixtures of patches (SiT).
    patch_weights: for each layer (B, M, N) float32 where tokens are mixtures: what each patch weighs in each patch
        token. None elsewhere.
    counts: (B, L) long, the tokens that leave each layer, prefix tokens included
    num_tokens: those that enter the model, prefix tokens included
    grid: rows and columns of patches; patch n lies in row n // columns
    shares: (B,) float64, the share of a dense model's multiply-adds that each image took, in the encoder's layers
    logits: (B, classes) float32, None of a model without a classifier
    reduction: the method configuration that the model ran, None if it reduces nothing
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
        """The layers that some image leaves with fewer tokens than it entered with."""
        entering = self.counts.roll(1, dims=1)
        entering[:, 0] = self.num_tokens
        return (entering > self.counts).any(dim=0).nonzero().flatten().tolist()

    def gathers_the_rest(self) -> bool:
        """Whether a token of several patches is one that gathers what would else be dropped (EViT)."""
        return method_of(self.reduction).gathers_the_rest

    def differ(self) -> bool:
        """Whether images were given different numbers of tokens."""
        return bool((self.counts != self.counts[:1]).any())


@torch.no_grad()
def token_maps(model: PreTrainedModel, pixel_values: Tensor, *, batch_size: int = 32) -> TokenMaps:
    """Run a reduced model on pixel values (B, C, H, W) and follow every patch through its layers.

    Images of another size than the model's have their position encoding interpolated. The model is in eval mode
    meanwhile, and all results come on the CPU.
    """
    if not isinstance(model, PreTrainedModel) or not hasattr(model.config, "reduction"):
        raise ValueError(
            f"Token maps are of a reduced model, got a {type(model).__name__}. Make one by reduce_tokens(model, "
            "ToMeConfig(r=8)); of a wrapped model (PEFT, compiled, parallel), pass the model inside."
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
            output = image_side(model)(batch.to(model.device), output_patch_map=True, **options)
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
    """(..., M, N) -> (..., N) long: the token in which each patch weighs most, a hard view of mixtures."""
    return patch_weights.argmax(dim=-2)


def checked_layers(layers: Sequence[int] | None, maps: TokenMaps, most: int) -> list[int]:
    """The layers to show: those given, or at most `most` of those that reduce, evenly spread and the last among
    them."""
    num_layers = maps.counts.shape[1]
    if layers is not None:
        wrong = [layer for layer in layers if layer not in range(num_layers)]
        if wrong or len(layers) == 0:
            raise ValueError(f"layers are 0-based indices from 0 to {num_layers - 1}, got {list(layers)}.")
        return list(layers)
    reducing = maps.reducing_layers() or [num_layers - 1]
    count = min(most, len(reducing))
    return [reducing[(place + 1) * len(reducing) // count - 1] for place in range(count)]


class _Tracked(NamedTuple):
    patch_map: Tensor | None
    patch_weights: Tensor | None


@contextmanager
def _states(model: PreTrainedModel) -> Iterator[list[_Tracked]]:
    """What each layer's state knows of the patches, in the order in which the layers run."""
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
    """Batches of layers -> layers, each with all images."""
    layers = []
    for parts in zip(*batches, strict=True):
        tensors = [part for part in parts if part is not None]
        layers.append(torch.cat(tensors) if tensors else None)
    return tuple(layers)
