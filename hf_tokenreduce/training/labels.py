"""`make_labels`: measure how much a classifier's loss grows when a patch is masked, for every patch of every image.

DL-ViT's filter learns from these labels. They are computed once and stored.

B images · T tokens of an image: P prefix tokens and N0 patches
"""

import io
import json
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..convert import reduce_tokens, stock_name
from ..evaluation.resume import digest, digest_of_data, digest_of_model
from ..files import known_settings, write_whole
from ..loading import undecoded
from ..methods import method_of
from ..modeling.encoders import MODELS
from ..modeling.version import __version__
from ..modes import evaluating
from ..pictures import as_rgb, decoded_picture
from ..tasks import check_has_classes
from .deltas import LABELLERS, MASKS, embed, gradient_deltas, masked_deltas, patch_groups


CLASSIFIERS = tuple(name for name in MODELS if "ForImageClassification" in name)


class Labelling(NamedTuple):
    """Count the results of `make_labels`.

    Attributes:
        images: Number of labelled images.
        skipped: Number of images that could not be read.
        computed: Number of images that this process measured in this call. The others were measured earlier, or by
            other processes.
        share_kept: Share of all patches that the labels keep.
    """

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
    """Decide for every patch of every image whether it should be kept.

    The *delta* of a patch is how much the loss of `model` grows when the patch is masked. Patches with a large delta
    are kept. The labels are the data set `output_dir`/labels with the columns index (row of `dataset`), label
    (class), loss, and delta and keep (lists with one value per patch). `output_dir`/settings.json says how they were
    made.

    Measurements are stored in `output_dir`/parts as they come. Called again with the same settings, after a crash or
    with another threshold, the function measures only what is missing. The processes of `accelerate launch` or
    `torchrun` share the images. They need a common file system, and the model of each is on its own device.

    Args:
        model: A classifier that sees all patches.
        dataset: The images. The label column holds the indices of the model's classes.
        output_dir: The folder for the labels.
        image_processor: The image processor of the model.
        threshold: Keep the patches whose delta is larger than this.
        keep_share: Keep this share of the patches of all images instead, those with the largest deltas. 0.2 is a
            good value: most deltas are near zero, where their sign is chance, and a filter cannot learn it.
        labeller: How deltas are measured. "exact": one forward per patch. "groups": squares of 2 x 2 patches are
            masked together, and each patch gets the delta of its square. "gradient": a first-order estimate from one
            forward and backward per image.
        mask: How a patch is masked. "remove": its token is left out of the sequence, as the filter will do. "zero":
            its embedded token is set to zero. The model has never seen such a token, and nearly all patches of an
            image get deltas of the same sign. The labeller "gradient" always estimates "zero".
        batch_size: Number of masked copies (for "gradient": of images) that go through the model at once.
        max_samples: Label at most this many images, drawn at random. None: label all.
        seed: Seed for drawing the images.
        on_error: What to do about an image that cannot be read: "stop" or "skip".
        image_column_name: Column that holds the images.
        label_column_name: Column that holds the labels.

    Returns:
        `Labelling`: Numbers of images, and the share of patches that the labels keep.

    Example:
        >>> make_labels(model, dataset, "labels", image_processor=processor, keep_share=0.2, max_samples=1000)
    """
    _check_choices(threshold, keep_share, labeller, mask, batch_size, max_samples, on_error)
    classifier = _unreduced(model)
    classes = _checked_classes(classifier, dataset, image_column_name, label_column_name)
    if max_samples is None or max_samples >= len(dataset):
        max_samples, rows = None, list(range(len(dataset)))
    else:
        rows = sorted(random.Random(seed).sample(range(len(dataset)), max_samples))
    groups = patch_groups(classifier, labeller).to(model.device)
    requested = {
        "version": __version__,
        "labeller": labeller,
        "mask": "zero" if labeller == "gradient" else mask,
        "num_rows": len(dataset),
        "num_images": len(rows),
        "max_samples": max_samples,
        "seed": None if max_samples is None else seed,
        "image_column_name": image_column_name,
        "images": digest_of_data(dataset, image_column_name, []),
        "classes": digest([np.asarray(classes).tobytes()]),
        "num_patches": len(groups),
        "model": digest_of_model(classifier),
        "image_processor": {
            name: value for name, value in image_processor.to_dict().items() if not name.endswith(("_type", "_class"))
        },
    }
    requested = json.loads(json.dumps(requested, default=str))

    launched = int(os.environ.get("WORLD_SIZE", 1))
    processes = PartialState(cpu=model.device.type == "cpu") if launched > 1 else None
    if processes and processes.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but they do not know of each other. On a machine without "
            "accelerators, create the first PartialState or Accelerator with cpu=True."
        )
    rank, world = (processes.process_index, processes.num_processes) if processes else (0, 1)
    folder = Path(output_dir)
    if rank == 0:
        # One part fills one batch. Its size is stored, so that a later run may have another batch size.
        copies = 1 if labeller == "gradient" else int(groups.max()) + 2
        images_per_part = max(1, min(batch_size // copies, -(-len(rows) // world)))
        _prepare(folder, {**requested, "images_per_part": images_per_part})
    if processes:
        processes.wait_for_everyone()
    settings = known_settings(folder / "settings.json", requested)

    encoded = undecoded(dataset, image_column_name)

    def measure(some: list[int]) -> dict[str, np.ndarray]:
        read: dict[int, Any] = {}
        for row in some:
            try:
                read[row] = read_image(encoded, row, image_column_name)
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
        # A barrier would give up when one process takes much longer than the others.
        for file in files:
            while not file.exists():
                time.sleep(0.5)
    if rank == 0:
        settings["labels"] = _assemble(folder, files, rows, threshold, keep_share, on_error)
        write_whole(folder / "settings.json", json.dumps(settings, indent=2))
    if processes:
        processes.wait_for_everyone()
    made = known_settings(folder / "settings.json", requested)["labels"]
    return Labelling(made["images"], made["skipped"], computed, made["share_kept"])


def read_image(dataset: Any, row: int, image_column_name: str) -> Image.Image:
    """Read the image of a row of an `undecoded` data set, in RGB. A `ValueError` names a row that cannot be read."""
    try:
        return as_rgb(decoded_picture(dataset[row][image_column_name]))
    except Exception as error:  # the parsers of broken files raise many kinds
        raise ValueError(
            f"Row {row} of the data set holds no readable image in its column {image_column_name!r} ({error}). "
            "Repair or remove the image, or pass on_error='skip' to make_labels."
        ) from error


def _check_choices(threshold, keep_share, labeller, mask, batch_size, max_samples, on_error) -> None:
    for name, value, choices in (("labeller", labeller, LABELLERS), ("mask", mask, MASKS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    if on_error not in ("stop", "skip"):
        raise ValueError(f"on_error must be 'stop' or 'skip', got {on_error!r}.")
    if keep_share is not None and not 0 < keep_share <= 1:
        raise ValueError(f"keep_share must be above 0 and at most 1, got {keep_share!r}.")
    if keep_share is not None and threshold != 0:
        raise ValueError(
            f"threshold={threshold} and keep_share={keep_share} exclude each other. Set only one of them."
        )
    for name, value in (("batch_size", batch_size), ("max_samples", max_samples)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}.")


def _unreduced(model: PreTrainedModel) -> PreTrainedModel:
    """Return a classifier with the weights of `model` that sees all patches."""
    reduction = getattr(model.config, "reduction", None)
    if reduction is not None and method_of(reduction).why_not(reduction) is None:
        raise ValueError(
            "Labels are made by a model that sees all patches, but this one drops some: it is reduced by "
            f"{reduction}. Pass hf_tokenreduce.restore(model), or the checkpoint it was made of."
        )
    if stock_name(model) not in CLASSIFIERS:
        raise ValueError(
            f"make_labels needs a classifier, one of {', '.join(CLASSIFIERS)}, got a {type(model).__name__}."
        )
    check_has_classes(model, "make_labels", one=True)
    return reduce_tokens(model, None)


def _checked_classes(model: PreTrainedModel, dataset: Dataset, image_column: str, label_column: str) -> list[int]:
    if not hasattr(dataset, "__len__"):
        raise ValueError(
            "make_labels needs a data set with numbered rows, not a stream. Copy a part of the stream: "
            "Dataset.from_list(list(stream.take(1000)), features=stream.features)."
        )
    if len(dataset) == 0:
        raise ValueError("The data set is empty, so there is nothing to label.")
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
                f"The model has no class {name!r}. Its classes are {list(label2id)[:5]}, ... Use a model that was "
                "trained for the classes of the data set, or give the labels as the model's class numbers."
            )
        # Two classes of ImageNet have the same name, and label2id holds only one of them.
        if model.config.id2label.get(index) != name and int(label2id.get(name, index)) != index:
            raise ValueError(
                f"The class {name!r} is number {index} in the data set and {label2id[name]} in the model. Pass "
                f"dataset.align_labels_with_mapping(model.config.label2id, {label_column!r})."
            )
    classes = list(dataset.with_format(None)[label_column])
    for row, label in enumerate(classes):
        if not isinstance(label, int) or not 0 <= label < model.config.num_labels:
            raise ValueError(
                f"Row {row} of the data set has the label {label!r}, but the model's classes are 0 to "
                f"{model.config.num_labels - 1}. Check that the model was trained for this data set."
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
    """Write the data set of labels from the stored deltas, and return how it was made."""
    parts = []
    for file in files:
        with np.load(file) as part:
            parts.append(dict(part))
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    skipped = sorted(set(rows) - set(columns["index"].tolist()))
    if skipped and (on_error == "stop" or len(skipped) == len(rows)):
        raise ValueError(
            f"{len(skipped)} of {len(rows)} images could not be read when they were tried, the first in row "
            f"{skipped[0]}. If other images can be read, skip these with on_error='skip'. Otherwise repair the data "
            "set and start again in a new output_dir."
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
    for left in [*folder.glob("*.part"), *(folder / "parts").glob("*.part")]:  # files of a run that was killed
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    if not (folder / "settings.json").exists():
        write_whole(folder / "settings.json", json.dumps(settings, indent=2))
