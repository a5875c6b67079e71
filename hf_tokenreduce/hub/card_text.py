"""Renew parts of a card's text. A card belongs to its owner: only our metadata and text between our markers change.

<!-- tokenreduce:begin results -->
...
<!-- tokenreduce:end results -->
"""

import re
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from .contents import one_line


MARKER = re.compile(r"<!-- tokenreduce:(begin|end) ([\w-]+) -->")


def sections(text: str) -> dict[str, tuple[int, int]]:
    """Find where each of our sections begins and ends, markers included. Markers must pair up, else a ValueError."""
    found: dict[str, tuple[int, int]] = {}
    opened: re.Match[str] | None = None
    for marker in MARKER.finditer(text):
        kind, name = marker.groups()
        if (kind == "begin") != (opened is None) or (opened is not None and opened[2] != name) or name in found:
            line = text.count("\n", 0, marker.start()) + 1
            raise ValueError(
                f"The card's markers do not pair up at line {line}: {marker[0]}. Each section needs one begin and one "
                "end of its name, none inside another; mend or delete them."
            )
        if opened is not None:
            found[name] = (opened.start(), marker.end())
        opened = marker if kind == "begin" else None
    if opened is not None:
        raise ValueError(f"The card's marker {opened[0]} has no end. Mend or delete it.")
    return found


def merge_body(old: str, new: str) -> str:
    """Return `old` with its sections replaced by those of `new`.

    Sections that the owner took out stay out. A card that has no section yet gets all of them at its end.
    """
    there, ours = sections(old), sections(new)
    if not there:
        added = "\n\n".join(new[begin:end] for begin, end in ours.values())
        return f"{old.rstrip()}\n\n{added}\n" if old.strip() else new
    for name, (begin, end) in sorted(there.items(), key=lambda item: -item[1][0]):
        if name in ours:
            old = old[:begin] + new[slice(*ours[name])] + old[end:]
    return old


def split(text: str) -> tuple[str, str]:
    """Split a card into the YAML of its metadata, empty if it has none, and its body."""
    found = REGEX_YAML_BLOCK.search(text)
    return (found[2] + "\n", text[found.end() :]) if found else ("", text)


def id_in(body: str) -> str | None:
    """Return the Hub id that the code of a card names, which can be a placeholder. None: there is no code of ours."""
    begin, end = sections(body).get("usage", (0, 0))
    found = re.search(r'from_pretrained\("([^"]+)"', body[begin:end])
    return None if found is None else found[1]


def parse_metadata(block: str) -> dict[str, Any]:
    """Read the YAML of a card's metadata."""
    try:
        values = yaml.safe_load(block) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"The card's metadata is no valid YAML: {one_line(error)}. Mend it first.") from None
    if not isinstance(values, dict):
        raise ValueError("The card's metadata must be a mapping of names to values. Mend it first.")
    return values


def merge_metadata(block: str, changes: dict[str, Any]) -> str:
    """Change, add or remove (None) some top-level values of a YAML block. Other lines stay as they are."""
    there = parse_metadata(block)
    wanted = {name: value for name, value in (there | changes).items() if name not in changes or value is not None}
    merged = block
    for name, value in changes.items():
        if name in there and there[name] == value:
            continue
        entry = "" if value is None else yaml_dump({name: value}, sort_keys=False)
        quoted = rf"(['\"]?){re.escape(name)}\1"
        lines = re.compile(rf"^{quoted}[ \t]*:.*\n(?:[ \t-].*\n|[ \t]*\n(?=[ \t-]))*", re.MULTILINE)
        found = lines.search(merged) if name in there else None
        merged = merged[: found.start()] + entry + merged[found.end() :] if found else merged + entry
    # Unusual YAML, such as a mapping in braces, is written anew instead.
    try:
        intact = parse_metadata(merged) == wanted
    except ValueError:
        intact = False
    return merged if intact else yaml_dump(wanted, sort_keys=False)


def plain(text: Any) -> str:
    """Turn a text of a record into one line of Markdown that holds no markup, no marker and no table cell."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(str(text).split()))


def code(text: Any) -> str:
    """Make a fenced block that its content cannot end, and that holds no marker."""
    content = str(text).replace("<!--", "<! --").strip("\n")
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{content}\n{fence}"


def read_card(path: Path) -> str:
    """Read a model card. "": there is none."""
    if not path.is_file():
        return ""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}). Save it in UTF-8.") from error
