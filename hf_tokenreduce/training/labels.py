"""`make_labels`: how much a classifier's loss grows when a patch is taken away, for every patch. What DL-ViT's filter
learns from, computed once and stored.

B images · T tokens of an image: P prefix tokens and N0 patches · G groups of patches that are masked together
"""

import hashlib
import io
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from ..convert import reduce_tokens, stock_name
from ..files import known_settings, write_whole
from ..methods import method_of
from ..modeling.encoders import MODELS, encoder_of, facts_of
from ..modeling.hooks import Reducer
from ..modeling.tokens import TokenMap, TokenState, apply_map
from ..modes import evaluating
from ..pictures import as_rgb


CLASSIFIERS = tuple(name for name in MODELS if "ForImageClassification" in name)
LABELLERS = ("exact", "groups", "gradient")
MASKS = ("remove", "zero")


class Labelling(NamedTuple):
    """images: labelled; skipped: could not be read; computed: measured by this process in this call, the others were
    there already; share_kept: of all patches."""

    images: int
    skipped: int
    computed: int
    share_kept: float


def make_labels(
    model: PreTrainedModel,
    dataset: Dataset,
    output_dir: str | Path,
    *,
    image_processor: Any,
    threshold: float = 0.0,
    keep_share: float | None = None,
    labeller: str = "exact",
    mask: str = "remove",
    batch_size: int = 64,
    max_samples: int | None = None,
    seed: int = 0,
    on_error: str = "stop",
    image_column_name: str = "image",
    label_column_name: str = "label",
) -> Labelling:
    """Label every patch of every image by what the loss of `model`, a classifier that sees all patches, gains without
    the patch. Makes the data set `output_dir`/labels with the columns index (row of `dataset`),
    label (class), loss, delta and keep (a list with one value per patch each); `output_dir`/settings.json says how.

    dataset: its label column holds the indices of the model's classes.
    threshold: patches of a larger delta are to be kept.
    keep_share: instead: this share of the patches of all images is to be kept, those of the largest deltas.
    labeller: "exact": one forward per patch. "groups": squares of 2 x 2 patches are masked together, and each patch
        gets the delta of its square. "gradient": a first-order estimate from one forward and backward per image.
    mask: what "without" means: "remove": the patch's token is left out of the sequence, as the filter will leave it
        out. "zero": its embedded token is set to zero; the model attends to a token it has never seen, and nearly all
        patches of an image get deltas of one sign. "gradient" estimates that one.
    batch_size: masked copies, or for "gradient" images, that go through the model at once.
    max_samples: no more images than these, drawn by `seed`.
    on_error: what to do about an image that cannot be read: "stop" or "skip".

    What was measured is stored as it comes, in `output_dir`/parts; called again with the same settings, after a crash
    or with another threshold, only what is missing is measured. Processes of `accelerate launch` or `torchrun` share
    the images, on a file system they share; each brings the model on its own device.
    """
    _check_choices(threshold, keep_share, labeller, mask, batch_size, max_samples, on_error)
    classifier = _unreduced(model)
    classes = _checked_classes(classifier, dataset, image_column_name, label_column_name)
    if max_samples is None or max_samples >= len(dataset):
        max_samples, rows = None, list(range(len(dataset)))
    else:
        rows = sorted(random.Random(seed).sample(range(len(dataset)), max_samples))
    groups = patch_groups(classifier, labeller).to(model.device)
    wanted = {
        "labeller": labeller,
        "mask": "zero" if labeller == "gradient" else mask,
        "num_rows": len(dataset),
        "num_images": len(rows),
        "max_samples": max_samples,
        "seed": None if max_samples is None else seed,
        "image_column_name": image_column_name,
        "classes": _digest([np.asarray(classes).tobytes()]),
        "num_patches": len(groups),
        "model": _digest(part for item in sorted(classifier.state_dict().items()) for part in _as_bytes(*item)),
        "image_processor": {
            name: value for name, value in image_processor.to_dict().items() if not name.endswith(("_type", "_class"))
        },
    }
    wanted = json.loads(json.dumps(wanted, default=str))

    launched = int(os.environ.get("WORLD_SIZE", 1))
    processes = PartialState(cpu=model.device.type == "cpu") if launched > 1 else None
    if processes and processes.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched and do not know of each other. On a machine without accelerators, "
            "make the first PartialState or Accelerator with cpu=True."
        )
    rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
    folder = Path(output_dir)
    if rank == 0:
        # A part is what fills one batch. It is recorded, so that a later run may have another batch size.
        copies = 1 if labeller == "gradient" else int(groups.max()) + 2
        images_per_part = max(1, min(batch_size // copies, -(-len(rows) // world)))
        _prepare(folder, {**wanted, "images_per_part": images_per_part})
    if processes:
        processes.wait_for_everyone()
    settings = known_settings(folder / "settings.json", wanted)

    def measure(some: list[int]) -> dict[str, np.ndarray]:
        read: dict[int, Any] = {}
        for row in some:
            try:
                read[row] = read_image(dataset, row, image_column_name)
            except ValueError:
                if on_error == "stop":
                    raise
        if not read:
            return _part([], torch.empty(0), torch.empty(0, len(groups)), classes)
        tokens = embed(classifier, list(read.values()), image_processor)
        targets = torch.tensor([classes[row] for row in read], device=tokens.device)
        if labeller == "gradient":
            loss, delta = gradient_deltas(classifier, tokens, targets, batch_size)
        else:
            loss, delta = masked_deltas(classifier, tokens, targets, groups, batch_size, mask)
        return _part(list(read), loss, delta, classes)

    size, computed = settings["images_per_part"], 0
    files = [folder / "parts" / f"{number:08d}.npz" for number in range(-(-len(rows) // size))]
    missing = [number for number in range(rank, len(files), world) if not files[number].exists()]
    total = sum(len(rows[number * size : (number + 1) * size]) for number in missing)
    with (
        evaluating(classifier),
        logging.tqdm(total=total, desc="measuring deltas", unit="images", disable=rank > 0 or not total) as progress,
    ):
        for number in missing:
            some = rows[number * size : (number + 1) * size]
            part = measure(some)
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **part)
            write_whole(files[number], buffer.getvalue())
            computed += len(part["index"])
            progress.update(len(some))

    if processes:
        # Not at a barrier, which gives up when a process takes much longer than the others.
        for file in files:
            while not file.exists():
                time.sleep(0.5)
    if rank == 0:
        settings["labels"] = _assemble(folder, files, rows, threshold, keep_share, on_error)
        write_whole(folder / "settings.json", json.dumps(settings, indent=2))
    if processes:
        processes.wait_for_everyone()
    made = known_settings(folder / "settings.json", wanted)["labels"]
    return Labelling(made["images"], made["skipped"], computed, made["share_kept"])


def read_image(dataset: Any, row: int, image_column_name: str) -> Image.Image:
    """RGB. A `ValueError` names the row that cannot be read."""
    try:
        return as_rgb(dataset[row][image_column_name])
    except (OSError, SyntaxError, ValueError, AttributeError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"Row {row} of the data set holds no readable image in its column {image_column_name!r} ({error}). "
            "Repair or remove it, or pass on_error='skip' to make_labels."
        ) from error


@torch.no_grad()
def embed(model: PreTrainedModel, images: list[Image.Image], image_processor: Any) -> Tensor:
    """(B, T, D), the tokens that enter the first layer."""
    pixels = image_processor(images, return_tensors="pt")["pixel_values"]
    return encoder_of(model).embed(pixels.to(device=model.device, dtype=model.dtype))


@torch.no_grad()
def masked_deltas(
    model: PreTrainedModel, tokens: Tensor, targets: Tensor, groups: Tensor, batch_size: int, mask: str = "remove"
) -> tuple[Tensor, Tensor]:
    """Loss (B,) of a classifier that reduces nothing on tokens (B, T, D), and delta (B, N0): what masking the group of
    each patch, groups (N0,) from 0 to G - 1, adds to it."""
    model = model if hasattr(model.config, "reduction") else reduce_tokens(model, None)
    copies = int(groups.max()) + 2
    # In the last copy of an image nothing is masked.
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
    """As `masked_deltas` by zeros, to the first order: a token that goes to zero changes the loss by
    -(gradient · token)."""
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
    """Keeps, before the encoder, the patches of a given map, as DL-ViT's filter will."""

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
    """(N0,) long, which patches are masked together."""
    height, width = facts_of(model.config).grid
    side = 2 if labeller == "groups" else 1
    across = -(-width // side)
    return (torch.arange(height)[:, None] // side * across + torch.arange(width) // side).flatten()


def _check_choices(threshold, keep_share, labeller, mask, batch_size, max_samples, on_error) -> None:
    for name, value, choices in (("labeller", labeller, LABELLERS), ("mask", mask, MASKS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}.")
    if keep_share is not None and not 0 < keep_share <= 1:
        raise ValueError(f"keep_share must be above 0 and at most 1, got {keep_share!r}.")
    if keep_share is not None and threshold != 0:
        raise ValueError(f"threshold={threshold} and keep_share={keep_share} exclude each other: set one of the two.")
    for name, value in (("batch_size", batch_size), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}.")


def _unreduced(model: PreTrainedModel) -> PreTrainedModel:
    """A classifier with the weights of `model` that sees all patches."""
    reduction = getattr(model.config, "reduction", None)
    if reduction is not None and method_of(reduction).why_not(reduction) is None:
        raise ValueError(
            "Labels are made by a model that sees all patches, and this one drops some: it is reduced by "
            f"{reduction}. Pass hf_tokenreduce.restore(model), or the checkpoint it was made of."
        )
    if stock_name(model) not in CLASSIFIERS:
        raise ValueError(
            f"make_labels needs a classifier, one of {', '.join(CLASSIFIERS)}, got a {type(model).__name__}."
        )
    return reduce_tokens(model, None)


def _checked_classes(model: PreTrainedModel, dataset: Dataset, image_column: str, label_column: str) -> list[int]:
    if len(dataset) == 0:
        raise ValueError("The data set is empty: there is nothing to label.")
    for column in (image_column, label_column):
        if column not in dataset.column_names:
            raise ValueError(
                f"The data set has no column {column!r}, only {', '.join(dataset.column_names)}. Pass "
                "image_column_name and label_column_name."
            )
    feature, label2id = dataset.features[label_column], model.config.label2id
    named = not any(re.fullmatch(r"LABEL_\d+", name) for name in label2id)
    for index, name in enumerate(feature.names if isinstance(feature, ClassLabel) else ()):
        if named and name not in label2id:
            raise ValueError(
                f"The class {name!r} is none of the model's: {list(label2id)[:5]}, ... Label with a model that was "
                "trained for these classes, or give the labels as the model's numbers."
            )
        if int(label2id.get(name, index)) != index:
            raise ValueError(
                f"The class {name!r} is number {index} in the data set and {label2id[name]} in the model. Pass "
                f"dataset.align_labels_with_mapping(model.config.label2id, {label_column!r})."
            )
    classes = list(dataset[label_column])
    for row, label in enumerate(classes):
        if not isinstance(label, int) or not 0 <= label < model.config.num_labels:
            raise ValueError(
                f"Row {row} of the data set has the label {label!r}; the model's classes are 0 to "
                f"{model.config.num_labels - 1}. Were they made for each other?"
            )
    return classes


def _part(rows: list[int], loss: Tensor, delta: Tensor, classes: list[int]) -> dict[str, np.ndarray]:
    for row, finite in zip(rows, (loss.isfinite() & delta.isfinite().all(dim=1)).tolist(), strict=True):
        if not finite:
            raise ValueError(f"The loss of row {row} is not finite. Load the model in another dtype, such as float32.")
    return {
        "index": np.array(rows, dtype=np.int64),
        "label": np.array([classes[row] for row in rows], dtype=np.int64),
        "loss": loss.cpu().numpy(),
        "delta": delta.cpu().numpy(),
    }


def _assemble(folder: Path, files: list[Path], rows: list[int], threshold, keep_share, on_error) -> dict[str, Any]:
    """Write the data set of labels from the stored deltas; returns how it was made."""
    parts = []
    for file in files:
        with np.load(file) as part:
            parts.append(dict(part))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    skipped = sorted(set(rows) - set(columns["index"].tolist()))
    if skipped and (on_error == "stop" or len(skipped) == len(rows)):
        raise ValueError(
            f"{len(skipped)} of {len(rows)} images could not be read when they were tried, the first in row "
            f"{skipped[0]}. Leave such images out with on_error='skip', if there are others, or start anew with a "
            "repaired data set."
        )
    delta = columns["delta"]
    if keep_share is None:
        keep = delta > threshold
    else:
        smaller = min(round((1 - keep_share) * delta.size), delta.size - 1)
        keep = delta >= np.partition(delta, smaller, axis=None)[smaller]
    number = delta.shape[1]
    features = Features(
        index=Value("int64"),
        label=Value("int64"),
        loss=Value("float32"),
        delta=Sequence(Value("float32"), length=number),
        keep=Sequence(Value("bool"), length=number),
    )
    made = folder / f"labels.{os.getpid()}.part"
    Dataset.from_dict({**columns, "keep": keep}, features=features).save_to_disk(made)
    shutil.rmtree(folder / "labels", ignore_errors=True)
    os.replace(made, folder / "labels")
    return {
        "threshold": threshold if keep_share is None else None,
        "keep_share": keep_share,
        "images": len(delta),
        "skipped": len(skipped),
        "share_kept": float(keep.mean()),
    }


def _prepare(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob("*.part"), *(folder / "parts").glob("*.part")]:  # by a run that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not (folder / "settings.json").exists():
        write_whole(folder / "settings.json", json.dumps(settings, indent=2))


def _as_bytes(name: str, tensor: Tensor) -> tuple[bytes, Any]:
    return f"{name} {tensor.dtype}".encode(), tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
