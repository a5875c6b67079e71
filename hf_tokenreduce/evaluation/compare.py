"""`compare`: one model, one data set, many settings: tables and a picture of what each costs and saves."""

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..calibration import calibrate
from ..convert import reduce_tokens
from ..loading import spread
from ..modeling.ats import ATSConfig
from ..modeling.bat import BATConfig
from ..modeling.configuration_base import ReductionConfig
from ..modeling.encoders import facts_of
from ..modeling.evit import EViTConfig
from ..modeling.ltmp import LTMPConfig
from ..modeling.methods import parse_reduction
from ..modeling.sit import SiTConfig
from ..modeling.tome import ToMeConfig
from ..modeling.topk import TopKConfig
from .accuracy import AccuracyReport, evaluate_model
from .pareto import NAMES, dense_rate, pareto_plot
from .resume import (
    append_line,
    digest,
    digest_of_data,
    digest_of_model,
    read_lines,
    refuse_other_settings,
    write_whole,
)
from .speed import benchmark, device_name
from .speed_report import conditions_line


logger = logging.get_logger(__name__)

CALIBRATED = ("ltmp", "sit")

COLUMNS = (
    "name",
    "method",
    "top1",
    "top1_low",
    "top1_high",
    "top5",
    "drop",
    "drop_low",
    "drop_high",
    "agreement",
    "mult_adds_ratio",
    "multiply_adds",
    "multiply_adds_p95",
    "tokens",
    "images_per_second",
    "speedup",
    "speedup_low",
    "speedup_high",
    "skipped",
    "settings",
)


