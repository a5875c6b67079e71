"""`tune`: search for the best reduction of a model on a part of the images, and report on the other images."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..evaluation.accuracy import evaluate_model, labels_of
from ..evaluation.compare import (
    CPU,
    compare,
    conditions_of,
    is_of_features,
    labelled_digest,
    reduced_as,
)
from ..evaluation.comparison import Comparison, write_comparison
from ..evaluation.features import voting_labels
from ..evaluation.reading import check_data, check_pictures
from ..evaluation.resume import check_one_process, digest_of_model
from ..evaluation.runtimes import RUNTIMES, check_runtimes
from ..evaluation.settings import describe
from ..evaluation.zero_shot import ZeroShotClassifier, converted, inside
from ..files import known_settings, model_folder, write_whole
from ..hub import write_card
from ..loading import contents
from ..methods import METHODS, method_of
from ..modeling.configuration_base import ReductionConfig
from ..modeling.methods import parse_reduction
from ..modeling.multiply_adds import check_share
from ..modeling.version import __version__
from ..tasks import check_has_classes
from .parts import LEAST_IMAGES, Parts, split_rows
from .report import LEFT_OUT, SEARCHED, TuningReport, write_report
from .search import Target, choose, measured, meets, pareto_front, search
from .space import Variant, searched_methods, variants_of
from .trials import CALIBRATION_IMAGES, Quality, Trials


MODEL = "model"  # folder of the chosen model, inside the folder of the report
MOST_ON_FRONT = 6


def tune(
    model: PreTrainedModel | ZeroShotClassifier,
    dataset: Dataset,
    processor: Any,
    *,
    share: float | None = None,
    speedup: float | None = None,
    max_drop: float | None = None,
    output_dir: str | Path,
    methods: Sequence[str] | None = None,
    minutes: float | None = None,
    seed: int = 0,
    batch_size: int = 32,
    speed: bool = True,
    repeats: int = 11,
    runtime: str = "eager",
    num_workers: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    record: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> TuningReport:
    """Search for the reduction that changes a model least at a given cost, or that costs least at a given change.

    Nothing is trained. Settings are compared by the distance of the model's outputs from the dense model's. If there
    are labels, the drop of the accuracy counts as much, among settings that were measured on all images of the search.

    The images are split into at most 500 to search on, and the others, for the report. Each result is kept as it
    comes. If you stop `tune` and call it again, it continues and comes to the same result.

    Args:
        model: A classifier, a `zero_shot_classifier`, or an encoder whose features are compared. If it is already
            reduced, the search begins with its dense form, and its reduction is one of those that are tried.
        dataset (`Dataset`): Images. With labels the report is about accuracy. Without labels it is about the share of
            the images that get the dense model's class.
        processor: The image processor of the model.
        share (`float`, *optional*): Target: the highest share of the multiply-adds to keep. A method whose cost
            depends on the images may exceed it by 0.015. Give exactly one of the three targets.
        speedup (`float`, *optional*): Target: the lowest speed-up over dense, on this device at this batch size.
        max_drop (`float`, *optional*): Target: the largest drop of the accuracy in points, or without labels of the
            agreement. The search then looks for the cheapest setting within it.
        output_dir: Folder for report.md, tuning.json, pareto.png and pareto.svg. The chosen model and its card go into
            its subfolder `model`.
        methods: Names of the methods to try. By default all that run untrained.
        minutes (`float`, *optional*): The most time for the trials. The report takes extra time afterwards. By default
            the search goes on as long as there is something to try.
        seed (`int`): Seed of the split and of the search.
        batch_size (`int`): Number of images per batch, also when time is measured.
        speed (`bool`): Also time the settings of the report, and choose the dense model if nothing is faster on this
            device. Set it to False if the model is for another device.
        repeats (`int`): Number of times that the report times each setting. With fewer than 6 its intervals of times
            cover less than 95 %.
        runtime (`str`): Where time is measured: `"eager"`, `"compiled"`, `"recorded"`, `"onnx"`, `"openvino"` or
            `"openvino-int8"`, as for `benchmark`.
        num_workers (`int`): Number of processes that read images.
        image_column (`str`): Column of the data set that holds the images.
        label_column (`str`): Column of the data set that holds the classes.
        record (`Mapping`, *optional*): Further entries for the card, such as `base_model`, `eval_dataset` and
            `command`, as in the record of a training.
        progress (`bool`): Show progress bars.

    Returns:
        `TuningReport`: The chosen setting and the other settings of the report, on the held-out images.

    Example:
        >>> report = tune(model, photos, processor, share=0.65, output_dir="tuned")
        >>> report.chosen["name"], report.chosen["drop"]
    """
    check_one_process("tune")
    check_has_classes(model, "tune", one=True)
    target = _target(share, speedup, max_drop, speed, minutes)
    of_features = is_of_features(model, None)
    if of_features and target.kind == "max_drop":
        raise ValueError(
            f"max_drop={max_drop} is about accuracy or agreement, but a {type(model).__name__} predicts no classes. "
            "Give share or speedup."
        )
    check_data(dataset, batch_size, image_column=image_column)
    check_runtimes([runtime], CPU if RUNTIMES.get(runtime) else inside(model).device)
    found = searched_methods(methods)
    has_labels = not of_features and label_column in dataset.column_names
    labels = labels_of(dataset, label_column, model.config) if has_labels else None
    if of_features and label_column in dataset.column_names:
        voting_labels(dataset, None, label_column)  # of the report, which would refuse them only after the search
    raw = None if labels is None else list(dataset.with_format(None)[label_column])
    parts = _parts(dataset, raw, seed)
    folder = _folder(Path(output_dir))
    settings = {
        "version": __version__,
        "model": digest_of_model(model),
        "data": labelled_digest(dataset, image_column, label_column, labels),
        "processor": json.loads(json.dumps(processor.to_dict(), default=str)),
        "target": list(target),
        "methods": [method.name for method in found],
        "seed": seed,
        "batch_size": batch_size,
        "speed": conditions_of(inside(model), batch_size, repeats, runtime) if speed else None,
    }
    if not (folder / "search" / "settings.json").is_file():
        check_pictures(dataset, image_column, progress)  # the report reads some of them only after the search
        (folder / "search" / "held-out" / "settings").mkdir(parents=True, exist_ok=True)
        write_whole(folder / SEARCHED, json.dumps(contents(dataset.select(parts.search), image_column), indent=1))
        write_whole(folder / "search" / "settings.json", json.dumps(settings, indent=1))
    known_settings(folder / "search" / "settings.json", settings)
    trials = Trials(
        model, dataset, parts.search, labels, processor, folder / "search",
        folder / "search" / "held-out" / "settings", of_features=of_features, batch_size=batch_size, runtime=runtime,
        image_column=image_column, num_workers=num_workers, progress=progress,
    )  # fmt: skip
    _check_classes(trials)
    parts = _without_copies(dataset, parts, image_column)
    variants = [variant for method in found for variant in variants_of(method, trials.facts)]
    own = parse_reduction(getattr(model.config, "reduction", None))
    if own is not None:
        trials.quality(own, len(parts.search))
        if target.kind == "speedup":
            trials.speedup(own)
    end = trials.clock + (math.inf if minutes is None else 60 * minutes)
    search(trials, variants, target, seed, end)
    chosen = choose(trials, target)
    why = "" if chosen is not None else _why_dense(trials, target)
    shown = _shown(trials, variants, target, chosen, end)
    trials.bar.close()

    held_out = dataset.select(parts.report)
    where = folder / "search" / "held-out"
    if not of_features and labels is None:
        held_out = _with_dense_classes(trials, held_out, label_column, folder / "search" / "classes", num_workers)
    comparison = compare(
        model, held_out, processor, [setting for setting, _ in shown], output_dir=where, batch_size=batch_size,
        num_workers=num_workers, image_column=image_column, label_column=label_column, speed=speed, repeats=repeats,
        runtime=runtime, calibration_images=CALIBRATION_IMAGES, calibration_dataset=trials.dataset, progress=progress,
    )  # fmt: skip
    name = Path(model.config.name_or_path or type(inside(model)).__name__).name
    tried = {setting.method for setting in trials.tried()}
    rows = _rows(trials, comparison, shown, of_dense_classes=not of_features and labels is None)
    write_comparison(Comparison(rows, where), f"{name}, {len(held_out)} images")
    row, why = _decided(rows, target, speed, why, trials.order)
    report = TuningReport(
        model=name,
        target=target._asdict(),
        seed=seed,
        images={"search": len(parts.search), "report": len(parts.report)},
        labelled=label_column in dataset.column_names,
        tried=len(trials.tried()),
        methods=[method.title for method in found if method.name in tried],
        untried=[method.title for method in found if method.name not in tried],
        seconds=round(trials.clock, 1),
        chosen=row,
        why=why,
        begun_from=None if own is None else describe(own),
        rows=rows,
        folder=folder,
    )
    write_report(report)
    _save(report, trials, processor, record or {})
    return report


def _target(
    share: float | None, speedup: float | None, max_drop: float | None, speed: bool, minutes: float | None
) -> Target:
    given = {name: value for name, value in (("share", share), ("speedup", speedup), ("max_drop", max_drop))
             if value is not None}  # fmt: skip
    if len(given) != 1:
        got = " and ".join(f"{name}={value}" for name, value in given.items()) or "none of them"
        raise ValueError(
            f"Give one target: share, such as 0.65 of the multiply-adds; speedup, such as 1.5; or max_drop, such as 1 "
            f"point. Got {got}."
        )
    ((kind, value),) = given.items()
    if kind == "share":
        check_share(value)
    elif kind == "speedup" and not 1 < value < math.inf:
        raise ValueError(
            f"speedup is the speed divided by the dense model's speed. It must be above 1, got {value!r}."
        )
    elif kind == "max_drop" and not 0 <= value < 100:
        raise ValueError(f"max_drop is in points of the accuracy. It must be from 0 to below 100, got {value!r}.")
    if kind == "speedup" and not speed:
        raise ValueError(f"For speedup={value} time must be measured. Leave speed=False (--no-speed) out.")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"minutes must be above 0, got {minutes!r}.")
    return Target(kind, float(value))


def _parts(dataset: Dataset, labels: list[int] | None, seed: int) -> Parts:
    count = len(dataset)
    if count < LEAST_IMAGES:
        raise ValueError(
            f"There are {count} images. A search on some and a report on the others take at least {LEAST_IMAGES}, and "
            "reliable results take some hundreds. Give more images."
        )
    if labels is not None and len(set(labels)) == 1:
        raise ValueError(
            f"All {count} images are of one class, so errors between classes cannot be seen. Give images of at least "
            "two classes."
        )
    return split_rows(labels, count, seed)


def _without_copies(dataset: Dataset, parts: Parts, image_column: str) -> Parts:
    """Leave images out of the report that the search sees under another name."""
    search, report = parts
    searched = set(contents(dataset.select(search), image_column))  # a folder may hold a picture twice
    left = [row for row, one in zip(report, contents(dataset.select(report), image_column), strict=True)
            if one not in searched]  # fmt: skip
    if not left:
        raise ValueError("Every image is there several times. The report needs images that the search does not see.")
    return Parts(search, left)


def _check_classes(trials: Trials) -> None:
    if trials.classes is not None and trials.labels is trials.classes and len(set(trials.classes.tolist())) == 1:
        raise ValueError(
            f"The dense model gives all {len(trials.classes)} images one class, so errors between classes cannot be "
            "seen. Give images of at least two classes."
        )


def _folder(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file. Name a folder.")
    others = [file for file in folder.iterdir() if file.name != "search"] if folder.is_dir() else []
    if others and not (folder / "search" / "settings.json").is_file():
        raise ValueError(f"output_dir {folder} is not empty, but it holds no search. Name another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _shown(
    trials: Trials, variants: Sequence[Variant], target: Target, chosen: ReductionConfig | None, end: float
) -> list[tuple[ReductionConfig, list[str]]]:
    """List the settings that are measured on the held-out images, each with its roles.

    Only the results of the search decide here. Nothing about the held-out images is known yet.
    """
    roles: dict[str, tuple[ReductionConfig, list[str]]] = {}

    def add(setting: ReductionConfig, role: str) -> None:
        roles.setdefault(trials.key(setting), (setting, []))[1].append(role)

    seen: set[str | None] = set()
    if chosen is not None:
        add(chosen, "chosen")
        seen.add(chosen.method)
        quality = trials.known_quality(chosen)
        assert quality is not None
        best = _best_default(trials, variants, target.value if target.kind == "share" else quality.share, end)
        if best is not None:
            add(best, "default")
    for setting, found in measured(trials):
        if setting.method not in seen and meets(trials, target, setting, found):
            seen.add(setting.method)
            add(setting, "runner-up")
    for setting in pareto_front(trials, MOST_ON_FRONT):
        add(setting, "front")
    return list(roles.values())


def _best_default(trials: Trials, variants: Sequence[Variant], share: float, end: float) -> ReductionConfig | None:
    """Find the best default of all methods at a share. After the end of the clock only known results are compared."""
    best: tuple[float, ReductionConfig] | None = None
    for name in dict.fromkeys(variant.method for variant in variants):
        ended = trials.clock > end
        if ended and METHODS[name].at_share is None:
            continue  # this method would have to be fitted on images
        setting = trials.setting_at(Variant(name), share)
        count = len(trials.dataset)
        quality = None
        if setting is not None:
            quality = trials.known_quality(setting, count) if ended else trials.quality(setting, count)
        if setting is not None and quality is not None and (best is None or trials.order(quality) < best[0]):
            best = (trials.order(quality), setting)
    return None if best is None else best[1]


def _why_dense(trials: Trials, target: Target) -> str:
    """Say why the dense model is chosen. Raise a ValueError if the target is one that cannot be reached."""
    if target.kind == "max_drop":
        drops = [quality.drop for _, quality in measured(trials) if quality.drop is not None]
        seen = f"the smallest drop was {min(drops):.1f}" if drops else "no drop could be measured"
        return f"No setting that was tried keeps the drop within {target.value:g} points: {seen}. Use the dense model."
    if target.kind == "share":
        raise ValueError(f"No setting that was tried keeps share={target.value:g} or less. Give a higher share.")
    fastest = max((row["speedup"] or 0.0 for row in trials.speeds.values()), default=0.0)
    if fastest > 1:
        raise ValueError(
            f"speedup={target.value:g} cannot be reached on this device at batch {trials.batch_size}: the highest "
            f"speed-up was {fastest:.2f}. Give a lower one, or another batch size."
        )
    return (
        f"No setting that was tried is faster than the dense model on this device at batch {trials.batch_size}. Use "
        "the dense model."
    )


def _with_dense_classes(trials: Trials, images: Dataset, label_column: str, folder: Path, num_workers: int) -> Dataset:
    """Label each image with the class that the dense model gives it, so that accuracy is agreement with that model."""
    options: dict[str, Any] = {"batch_size": trials.batch_size, "num_workers": num_workers, "progress": False}
    unknown = images.add_column(label_column, [0] * len(images))
    report = evaluate_model(
        reduced_as(trials.model, None), unknown, trials.processor, output_dir=folder,
        image_column=trials.image_column, label_column=label_column, **options,
    )  # fmt: skip
    return images.add_column(label_column, report.per_image["predictions"].tolist())


def _rows(
    trials: Trials, comparison: Comparison, shown: list[tuple[ReductionConfig, list[str]]], of_dense_classes: bool
) -> list[dict[str, Any]]:
    """Return the records of the comparison, with their roles and with the results on the images of the search."""
    rows = []
    for row in comparison.rows:
        own = next(((one, roles) for one, roles in shown if one.to_dict() == row["settings"]), None)
        quality = None if own is None else trials.known_quality(own[0])
        row = {name: value for name, value in row.items() if name not in LEFT_OUT}
        row |= {"roles": [] if own is None else own[1], "search": None if quality is None else asdict(quality)}
        if of_dense_classes and not row.get("skipped"):
            # The labels were the dense model's classes, so what looks like accuracy is agreement with it.
            row |= {"agreement": row["top1"], "agreement_interval": row["top1_interval"]}
            row |= dict.fromkeys(("top1", "top1_interval", "top5", "baseline_top1"))
        rows.append(row)
    return rows


def _decided(
    rows: list[dict[str, Any]], target: Target, speed: bool, why: str, order: Callable[[Quality], float]
) -> tuple[dict[str, Any], str]:
    """Return the chosen record, and a reason if it is not the search's choice, because that one is not faster. The
    best of the others by `order` then takes its place."""
    wanted = next((row for row in rows if "chosen" in row["roles"]), rows[0])
    chosen = wanted
    if speed and wanted is not rows[0]:
        # A default keeps the share that was asked for. It was not checked against the other kinds of target.
        roles = {"runner-up", "default"} if target.kind == "share" else {"runner-up"}
        others = [row for row in rows if roles & set(row["roles"]) and row["search"] is not None]
        able = [wanted, *sorted(others, key=lambda row: order(Quality(**row["search"])))]
        paying = [row for row in able if (row["speedup_interval"] or [0])[0] > 1]  # by more than the noise
        chosen = paying[0] if paying else rows[0]
        speed_of_wanted = f"{wanted['name']}, which the search found, "
        if wanted["speedup"] is None:
            speed_of_wanted += "does not run in this runtime at this batch size"
        else:
            speed_of_wanted += f"has {wanted['speedup']:.2f} times the speed of the dense model"
        if not paying:
            batch = rows[0]["speed_batch_size"]
            why = (
                f"No setting that meets the target pays on this device at batch {batch}: {speed_of_wanted}. Use the "
                "dense model."
            )
        elif chosen is not wanted:
            why = f"{speed_of_wanted} on this device, which does not pay. This is the next setting that pays."
    if not why and chosen is wanted and wanted is not rows[0]:
        why = _what_is_missed(wanted, target)
    if chosen is not wanted or wanted is rows[0]:
        wanted["roles"] = [role for role in wanted["roles"] if role != "chosen"]
        chosen["roles"] = ["chosen", *chosen["roles"]]
    return chosen, why


def _what_is_missed(row: dict[str, Any], target: Target) -> str:
    """Say if the held-out images show that the target is missed, although the search met it."""
    drop = row.get("drop")
    if target.kind == "speedup" and row["speedup"] is not None and row["speedup"] < target.value:
        return f"Timed again, its speed-up over dense is {row['speedup']:.2f}, below {target.value:g}."
    if target.kind == "max_drop" and drop is not None and drop > target.value:
        return f"On the held-out images its drop is {drop:.1f} points, above {target.value:g}."
    return ""


def _save(report: TuningReport, trials: Trials, processor: Any, known: Mapping[str, Any]) -> None:
    """Write the chosen model, as `tokenreduce reduce` does, with a record and a card that say how it was found."""
    row = report.chosen
    if row["method"] is None:
        reduced = converted(trials.model, lambda one: reduced_as(one, None))
    else:
        setting = next(one for one in trials.tried() if one.to_dict() == row["settings"])
        reduced, reason = trials.reduced(setting)
        assert reason is None
    chosen = inside(reduced)
    if method_of(chosen.config.reduction).prepare is not None:
        chosen.config.calibrated_share = round(row["search"]["share"], 4)
    record = {
        "base_model": report.model,
        "method": row["method"],
        "settings": row["settings"],
        "tokens_per_layer": row["tokens_per_layer"],
        "mult_adds_ratio": row["mult_adds_ratio"],
        "speedup": row["speedup"],
        "speed_batch_size": row["speed_batch_size"],
        "epochs": 0,
        "seed": report.seed,
        "found_by": report.found_by(),
    }
    if row.get("top1") is not None:
        record |= {name: row.get(name) for name in ("top1", "baseline_top1")} | {"eval_images": row["images"]}
    with model_folder(report.folder / MODEL, with_card=True) as place:
        chosen.save_pretrained(place)
        processor.save_pretrained(place)
        write_whole(place / "record.json", json.dumps(record | dict(known), indent=1))
    write_card(report.folder / MODEL)
