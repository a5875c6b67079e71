"""`fit_filter`: train DL-ViT's filter on labels that say which patches matter."""

import copy
import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..evaluation.resume import digest_of_data
from ..loading import undecoded
from ..modeling.dlvit import DLViTConfig
from ..modeling.encoders import encoder_of, facts_of
from ..modeling.tokens import start
from ..modes import evaluating
from .deltas import embed
from .labels import read_image


logger = logging.get_logger(__name__)


class FilterFit(NamedTuple):
    """Say how well a filter was fitted, measured on held-out images by the decisions that the model will make.

    Attributes:
        precision: Share of the kept patches that the labels keep too.
        recall: Share of the patches that the labels keep which the filter keeps too.
        share_kept: Share of all patches that the filter keeps.
        share_labelled: Share of all patches that the labels keep.
        images: Number of held-out images.
        loss: Mean training loss of the last epoch.
    """

    precision: float
    recall: float
    share_kept: float
    share_labelled: float
    images: int
    loss: float


def fit_filter(
    model: PreTrainedModel,
    labels: Dataset | str | Path,
    dataset: Dataset,
    *,
    image_processor: Any,
    epochs: int = 10,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    validation_share: float = 0.1,
    seed: int = 0,
    image_column_name: str = "image",
    max_cache_bytes: int = 2**31,
) -> FilterFit:
    """Fit the filter of a model that is reduced by `DLViTConfig` to labels. Afterwards the model drops patches.

    The filter starts from new weights, whatever it was before. Nothing else in the model changes.

    Args:
        model: A model that is reduced by `DLViTConfig`.
        labels: The output folder of `make_labels`, or the data set in it.
        dataset: The images that the labels were made of.
        image_processor: The image processor of the model.
        epochs: Number of passes over the training images.
        learning_rate: Learning rate of AdamW at the start. It falls as a cosine.
        batch_size: Number of images per step.
        validation_share: Share of the images that are held out to measure the filter.
        seed: Seed of the new weights, of the order of the images and of the choice of the held-out images.
        image_column_name: Column of `dataset` that holds the images.
        max_cache_bytes: Embedded images stay in memory if all of them need at most this many bytes. Otherwise every
            epoch reads the images again.

    Returns:
        `FilterFit`: How well the filter repeats the labels of the held-out images.

    Example:
        >>> make_labels(model, dataset, "labels", image_processor=processor, keep_share=0.2)
        >>> reduced = reduce_tokens(model, DLViTConfig())
        >>> fit = fit_filter(reduced, "labels", dataset, image_processor=processor)
    """
    reduction = getattr(model.config, "reduction", None)
    if reduction is None or reduction.method != DLViTConfig.method:
        raise ValueError(
            f"This {type(model).__name__} has no filter to fit. Reduce it first: reduce_tokens(model, DLViTConfig())."
        )
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}.")
    rows, keep = _checked_labels(model, labels, dataset, image_column_name)
    held_out = round(validation_share * len(rows)) or 1
    if not 0 < validation_share < 1 or held_out >= len(rows):
        raise ValueError(
            f"validation_share={validation_share} of {len(rows)} labelled images leaves none to learn from or none "
            "to measure on. Give a share between 0 and 1, and at least two images."
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held, learning = order[:held_out], order[held_out:]
    positives = int(keep[learning].sum())
    negatives = keep[learning].numel() - positives
    if not positives or not negatives:
        raise ValueError(
            f"The labels {'keep' if positives else 'drop'} every patch, so there is nothing to learn. Call "
            "make_labels again with another threshold or keep_share. It measures nothing again, so this is quick."
        )

    reducer = encoder_of(model).reducers[0]
    # A float32 copy is trained, whatever the dtype of the model, so that an error leaves the model as it was.
    student = copy.deepcopy(reducer).float().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    _start_anew(student, getattr(encoder_of(model).config, "initializer_range", 0.02), generator)
    patches_of = _patch_reader(model, dataset, rows, image_processor, image_column_name, max_cache_bytes)
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate)
    steps = epochs * -(-len(learning) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    weight = torch.tensor(negatives / positives, device=model.device)
    with evaluating(model), torch.enable_grad(), logging.tqdm(total=steps, desc="fitting the filter") as progress:
        for _ in range(epochs):
            total = 0.0
            shuffled = torch.tensor(learning)[torch.randperm(len(learning), generator=generator)]
            for some in shuffled.split(batch_size):
                target = keep[some].to(model.device, torch.float32)
                loss = F.binary_cross_entropy_with_logits(
                    student.logits(patches_of(some.tolist()).float()), target, pos_weight=weight
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
                total += loss.item() * len(some)
        loss_of_epoch = total / len(learning)

        with torch.no_grad():
            for parameter, value in zip(reducer.parameters(), student.parameters(), strict=True):
                parameter.copy_(value)
        model.set_reduction(dataclasses.replace(reduction, trained=True))  # the filter stays

        kept = torch.cat(
            [_decisions(model, patches_of(some.tolist())) for some in torch.tensor(held).split(batch_size)]
        )
    wanted = keep[held]
    right = (kept & wanted).sum().item()
    share = kept.float().mean().item()
    if share in (0.0, 1.0):
        logger.warning(
            f"The filter {'keeps' if share else 'drops'} every patch of the held-out images. More images or epochs, "
            "or another threshold in DLViTConfig, may help."
        )
    return FilterFit(
        precision=right / max(kept.sum().item(), 1),
        recall=right / max(wanted.sum().item(), 1),
        share_kept=share,
        share_labelled=wanted.float().mean().item(),
        images=len(held),
        loss=loss_of_epoch,
    )


def _checked_labels(
    model: PreTrainedModel, labels: Any, dataset: Any, image_column_name: str
) -> tuple[list[int], Tensor]:
    """Return the n labelled rows of `dataset`, and which patches of each row the labels keep: bool (n, N0)."""
    num_rows = None
    if isinstance(labels, (str, Path)):
        folder = Path(labels)
        if not (folder / "settings.json").is_file() or not (folder / "labels").is_dir():
            raise ValueError(
                f"{folder} holds no labels. Give the output_dir of a call of make_labels that was not interrupted."
            )
        settings = json.loads((folder / "settings.json").read_text())
        num_rows = settings["num_rows"]
        if num_rows == len(dataset) and settings.get("images") != digest_of_data(dataset, image_column_name, []):
            raise ValueError(
                "The labels were made of other images, or of these in another order. Pass the data set that they were "
                "made of."
            )
        labels = load_from_disk(str(folder / "labels"))
    table = labels.select_columns(["index", "keep"]).with_format("numpy")[:]
    rows, keep = table["index"].tolist(), torch.from_numpy(table["keep"].astype(bool))
    if num_rows not in (None, len(dataset)) or max(rows) >= len(dataset):
        expected = f"{num_rows} rows" if num_rows is not None else f"a row {max(rows)}"
        raise ValueError(
            f"The labels were made of a data set with {expected}, but this one has {len(dataset)} rows. Pass the data "
            "set that they were made of."
        )
    num_patches = facts_of(model.config).num_patches
    if keep.shape[1] != num_patches:
        raise ValueError(
            f"The labels are for {keep.shape[1]} patches per image, but the model has {num_patches}. Make the labels "
            "with this model, or with one of the same image size and patch size."
        )
    return rows, keep


def _start_anew(student: nn.Module, spread: float, generator: torch.Generator) -> None:
    for module in student.modules():
        if isinstance(module, nn.Linear):
            # Drawn on the CPU, so that the weights are the same on every device.
            initial = nn.init.trunc_normal_(torch.empty(module.weight.shape), std=spread, generator=generator)
            with torch.no_grad():
                module.weight.copy_(initial)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def _patch_reader(
    model: PreTrainedModel, dataset: Any, rows: list[int], image_processor: Any, column: str, max_cache_bytes: int
) -> Callable[[list[int]], Tensor]:
    """Return a function: n positions in `rows` -> embedded patches (n, N0, D). It caches them if they fit."""
    facts = facts_of(model.config)
    num_patches = facts.num_patches
    fits = len(rows) * num_patches * facts.hidden_size * model.dtype.itemsize <= max_cache_bytes
    cache: dict[int, Tensor] = {}
    files = undecoded(dataset, column)

    def patches_of(places: list[int]) -> Tensor:
        unknown = [place for place in places if place not in cache]
        patches = {place: cache[place] for place in places if place in cache}
        if unknown:
            photos = [read_image(files, rows[place], column) for place in unknown]
            patches |= zip(unknown, embed(model, photos, image_processor)[:, -num_patches:].cpu(), strict=True)
            if fits:
                cache.update(patches)
        return torch.stack([patches[place] for place in places]).to(model.device)

    return patches_of


@torch.no_grad()
def _decisions(model: PreTrainedModel, patches: Tensor) -> Tensor:
    """Return which embedded patches (B, N0, D) the model keeps: bool (B, N0), on the CPU."""
    state = start(patches, 0, track_patches=True)
    return (encoder_of(model).reducers[0].before_encoder(state).patch_map >= 0).cpu()
