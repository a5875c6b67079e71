"""`TuningReport`: the result of a search, as a table, a picture and a file for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.comparison import Comparison
from ..evaluation.pareto import pareto_plot
from ..files import write_whole


FILE = "tuning.json"
SEARCHED = Path("search") / "images.json"  # digests of the images that the search used
MEANINGS = {
    "share": "at most {:.4g} of the encoder's multiply-adds (0.015 more for methods whose cost depends on the images)",
    "speedup": "at least {:.4g} times the speed of the dense model on this device",
    "max_drop": "a drop of at most {:.4g} points",
}
ROLES = {
    "chosen": "chosen",
    "runner-up": "best of its method",
    "default": "best single default",
    "front": "on the front",
}
LEFT_OUT = ("became_right", "became_wrong", "key")  # only of use inside the folder of the comparison


@dataclass
class TuningReport:
    """The result of `tune`.

    Attributes:
        model: Name of the model.
        target: The target: `kind`, which is "share", "speedup" or "max_drop", and `value`.
        seed: Seed of the split and of the search.
        images: Number of images that were searched on (`search`), and of the others, for the report (`report`).
        labelled: Whether the images have labels. Without labels the drop is 100 minus the agreement with the dense
            model.
        tried: Number of settings that were tried; some may have failed.
        methods: Titles of the methods that were tried.
        seconds: Time of all trials of the search, also of earlier runs that were stopped.
        chosen: The record of the chosen setting among `rows`. If no setting pays or meets the target, it is the record
            of the dense model.
        why: One sentence about the choice, if something else than the target decided.
        begun_from: Name of the reduction that the given model had. The search began with its dense form.
        rows: Records on the held-out images, the dense model first. They are like the records of `compare`, with
            `roles`, and under `search` the results on the images of the search.
        untried: Titles of the methods that the time was too short for, or that cannot run on this model.
        folder: Folder of the report.
    """

    model: str
    target: dict[str, Any]
    seed: int
    images: dict[str, int]
    labelled: bool
    tried: int
    methods: list[str]
    seconds: float
    chosen: dict[str, Any]
    why: str
    begun_from: str | None
    rows: list[dict[str, Any]]
    untried: list[str] = field(default_factory=list)
    folder: Path = field(default=Path())

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but `folder`."""
        values = asdict(self)
        del values["folder"]
        return values

    def found_by(self) -> str:
        """Return the text for the model's card about how its setting was found."""
        wanted = MEANINGS[self.target["kind"]].format(self.target["value"])
        return (
            f"The setting was found by tokenreduce tune for {wanted}, seed {self.seed}: {self._tried()} were "
            f"tried on {self.images['search']} images. {self._quality()}"
        )

    def _tried(self) -> str:
        return f"{self.tried} settings of {len(self.methods)} method{'' if len(self.methods) == 1 else 's'}"

    def _quality(self) -> str:
        """Return one sentence about the chosen setting on the held-out images."""
        row, count = self.chosen, self.images["report"]
        if row["method"] is None:
            return f"The report is on {count} other images."
        start = f"On {count} other images, which the search did not use, "
        if row.get("pooled_cosine") is not None:
            return start + f"the cosine to the dense model's features is {row['pooled_cosine']:.4f}."
        if self.labelled:
            return start + "the accuracy drops by {:.1f} points ({:.1f} to {:.1f}).".format(
                row["drop"], *row["drop_interval"]
            )
        return start + "{:.1f} % of the images ({:.1f} to {:.1f}) keep the dense model's class.".format(
            row["agreement"], *row["agreement_interval"]
        )

    def to_markdown(self) -> str:
        """Return the page of the search: what was chosen and why, and the table of the held-out images."""
        wanted = MEANINGS[self.target["kind"]].format(self.target["value"])
        minutes = f"{self.seconds / 60:.0f} min" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        chosen = self.chosen["name"]
        lines = [
            f"# {self.model}, tuned for {wanted}",
            "",
            f"Chosen: **{chosen}**." + (f" {self.why}" if self.why else ""),
            "",
            f"{self._tried()} ({', '.join(self.methods)}) were tried on "
            f"{self.images['search']} images in {minutes}, with seed {self.seed}. {self._quality()}",
        ]
        if self.untried:
            lines[-1] += f" Not tried: {', '.join(self.untried)}. With more minutes, the same command goes on."
        if self.begun_from is not None:
            lines[-1] += f" The model was already reduced by {self.begun_from}. The search began with its dense form."
        rows = [row | {"name": _named(row)} for row in self.rows]
        lines += ["", "On the images that the search did not use:", "", Comparison(rows, self.folder).to_markdown()]
        lines += [
            "",
            "Intervals cover 95 %. The interval of a drop pairs both models image by image.",
            "",
            "![Quality against cost](pareto.png)",
        ]
        return "\n".join(lines) + "\n"


def _named(row: dict[str, Any]) -> str:
    roles = [ROLES[role] for role in row["roles"]]
    return f"{row['name']} ({', '.join(roles)})" if roles else row["name"]


def write_report(report: TuningReport) -> None:
    """Write report.md, tuning.json, pareto.png and pareto.svg into the report's folder."""
    write_whole(report.folder / FILE, json.dumps(report.to_dict(), indent=1))
    write_whole(report.folder / "report.md", report.to_markdown())
    drawn = [row for row in report.rows if not row.get("skipped")]
    pictures = [report.folder / "pareto.png", report.folder / "pareto.svg"]
    if any(row["method"] is not None for row in drawn):
        pareto_plot(_lines(drawn), pictures, f"{report.model}, {report.images['report']} held-out images")


def _lines(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Choose what the picture shows: the front is one line, and each other method has its own line."""
    front = [row | {"label": "front"} for row in rows if "front" in row["roles"] or "chosen" in row["roles"]]
    others = [row for row in rows if set(row["roles"]) & {"runner-up", "default"} and "chosen" not in row["roles"]]
    return [row for row in rows if row["method"] is None] + others + front


def read_tuned(folder: str | Path) -> dict[str, Any]:
    """Read the report of a search from its folder.

    Args:
        folder: The `output_dir` of `tune`.

    Returns:
        `dict`: The same as `TuningReport.to_dict` returns.

    Example:
        >>> read_tuned("tuned")["chosen"]["settings"]
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {FILE}. Give the folder that tokenreduce tune wrote, after it has ended.")
    return json.loads(file.read_text())
