"""What the documentation says of methods, made from their descriptions: a table, and a page for each."""

import inspect
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from . import METHODS
from .method import Method


HEADER = (
    "| method | what it does with tokens | tokens per image | to keep a share it needs | our own decisions |",
    "|---|---|---|---|---|",
)
NEEDS = {"nothing": "nothing", "images": "unlabelled images, or training", "labels": "labels, a filter, fine-tuning"}
PAPER = (
    "`--recipe paper` also turns on the strong augmentation, and its batch is that of all devices together. `quick` "
    "is our own."
)
_TRAINED = {
    "nothing": "`tokenreduce train MODEL -r {name} --recipe quick ...`",
    "images": "`tokenreduce train MODEL -r {name} --recipe quick ...`",
    "labels": "Once it has learned from labels, `tokenreduce train FOLDER --recipe quick ...`",
}
MADE = "<!-- Made by python -m hf_tokenreduce.methods docs. Change hf_tokenreduce/methods/ instead. -->"


def methods_table() -> str:
    """Make the Markdown table with a row for every method.

    Returns:
        `str`: The table, without a line break at its end.

    Example:
        >>> print(methods_table())
    """
    return "\n".join([*HEADER, *map(_row, METHODS.values())])


def methods_rows() -> list[dict[str, str]]:
    """Say shortly of every method what a user chooses by.

    Returns:
        `list` of `dict`: Name, title, what it does, whether images keep different numbers of tokens, what it needs.

    Example:
        >>> [row["name"] for row in methods_rows()]
    """
    return [
        {
            "name": method.name,
            "method": method.title,
            "what it does with tokens": method.family,
            "tokens per image": _tokens(method),
            "to keep a share it needs": _needs(method),
        }
        for method in METHODS.values()
    ]


def method_page(method: Method) -> str:
    """Make the page of a method in the documentation.

    Args:
        method (`Method`): The description.

    Returns:
        `str`: Markdown.

    Example:
        >>> print(method_page(METHODS["tome"]))
    """
    paper = ""
    if method.paper is not None:
        paper = f"Paper: *{method.paper}*, [arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv}).\n"
    images = "" if method.any_image_size else " Images must have the size that the model was made for."
    parts = [
        (f"# {method.title}", f"{MADE}\n\n{method.summary}\n\n{paper}"),
        ("## How it works", method.details),
        ("## Use it", _usage(method)),
        ("## Settings", _settings(method)),
        ("## Train it", _recipes(method)),
        ("## Limits", (method.limits + images).strip()),
        ("## Our own decisions", method.ours and method.ours[0].upper() + method.ours[1:] + "."),
    ]
    return "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in parts if text) + "\n"


def methods_page() -> str:
    """Make the page that leads to those of the methods.

    Returns:
        `str`: Markdown.

    Example:
        >>> print(methods_page())
    """
    links = [f"- [{method.title}](methods/{method.name}.md): {method.summary}" for method in METHODS.values()]
    return "\n".join(
        [
            "# The methods",
            "",
            MADE,
            "",
            "Layer numbers begin at 0. Class, distillation and other prefix tokens are never merged, dropped or "
            "counted in a rate. All settings are checked when they are made, and again against the backbone.",
            "",
            methods_table(),
            "",
            *links,
            "",
        ]
    )


def write_pages(docs: str | Path) -> None:
    """Write the pages into a folder of documentation.

    Args:
        docs: The folder, which gets `methods.md` and `methods/<name>.md`.

    Example:
        >>> write_pages("docs")
    """
    folder = Path(docs) / "methods"
    folder.mkdir(exist_ok=True)
    (folder.parent / "methods.md").write_text(methods_page())
    for method in METHODS.values():
        (folder / f"{method.name}.md").write_text(method_page(method))


def _tokens(method: Method) -> str:
    return "as many as it needs" if method.is_adaptive(method.config_class()) else "the same for all"


def _needs(method: Method) -> str:
    if method.at_share is None:
        return "unlabelled images" if method.fit_share is not None else "settings of its own"
    return NEEDS[method.needs]


def _row(method: Method) -> str:
    paper = "" if method.arxiv is None else f", after [{method.arxiv}](https://arxiv.org/abs/{method.arxiv})"
    return (
        f"| {method.title}: `{method.config_class.__name__}` | {method.family}{paper} | {_tokens(method)} | "
        f"{_needs(method)} | {method.ours} |"
    )


def _usage(method: Method) -> str:
    if method.needs == "labels":
        why = method.why_not(method.config_class())
        start = (
            f'```python\nstart = reduce_tokens(model, "{method.name}")  # reduces nothing until it has learned\n```'
        )
        return f"{start}\n\nIt needs {_needs(method)}. On a checkpoint as it is, {why}."
    if method.at_share is None and method.fit_share is None:
        return f"`reduce_tokens(model, {method.config_class.__name__}(...))` with its settings."
    fitted = method.prepare is not None or method.at_share is None
    images = ', images="photos", image_processor=processor' if fitted else ""
    option = " --images photos" if fitted else ""
    return (
        f'```python\nreduced = reduce_tokens(model, "{method.name}", share=0.65{images})\n```\n\n'
        f"The same from a terminal: `tokenreduce reduce MODEL -r {method.name} --share 0.65{option} -o FOLDER`. "
        f"To keep a share it needs {_needs(method)}."
    )


def _settings(method: Method) -> str:
    """A table of the configuration's fields; what they mean is what its docstring says of them."""
    told: dict[str, str] = {}
    for cls in reversed(method.config_class.__mro__):
        text = inspect.cleandoc(cls.__doc__ or "")
        for names, meaning in re.findall(r"^(\w+(?:, \w+)*): (.*(?:\n {4}.*)*)", text, re.MULTILINE):
            told |= dict.fromkeys(names.split(", "), re.sub(r"\s+", " ", meaning))
    rows = []
    for field in fields(method.config_class):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        rows.append(
            f"| `{field.name}` | `{_value(default)}` | {told.get(field.name, '').replace('|', chr(92) + '|')} |"
        )
    return "\n".join(
        [f"Those of `{method.config_class.__name__}`:", "", "| setting | default | |", "|---|---|---|", *rows]
    )


def _recipes(method: Method) -> str:
    named = {name: recipe for name, recipe in method.recipes.items() if name != "demo"}
    keys = list(dict.fromkeys(key for recipe in named.values() for key in recipe))
    rows = [
        f"| `{key}` | " + " | ".join(f"`{_value(recipe[key])}`" if key in recipe else "" for recipe in named.values())
        + " |"
        for key in keys
    ]  # fmt: skip
    head = [f"| argument | {' | '.join(named)} |", "|---" * (1 + len(named)) + "|"]
    command = _TRAINED[method.needs].format(name=method.name)
    return "\n".join([f"{command} takes these arguments:", "", *head, *rows, "", PAPER, method.paper_recipe])


def _value(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)
