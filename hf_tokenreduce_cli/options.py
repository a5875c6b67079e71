"""The app, the options that several commands have, and how an answer is printed."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Token reduction for the vision transformers of Hugging Face.",
    epilog="Start with: [bold]tokenreduce demo[/bold]. Of a command: [bold]tokenreduce reduce --help[/bold].",
)
out = Console()

Model = Annotated[str, typer.Argument(help="A folder or a Hub id.", metavar="MODEL")]
Data = Annotated[str, typer.Argument(help="An image folder, one folder per class, or a Hub data set.", metavar="DATA")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of a Hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that the model brings along.")]
Split = Annotated[str | None, typer.Option(help="Of the data. Default: validation, test or train.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use this many images, evenly spread.")]
Batch = Annotated[int, typer.Option(min=1, help="Images at once.")]
Method = Annotated[str, typer.Option("--reduction", "-r", help="The method: tokenreduce methods lists them.")]
Share = Annotated[float | None, typer.Option(help="Of the multiply-adds to keep, such as 0.65.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the model that is in the folder.")]
Settings = Annotated[str, typer.Option("--reduction-args", help="Further settings of the method, JSON.")]

MOST_SHOWN = 48  # entries of a list


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Options of all commands; `--debug` is taken out of the arguments by `main`, wherever it stands."""


def print_answer(answer: dict[str, Any], as_json: bool, title: str) -> None:
    """Print one answer: as JSON, or as a table of its entries."""
    if as_json:
        print(json.dumps(answer, indent=1, default=str))
        return
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in answer.items():
        text = _told(value)
        if value is None:
            text = "depends on the image" if key in ("multiply_adds", "tokens_per_layer") else "none"
        table.add_row(key.replace("_", " "), escape(text))
    out.print(table)


def _told(value: Any) -> str:
    """A value as a person reads it: numbers of four digits, billions as G, an interval by its ends."""
    if isinstance(value, dict):
        return ", ".join(f"{name}={_told(entry)}" for name, entry in value.items())
    if isinstance(value, tuple) and len(value) == 2:
        return f"{_told(value[0])} to {_told(value[1])}"
    if isinstance(value, (list, tuple)):
        more = f" and {len(value) - MOST_SHOWN} more" if len(value) > MOST_SHOWN else ""
        return " ".join(map(_told, value[:MOST_SHOWN])) + more
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if abs(value) >= 1e5:
            return f"{value / 1e9:.2f} G" if abs(value) >= 1e9 else f"{value / 1e6:.1f} M"
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    return str(value)
