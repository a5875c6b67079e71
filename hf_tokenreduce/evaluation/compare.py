"""`compare`: measure many settings of one model on one data set, and write tables and a picture of the results."""

import json
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.utils import logging

from ..calibration import calibrate
from ..convert import with_reduction
from ..files import known_settings, whole, write_whole
from ..methods import method_of
from ..modeling.configuration_base import ReductionConfig
from ..modeling.encoders import EncoderFacts, encoder_of, facts_of
from ..modeling.methods import parse_reduction
from ..modeling.version import __version__
from ..modes import evaluating
from ..tasks import check_has_classes, facts_on, image_side, task_of_model
from ..timing import seconds_of
from .accuracy import evaluate_model, labels_of
from .comparison import Comparison, write_comparison
from .features import check_features_model, evaluate_features
from .reading import check_data, sample_pixels
from .resume import (
    append_line,
    check_one_process,
    digest,
    digest_of_data,
    digest_of_model,
    read_lines,
)
from .runtimes import RUNTIMES, check_runtimes
from .settings import default_reductions, describe, with_usual
from .speed import benchmark, device_name, version_of
from .zero_shot import ZeroShotClassifier, converted, inside


CPU = torch.device("cpu")  # where graphs are timed, wherever the model is

logger = logging.get_logger(__name__)


