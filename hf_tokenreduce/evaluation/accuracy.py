"""`evaluate_model`: accuracy on labelled images beside the model before reduction, image by image."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ..convert import restore, stock_name
from ..modeling.encoders import facts_of
from ..modeling.multiply_adds import shares_kept
from ..modes import evaluating
from ..tasks import all_layers_act, task_of
from .compute import summary, tokens_entering, total_multiply_adds
from .reading import batches, check_data, sample_pixels
from .resume import Progress, Records, digest_of_data, digest_of_model, launched_processes
from .zero_shot import TASK as ZERO_SHOT
from .zero_shot import ZeroShotClassifier, converted, inside


NUM_RESAMPLES = 10_000


@dataclass
class AccuracyReport:
    """Accuracies and their differences are in percent, intervals are of 95 %.

    top1_interval: Wilson's, of what other images of the kind would give
    baseline_top1: of the model before reduction; `drop` is that less `top1`, and `drop_interval` a paired bootstrap's:
        most of what makes accuracy vary from one set of images to another is common to both models
    agreement: percent of the images for which both predict the same class
    became_right, became_wrong: rows of the data set that only this model, or only the other, gets right
    tokens: that leave the last layer, over images; `tokens_per_layer` are means
    multiply_adds: of the whole model, over images; `mult_adds_ratio` is the share of its encoder's that is kept
    per_image: rows of the data set, their classes, what was predicted first by both, tokens and multiply-adds
    """

    images: int
    method: str | None
    settings: dict[str, Any] | None
    top1: float
    top1_interval: tuple[float, float]
    top5: float
    tokens: dict[str, float]
    tokens_per_layer: list[float]
    multiply_adds: dict[str, float]
    mult_adds_ratio: float
    baseline_top1: float | None = None
    drop: float | None = None
    drop_interval: tuple[float, float] | None = None
    agreement: float | None = None
    became_right: list[int] = field(default_factory=list)
    became_wrong: list[int] = field(default_factory=list)
    per_image: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All but `per_image`."""
        values = asdict(self)
        del values["per_image"]
        return values


def evaluate_model(
    model: PreTrainedModel | ZeroShotClassifier,
    dataset: Dataset,
    processor: Any,
    *,
    dense: PreTrainedModel | ZeroShotClassifier | AccuracyReport | None = None,
    batch_size: int = 32,
    output_dir: str | Path | None = None,
    num_workers: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    progress: bool = True,
) -> AccuracyReport:
    """Accuracy of a classifier, reduced or not.

    model: an image classifier, or a model of images and texts with class names, from `zero_shot_classifier`.
    dataset: images with their classes, such as an image folder. A class is named by a label of the model, or begins
        with its index: `0001_n01443537`.
    dense: what to compare with: a model, which goes through the images beside this one, or the report that it got
        on the same images. None: `restore(model)`; of a model that is not reduced, no comparison.
    output_dir: what was measured is kept there as it comes, and the report in `report.json` at the end. Called again
        after a crash, only what is missing is computed. What another model, data set or processor left there is a
        `ValueError`.
    num_workers: processes that read images

    Processes of `accelerate launch` or `torchrun` share the images; each brings the model on its own device, and each
    gets the report of all images. Their `output_dir` is on a file system they share.
    """
    check_data(dataset, batch_size, image_column=image_column, label_column=label_column)
    _check_model(model)
    classes = class_indices(dataset, label_column, model.config.label2id)
    labels = [classes[label] if classes else label for label in dataset.with_format(None)[label_column]]
    highest = model.config.num_labels - 1
    if any(label is None or not 0 <= label <= highest for label in labels):
        raise ValueError(f"The labels must be classes of the model, 0 to {highest}. Leave out images without a class.")
    given, beside = None, None
    if isinstance(dense, AccuracyReport):
        given = _given_predictions(dense, len(dataset))
    elif dense is not None:
        beside = dense
        if dense.config.id2label != model.config.id2label:
            raise ValueError("The classes of dense are others than the model's, or in another order: compare its own.")
    elif getattr(model.config, "reduction", None) is not None:
        beside = converted(model, restore)

    processes = launched_processes(model.device)
    settings = {
        "model": digest_of_model(model),
        "dense": None if beside is None else digest_of_model(beside),
        "data": digest_of_data(dataset, image_column, labels),
        "processor": processor.to_dict(),
    }
    records = Records(output_dir, settings, processes)
    missing = [row for row in range(len(dataset)) if row not in records.done]
    mine = missing[processes.rank :: processes.world]
    parts = batches(
        dataset, mine, processor, batch_size=batch_size, image_column=image_column, num_workers=num_workers,
        title="evaluating", progress=progress and processes.rank == 0,
    )  # fmt: skip
    models = [model] if beside is None else [model, beside]
    with evaluating(*models), torch.no_grad():
        for rows, pixel_values in parts:
            records.add(_record(model, beside, rows, pixel_values))
    found = records.gather()
    num_tokens = tokens_entering(model, sample_pixels(dataset, processor, image_column, 1))
    report = _report(model, found, labels, given, num_tokens)
    records.finish(report.to_dict())
    return report


