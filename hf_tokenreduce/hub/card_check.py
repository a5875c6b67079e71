"""Check that the card in a folder describes the model that is there."""

import json
import re
from pathlib import Path
from typing import Any

from ..methods import METHODS, method_of
from .card_text import sections, split


def check_card(folder: Path, files: dict[str, int], config: Any) -> None:
    """Raise a ValueError if the section that this library wrote names other settings than config.json has."""
    if "README.md" not in files:
        return
    _, body = split((folder / "README.md").read_text(encoding="utf-8-sig", errors="replace"))
    place = sections(body).get("method")
    if place is None:
        return
    text = body[slice(*place)]
    in_card = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|$", text, re.MULTILINE))
    in_config = {} if config.reduction is None else dict(settings_rows(config.reduction))
    different = sorted(name for name in {*in_card, *in_config} if in_card.get(name) != in_config.get(name))
    others = [method.title for method in METHODS.values() if f"token reduction by {method.title}, made with" in text]
    if others and method_of(config.reduction).title not in others:
        different.insert(0, "the method")
    if different:
        raise ValueError(
            f"README.md tells of another model than config.json: they differ in {', '.join(different)}. Write the "
            "card anew: tokenreduce card FOLDER."
        )


def settings_rows(reduction: Any) -> list[tuple[str, str]]:
    """Return the settings of a method, name and value, as a card shows them."""
    return [(name, f"`{json.dumps(value)}`") for name, value in reduction.to_dict().items() if name != "method"]
