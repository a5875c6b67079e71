"""How the command line prints what a command found."""

import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


out = Console()


def print_answer(answer: dict[str, Any], as_json: bool, title: str) -> None:
    """Print one answer, as JSON or as a table of its entries."""
    if as_json:
        print(json.dumps(answer, indent=1, default=str))
        return
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in answer.items():
        if value is None:
            value = "depends on the image" if key in ("multiply_adds", "tokens_per_layer") else "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{name}={entry}" for name, entry in value.items())
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 100_000:
            value = f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"
        table.add_row(key.replace("_", " "), escape(str(value)))
    out.print(table)