def class_indices(dataset: Dataset, label_column: str, label2id: dict[str, int]) -> list[int]:
    """For each class of the data set its index in the model. Empty: the column holds indices and no names."""
    names = getattr(dataset.features[label_column], "names", None)
    return [class_index(name, label2id) for name in names or []]


def class_index(name: str, label2id: dict[str, int]) -> int:
    if name in label2id:
        return int(label2id[name])
    index = name.split("_")[0]
    if not index.isdecimal() or int(index) >= len(label2id):
        raise ValueError(
            f"The class {name!r} is no label of the model, nor does it begin with the index of one. Rename its folder "
            f"to one of {', '.join(list(label2id)[:5])}, ... or to an index and anything, such as 0001_{name}."
        )
    return int(index)


def wilson_interval(correct: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute the 95 % interval, in percent, of the share of `count` images that are `correct`."""
    share = correct / count
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


def paired_bootstrap(right: np.ndarray, was_right: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Of the drop in accuracy, in percent, for images drawn anew: bool (n,) twice.

    An image can only count -1, 0 or 1, so that drawing how many of each there are is drawing images, and fast for any
    number of them.
    """
    count = len(right)
    lost, gained = int((was_right & ~right).sum()), int((right & ~was_right).sum())
    if not lost and not gained:
        unseen = 100 * (1 - 0.025 ** (1 / count))  # as many could flip, and none of them be among these
        return -unseen, unseen
    shares = [lost / count, gained / count, (count - lost - gained) / count]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=NUM_RESAMPLES)
    low, high = np.quantile(100 * (drawn[:, 0] - drawn[:, 1]) / count, [0.025, 0.975])
    return float(low), float(high)


def check_finite(outputs: Tensor, rows: Sequence[int], what: str = "model") -> None:
    """Raise a ValueError that names the first image for which the numbers are not finite: they would rank anyhow."""
    broken = ~outputs.flatten(1).isfinite().all(dim=1)
    if broken.any():
        row = rows[int(broken.nonzero()[0, 0])]
        raise ValueError(
            f"What the {what} computes for row {row} of the data set is not finite. Its weights are broken, the image "
            "processor is (image_std of 0?), or a half type overflows: load it in float32."
        )


def _record(model: Any, dense: Any, rows: list[int], pixel_values: Tensor) -> Progress:
    pixel_values = pixel_values.to(model.device)
    output = model(pixel_values, **all_layers_act(model))
    check_finite(output.logits, rows)
    ranked = output.logits.topk(min(5, output.logits.shape[-1]), dim=-1).indices
    counts = output.get("token_counts")
    if counts is None:
        layers = facts_of(model.config).num_hidden_layers
        counts = torch.full((len(rows), layers), tokens_entering(model, pixel_values))
    record = {"rows": rows, "ranked": ranked.tolist(), "tokens": counts.tolist()}
    if dense is not None:
        logits = dense(pixel_values.to(dense.device)).logits
        check_finite(logits, rows, "dense model")
        record["dense"] = logits.argmax(dim=-1).tolist()
    return record


