"""`BenchmarkReport`: the results of `benchmark` as rows, tables and files, and several reports combined into one."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..timing import coverage
from .breakdown import PARTS


COMPARABLE = ("device", "threads", "dtypes", "attention", "runtimes", "torch")


def conditions_line(settings: Mapping[str, Any]) -> str:
    """Return the conditions of a timing in one line."""
    s = settings
    return f"{s['device']}, {s['threads']} threads, {s['attention']} attention, torch {s['torch']}"


@dataclass
class SpeedRow:
    """The speed of one model at one batch size and dtype in one runtime.

    Attributes:
        name: Name of the model.
        method: Name of its method. None: the model is not reduced.
        batch_size: Number of images per batch.
        dtype: Name of the floating type.
        runtime: Name of the runtime.
        tokens: Number of tokens that leave the last layer: mean, least and most over the images.
        p50_ms: Median time of a batch, in milliseconds.
        p95_ms: 95 % of the batches took at most this time, in milliseconds.
        images_per_second: Images per second, from the median time.
        speedup: Speed-up over dense: the median of the ratios in each repeat.
        speedup_interval: Interval of that median, of 95 % from 6 repeats on. With 5 it covers 94 %, with 3 only 75 %.
        speedup_over_first: Speed-up over dense in the first of several runtimes: the gain of reduction and runtime
            together.
        oracle_share: Time of the slice oracle divided by the model's time: how much of the ideal is reached.
        oracle_share_interval: Interval of `oracle_share`.
        over_padded: Time of the oracle that is cut to the longest image of the batch, divided by the model's time. It
            is for methods that keep different numbers of tokens.
        peak_memory_mib: Peak memory in MiB, above what the model and the images take.
        memory_over_dense: Peak memory divided by the dense model's.
        breakdown: Share of the time of each part, see `hf_tokenreduce.evaluation.breakdown`.
        nearest: For a model that is not shown to pay, the nearest setting of its method that is, and its speed-up.
    """

    name: str
    method: str | None
    batch_size: int
    dtype: str
    runtime: str
    tokens: dict[str, float]
    p50_ms: float
    p95_ms: float
    images_per_second: float
    speedup: float
    speedup_interval: tuple[float, float]
    speedup_over_first: float | None = None
    oracle_share: float | None = None
    oracle_share_interval: tuple[float, float] | None = None
    over_padded: float | None = None
    peak_memory_mib: float | None = None
    memory_over_dense: float | None = None
    breakdown: dict[str, float] | None = None
    nearest: tuple[dict[str, Any], float] | None = None

    @property
    def pays(self) -> bool:
        """Whether the model is faster than dense, by more than the noise."""
        return self.speedup_interval[0] > 1


@dataclass
class BenchmarkReport:
    """The results of `benchmark`.

    Attributes:
        settings: The device, and how time was measured. Only reports with the same conditions can be combined.
        rows: One row for each model, batch size, dtype and runtime.
        left_out: What could not be timed, and why.
    """

    settings: dict[str, Any]
    rows: list[SpeedRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def row(
        self, name: str, batch_size: int | None = None, dtype: str | None = None, runtime: str | None = None
    ) -> SpeedRow:
        """Return the only row of a model, for the batch size, dtype and runtime that are given.

        Raises:
            ValueError: There is no such row, or there are several.
        """
        wanted = (name, batch_size, dtype, runtime)
        found = [
            row
            for row in self.rows
            if all(value in (None, own) for value, own in zip(wanted, _identity(row), strict=True))
        ]
        if len(found) != 1:
            known = sorted(set(map(_identity, self.rows)))
            raise ValueError(f"{len(found)} rows match {wanted}. Name one of {known}.")
        return found[0]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a dictionary, which `from_dict` reads."""
        return {"settings": self.settings, "rows": [asdict(row) for row in self.rows], "left_out": self.left_out}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "BenchmarkReport":
        """Make a report from the result of `to_dict`."""
        rows = [SpeedRow(**row) for row in values["rows"]]
        for row in rows:
            row.speedup_interval = tuple(row.speedup_interval)  # type: ignore[assignment]
            if row.oracle_share_interval is not None:
                row.oracle_share_interval = tuple(row.oracle_share_interval)  # type: ignore[assignment]
            if row.nearest is not None:
                row.nearest = tuple(row.nearest)  # type: ignore[assignment]
        return cls(dict(values["settings"]), rows, list(values.get("left_out", [])))

    def save(self, path: str | Path) -> None:
        """Write the report to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> "BenchmarkReport":
        """Read a report from a JSON file."""
        return cls.from_dict(json.loads(Path(path).read_text()))

    def to_markdown(self) -> str:
        """Return the report as tables in Markdown."""
        s = self.settings
        first = next(iter(s["runtimes"]))
        lines = [
            f"{conditions_line(s)}; medians of {s['repeats']} repeats in turn"
            + (f", in brackets their intervals of {coverage(s['repeats']):.0f} %" if s["repeats"] > 1 else ""),
            "",
            "| model | runtime | batch | dtype | tokens leaving | ms | p95 | images/s | speed-up over dense "
            f"| over dense {first} | of the oracle | over padded | peak MiB | peak over dense |",
            "|---" * 14 + "|",
        ]
        for row in self.rows:
            low, high = row.speedup_interval
            least, most = row.tokens["min"], row.tokens["max"]
            spread = "" if least == most else f" ({least:.0f}-{most:.0f})"
            cells = [
                row.name,
                row.runtime,
                str(row.batch_size),
                row.dtype,
                f"{row.tokens['mean']:.0f}{spread}",
                f"{row.p50_ms:.1f}",
                f"{row.p95_ms:.1f}",
                f"{row.images_per_second:.1f}",
                f"{row.speedup:.2f} ({low:.2f}-{high:.2f})",
                _cell(row.speedup_over_first),
                _cell(row.oracle_share),
                _cell(row.over_padded),
                _cell(row.peak_memory_mib, 0),
                _cell(row.memory_over_dense),
            ]
            lines.append("| " + " | ".join(cells) + " |")
        lines += self._what_columns_mean()
        lines += self._what_does_not_pay()
        lines += ["", *(f"- Left out: {text}." for text in self.left_out)] if self.left_out else []
        with_parts = [row for row in self.rows if row.breakdown is not None]
        if with_parts:
            parts = [*PARTS[::-1], "other"]
            lines += ["", "Share of the time, %:", "", "| model | batch | dtype | " + " | ".join(parts) + " |"]
            lines.append("|---" * (3 + len(parts)) + "|")
            for row in with_parts:
                shares = row.breakdown or {}
                cells = [row.name, str(row.batch_size), row.dtype, *(f"{100 * shares[part]:.0f}" for part in parts)]
                lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)

    def _what_columns_mean(self) -> list[str]:
        """Return a line about each column that a reader cannot guess, if it has values."""
        lines = []
        if any(row.oracle_share is not None for row in self.rows):
            lines.append(
                "- Of the oracle: the speed, as a part of that of the dense model cut to the same numbers of tokens "
                "at no cost."
            )
        if any(row.over_padded is not None for row in self.rows):
            lines.append(
                "- Over padded: the speed, as a multiple of that of the dense model cut to the longest image of each "
                "batch."
            )
        if any(row.memory_over_dense is not None for row in self.rows):
            lines.append("- Peak MiB: the most memory that a forward pass takes.")
        return ["", *lines] if lines else []

    def _what_does_not_pay(self) -> list[str]:
        """Return a line of advice for each reduced model that is not faster than dense, as far as the timing shows."""
        lines = []
        for row in self.rows:
            if row.method is None or row.pays:
                continue
            paying = [
                other.batch_size
                for other in self.rows
                if (other.name, other.dtype, other.runtime) == (row.name, row.dtype, row.runtime) and other.pays
            ]
            what, advice = f"{row.name} does not pay", "Use the dense model here."
            if row.speedup > 1:  # the interval reaches below 1, so the noise may be larger than the gain
                what = f"It is not certain that {row.name} pays"
                advice = "Measure with more repeats while the machine does nothing else."
            if row.nearest is not None:
                setting, speedup = row.nearest
                advice = f"The nearest setting of its method that pays: {json.dumps(setting)}, {speedup:.2f} x dense."
            elif paying:
                nearest = min(paying, key=lambda size: abs(size - row.batch_size))
                advice += f" At batch {nearest} the reduction pays."
            low, high = row.speedup_interval
            lines.append(
                f"- {what} on this device at batch {row.batch_size} in {row.dtype}, {row.runtime}: "
                f"{row.speedup:.2f} x dense ({low:.2f} to {high:.2f}). {advice}"
            )
        return ["", *lines] if lines else []


def combine(reports: Iterable[BenchmarkReport | Mapping[str, Any]]) -> BenchmarkReport:
    """Combine several reports into one, if they were measured under the same conditions.

    Args:
        reports: Reports, or their dictionary forms.

    Returns:
        One report with all rows.

    Raises:
        ValueError: The conditions differ, or two reports have rows with the same name.

    Example:
        >>> combine([BenchmarkReport.load("a.json"), BenchmarkReport.load("b.json")]).to_markdown()
    """
    read = [report if isinstance(report, BenchmarkReport) else BenchmarkReport.from_dict(report) for report in reports]
    if not read:
        raise ValueError("There are no reports to combine.")
    settings = read[0].settings
    for other in read[1:]:
        for name in COMPARABLE:
            if other.settings[name] != settings[name]:
                raise ValueError(
                    f"These reports cannot be compared: {name} is {settings[name]!r} in one and "
                    f"{other.settings[name]!r} in another. Measure again under the same conditions."
                )
    rows: dict[tuple[Any, ...], SpeedRow] = {}
    for row in (row for report in read for row in report.rows):
        key = _identity(row)
        if row.method is not None and key in rows:
            raise ValueError(f"Two reports have a row {key}. Give the models different names, or leave one out.")
        rows.setdefault(key, row)  # every report has the dense model, and its rows differ only by noise
    left_out = [text for report in read for text in report.left_out]
    return BenchmarkReport(dict(settings), list(rows.values()), left_out)


def _identity(row: SpeedRow) -> tuple[Any, ...]:
    return row.name, row.batch_size, row.dtype, row.runtime


def _cell(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"
