"""Small parts of the pages that are made from records: links, numbers and rows of tables."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_tokenreduce.methods import METHODS


ROOT = Path(__file__).resolve().parents[1]


def with_interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.1f} ({low:.1f} to {high:.1f})"


def link(file: Path) -> str:
    return f"../{file.resolve().relative_to(ROOT).as_posix()}"


def known(names: Iterable[str | None]) -> list[str]:
    """The methods among these names, in the order of all tables."""
    given = set(names)
    return [name for name in METHODS if name in given]


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def bold(text: str, wanted: bool) -> str:
    return f"**{text}**" if wanted else text


def signed(value: float) -> str:
    """One digit after the point; a rounded zero has no sign."""
    return f"{round(value, 1) + 0.0:.1f}"


def rule(columns: int) -> str:
    """The line below the header of a table."""
    return "|" + "---|" * columns


def row_of(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
