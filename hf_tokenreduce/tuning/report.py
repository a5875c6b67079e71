"""`TuningReport`: what a search found, as a table, a picture and a file for programs."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.comparison import Comparison
from ..evaluation.pareto import pareto_plot
from ..files import write_whole


FILE = "tuning.json"
SEARCHED = Path("search") / "images.json"  # the images that were searched on, by their content
MEANINGS = {
    "share": "at most {:.4g} of the encoder's multiply-adds (0.015 more where it depends on the images)",
    "speedup": "at least {:.4g} times as fast as dense on this device",
    "max_drop": "a drop of at most {:.4g} points",
}
ROLES = {
    "chosen": "chosen",
    "runner-up": "best of its method",
    "default": "best single default",
    "front": "on the front",
}
LEFT_OUT = ("became_right", "became_wrong", "key")  # rows of the data set, and a file's name


@dataclass
class TuningReport:
    """What `tune` found.

    model: its name
    target: {"kind": "share", "speedup" or "max_drop", "value"}
    images: how many were searched on, and how many others it is reported on
    labelled: whether the images have labels. Without them a drop is what agreement with the dense model lacks of 100.
    tried, methods: how many settings of which methods were tried; some may have failed
    seconds: what the trials of the search took, over all runs of it
    chosen: the record of the chosen setting among `rows`; the dense model's if none pays or does what was asked for
    why: what decided, in a sentence, if it was not the target alone
    begun_from: what the given model was reduced by, if it was; the search began with its dense form
    rows: records on the held-out images, the dense model's first. They have what records of `compare` have, `roles`,
        and under `search` what was measured on the images of the search.
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
    folder: Path = field(default=Path())

    def to_dict(self) -> dict[str, Any]:
        """All but `folder`."""
        values = asdict(self)
        del values["folder"]
        return values

    def found_by(self) -> str:
        """Say for the model's card how its setting was found."""
        wanted = MEANINGS[self.target["kind"]].format(self.target["value"])
        return (
            f"The setting was found by tokenreduce tune for {wanted}, seed {self.seed}: {self.tried} settings of "
            f"{len(self.methods)} methods were tried on {self.images['search']} images. {self._judged()}"
        )

    def _judged(self) -> str:
        row, count = self.chosen, self.images["report"]
        if row["method"] is None:
            return f"The report is on {count} other images."
        known = f"On {count} other images, which the search never saw, "
        if row.get("pooled_cosine") is not None:
            return known + f"the cosine to the dense model's features is {row['pooled_cosine']:.4f}."
        if self.labelled:
            return known + "the drop of the accuracy is {:.1f} points ({:.1f} to {:.1f}).".format(
                row["drop"], *row["drop_interval"]
            )
        return known + "{:.1f} % of the images ({:.1f} to {:.1f}) keep the dense model's class.".format(
            row["agreement"], *row["agreement_interval"]
        )

    def to_markdown(self) -> str:
        """The page of the search: what was chosen and why, and the table of the held-out images."""
        wanted = MEANINGS[self.target["kind"]].format(self.target["value"])
        minutes = f"{self.seconds / 60:.0f} min" if self.seconds >= 90 else f"{self.seconds:.0f} s"
        chosen = self.chosen["name"]
        lines = [
            f"# {self.model}, tuned for {wanted}",
            "",
            f"Chosen: **{chosen}**." + (f" {self.why}" if self.why else ""),
            "",
            f"{self.tried} settings of {len(self.methods)} methods ({', '.join(self.methods)}) were tried on "
            f"{self.images['search']} images in {minutes}, with seed {self.seed}. {self._judged()}",
        ]
        if self.begun_from is not None:
            lines[-1] += f" The model was reduced already, by {self.begun_from}: the search began with its dense form."
        rows = [row | {"name": _named(row)} for row in self.rows]
        lines += ["", "On the images that the search never saw:", "", Comparison(rows, self.folder).to_markdown(), ""]
        lines += [
            "Intervals are of 95 %; those of a drop are paired with the dense model on the same images.",
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
    """Choose what the picture shows: the front is a line of its own, and the others go by their method."""
    front = [row | {"label": "front"} for row in rows if "front" in row["roles"] or "chosen" in row["roles"]]
    others = [row for row in rows if set(row["roles"]) & {"runner-up", "default"} and "chosen" not in row["roles"]]
    return [row for row in rows if row["method"] is None] + others + front


def read_tuned(folder: str | Path) -> dict[str, Any]:
    """Read what a search found from its folder.

    Args:
        folder: What `tune` was given as `output_dir`.

    Returns:
        `dict`: As `TuningReport.to_dict` gives it.

    Example:
        >>> read_tuned("tuned")["chosen"]["settings"]
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise ValueError(f"{folder} has no {FILE}. Give the folder that tokenreduce tune wrote, when it has ended.")
    return json.loads(file.read_text())
