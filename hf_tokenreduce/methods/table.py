"""The methods as a table, made from their descriptions."""

from . import METHODS
from .method import Method


HEADER = (
    "| method | what it does with tokens | tokens per image | to keep a share it needs | our own decisions |",
    "|---|---|---|---|---|",
)
NEEDS = {"nothing": "nothing", "images": "unlabelled images, or training", "labels": "labels, a filter, fine-tuning"}


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


def _tokens(method: Method) -> str:
    return "as many as it needs" if method.is_adaptive(method.config_class()) else "the same for all"


def _needs(method: Method) -> str:
    return "unlabelled images" if method.at_share is None else NEEDS[method.needs]


def _row(method: Method) -> str:
    paper = "" if method.arxiv is None else f", after [{method.arxiv}](https://arxiv.org/abs/{method.arxiv})"
    return (
        f"| {method.title}: `{method.config_class.__name__}` | {method.family}{paper} | {_tokens(method)} | "
        f"{_needs(method)} | {method.ours} |"
    )
