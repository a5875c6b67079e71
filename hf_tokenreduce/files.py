"""Files that are written whole or not at all, and folders that know the settings they were made with."""

import os
import reprlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `file` at the end: a reader finds the old file or the new one.

    Its name has the numbers of process and thread, so two of them do not write into one path.
    """
    unfinished = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield unfinished
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())  # else a machine that stops may keep the new name and lose the content
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a text, as it is, or bytes."""
    with whole(file) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def refuse_other_settings(folder: Path, found: Any, wanted: dict[str, Any]) -> None:
    """Raise a ValueError if a folder was made with other settings than are wanted now, and name those."""
    found = found if isinstance(found, dict) else {}  # a file that somebody else wrote
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different:
        told = "; ".join(
            f"{name} was {reprlib.repr(found.get(name))}, now {reprlib.repr(wanted[name])}" for name in different
        )
        raise ValueError(
            f"{folder} was made with other settings: {told}. Give the settings of then, give another folder, or "
            "delete this one to start anew."
        )
