"""`fit_filter`: DL-ViT's filter learns from labels which patches matter."""

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

from ..modeling.dlvit import DLViTConfig
from ..modeling.encoders import encoder_of, facts_of
from ..modeling.tokens import start
from ..modes import evaluating
from .labels import embed, read_image


logger = logging.get_logger(__name__)


class FilterFit(NamedTuple):
    """On the `images` held out, by the decisions the model will make: precision and recall of the patches kept, their
    share of all patches, and the share that the labels keep. loss: of the last epoch of training."""

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
    """Fit the filter of a model reduced by `DLViTConfig` to labels, after which the model drops patches. The filter
    starts anew, by `seed`; nothing else in the model changes.

    labels: the output folder of `make_labels`, or the data set in it.
    dataset: the images the labels were made of.
    batch_size: images.
    validation_share: of the images; they are held out to measure on.
    max_cache_bytes: the embedded images stay in memory if they need no more than this; else every epoch reads them
        again.
    """
    reduction = getattr(model.config, "reduction", None)
    if reduction is None or reduction.method != DLViTConfig.method:
        raise ValueError(
            f"This {type(model).__name__} has no filter to fit. Reduce it first: reduce_tokens(model, DLViTConfig())."
        )
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}.")
    rows, keep = _checked_labels(model, labels, dataset)
    held_out = round(validation_share * len(rows)) or 1
    if not 0 < validation_share < 1 or held_out >= len(rows):
        raise ValueError(
            f"validation_share={validation_share} of {len(rows)} labelled images leaves none to learn from or none "
            "to measure on. It must lie between 0 and 1, and two images are the least."
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held, learning = order[:held_out], order[held_out:]
    positives = int(keep[learning].sum())
    negatives = keep[learning].numel() - positives
    if not positives or not negatives:
        raise ValueError(
            f"The labels {'keep' if positives else 'drop'} every patch, so there is nothing to learn. Call "
            "make_labels again with another threshold or keep_share; it measures nothing again."
        )

    reducer = encoder_of(model).reducers[0]
    # A copy in float32 learns, whatever the model's type, and the model is as it was if anything goes wrong.
    student = copy.deepcopy(reducer).float().requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    _start_anew(student, model.config.initializer_range, generator)
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
        # Not by set_reduction, which would make a new filter.
        model.config.reduction = dataclasses.replace(reduction, trained=True)
        for each in encoder_of(model).reducers:
            each.built_for = model.config.reduction

        kept = torch.cat(
            [_decisions(model, patches_of(some.tolist())) for some in torch.tensor(held).split(batch_size)]
        )
    wanted = keep[held]
    right = (kept & wanted).sum().item()
    share = kept.float().mean().item()
    if share in (0.0, 1.0):
        logger.warning(
            f"The filter {'keeps' if share else 'drops'} every patch of the images held out. More images or epochs, "
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


def _checked_labels(model: PreTrainedModel, labels: Any, dataset: Any) -> tuple[list[int], Tensor]:
    """The labelled rows of `dataset`, and which patches of each are to be kept: bool (n, N0)."""
    num_rows = None
    if isinstance(labels, (str, Path)):
        folder = Path(labels)
        if not (folder / "settings.json").is_file() or not (folder / "labels").is_dir():
            raise ValueError(f"{folder} holds no labels. Give the output_dir of a call of make_labels that ended.")
        num_rows = json.loads((folder / "settings.json").read_text())["num_rows"]
        labels = load_from_disk(str(folder / "labels"))
    table = labels.select_columns(["index", "keep"]).with_format("numpy")[:]
    rows, keep = table["index"].tolist(), torch.from_numpy(table["keep"].astype(bool))
    if num_rows not in (None, len(dataset)) or max(rows) >= len(dataset):
        found = f"{num_rows} rows" if num_rows is not None else f"a row {max(rows)}"
        raise ValueError(
            f"The labels were made of a data set with {found}, this one has {len(dataset)}. Pass the one they were "
            "made of."
        )
    expected = facts_of(model.config).num_patches
    if keep.shape[1] != expected:
        raise ValueError(
            f"The labels are of {keep.shape[1]} patches per image, the model has {expected}. Make labels by this "
            "model, or one with the same image and patch size."
        )
    return rows, keep


def _start_anew(student: nn.Module, spread: float, generator: torch.Generator) -> None:
    for module in student.modules():
        if isinstance(module, nn.Linear):
            # On the CPU, so that every device starts the same.
            initial = nn.init.trunc_normal_(torch.empty(module.weight.shape), std=spread, generator=generator)
            with torch.no_grad():
                module.weight.copy_(initial)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def _patch_reader(
    model: PreTrainedModel, dataset: Any, rows: list[int], image_processor: Any, column: str, max_cache_bytes: int
) -> Callable[[list[int]], Tensor]:
    """A function from places in `rows` to the embedded patches (n, N0, D), which remembers them if they are few."""
    facts = facts_of(model.config)
    num_patches = facts.num_patches
    caches = len(rows) * num_patches * facts.hidden_size * model.dtype.itemsize <= max_cache_bytes
    cache: dict[int, Tensor] = {}

    def patches_of(places: list[int]) -> Tensor:
        unknown = [place for place in places if place not in cache]
        found = {place: cache[place] for place in places if place in cache}
        if unknown:
            photos = [read_image(dataset, rows[place], column) for place in unknown]
            found |= zip(unknown, embed(model, photos, image_processor)[:, -num_patches:].cpu(), strict=True)
            if caches:
                cache.update(found)
        return torch.stack([found[place] for place in places]).to(model.device)

    return patches_of


@torch.no_grad()
def _decisions(model: PreTrainedModel, patches: Tensor) -> Tensor:
    """Embedded patches (B, N0, D) -> bool (B, N0), on the CPU: those that the model keeps."""
    state = start(patches, 0, track_patches=True)
    return (encoder_of(model).reducers[0].before_encoder(state).patch_map >= 0).cpu()
