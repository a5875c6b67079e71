"""`Comparison`: the results of `compare` as tables, files and a picture."""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_whole
from .pareto import dense_rate, pareto_plot
from .speed_report import conditions_line


COSTS = (
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
DROP = ("drop", "drop_low", "drop_high", "agreement")
COLUMNS = ("name", "method", "top1", "top1_low", "top1_high", "top5", *DROP, *COSTS)
FEATURE_COLUMNS = (
    "name", "method", "knn", "knn_low", "knn_high", *DROP, "pooled_cosine", "patch_cosine", *COSTS,
)  # fmt: skip


@dataclass
class Comparison:
    """The results of `compare`.

    Attributes:
        rows: One record per setting, the dense model first. `pareto_plot` reads these records. A setting that was left
            out has the reason under `skipped`.
        folder: Folder that holds the files.
    """

    rows: list[dict[str, Any]]
    folder: Path

    @property
    def of_features(self) -> bool:
        """Whether features were compared, not the accuracy of a classifier."""
        return any("pooled_cosine" in row for row in self.rows)

    def to_markdown(self) -> str:
        """Return the table in Markdown.

        Each setting was timed in turn with the dense model. Its images/s are its speed-up times the dense model's
        median images/s, so that the rows can be compared.
        """
        rate = dense_rate(self.rows)
        columns = _columns(self.rows, rate)
        lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
        for row in self.rows:
            if not row.get("skipped"):
                lines.append("| " + " | ".join(cell(row) for cell in columns.values()) + " |")
        voted = next((row for row in self.rows if row.get("knn") is not None), None)
        if voted is not None:
            alone = f" {voted['alone']} of the images have no image of their class there." if voted["alone"] else ""
            lines += ["", f"kNN: the {voted['neighbours']} nearest of {voted['bank_images']} images vote.{alone}"]
        if rate is not None:
            how = next(row["speed_settings"] for row in self.rows if row.get("speed_settings"))
            batch = next(row["speed_batch_size"] for row in self.rows if row.get("speed_batch_size"))
            lines += ["", f"{_conditions(how)}, batch {batch}"]
        skipped = [f"- {row['name']}: {row['skipped']}" for row in self.rows if row.get("skipped")]
        return "\n".join([*lines, *(["", "Left out:", "", *skipped] if skipped else [])])


def _conditions(settings: dict[str, Any]) -> str:
    """Return the conditions of a timing in one runtime, which the table names nowhere else."""
    for runtime, version in settings.get("runtimes", {}).items():
        if runtime != "eager":
            types = ", ".join(settings["dtypes"])
            return f"{settings['device']}, {settings['threads']} threads, {runtime} {version}, {types}"
    return conditions_line(settings)


def _columns(rows: list[dict[str, Any]], rate: float | None) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Return for each column of the table its header, and a function that formats its cells."""

    def number(name: str, digits: int) -> Callable[[dict[str, Any]], str]:
        return lambda row: "" if row[name] is None else f"{row[name]:.{digits}f}"

    def known(name: str, digits: int) -> Callable[[dict[str, Any]], str]:
        return lambda row: _with_interval(row[name], row[f"{name}_interval"], digits)

    columns: dict[str, Callable[[dict[str, Any]], str]] = {"setting": lambda row: row["name"]}
    differing = {"drop": known("drop", 1), "same as dense %": number("agreement", 1)}
    if any(row.get("top1") is not None for row in rows):
        columns |= {"top-1 %": known("top1", 1), **differing, "top-5 %": number("top5", 1)}
    elif any(row.get("knn") is not None for row in rows):
        columns |= {"kNN %": known("knn", 1), **differing}
    elif any(row.get("agreement_interval") is not None for row in rows):  # the images have no labels
        columns |= {"same as dense %": known("agreement", 1)}
    if any("pooled_cosine" in row for row in rows):
        columns |= {"cosine, pooled": number("pooled_cosine", 4), "cosine, patches": number("patch_cosine", 4)}
    return columns | {
        "multiply-adds kept": number("mult_adds_ratio", 3),
        "G, p95": lambda row: f"{row['multiply_adds']['mean'] / 1e9:.2f}, {row['multiply_adds']['p95'] / 1e9:.2f}",
        "tokens": lambda row: f"{row['tokens']['mean']:.0f}",
        "images/s": lambda row: "" if None in (rate, row["speedup"]) else f"{rate * row['speedup']:.1f}",
        "speed-up": known("speedup", 2),
    }


def write_comparison(comparison: Comparison, title: str) -> None:
    """Write table.md, results.csv, results.json, pareto.png and pareto.svg into the comparison's folder."""
    folder, rows = comparison.folder, comparison.rows
    write_whole(folder / "results.json", json.dumps(rows, indent=1))
    write_whole(folder / "table.md", f"# {title}\n\n{comparison.to_markdown()}\n")
    with (folder / "results.csv").open("w", newline="") as file:
        columns = FEATURE_COLUMNS if comparison.of_features else COLUMNS
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(_flat(row, columns) for row in rows)
    if any(row["method"] is not None and not row.get("skipped") for row in rows):
        pareto_plot(rows, [folder / "pareto.png", folder / "pareto.svg"], title)


def _flat(row: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    flat = {name: row.get(name) for name in columns}
    for name in ("top1", "knn", "drop", "speedup"):
        if f"{name}_low" in columns:
            flat[f"{name}_low"], flat[f"{name}_high"] = row.get(f"{name}_interval") or (None, None)
    for name in ("multiply_adds", "tokens"):
        flat[name] = row[name]["mean"] if row.get(name) else None
    flat["multiply_adds_p95"] = row["multiply_adds"]["p95"] if row.get("multiply_adds") else None
    flat["settings"] = json.dumps(row.get("settings"))
    return flat


def _with_interval(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
    if value is None:
        return ""
    if interval is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ({interval[0]:.{digits}f} to {interval[1]:.{digits}f})"
