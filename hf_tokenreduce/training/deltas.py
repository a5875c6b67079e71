"""How much a classifier's loss grows without a patch: measured by masking, or estimated by a gradient.

B images · T tokens of an image: P prefix tokens and N0 patches · G groups of patches that are masked together
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..convert import reduce_tokens
from ..modeling.encoders import encoder_of, facts_of
from ..modeling.hooks import Reducer
from ..modeling.tokens import TokenMap, TokenState, apply_map
from ..tasks import facts_on


LABELLERS = ("exact", "groups", "gradient")
MASKS = ("remove", "zero")


@torch.no_grad()
def embed(model: PreTrainedModel, images: list[Image.Image], image_processor: Any) -> Tensor:
    """Return the tokens that enter the first layer: B images -> (B, T, D)."""
    pixels = image_processor(images, return_tensors="pt")["pixel_values"]
    own, given = facts_of(model.config).grid, facts_on(model, pixels).grid
    if own != given:
        raise ValueError(
            f"The image processor makes images of {given[0]} x {given[1]} patches, but the configuration of the model "
            f"says {own[0]} x {own[1]}. Labels need the size of the configuration. Set the processor to that size."
        )
    return encoder_of(model).embed(pixels.to(device=model.device, dtype=model.dtype))


@torch.no_grad()
def masked_deltas(
    model: PreTrainedModel, tokens: Tensor, targets: Tensor, groups: Tensor, batch_size: int, mask: str = "remove"
) -> tuple[Tensor, Tensor]:
    """Measure the loss of a classifier, and how much it grows when the group of each patch is masked.

    Args:
        model: A classifier that reduces nothing.
        tokens: Tokens that enter the first layer, (B, T, D).
        targets: Classes, (B,).
        groups: Group of each patch, (N0,), from 0 to G - 1.
        batch_size: Number of masked copies that go through the model at once.
        mask: "remove" or "zero", as in `make_labels`.

    Returns:
        The loss without a mask (B,), and the delta of each patch (B, N0).
    """
    model = model if hasattr(model.config, "reduction") else reduce_tokens(model, None)
    copies = int(groups.max()) + 2
    # Nothing is masked in the last copy of an image.
    masked = groups == torch.arange(copies, device=groups.device).unsqueeze(1)  # (G + 1, N0)
    prefix = tokens.shape[1] - len(groups)
    loss = tokens.new_empty(len(tokens), copies, dtype=torch.float32)
    lengths = (~masked).sum(dim=1) if mask == "remove" else torch.zeros(copies, dtype=torch.long)
    for length in lengths.unique().tolist():  # copies of one length go through the model together
        numbers = (lengths == length).nonzero()[:, 0].to(tokens.device)
        for which in torch.arange(len(tokens) * len(numbers), device=tokens.device).split(batch_size):
            image, number = which // len(numbers), which % len(numbers)
            gone = masked[numbers[number]]
            copy, keep = tokens[image], None
            if mask == "remove":
                keep = TokenMap(torch.where(gone, -1, (~gone).cumsum(dim=1) - 1), length)
            else:
                copy = copy.masked_fill(F.pad(gone, (prefix, 0), value=False).unsqueeze(-1), 0)
            loss[image, numbers[number]] = _losses(model, copy, targets[image], keep)
    return loss[:, -1], (loss[:, :-1] - loss[:, -1:])[:, groups]


def gradient_deltas(model: PreTrainedModel, tokens: Tensor, targets: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Estimate what `masked_deltas` gives for the mask "zero", to the first order.

    A token that goes to zero changes the loss by about -(gradient · token). Shapes are those of `masked_deltas`.
    """
    losses, deltas = [], []
    prefix = facts_of(model.config).num_prefix_tokens
    for some, target in zip(tokens.split(batch_size), targets.split(batch_size), strict=True):
        with torch.enable_grad():
            some = some.detach().requires_grad_()
            loss = _losses(model, some, target)
            (gradient,) = torch.autograd.grad(loss.sum(), some)
        losses.append(loss.detach())
        deltas.append(-(gradient.float() * some.detach().float()).sum(dim=-1)[:, prefix:])
    return torch.cat(losses), torch.cat(deltas)


class _KeepGiven(Reducer):
    """Keep the patches of a given map before the encoder, as DL-ViT's filter will."""

    def __init__(self, keep: TokenMap):
        torch.nn.Module.__init__(self)
        self.keep = keep

    def before_encoder(self, state: TokenState) -> TokenState:
        return apply_map(state, self.keep)


def _losses(model: PreTrainedModel, tokens: Tensor, targets: Tensor, keep: TokenMap | None = None) -> Tensor:
    encoder = encoder_of(model)
    if keep is None:
        logits = encoder.run(tokens).logits
    else:
        first = encoder.layers[0]
        reduces_nothing, first.reducer = first.reducer, _KeepGiven(keep)
        try:
            logits = encoder.run(tokens).logits
        finally:
            first.reducer = reduces_nothing
    return F.cross_entropy(logits.float(), targets, reduction="none")


def patch_groups(model: PreTrainedModel, labeller: str) -> Tensor:
    """Return the group of each patch, (N0,) long: patches of one group are masked together."""
    height, width = facts_of(model.config).grid
    side = 2 if labeller == "groups" else 1
    across = -(-width // side)
    return (torch.arange(height)[:, None] // side * across + torch.arange(width) // side).flatten()
