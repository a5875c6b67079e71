"""The documentation of the methods, made from their descriptions: a table, and a page for each method."""

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
NEEDS = {
    "nothing": "nothing",
    "images": "unlabelled images, or training",
    "labels": "labelled images, a filter, fine-tuning",
}
PAPER = (
    "`--recipe paper` also turns on the strong augmentation, and its batch size is that of all devices together. The "
    "values of `quick` are our own choice."
)
# How the setting for a share is found, for the page of a method.
_KEEPS = "The result keeps 65 % of the multiply-adds of the encoder. "
_FOUND = {
    "nothing": _KEEPS + "This needs no images and no training.",
    "images": _KEEPS + "The method is fitted to the share on images without labels.",
    "adaptive": (
        "The method is fitted on images without labels. On average over these images, the result keeps about 65 % of "
        "the multiply-adds of the encoder, or less. Other images can need more."
    ),
}
_TRAINED = {
    "nothing": "`tokenreduce train MODEL -r {name} --recipe quick ...`",
    "images": "`tokenreduce train MODEL -r {name} --recipe quick ...`",
    "labels": "After the method has learned from labels, `tokenreduce train FOLDER --recipe quick ...`",
}
CREDIT = "Photograph: [Katja Schulz](https://www.flickr.com/photos/treegrow/31686321825), CC BY 2.0."
_SEE_ALSO = (
    "[All methods](../methods.md) · [Choose by measuring](../choosing.md) · [Results](../results.md) · "
    "[Train on your data](../training.md) · [Glossary](../glossary.md)"
)
_FIELD = re.compile(r"( *)(\w+(?:, \w+)*)(?: \(.*?\))?: (\S.*)")
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
    """List the facts about every method by which a user chooses one.

    Returns:
        `list` of `dict`: A row for each method. Its keys are `name` and the titles of the columns: the method's
        title, what it does with tokens, whether all images keep the same number of them, and what it needs.

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
    """Make the page of one method for the documentation.

    Args:
        method (`Method`): The description of the method.

    Returns:
        `str`: The page, in Markdown. It shows the picture `images/methods/<name>.webp`, which
        `docs/make_pictures.py` draws.

    Example:
        >>> print(method_page(METHODS["tome"]))
    """
    paper = ""
    if method.paper is not None:
        paper = f"Paper: *{method.paper}*, [arXiv {method.arxiv}](https://arxiv.org/abs/{method.arxiv}).\n"
    images = "" if method.any_image_size else " Images must have the size that the model was made for."
    parts = [
        (f"# {method.title}", f"{MADE}\n\n{method.summary}\n\n{_picture(method)}\n\n{paper}"),
        ("## How it works", method.details),
        ("## Use it", _usage(method)),
        ("## Settings", _settings(method)),
        ("## Train it", _recipes(method)),
        ("## Limits", (method.limits + images).strip()),
        ("## Our own decisions", method.ours and f"{_capitalised(method.ours)}."),
        ("## See also", _SEE_ALSO),
    ]
    return "\n\n".join(f"{title}\n\n{text.strip()}" for title, text in parts if text) + "\n"


def methods_page() -> str:
    """Make the page that lists all methods and links to their pages.

    Returns:
        `str`: The page, in Markdown.

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
            "[Choose by measuring](choosing.md) helps to choose one of these methods. [The glossary](glossary.md) "
            "explains the words, and [the results](results.md) compare the methods.",
            "",
            methods_table(),
            "",
            "Layer numbers begin at 0. Class tokens, distillation tokens and other prefix tokens are never merged or "
            "dropped, and a keep rate does not count them. A configuration checks its values when it is made, and "
            "`reduce_tokens` checks them again against the model.",
            "",
            *links,
            "",
        ]
    )


def write_pages(docs: str | Path) -> None:
    """Write the pages of all methods into a folder of documentation.

    Args:
        docs (`str` or `Path`): The folder. `methods.md` and `methods/<name>.md` are written into it.

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


def _picture(method: Method) -> str:
    parts = [
        f"*Left: the photograph as the model sees it. Right: the tokens that leave the last layer of DeiT-Tiny if "
        f"{method.title} keeps about 65 % of the multiply-adds. A faded patch was dropped. Patches inside one outline "
        "are one token, filled with its mean colour."
    ]
    if method.gathers_the_rest(method.config_class()):
        parts.append("A pale patch went into a token that gathers the patches which were not kept.")
    if method.token_decoder is not None:
        parts.append("Tokens are mixtures here, so each patch is drawn with the token in which it weighs most.")
    if method.needs == "labels":
        parts.append("For this picture the method learned from only 100 labelled photographs.")
    if method.needs == "nothing" and method.config_class().untrained() is not None:
        parts.append("For this picture the method was not trained.")
    text = " ".join([*parts, f"{CREDIT}*"])
    shown = f"A photograph, and the tokens that {method.title} leaves of it"
    return f"![{shown}](../images/methods/{method.name}.webp)\n\n{text}"


def _usage(method: Method) -> str:
    if method.needs == "labels":
        start = (
            f'```python\nstart = reduce_tokens(model, "{method.name}")  # reduces nothing until it has learned\n```'
        )
        return (
            f"{start}\n\nIt must learn first. Label the patches of some images, fit the filter to the labels, and "
            "fine-tune the model. [Train on your data](../training.md#dl-vits-two-stages) has the commands. Until "
            "then it keeps every token."
        )
    if method.at_share is None and method.fit_share is None:
        return f"Call `reduce_tokens(model, {method.config_class.__name__}(...))` with the settings below."
    fitted = method.prepare is not None or method.at_share is None
    adaptive = method.is_adaptive(method.config_class())
    kind = "nothing" if not fitted else "adaptive" if adaptive else "images"
    images = ', images="photos", image_processor=processor' if fitted else ""
    option = " --images photos" if fitted else ""
    return (
        f'```python\nreduced = reduce_tokens(model, "{method.name}", share=0.65{images})\n```\n\n'
        f"{_FOUND[kind]}\n\n"
        f"The same from a terminal: `tokenreduce reduce MODEL -r {method.name} --share 0.65{option} -o FOLDER`."
    )


def _settings(method: Method) -> str:
    """A table of the configuration's fields. The docstrings of the class and of its bases give the meanings."""
    meanings: dict[str, str] = {}
    for cls in reversed(method.config_class.__mro__):
        meanings |= _meanings(inspect.cleandoc(cls.__doc__ or ""))
    rows = []
    for field in fields(method.config_class):
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        meaning = _capitalised(meanings.get(field.name, "")).replace("|", chr(92) + "|")
        rows.append(f"| `{field.name}` | `{_value(default)}` | {meaning} |")
    return "\n".join(
        [
            f"The fields of `{method.config_class.__name__}`:",
            "",
            "| setting | default | meaning |",
            "|---|---|---|",
            *rows,
        ]
    )


def _meanings(docstring: str) -> dict[str, str]:
    """What a docstring says about each field, in lines `name: meaning` or `name (type): meaning`, which may be the
    lines of an `Args:` section. Lines that are indented further go on with the meaning."""
    meanings: dict[str, str] = {}
    names: list[str] = []
    indent = 0
    for line in docstring.splitlines():
        found = _FIELD.fullmatch(line)
        if names and len(line) - len(line.lstrip()) > indent:
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
        elif found:
            indent, names = len(found[1]), found[2].split(", ")
            meanings |= dict.fromkeys(names, found[3])
        else:
            names = []
    return meanings


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
    return "\n".join([f"{command} uses these arguments:", "", *head, *rows, "", PAPER, method.paper_recipe])


def _value(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]
