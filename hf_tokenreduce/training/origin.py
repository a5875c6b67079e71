"""Say where a trained model came from: its checkpoint, its data, and the commands that made it."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from ..hub.contents import read_json


def was_trained(path: str, revision: str | None = None) -> bool:
    """Return whether the record in a folder or on the Hub says that its model was trained with its reduction."""
    record = _record(path, revision)
    if record.get("method") is None:
        return False
    epochs = record.get("epochs")
    return isinstance(epochs, (int, float)) and epochs > 0


def fitted_on(path: str) -> str | None:
    """Return the name of the images from whose labels a model's filter learned, if its record names them."""
    return _record(path).get("fitted_on")


def _record(path: str, revision: str | None = None) -> dict[str, Any]:
    """Read the record in a folder or on the Hub. It is empty if there is none, or the Hub is out of reach."""
    try:
        found = cached_file(path, "record.json", revision=revision)
    except OSError:
        return {}
    record = read_json(Path(found)) if found else {}
    return record if isinstance(record, dict) else {}


def origin(path: str) -> dict[str, Any]:
    """Return the checkpoint that `path` was made from, and the commands that made it, from the record in the folder.

    A checkpoint without a record is its own origin.
    """
    file = Path(path) / "record.json"
    record = read_json(file) if file.is_file() else {}
    made_by = [record["command"]] if record.get("command") else []
    name = Path(path).name if Path(path).exists() else path  # else a Hub id
    return {
        "base_model": record.get("base_model") or name,
        "earlier_commands": (record.get("earlier_commands") or []) + made_by,
    }


def shown(command: Sequence[str]) -> str:
    """Return a command that may be published: without secrets, and with shortened absolute paths."""
    command = [re.sub(r"^(--?[\w-]+=|-[a-zA-Z])?(/.*)$", _shortened, word) for word in command]
    return re.sub(r"(--[\w-]*(?:token|key|secret|password)[ =])('[^']*'|\S+)", r"\1***", shlex.join(command))


def _shortened(found: re.Match[str]) -> str:
    """Return an option with the last two parts of its path."""
    return (found[1] or "") + "/".join(Path(found[2]).parts[-2:])


def name_of(dataset_name: str | None, folder: str | None) -> str:
    return dataset_name or "/".join(Path(str(folder)).parts[-2:])


def last_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest checkpoint that was written whole: the state of the trainer comes last."""
    whole = [state.parent for state in Path(folder).glob("checkpoint-*/trainer_state.json")]
    steps = {int(path.name.split("-")[1]): path for path in whole if re.fullmatch(r"checkpoint-\d+", path.name)}
    return steps[max(steps)] if steps else None