@dataclass
class Comparison:
    """rows: a record per setting, the dense model's first, with the keys that `pareto_plot` reads; a setting that was
    left out has the reason under `skipped`. folder: where the files are."""

    rows: list[dict[str, Any]]
    folder: Path

    def to_markdown(self) -> str:
        """Images/s are the speed-up, measured beside the dense model each time, times its median rate."""
        rate = dense_rate(self.rows)
        lines = [
            "| setting | top-1 % | drop | same as dense % | top-5 % | multiply-adds kept | G, p95 | tokens | images/s "
            "| speed-up |",
            "|---" * 10 + "|",
        ]
        for row in self.rows:
            if row.get("skipped"):
                continue
            cells = [
                row["name"],
                _with_interval(row["top1"], row["top1_interval"], 1),
                _with_interval(row["drop"], row["drop_interval"], 1),
                "" if row["agreement"] is None else f"{row['agreement']:.1f}",
                f"{row['top5']:.1f}",
                f"{row['mult_adds_ratio']:.3f}",
                f"{row['multiply_adds']['mean'] / 1e9:.2f}, {row['multiply_adds']['p95'] / 1e9:.2f}",
                f"{row['tokens']['mean']:.0f}",
                "" if rate is None else f"{rate * row['speedup']:.1f}",
                _with_interval(row["speedup"], row["speedup_interval"], 2),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        if rate is not None:
            how = next(row["speed_settings"] for row in self.rows if row.get("speed_settings"))
            batch = next(row["speed_batch_size"] for row in self.rows if row.get("speed_batch_size"))
            lines += ["", f"{conditions_line(how)}, batch {batch}"]
        skipped = [f"- {row['name']}: {row['skipped']}" for row in self.rows if row.get("skipped")]
        return "\n".join([*lines, *(["", "Left out:", "", *skipped] if skipped else [])])


def compare(
    model: PreTrainedModel,
    dataset: Dataset,
    processor: Any,
    reductions: Sequence[ReductionConfig | dict[str, Any] | None] | None = None,
    *,
    output_dir: str | Path,
    batch_size: int = 32,
    num_workers: int = 0,
    image_column: str = "image",
    label_column: str = "label",
    calibration_images: int = 100,
    calibration_dataset: Dataset | None = None,
    speed: bool = True,
    speed_batch_size: int | None = None,
    repeats: int = 11,
    progress: bool = True,
) -> Comparison:
    """Measure the dense model and each reduction of it; write table.md, results.csv, results.json, pareto.png and
    pareto.svg into `output_dir`.

    model: a classifier, stock or reduced. A reduction that it has already is measured with what it has learned.
    reductions: None: `default_reductions`. Those that need it, LTMP and SiT, are calibrated without labels on
        `calibration_images` images, evenly spread over `calibration_dataset` or else over `dataset`; LTMP to its
        `target`. DL-ViT without a trained filter is left out, and says so.
    speed: also time each setting in turn with the dense model, on images of the data set, `speed_batch_size` (None:
        `batch_size`) at once, `repeats` times.

    Every result is kept as it comes, in results.jsonl and, image by image, in `settings/`. Called again, also with
    more reductions, only what is missing is measured. It runs in one process; `evaluate_model` in any number.
    """
    config = model.config
    dense = reduce_tokens(model, None).eval()
    reductions = default_reductions(config) if reductions is None else reductions
    wanted: list[ReductionConfig | None] = [None]
    for reduction in map(parse_reduction, reductions):
        if reduction is not None:
            reduction.check_fit(facts_of(dense.config))
        if reduction not in wanted:
            wanted.append(reduction)
    speed_batch_size = batch_size if speed_batch_size is None else speed_batch_size
    data: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    folder = Path(output_dir)
    (folder / "settings").mkdir(parents=True, exist_ok=True)
    source = dataset if calibration_dataset is None else calibration_dataset
    settings = {
        "model": digest_of_model(dense),
        "data": digest_of_data(dataset, image_column, list(dataset.with_format(None)[label_column])),
        "processor": json.loads(json.dumps(processor.to_dict(), default=str)),
        "calibration": [calibration_images, calibration_dataset and digest_of_data(source, image_column, [])],
        "speed": _conditions(dense, speed_batch_size, repeats) if speed else None,
    }
    if not (folder / "settings.json").is_file():
        write_whole(folder / "settings.json", json.dumps(settings, indent=1))
    refuse_other_settings(folder / "settings.json", settings)

    images = None
    if speed:
        images = _pixels(dataset, processor, image_column, 2 * speed_batch_size).to(model.device)
    done = {row["key"]: row for row in read_lines(folder / "results.jsonl")}
    dense_report: AccuracyReport | None = None
    rows = []
    bar = logging.tqdm(wanted, desc="settings", disable=not progress)
    for reduction in bar:
        same = reduction is not None and reduction == parse_reduction(getattr(config, "reduction", None))
        reduced = reduce_tokens(model, reduction).eval()
        key = _key(reduction, digest_of_model(reduced) if same else "")
        name = describe(reduction)
        if key not in done:
            bar.set_postfix_str(name)
            reason = _why_not(reduced)
            if reason is None and reduction is not None and reduction.method in CALIBRATED and not same:
                reason = _calibrate_once(
                    reduced, folder / "settings" / f"{key}.safetensors", source, processor, image_column,
                    calibration_images,
                )  # fmt: skip
            row: dict[str, Any] = {"key": key, "name": name, "method": reduction and reduction.method}
            if reason is not None:
                row |= {"skipped": reason, "settings": reduction and reduction.to_dict(), "top1": None}
                logger.warning(f"{name} is left out: {reason}")
            else:
                options = {**data, "batch_size": batch_size, "num_workers": num_workers, "progress": progress}
                if dense_report is None:  # read, not computed, if it is there already
                    where = folder / "settings" / _key(None, "")
                    dense_report = evaluate_model(dense, dataset, processor, output_dir=where, **options)
                report = dense_report
                if reduction is not None:
                    report = evaluate_model(
                        reduced,
                        dataset,
                        processor,
                        dense=dense_report,
                        output_dir=folder / "settings" / key,
                        **options,
                    )
                row |= report.to_dict()
                if reduction is None:
                    row |= {"baseline_top1": row["top1"], "drop": None}
                row |= _timed(reduced, dense, images, speed_batch_size, repeats)
            append_line(folder / "results.jsonl", row)
            done[key] = json.loads(json.dumps(row))
        rows.append(done[key])
    comparison = Comparison(rows, folder)
    _write(comparison, f"{Path(config.name_or_path or type(model).__name__).name}, {len(dataset)} images")
    return comparison


def default_reductions(config: PreTrainedConfig, shares: Sequence[float] = (0.8, 0.65, 0.5)) -> list[ReductionConfig]:
    """Settings of every method that runs untrained which keep these shares of the multiply-adds of a backbone; those
    that cannot keep so little are left out. ATS, which has no setting for a share, samples from all tokens, from half
    and from a quarter of them. Layers are those the methods have on 12 layers, moved in proportion."""
    facts = facts_of(config)
    depth = facts.num_hidden_layers

    def moved(*layers: int) -> tuple[int, ...]:
        return tuple(sorted({layer * depth // 12 for layer in layers}))

    thirds, late = moved(3, 6, 9), moved(5, 8, 9)
    placed: list[tuple[type[ReductionConfig], dict[str, Any]]] = [
        (ToMeConfig, {}),
        (TopKConfig, {"layers": thirds}),
        (EViTConfig, {"layers": thirds}),
        (BATConfig, {"layers": thirds}),
        (SiTConfig, {"layers": late}),
    ]
    found: list[ReductionConfig] = []
    for method, options in placed:
        for share in shares:
            try:
                found.append(method.for_budget(config, share, **options))
            except ValueError as error:
                if "cannot be reached" not in str(error):
                    raise
                logger.warning(f"{method.__name__} at {share} is left out: {error}")
    half = math.ceil(facts.num_patches / 2)
    points = [None, half, half // 2]
    found += [ATSConfig(layers=tuple(range(depth // 4, depth)), num_tokens=count) for count in points]
    return [*found, *(LTMPConfig(target=share) for share in shares)]


def describe(reduction: ReductionConfig | None) -> str:
    """A short name of a setting: what differs from the method's defaults."""
    if reduction is None or reduction.method is None:
        return "dense"
    values, usual = reduction.to_dict(), type(reduction)().to_dict()
    shown = {"tome": ("r",), "ltmp": ("target",)}.get(reduction.method, ("keep_rate",))
    parts = []
    for name, value in values.items():
        if name == "method" or value is None or (name not in shown and value == usual[name]):
            continue
        if isinstance(value, list) and len(set(value)) > 1 and name == "r":
            value = f"{min(value)} to {max(value)}"
        elif isinstance(value, float):
            value = f"{value:.4g}"
        parts.append(f"{name}={value}".replace("[", "(").replace("]", ")"))
    return " ".join([NAMES.get(reduction.method, reduction.method), ", ".join(parts)]).strip()


def _why_not(model: PreTrainedModel) -> str | None:
    reduction = model.config.reduction
    if reduction is not None and reduction.method == "dlvit" and not model.config.reduction.trained:
        return "its filter is not trained, so it would keep every token; fit it by hf_tokenreduce.training.fit_filter"
    return None


def _calibrate_once(
    model: PreTrainedModel, file: Path, source: Dataset, processor: Any, image_column: str, most: int
) -> str | None:
    """Learn what the method needs, or read what was learned before. Returns why it could not be."""
    parameters = {name: p for name, p in model.named_parameters() if ".reducer." in name}
    if file.is_file():
        known = load_file(file)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(known[name])
        return None
    pixels = _pixels(source, processor, image_column, most)
    target = model.config.reduction.target if model.config.reduction.method == "ltmp" else None
    try:
        calibrate(model, pixels, target, max_images=most)
    except ValueError as error:
        return str(error)
    part = file.with_suffix(".part")
    save_file({name: p.detach().contiguous() for name, p in parameters.items()}, part)
    part.replace(file)
    return None


def _pixels(dataset: Dataset, processor: Any, image_column: str, most: int) -> Tensor:
    """Of at most so many images, evenly spread."""
    photos = dataset.with_format(None).select(spread(len(dataset), most))[image_column]
    return torch.cat([processor(photo.convert("RGB"), return_tensors="pt")["pixel_values"] for photo in photos])


def _conditions(model: PreTrainedModel, batch_size: int, repeats: int) -> dict[str, Any]:
    """Times of other conditions do not go into one table."""
    return {
        "batch_size": batch_size,
        "repeats": repeats,
        "device": device_name(model.device),
        "threads": torch.get_num_threads(),
        "attention": model.config._attn_implementation,
        "torch": torch.__version__,
    }


def _timed(
    reduced: PreTrainedModel, dense: PreTrainedModel, images: Tensor | None, batch_size: int, repeats: int
) -> dict[str, Any]:
    if images is None:
        names = ("images_per_second", "dense_images_per_second", "speedup", "speedup_interval", "speed_batch_size")
        return dict.fromkeys(names)
    others: dict[str, Any] = {"batch_sizes": [batch_size], "repeats": repeats, "progress": False}
    others |= {"oracle": False, "breakdown": False, "memory": False}
    is_dense = reduced.config.reduction is None
    report = benchmark({"dense": dense} if is_dense else {"dense": dense, "reduced": reduced}, images, **others)
    row = report.row("dense" if is_dense else "reduced")
    return {
        "images_per_second": row.images_per_second,
        "dense_images_per_second": report.row("dense").images_per_second,
        "speedup": row.speedup,
        "speedup_interval": row.speedup_interval,
        "speed_batch_size": batch_size,
        "speed_settings": report.settings,
    }


def _write(comparison: Comparison, title: str) -> None:
    folder, rows = comparison.folder, comparison.rows
    write_whole(folder / "results.json", json.dumps(rows, indent=1))
    write_whole(folder / "table.md", f"# {title}\n\n{comparison.to_markdown()}\n")
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(_flat(row) for row in rows)
    if any(row["method"] is not None and row["top1"] is not None for row in rows):
        pareto_plot(rows, [folder / "pareto.png", folder / "pareto.svg"], title)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat = {name: row.get(name) for name in COLUMNS}
    for name in ("top1", "drop", "speedup"):
        low, high = row.get(f"{name}_interval") or (None, None)
        flat |= {f"{name}_low": low, f"{name}_high": high}
    for name in ("multiply_adds", "tokens"):
        flat[name] = row[name]["mean"] if row.get(name) else None
    flat["multiply_adds_p95"] = row["multiply_adds"]["p95"] if row.get("multiply_adds") else None
    flat["settings"] = json.dumps(row.get("settings"))
    return flat


def _key(reduction: ReductionConfig | None, learned: str) -> str:
    how = None if reduction is None else reduction.to_dict()
    name = "dense" if reduction is None else str(reduction.method)
    return f"{name}-{digest([json.dumps(how, sort_keys=True).encode(), learned.encode()])[:12]}"


def _with_interval(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
    if value is None:
        return ""
    if interval is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