def costs_of(model: PreTrainedModel, counts: Tensor, num_tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a report says of a model's method and of its costs, and of those what is known per image.

    counts: long (n, L), the tokens that leave each layer; `num_tokens` enter the model.
    """
    reduction = getattr(model.config, "reduction", None)
    multiplied = total_multiply_adds(model, counts, num_tokens=num_tokens)
    costs = {
        "method": None if reduction is None else reduction.method,
        "settings": None if reduction is None else reduction.to_dict(),
        "tokens": summary(counts[:, -1]),
        "tokens_per_layer": counts.double().mean(dim=0).tolist(),
        "multiply_adds": summary(multiplied),
        "mult_adds_ratio": shares_kept(model.config, counts, num_tokens, reduction).mean().item(),
    }
    return costs, {"tokens": counts, "multiply_adds": multiplied}


def _report(
    model: Any, found: dict[int, dict[str, Any]], labels: list[int], given: Tensor | None, num_tokens: int
) -> AccuracyReport:
    from .metrics.accuracy.accuracy import top_k_hits
    from .metrics.agreement.agreement import agreement, flips

    rows = sorted(found)
    truth = np.array([labels[row] for row in rows])
    ranked = np.array([found[row]["ranked"] for row in rows])
    costs, per_image = costs_of(inside(model), torch.tensor([found[row]["tokens"] for row in rows]), num_tokens)
    right = top_k_hits(ranked, truth)
    per_image = {
        "rows": torch.tensor(rows),
        "labels": torch.from_numpy(truth),
        "predictions": torch.from_numpy(ranked[:, 0]),
        **per_image,
    }
    report = AccuracyReport(
        images=len(rows),
        top1=100 * float(right.mean()),
        top1_interval=wilson_interval(int(right.sum()), len(rows)),
        top5=100 * float(top_k_hits(ranked, truth, ranked.shape[1]).mean()),
        per_image=per_image,
        **costs,
    )
    if given is None and "dense" in found[rows[0]]:
        given = torch.tensor([found[row]["dense"] for row in rows])
    if given is not None:
        theirs = given.numpy()
        was_right = top_k_hits(theirs, truth)
        report.baseline_top1 = 100 * float(was_right.mean())
        report.drop = report.baseline_top1 - report.top1
        report.drop_interval = paired_bootstrap(right, was_right)
        report.agreement = 100 * agreement(ranked[:, 0], theirs)
        report.became_right, report.became_wrong = (
            per_image["rows"][torch.from_numpy(which)].tolist() for which in flips(ranked[:, 0], theirs, truth)
        )
        per_image["dense_predictions"] = given
    return report


def _given_predictions(report: AccuracyReport, num_rows: int) -> Tensor:
    if report.images != num_rows or "predictions" not in report.per_image:
        raise ValueError(
            f"dense is a report on {report.images} images, the data set has {num_rows}. Give the one that "
            "evaluate_model returned for the same images, as it returned it, or the model itself."
        )
    return report.per_image["predictions"]


def _check_model(model: Any) -> None:
    name = stock_name(model)
    task = None if name is None else task_of(name).name
    if task == ZERO_SHOT:
        raise ValueError(
            f"A {type(model).__name__} has no classes of its own. Give it their names: "
            "hf_tokenreduce.evaluation.zero_shot_classifier(model, processor, class_names)."
        )
    if task is not None and task != "image-classification":
        raise ValueError(
            f"A {type(model).__name__} predicts no classes, so it has no accuracy. What a reduction costs its "
            "features is measured by tokenreduce compare, or hf_tokenreduce.evaluation.compare."
        )
