"""An extension of Griffe, which reads the docstrings for the reference: the habits of this package's docstrings.

Docstrings show types in the way of transformers, ``name (`float`, *optional*): meaning``, and examples below
`Example:`. In the reference types come from the annotations, and examples are code.
"""

import re
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Change each docstring into plain Google style before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(docstring: str) -> str:
    """A docstring without types in the way of transformers, and with `Examples:` for `Example:`."""
    text = re.sub(r"(?m)^( *)Example:$", r"\1Examples:", docstring)
    text = re.sub(r"(?m)^( {2,}\*{0,2}\w+(?:, \w+)*) \([^\n]*?`[^\n]*?\):(?= |$)", r"\1:", text)
    return re.sub(r"(?m)^( {2,})`([\w.\[\], |]+)`(?: of `([\w.]+)`)?: ", _type, text)


def _type(found: re.Match[str]) -> str:
    inner = f"[{found[3]}]" if found[3] else ""
    return f"{found[1]}{found[2]}{inner}: "
