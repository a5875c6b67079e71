"""Files that are written whole or not at all, and folders that know the settings they were made with."""

import json
import os
import reprlib
import shutil
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


def known_settings(file: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Read the settings that a folder was made with. Raise a ValueError if they are others than are wanted now, or if
    the file is broken."""
    try:
        found = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}), so nobody knows with which settings {file.parent} was made. Delete "
            "that folder, or give another one."
        ) from error
    refuse_other_settings(file.parent, found, wanted)
    return found


def refuse_other_settings(folder: Path, found: Any, wanted: dict[str, Any]) -> None:
    """Raise a ValueError if a folder was made with other settings than are wanted now, and name those."""
    found = found if isinstance(found, dict) else {}  # a file that somebody else wrote
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different:
        told = "; ".join(_told_apart(name, found.get(name), wanted[name]) for name in different)
        raise ValueError(
            f"{folder} was made with other settings: {told}. Give the settings of then, give another folder, or "
            "delete this one to start anew."
        )


def _told_apart(name: str, was: Any, now: Any) -> str:
    """What differs; of two dicts only the entries that do."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        return "; ".join(_told_apart(f"{name}.{key}", was.get(key), now.get(key)) for key in names)
    return f"{name} was {reprlib.repr(was)}, now {reprlib.repr(now)}"


CONFIG = "config.json"
UNFINISHED = ".{}.part"
# Of a model that is replaced none of these may stay beside the new one's files.
WEIGHTS_AND_SETTINGS = (
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "preprocessor_config.json", "processor_config.json", "generation_config.json", "tokenizer*.json", "vocab.json",
    "merges.txt", "special_tokens_map.json", "model.onnx*", "model.pt2", "openvino_model.*", "export.json",
)  # fmt: skip
TOLD_OF_IT = ("README.md", "record.json", "token_map.png")


def check_new_folder(folder: str | Path, overwrite: bool = False, option: str = "--output-dir") -> Path:
    """Raise a ValueError unless a model can be written there. Call it before long work, so that none is in vain."""
    if not str(folder).strip():
        raise ValueError(f"{option} is empty. Name a folder.")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file. Name a folder.")
    if folder.is_dir() and holds_something(folder):
        if not overwrite:
            raise ValueError(
                f"{option} {folder} is not empty. Name another folder, or pass --overwrite to replace the model there."
            )
        if not (folder / CONFIG).is_file():
            raise ValueError(
                f"{option} {folder} holds no model (no {CONFIG}) but other files, which --overwrite does not delete. "
                "Name another folder."
            )
    return folder


def holds_something(folder: Path) -> bool:
    """Whether a folder has files, besides what a killed process left unfinished."""
    return any(not file.match(UNFINISHED.format("*")) for file in folder.iterdir())


@contextmanager
def model_folder(folder: str | Path, with_card: bool = False) -> Iterator[Path]:
    """Give an empty folder to save a model in. At the end what is in it takes the place of the model in `folder`.

    `folder` never holds a mixture that loads: until the new model is whole the old one stays as it is; then its
    config.json goes first, and the new one comes last. If the work fails or is killed before, nothing has changed.
    Files that are not a model's, such as checkpoints and anybody's own code, stay.

    with_card: also take away what was written about the old model.
    """
    folder = Path(folder)
    was_there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(UNFINISHED.format("*")):
        if not _is_alive(left.name.split(".")[1]):  # a process that was killed left it
            shutil.rmtree(left, ignore_errors=True)
    unfinished = folder / UNFINISHED.format(os.getpid())  # inside: beside the folder may be another file system
    unfinished.mkdir()
    try:
        yield unfinished
        _replace_model(unfinished, folder, with_card)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


def _replace_model(new: Path, folder: Path, with_card: bool) -> None:
    names = sorted(os.listdir(new), key=lambda name: name == CONFIG)
    if (folder / CONFIG).is_file():
        (folder / CONFIG).unlink()
        for pattern in WEIGHTS_AND_SETTINGS + (TOLD_OF_IT if with_card else ()):
            for old in folder.glob(pattern):
                old.unlink()
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        os.replace(new / name, folder / name)


def _is_alive(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True
