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


def _row(method: Method) -> str:
    paper = "" if method.arxiv is None else f", after [{method.arxiv}](https://arxiv.org/abs/{method.arxiv})"
    adaptive = method.is_adaptive(method.config_class())
    images = "as many as it needs" if adaptive else "the same for all"
    needs = "unlabelled images" if method.at_share is None else NEEDS[method.needs]
    return (
        f"| {method.title}: `{method.config_class.__name__}` | {method.family}{paper} | {images} | {needs} | "
        f"{method.ours} |"
    )
