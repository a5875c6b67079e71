"""The app, the options that several commands share, and how a result is printed."""

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
    epilog="Start with: [bold]tokenreduce demo[/bold]. Help for a command: [bold]tokenreduce reduce --help[/bold].",
)
out = Console()

Model = Annotated[str, typer.Argument(help="Folder or Hub id of the model.", metavar="MODEL")]
Data = Annotated[
    str, typer.Argument(help="Folder with one folder per class, or Hub id of a data set.", metavar="DATA")
]
Images = Annotated[str, typer.Argument(help="Folder or Hub id of images, with or without classes.", metavar="IMAGES")]
Pictures = Annotated[list[str], typer.Argument(help="Images, or folders of images.", metavar="IMAGES...")]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch of the Hub id.", metavar="TEXT")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Split = Annotated[
    str | None, typer.Option(help="Split of the data set. Default: validation, test or train.", metavar="NAME")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most this many images, evenly spread.", metavar="N")]
Batch = Annotated[int, typer.Option(min=1, help="Number of images per batch.", metavar="N")]
Method = Annotated[
    str,
    typer.Option("--reduction", "-r", help="Name of the method. List them by: tokenreduce methods.", metavar="NAME"),
]
Share = Annotated[float | None, typer.Option(help="Share of the multiply-adds to keep, such as 0.65.", metavar="N")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the model in the output folder, also its card and record.")
]
Settings = Annotated[
    str, typer.Option("--reduction-args", help="Further settings of the method, as JSON.", metavar="JSON")
]
ClassNames = Annotated[
    str | None,
    typer.Option(help="Zero-shot classes: a,b,c or a text file. Default: those of DATA.", metavar="NAMES"),
]
Prompt = Annotated[
    list[str],
    typer.Option(help="Zero-shot prompt, such as 'a photo of a {}'. Repeatable.", metavar="TEXT"),
]
Runtime = Annotated[
    str,
    typer.Option(help="Runtime: eager, compiled, recorded, onnx, openvino or openvino-int8.", metavar="NAME"),
]

# What no value means, where it is not "none".
NOT_ONE_NUMBER = {
    **dict.fromkeys(("multiply_adds", "tokens_per_layer", "tokens"), "depends on the image"),
    "batch_size": "any number",
}
MOST_SHOWN = 48  # number of entries of a list that are printed


@app.callback()
def common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Declare the options of all commands. `main` removes `--debug` from the arguments, wherever it is."""


def print_answer(answer: dict[str, Any], as_json: bool, title: str) -> None:
    """Print a result as JSON, or as a table with one row per entry."""
    if as_json:
        print(json.dumps(answer, indent=1, default=str))
        return
    table = Table(title=escape(title), show_header=False, title_justify="left")
    for key, value in answer.items():
        text = _told(value)
        if value is None:
            text = NOT_ONE_NUMBER.get(key, "none")
        table.add_row(key.replace("_", " "), escape(text))
    out.print(table)


def _told(value: Any) -> str:
    """Format a value for reading: numbers with four digits, billions as G, an interval as its two ends."""
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