def compare(
    model: PreTrainedModel | ZeroShotClassifier,
    dataset: Dataset,
    processor: Any,
    reductions: Sequence[ReductionConfig | dict[str, Any] | str | None] | None = None,
    *,
    shares: Sequence[float] = (0.8, 0.65, 0.5),
    tuned: Sequence[ReductionConfig] = (),
    output_dir: str | Path,
    bank: Dataset | None = None,
    batch_size: int = 32,
    num_workers: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    calibration_images: int = 100,
    calibration_dataset: Dataset | None = None,
    speed: bool = True,
    speed_batch_size: int | None = None,
    repeats: int = 11,
    runtime: str = "eager",
    progress: bool = True,
) -> Comparison:
    """Measure the dense model and each reduction of it, and write tables and pictures.

    `output_dir` gets table.md, results.csv, results.json, pareto.png and pareto.svg. Every result is kept as it comes,
    in results.jsonl and, image by image, in `settings/`. If you call again, also with more reductions, only what is
    missing is measured. `compare` runs in one process; `evaluate_model` can use any number of them.

    Args:
        model: A classifier or a `zero_shot_classifier`, for accuracy. For an encoder without a classifier, or a plain
            model of images and texts, features are compared as by `evaluate_features`. If the model is reduced, its
            own reduction is measured with what it has learned.
        dataset: Images with labels. Features can also be compared without labels.
        processor: The image processor of the model.
        reductions: Settings, and names of methods. A method that is given by name runs at each of the `shares`. By
            default every method that runs untrained, see `default_reductions`. A setting that cannot run yet, such as
            DL-ViT without a trained filter, is left out with the reason.
        shares: Shares of the multiply-adds to keep, for methods that are given by name.
        tuned: Settings that a search found, from `tuning.held_out_from`. They get lines of their own.
        output_dir: Folder for the results.
        bank: Labelled images whose neighbours vote where features are compared, such as the training images. By
            default the images of `dataset`, each without itself.
        batch_size: Number of images per batch.
        num_workers: Number of processes that read images.
        image_column: Column of the data set that holds the images.
        label_column: Column of the data set that holds the classes.
        calibration_images: Number of images on which methods that learn from images are calibrated, without labels.
            LTMP is calibrated to its `target`.
        calibration_dataset: Where these images come from, evenly spread. By default `dataset`.
        speed: Also time each setting in turn with the dense model, on images of the data set.
        speed_batch_size: Number of images per batch when time is measured. By default `batch_size`.
        repeats: Number of times that each setting is timed.
        runtime: Where time is measured: `"eager"`, `"compiled"`, `"recorded"`, `"onnx"`, `"openvino"` or
            `"openvino-int8"`, as for `benchmark`. Accuracy is always measured in PyTorch. A setting that cannot run
            there has no speed, for example an adaptive method in a graph of several images.
        progress: Show progress bars.

    Returns:
        The comparison: one row per setting, the dense model first.

    Example:
        >>> comparison = compare(model, photos, processor, ["tome", EViTConfig()], output_dir="comparison")
        >>> print(comparison.to_markdown())
    """
    check_one_process("compare")
    check_has_classes(model, "compare")
    of_features = is_of_features(model, bank)
    columns = {"image_column": image_column, **({} if of_features else {"label_column": label_column})}
    check_data(dataset, batch_size, **columns)
    folder = Path(output_dir)
    _check_folder(folder)
    labels = None if of_features else labels_of(dataset, label_column, model.config)  # before anything is computed
    if speed:
        check_runtimes([runtime], CPU if RUNTIMES.get(runtime) else inside(model).device)
    config = model.config
    dense = reduced_as(model, None)
    facts = facts_for(model, dataset, processor, image_column)
    source = dataset if calibration_dataset is None else calibration_dataset
    if isinstance(reductions, (str, ReductionConfig)):
        reductions = [reductions]
    if reductions is None or any(isinstance(reduction, str) for reduction in reductions):
        pixels = sample_pixels(source, processor, image_column, calibration_images)
        usual = default_reductions(facts, shares, model=inside(dense), pixel_values=pixels, names=reductions)
        own = [getattr(config, "reduction", None)] if reductions is None else []
        reductions = [*own, *usual] if reductions is None else with_usual(reductions, usual, shares)
    wanted: list[ReductionConfig | None] = [None]
    for reduction in map(parse_reduction, [*reductions, *tuned]):
        if reduction is not None:
            reduction.check_fit(facts_of(dense.config))
        if reduction not in wanted:
            wanted.append(reduction)
    speed_batch_size = batch_size if speed_batch_size is None else speed_batch_size
    options: dict[str, Any] = {
        "image_column": image_column, "label_column": label_column, "batch_size": batch_size,
        "num_workers": num_workers, "progress": progress,
    }  # fmt: skip
    (folder / "settings").mkdir(parents=True, exist_ok=True)
    settings = {
        "version": __version__,  # another release may fit and compute something else
        "model": digest_of_model(dense),
        "data": labelled_digest(dataset, image_column, label_column, labels),
        "processor": json.loads(json.dumps(processor.to_dict(), default=str)),
        "calibration": [calibration_images, calibration_dataset and digest_of_data(source, image_column, [])],
        "speed": conditions_of(inside(dense), speed_batch_size, repeats, runtime) if speed else None,
        "bank": bank and labelled_digest(bank, image_column, label_column),
    }
    nothing_yet = not any((folder / "settings").iterdir()) and not (folder / "results.jsonl").is_file()
    if nothing_yet or not (folder / "settings.json").is_file():
        write_whole(folder / "settings.json", json.dumps(settings, indent=1))
    known_settings(folder / "settings.json", settings)

    images = None
    if speed:
        images = sample_pixels(dataset, processor, image_column, 2 * speed_batch_size).to(model.device)

    def measured(one: Any, key: str, beside: Any) -> Any:
        where = folder / "settings" / key
        if of_features:
            return evaluate_features(one, dataset, processor, bank=bank, baseline=beside, output_dir=where, **options)
        return evaluate_model(one, dataset, processor, dense=beside, output_dir=where, **options)

    done = {row["key"]: row for row in read_lines(folder / "results.jsonl")}
    known = [row.get("settings") for row in done.values()]
    settings_left = sum(json.loads(json.dumps(one and one.to_dict())) not in known for one in wanted)
    if progress and settings_left:
        # Where features are compared, the dense model runs beside each setting, and the bank runs through it too.
        images_each = len(dataset) * (2 if of_features else 1) + (0 if bank is None else len(bank))
        _tell_how_long(inside(dense), dataset, processor, image_column, batch_size, settings_left, images_each)
    dense_report: Any = None
    rows = []
    bar = logging.tqdm(wanted, desc="settings", disable=not progress)
    for reduction in bar:
        same = reduction is not None and reduction == parse_reduction(getattr(config, "reduction", None))
        reduced = reduced_as(model, reduction)
        learned = same or (reduction is not None and _shares_learned(reduced, model))
        key = key_of(reduction, digest_of_model(reduced) if learned else "")
        name = describe(reduction)
        if key not in done:
            bar.set_postfix_str(name)
            reason = why_it_cannot_run(reduced, facts)
            if reason is None and not same and method_of(reduction).prepare is not None:
                reason = calibrate_once(
                    inside(reduced), folder / "settings" / f"{key}.safetensors", source, processor, image_column,
                    calibration_images,
                )  # fmt: skip
            row: dict[str, Any] = {"key": key, "name": name, "method": reduction and reduction.method}
            if reason is not None:
                row |= {"skipped": reason, "settings": reduction and reduction.to_dict(), "top1": None}
                logger.warning(f"{name} is left out: {reason}")
            else:
                if dense_report is None:  # if it is in the folder already, this only reads it
                    dense_report = measured(dense, key_of(None, ""), None)
                report = dense_report if reduction is None else measured(reduced, key, dense_report)
                row |= report.to_dict()
                if reduction is None and of_features:
                    row |= {"baseline_knn": row["knn"], "pooled_cosine": 1.0, "patch_cosine": 1.0}
                elif reduction is None:
                    row |= {"baseline_top1": row["top1"], "drop": None}
                row |= timed(inside(reduced), inside(dense), images, speed_batch_size, repeats, runtime)
            append_line(folder / "results.jsonl", row)
            done[key] = json.loads(json.dumps(row))
        tuned_names = {"name": f"{name}, tuned", "label": f"{method_of(reduction).title}, tuned"}
        rows.append(done[key] | (tuned_names if reduction in tuned else {}))
    comparison = Comparison(rows, folder)
    write_comparison(
        comparison, f"{Path(config.name_or_path or type(inside(model)).__name__).name}, {len(dataset)} images"
    )
    return comparison


