"""`evaluate_model`: accuracy on labelled images, compared image by image with the model before reduction."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..convert import restored, stock_name
from ..modeling.encoders import facts_of
from ..modeling.multiply_adds import shares_kept
from ..modeling.version import __version__
from ..modes import evaluating
from ..tasks import all_layers_act, check_has_classes, task_of
from .compute import summary, tokens_entering, total_multiply_adds
from .reading import batches, check_data, sample_pixels
from .resume import Progress, Records, digest_of_data, digest_of_model, launched_processes
from .zero_shot import TASK as ZERO_SHOT
from .zero_shot import ZeroShotClassifier, converted, inside


NUM_RESAMPLES = 10_000


@dataclass
class AccuracyReport:
    """The accuracy of a model, and what the model costs. Accuracies are in percent, and intervals cover 95 %.

    Attributes:
        images: Number of images.
        method: Name of the reduction method. None: the model is not reduced.
        settings: Fields of the method's configuration.
        top1: Top-1 accuracy.
        top1_interval: Wilson's interval of `top1`, for other images of the same kind.
        top5: Top-5 accuracy.
        tokens: Number of tokens that leave the last layer: mean, quantiles, least and most over the images.
        tokens_per_layer: Mean number of tokens that leave each layer.
        multiply_adds: Multiply-adds of the whole model, summarised over the images like `tokens`.
        mult_adds_ratio: Share of the encoder's multiply-adds that is kept.
        baseline_top1: Top-1 accuracy of the model before reduction.
        drop: `baseline_top1` minus `top1`.
        drop_interval: Interval of `drop` by a paired bootstrap. It pairs the two models image by image, because most
            of the variation between two sets of images is the same for both models.
        agreement: Percentage of the images for which both models predict the same class.
        became_right: Rows of the data set that only this model gets right.
        became_wrong: Rows of the data set that only the model before reduction gets right.
        per_image: One value per image: rows of the data set, labels, first predictions of both models, tokens and
            multiply-adds.
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
        """Return all fields but `per_image`."""
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
    """Measure the accuracy of a classifier, reduced or not.

    Processes of `accelerate launch` or `torchrun` share the images. Each process has the model on its own device, and
    each gets the report of all images. Their `output_dir` must be on a file system that all of them share.

    Args:
        model: An image classifier, or the result of `zero_shot_classifier` for a model of images and texts.
        dataset: Images with their classes, such as an image folder. The name of a class is a label of the model, or
            begins with its index: `0001_n01443537`.
        processor: The image processor of the model.
        dense: What to compare with. Either a model, which runs on the same images, or the report that
            `evaluate_model` returned for that model on the same images. By default `restore(model)`. A model that is
            not reduced is compared with nothing by default.
        batch_size: Number of images per batch.
        output_dir: Folder that keeps each result as it comes, and at the end the report in `report.json`. If you call
            again after a crash, only the missing images are computed.
        num_workers: Number of processes that read images.
        image_column: Column of the data set that holds the images.
        label_column: Column of the data set that holds the classes.
        progress: Show a progress bar.

    Returns:
        The report. Its `per_image` has one row per image.

    Raises:
        ValueError: `output_dir` holds results of another model, data set or processor.

    Example:
        >>> report = evaluate_model(reduce_tokens(model, ToMeConfig(r=13)), photos, processor)
        >>> report.top1, report.drop, report.drop_interval
    """
    check_data(dataset, batch_size, image_column=image_column, label_column=label_column)
    _check_model(model)
    check_has_classes(model, "evaluate_model")
    labels = labels_of(dataset, label_column, model.config)
    given, beside = None, None
    if isinstance(dense, AccuracyReport):
        given = _given_predictions(dense, len(dataset))
    elif dense is not None:
        beside = dense
        if dense.config.id2label != model.config.id2label:
            raise ValueError(
                "The classes of dense differ from the classes of the model, or they are in another order. Give the "
                "dense form of the same model."
            )
    elif getattr(model.config, "reduction", None) is not None:
        beside = converted(model, restored)

    processes = launched_processes(model.device)
    settings = {
        "version": __version__,
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
    results = records.gather()
    num_tokens = tokens_entering(model, sample_pixels(dataset, processor, image_column, 1))
    report = _report(model, results, labels, given, num_tokens)
    named = {} if beside is None or dense is None else {"dense": beside.config.name_or_path}  # for a card
    records.finish({**report.to_dict(), **named})
    return report


def labels_of(dataset: Dataset, label_column: str, config: PreTrainedConfig) -> list[int]:
    """Return the model's index of the class of each image."""
    classes = class_indices(dataset, label_column, config.label2id)
    given = list(dataset.with_format(None)[label_column])
    texts = sorted({label for label in given if isinstance(label, str)})
    of_texts = dict(zip(texts, _indices(texts, config.label2id), strict=True))
    given = [of_texts[label] if isinstance(label, str) else label for label in given]
    # On the Hub, -1 stands for "no label".
    labels = [classes[label] if classes and label is not None and label >= 0 else label for label in given]
    highest = config.num_labels - 1
    for label in labels:
        if not isinstance(label, (int, float)) or not 0 <= label <= highest:
            raise ValueError(
                f"The labels must be classes of the model, which are 0 to {highest}, got {label!r}. Leave out images "
                "without a class."
            )
    return labels


def class_indices(dataset: Dataset, label_column: str, label2id: dict[str, int]) -> list[int]:
    """Return the model's index of each class of a data set. It is empty if the column has no list of its classes."""
    names = getattr(dataset.features[label_column], "names", None)
    return _indices(names or [], label2id)


def class_index(name: str, label2id: dict[str, int]) -> int:
    """Return the model's index of a class, by its label or by the index that the name begins with."""
    return _indices([name], label2id)[0]


def _indices(names: Sequence[str], label2id: dict[str, int]) -> list[int]:
    """Return the model's index of each name, as `class_index` does for one."""
    # macOS may write an accent of a folder's name as a character of its own.
    by_label = {_composed(label): int(index) for label, index in label2id.items()}
    # Two classes of ImageNet have the same label, of which `label2id` has only one. So the number of labels is not the
    # number of classes, and the other class has no label here.
    labels = {index: label for label, index in by_label.items()}
    highest = max(labels, default=-1)
    found = []
    for name in map(_composed, names):
        begin, _, rest = name.partition("_")
        if name in by_label:
            found.append(by_label[name])
            continue
        if not begin.isdecimal() or int(begin) > highest:
            some = ", ".join(repr(label) for label in list(label2id)[:5])
            raise ValueError(
                f"The class {name!r} is not a label of the model, and does not begin with the index of a label. The "
                f"labels are {some}, ... If it is one of them by another name, rename its folder to the label, or put "
                "the index of the label and _ in front. If your classes are new to the model, train it on them first: "
                "tokenreduce train MODEL --train-dir IMAGES -o TRAINED --ignore_mismatched_sizes. Without labels, "
                "tokenreduce tune MODEL IMAGES --no-labels compares methods by how often they keep the class of the "
                "dense model."
            )
        index = int(begin)
        if rest in by_label and labels.get(index, rest) != rest:
            raise ValueError(
                f"The class {name!r} begins with the index {index}, which is {labels[index]!r} in the model, but "
                f"{rest!r} is the label of {by_label[rest]}, so the name is not a label of the model. Rename its "
                f"folder to the label, or put {by_label[rest]} and _ in front of the label."
            )
        found.append(index)
    return found


def _composed(name: object) -> str:
    return unicodedata.normalize("NFC", str(name))


def wilson_interval(correct: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute the 95 % interval, in percent, of the share of `count` images that are `correct`."""
    share = correct / count
    center = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)


def paired_bootstrap(right: np.ndarray, was_right: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Compute the 95 % interval of the drop in accuracy, in percent: two bool (n,) -> (low, high).

    Each image counts -1, 0 or 1. Drawing how many images count which is the same as drawing the images themselves,
    and it is fast for any number of images.
    """
    count = len(right)
    lost, gained = int((was_right & ~right).sum()), int((right & ~was_right).sum())
    if not lost and not gained:
        # None of these images flips. With a larger share of flips, the chance to see none would be below 2.5 %.
        unseen = 100 * (1 - 0.025 ** (1 / count))
        return -unseen, unseen
    shares = [lost / count, gained / count, (count - lost - gained) / count]
    drawn = np.random.default_rng(seed).multinomial(count, shares, size=NUM_RESAMPLES)
    low, high = np.quantile(100 * (drawn[:, 0] - drawn[:, 1]) / count, [0.025, 0.975])
    return float(low), float(high)


def check_finite(outputs: Tensor, rows: Sequence[int], what: str = "model") -> None:
    """Raise a ValueError that names the first image whose outputs are not finite. `topk` would rank them silently."""
    broken = ~outputs.flatten(1).isfinite().all(dim=1)
    if broken.any():
        row = rows[int(broken.nonzero()[0, 0])]
        raise ValueError(
            f"What the {what} computes for row {row} of the data set is not finite. Maybe its weights are broken, the "
            "image processor is wrong (is image_std 0?), or a half type overflows. Try to load it in float32."
        )


def _ranked(logits: Tensor) -> Tensor:
    """Return the best classes, best first. Of equal logits `argmax` may take another one, so all models use this."""
    return logits.topk(min(5, logits.shape[-1]), dim=-1).indices


def _record(model: Any, dense: Any, rows: list[int], pixel_values: Tensor) -> Progress:
    own = pixel_values.to(model.device, model.dtype)
    output = model(own, **all_layers_act(model))
    check_finite(output.logits, rows)
    ranked = _ranked(output.logits)
    counts = output.get("token_counts")
    if counts is None:
        layers = facts_of(model.config).num_hidden_layers
        counts = torch.full((len(rows), layers), tokens_entering(model, pixel_values))
    record = {"rows": rows, "ranked": ranked.tolist(), "tokens": counts.tolist()}
    if dense is not None:
        logits = dense(pixel_values.to(dense.device, dense.dtype)).logits
        check_finite(logits, rows, "dense model")
        record["dense"] = _ranked(logits)[:, 0].tolist()
    return record


def costs_of(model: PreTrainedModel, counts: Tensor, num_tokens: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the fields of a report about the method and the costs, and the costs per image.

    counts (n, L), long: tokens that leave each layer. `num_tokens` is how many enter the model.
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
    model: Any, results: dict[int, dict[str, Any]], labels: list[int], given: Tensor | None, num_tokens: int
) -> AccuracyReport:
    from .metrics.accuracy.accuracy import top_k_hits
    from .metrics.agreement.agreement import agreement, flips

    rows = sorted(results)
    truth = np.array([labels[row] for row in rows])
    ranked = np.array([results[row]["ranked"] for row in rows])
    costs, per_image = costs_of(inside(model), torch.tensor([results[row]["tokens"] for row in rows]), num_tokens)
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
    if given is None and "dense" in results[rows[0]]:
        given = torch.tensor([results[row]["dense"] for row in rows])
    if given is not None:
        dense_classes = given.numpy()
        was_right = top_k_hits(dense_classes, truth)
        report.baseline_top1 = 100 * float(was_right.mean())
        report.drop = report.baseline_top1 - report.top1
        report.drop_interval = paired_bootstrap(right, was_right)
        report.agreement = 100 * agreement(ranked[:, 0], dense_classes)
        report.became_right, report.became_wrong = (
            per_image["rows"][torch.from_numpy(which)].tolist() for which in flips(ranked[:, 0], dense_classes, truth)
        )
        per_image["dense_predictions"] = given
    return report


def _given_predictions(report: AccuracyReport, num_rows: int) -> Tensor:
    if report.images != num_rows or "predictions" not in report.per_image:
        raise ValueError(
            f"dense is a report on {report.images} images, and the data set has {num_rows} images. Give the report "
            "that evaluate_model returned for the same images, unchanged, or give the model itself."
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
            f"A {type(model).__name__} predicts no classes, so it has no accuracy. To measure what a reduction does "
            "to its features, use tokenreduce compare or hf_tokenreduce.evaluation.compare."
        )
