"""Write files whole or not at all, and check with which settings a folder was made."""

import json
import os
import reprlib
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Give a path to write to, which replaces `file` at the end. A reader finds either the old file or the new one.

    The name of the path has the numbers of the process and the thread, so that two of them never write to one path.
    """
    unfinished = file.with_name(f"{file.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield unfinished
        with unfinished.open("rb+") as written:  # Windows syncs no file that is open for reading only
            os.fsync(written.fileno())  # without this, a machine that crashes may keep the name and lose the content
        os.replace(unfinished, file)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a text or bytes to a file, whole or not at all."""
    with whole(file) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def known_settings(file: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Read the settings with which a folder was made.

    Raises a ValueError if they differ from the wanted settings, or if the file is broken.
    """
    try:
        found = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}), so the settings with which {file.parent} was made are unknown. Delete "
            "that folder, or give another one."
        ) from error
    refuse_other_settings(file.parent, found, wanted)
    return found


def refuse_other_settings(folder: Path, found: Any, wanted: dict[str, Any]) -> None:
    """Raise a ValueError that names the differences, if a folder was made with other settings than the wanted ones."""
    found = found if isinstance(found, dict) else {}  # another program may have written the file
    different = [name for name, value in wanted.items() if found.get(name) != value]
    if different:
        differences = "; ".join(_difference(name, found.get(name), wanted[name]) for name in different)
        raise ValueError(
            f"{folder} was made with other settings: {differences}. Give the same settings as before, give another "
            "folder, or delete this one to start again."
        )


def _difference(name: str, was: Any, now: Any) -> str:
    """Describe how a setting differs. For two dictionaries, describe only the entries that differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = [key for key in {**was, **now} if was.get(key) != now.get(key)]
        return "; ".join(_difference(f"{name}.{key}", was.get(key), now.get(key)) for key in names)
    return f"{name} was {reprlib.repr(was)}, now {reprlib.repr(now)}"


CONFIG = "config.json"
OLD_CONFIG = "config.json.old"
UNFINISHED = ".{}.part"
# If a model is replaced, none of these files of the old model may stay in the folder.
WEIGHTS_AND_SETTINGS = (
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "generation_config.json", "adapter_config.json", "adapter_model.*", "model.onnx*", "model.pt2",
    "openvino_model.*", "export.json",
)  # fmt: skip
OF_ITS_PROCESSOR = (
    "preprocessor_config.json", "processor_config.json", "tokenizer*.json", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json", "spiece.model", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
WRITTEN_ABOUT_IT = ("README.md", "record.json", "token_map.png")


def check_new_folder(folder: str | Path, overwrite: bool = False, option: str = "--output-dir") -> Path:
    """Raise a ValueError unless a model can be written to a folder. Call this before long work."""
    if not str(folder).strip():
        raise ValueError(f"{option} is empty. Name a folder.")
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        raise ValueError(f"{option} {folder} is a link to {os.readlink(folder)}, which does not exist. Name a folder.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option} {folder} is a file. Name a folder.")
    place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(
            f"{option} {folder} cannot be written, because {place} takes no new files. Name another folder."
        )
    if folder.is_dir() and holds_something(folder):
        if not overwrite:
            raise ValueError(
                f"{option} {folder} is not empty. Name another folder, or pass --overwrite to replace the model there."
            )
        if not (folder / CONFIG).is_file() and not any(map(_was_replacing, folder.glob(UNFINISHED.format("*")))):
            raise ValueError(
                f"{option} {folder} holds other files, but no model (no {CONFIG}). --overwrite does not delete other "
                "files. Name another folder."
            )
    return folder


def holds_something(folder: Path) -> bool:
    """Return whether a folder has files, apart from unfinished ones that a killed process left."""
    return any(not file.match(UNFINISHED.format("*")) for file in folder.iterdir())


@contextmanager
def model_folder(folder: str | Path, with_card: bool = False, of_processor: bool = True) -> Iterator[Path]:
    """Give an empty folder to save a model in. At the end its files replace the model in `folder`.

    `folder` never holds a mixture of two models that can be loaded. The old model stays as it is until the new one is
    complete. Then the old config.json is moved away first, and the new one is written last. If the work fails or is
    killed before that, nothing has changed. If it is killed in between, the next call removes what is left. Other
    files in the folder, such as checkpoints and your own code, stay.

    Args:
        folder: Folder of the model.
        with_card: Also delete the card and the record of the old model.
        of_processor: Also delete the image processor and the tokenizer of the old model.
    """
    folder = Path(folder)
    was_there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    interrupted = False
    for left in folder.glob(UNFINISHED.format("*")):
        number = left.name.split(".")[1]
        # It belongs to a process that was killed. In a container, that process can have had our own number.
        if number == str(os.getpid()) or not _is_alive(number):
            interrupted = interrupted or _was_replacing(left)
            shutil.rmtree(left, ignore_errors=True)
    # Inside `folder`, because its parent may be on another file system.
    unfinished = folder / UNFINISHED.format(os.getpid())
    unfinished.mkdir()
    if interrupted:
        (unfinished / OLD_CONFIG).touch()  # this process may be killed too
    try:
        yield unfinished
        more = (WRITTEN_ABOUT_IT if with_card else ()) + (OF_ITS_PROCESSOR if of_processor else ())
        _replace_model(unfinished, folder, WEIGHTS_AND_SETTINGS + more)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not was_there and not any(folder.iterdir()):
            folder.rmdir()


def _replace_model(new: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    names = sorted(set(os.listdir(new)) - {OLD_CONFIG}, key=lambda name: name == CONFIG)
    if (folder / CONFIG).is_file():
        os.replace(folder / CONFIG, new / OLD_CONFIG)  # if this process is killed, it tells that a model was here
    if _was_replacing(new):
        for pattern in patterns:
            for old in folder.glob(pattern):
                old.unlink()
    for name in names:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        os.replace(new / name, folder / name)


def _was_replacing(unfinished: Path) -> bool:
    """Return whether a process was killed while it replaced the files of a model by those of this folder."""
    return (unfinished / OLD_CONFIG).is_file()


def _is_alive(process: str) -> bool:
    """Return whether a process with this number is running."""
    # Not os.kill(process, 0): on Windows that ends the process.
    return process.isdecimal() and psutil.pid_exists(int(process))