def _check_folder(folder: Path) -> None:
    """Raise a ValueError if a folder holds the results of another command, which would be replaced in part."""
    others = ("part-*.jsonl", "report.json", "tuning.json", "search/settings.json")
    # A comparison makes the folder `settings` before all files. No other command makes both.
    is_new = not (folder / "settings").is_dir()
    unknown = (folder / "settings.json").is_file() and is_new
    if unknown or any(True for pattern in others for _ in folder.glob(pattern)):
        raise ValueError(f"output_dir {folder} holds the results of another command. Name another folder.")
    patterns = ("config.json", *(("results.*", "table.md", "pareto.*") if is_new else ()))
    foreign = [file.name for pattern in patterns for file in folder.glob(pattern)]
    if foreign:
        raise ValueError(f"output_dir {folder} holds {foreign[0]} of something else. Name another folder.")


def _tell_how_long(
    model: PreTrainedModel,
    dataset: Dataset,
    processor: Any,
    image_column: str,
    batch_size: int,
    settings: int,
    images: int,
) -> None:
    """Print an estimate of the total time, from the time of one batch through the dense model."""
    begin = time.perf_counter()
    pixels = sample_pixels(dataset, processor, image_column, batch_size).to(model.device, model.dtype)
    reading = time.perf_counter() - begin
    with evaluating(model), torch.no_grad():
        computing = min(seconds_of(partial(image_side(model), pixels), model.device) for _ in range(2))
    minutes = settings * images / len(pixels) * (reading + computing) / 60
    work = f"{settings} settings on {len(dataset)} images"
    tqdm.write(f"{work} take about {math.ceil(minutes)} min. Calibration and timing come on top.", sys.stderr)


def facts_for(
    model: PreTrainedModel | ZeroShotClassifier, dataset: Dataset, processor: Any, image_column: str = "image"
) -> EncoderFacts:
    """Return the facts of a model's encoder for prepared images, whose size may differ from the model's own.

    Args:
        model: The model, stock or reduced.
        dataset (`Dataset`): The images. Only one of them is read.
        processor: The image processor of the model.
        image_column: Column of the data set that holds the images.

    Returns:
        `EncoderFacts`, which you can pass to `default_reductions`.

    Example:
        >>> settings = default_reductions(facts_for(model, photos, processor), [0.6])
    """
    return facts_on(inside(model), sample_pixels(dataset, processor, image_column, 1))


def is_of_features(model: Any, bank: Dataset | None) -> bool:
    """Return whether features are compared, because the model predicts no classes."""
    if not isinstance(model, ZeroShotClassifier) and task_of_model(model).name != "image-classification":
        check_features_model(model)
        return True
    if bank is not None:
        raise ValueError("bank is for comparing features, but this model predicts classes itself. Leave bank out.")
    return False


def reduced_as(model: Any, reduction: ReductionConfig | None) -> Any:
    """Return a model or classifier with another reduction, in eval mode."""
    return converted(model, lambda one: with_reduction(one, reduction).eval())


def _shares_learned(reduced: Any, model: Any) -> bool:
    """Return whether a reduced model decides by parameters that the given model has learned, for another setting."""
    given = {id(parameter) for parameter in model.parameters()}
    return any(id(one) in given for reducer in encoder_of(inside(reduced)).reducers for one in reducer.parameters())


def labelled_digest(dataset: Dataset, image_column: str, label_column: str, labels: list[int] | None = None) -> str:
    """Return the digest of a data set and its labels, if it has labels.

    Args:
        dataset (`Dataset`): The images.
        image_column: Column of the data set that holds the images.
        label_column: Column of the data set that holds the classes.
        labels: The classifier's index of the class of each image. By default the data set's own numbers.

    Returns:
        The digest. With `labels` it changes if the classifier gets other names of its classes.
    """
    if labels is None:
        labels = list(dataset.with_format(None)[label_column]) if label_column in dataset.column_names else []
    return digest_of_data(dataset, image_column, labels)


def why_it_cannot_run(model: Any, facts: EncoderFacts) -> str | None:
    """Return why a reduced model cannot run on images of this size, or None if it can."""
    reduction = model.config.reduction
    method = method_of(reduction)
    if not method.any_image_size and facts.grid != facts_of(model.config).grid:
        return "its networks are made for images of the model's own size, and these images have another size"
    return method.why_not(reduction)


def calibrate_once(
    model: PreTrainedModel, file: Path, source: Dataset, processor: Any, image_column: str, most: int
) -> str | None:
    """Calibrate a model, or read what it learned before. Returns why calibration failed, or None."""
    parameters = {name: p for name, p in model.named_parameters() if ".reducer." in name}
    if file.is_file():
        known = load_file(file)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(known[name])
        return None
    pixels = sample_pixels(source, processor, image_column, most)
    try:
        calibrate(model, pixels, getattr(model.config.reduction, "target", None), max_images=most)
    except ValueError as error:
        return str(error)
    with whole(file) as unfinished:
        save_file({name: p.detach().contiguous() for name, p in parameters.items()}, unfinished)
    return None


def conditions_of(model: PreTrainedModel, batch_size: int, repeats: int, runtime: str) -> dict[str, Any]:
    """Return the conditions of a timing. Times of different conditions must not go into one table."""
    return {
        "batch_size": batch_size,
        "repeats": repeats,
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "torch": torch.__version__,
        **({} if runtime == "eager" else {"runtime": runtime, "runtime_version": version_of(runtime)}),
        **({} if RUNTIMES[runtime] or type_of(model) == "float32" else {"dtype": type_of(model)}),
    }


def type_of(model: PreTrainedModel) -> str:
    """Return the name of the floating type of a model, such as "bfloat16"."""
    return str(model.dtype).removeprefix("torch.")


def timed(
    reduced: PreTrainedModel,
    dense: PreTrainedModel,
    images: Tensor | None,
    batch_size: int,
    repeats: int,
    runtime: str,
) -> dict[str, Any]:
    """Time a model in turn with the dense one. All values are None if there are no images or it cannot run there."""
    names = ("images_per_second", "dense_images_per_second", "speedup", "speedup_interval", "speed_batch_size")
    if images is None:
        return dict.fromkeys(names)
    others: dict[str, Any] = {"batch_sizes": [batch_size], "repeats": repeats, "progress": False}
    others |= {"runtimes": [runtime], "device": CPU if RUNTIMES[runtime] else None}
    others |= {} if RUNTIMES[runtime] else {"dtypes": [type_of(reduced)]}
    others |= {"oracle": False, "breakdown": False, "memory": False, "suggest": False}
    is_dense = reduced.config.reduction is None
    report = benchmark({"dense": dense} if is_dense else {"dense": dense, "reduced": reduced}, images, **others)
    if report.left_out:
        return dict.fromkeys(names)
    row = report.row("dense" if is_dense else "reduced")
    if row.runtime != runtime:  # an adaptive method is not compiled, and its dense model is
        return dict.fromkeys(names)
    return {
        "images_per_second": row.images_per_second,
        "dense_images_per_second": report.row("dense").images_per_second,
        "speedup": row.speedup,
        "speedup_interval": row.speedup_interval,
        "speed_batch_size": batch_size,
        "speed_settings": report.settings,
    }


def key_of(reduction: ReductionConfig | None, learned: str) -> str:
    """Return the name under which the results of a setting are kept; `learned` is a digest of what it has learned."""
    how = None if reduction is None else reduction.to_dict()
    name = "dense" if reduction is None else str(reduction.method)
    return f"{name}-{digest([json.dumps(how, sort_keys=True).encode(), learned.encode()])[:12]}"
