"""What a published folder may hold, judged by names and sizes: nothing in it is run, no weight is read."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .code_files import EARLIER_CODE


PLAIN = {"README.md", "LICENSE", ".gitattributes", "record.json", "token_map.png", "thresholds.safetensors"}
IMAGES, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TOKENIZERS = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
OF_TEXTS = {
    *TOKENIZERS,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    PROCESSOR,
}
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
PICTURE = re.compile(r"images/[\w-][\w.-]*\.png")
PICKLED = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
# Files that a training of this library leaves in its folder. They are left out without asking.
LEFT_BY_TRAINING = re.compile(
    r"\.\d+\.part/|checkpoint-\d+/|runs/|training_args\.bin|trainer_state\.json|(all|train|eval)_results\.json|reverse_slimming\.safetensors"
)
NEVER_UPLOADED = {".git", ".cache", "__pycache__"}
JSON_BYTES = 2**26


def list_files(
    folder: Path, code: set[str], texts: bool | None = False
) -> tuple[dict[str, int], list[str], list[str]]:
    """List the files of a folder, judged by their names.

    Args:
        folder: The folder of a saved model.
        code: Names of the code files that may be there.
        texts: Whether the model takes texts, with a tokenizer; None if that is unknown.

    Returns:
        The files that belong to a published model with their sizes in bytes; errors about them and about files that
        are missing; and the files that do not belong, each with the reason.
    """
    files: dict[str, int] = {}
    errors: list[str] = []
    others: list[str] = []
    root = folder.resolve()
    allowed = PLAIN | code | {"config.json", IMAGES, INDEX} | (OF_TEXTS if texts is not False else set())
    for name, path in _entries(folder):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            errors.append(f"{name} is a link out of the folder. Put the file itself there (cp -L follows links).")
        elif path.is_dir():
            others.append(f"{name}/ {_why_not(name, is_folder=True)}")
        elif not path.is_file():
            errors.append(f"{name} is no readable file.")
        elif name in allowed or WEIGHTS.fullmatch(name) or PICTURE.fullmatch(name):
            files[name] = path.stat().st_size
        else:
            others.append(f"{name} {_why_not(name)}")
    errors += [f"{name} is missing. Save {what}.save_pretrained(folder)." for name, what in _missing(files, texts)]
    return files, errors, others


def _missing(files: dict[str, int], texts: bool | None) -> Iterator[tuple[str, str]]:
    if "config.json" not in files:
        yield "config.json", "the model with model"
    if not any(name in files for name in ([IMAGES] if texts is False else [IMAGES, PROCESSOR])):
        yield (PROCESSOR, "the processor with processor") if texts else (IMAGES, "the image processor with processor")
    if texts and not any(name in files for name in TOKENIZERS):
        yield TOKENIZERS[0], "the processor, which holds the tokenizer, with processor"
    if not any(WEIGHTS.fullmatch(name) for name in files):
        yield "model.safetensors", "the model with model"


def read_json(path: Path) -> Any:
    """Read a JSON file. A ValueError names the file if it is no JSON, or unreasonably long."""
    if path.stat().st_size > JSON_BYTES:
        raise ValueError(f"{path.name} has {path.stat().st_size:,} bytes, which no such file needs.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is not valid JSON: {one_line(error)}.") from None


def short(value: Any, most: int = 80) -> str:
    """Show a value in an error message: as one line, cut where it is long."""
    if isinstance(value, (list, tuple, dict)) and len(value) > 8:
        return f"a {type(value).__name__} of {len(value):,} entries"
    text = " ".join(repr(value).split())
    return text if len(text) <= most else text[:most] + "..."


def one_line(error: BaseException | str, most: int = 300) -> str:
    """Show an error or a text as one line of at most about `most` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."


def _entries(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield every file, and every folder. Only the folder images/ is looked into."""
    for entry in sorted(os.listdir(folder)):
        path = folder / entry
        if entry in NEVER_UPLOADED:
            continue
        if entry == "images" and path.is_dir() and not path.is_symlink():
            for inner in sorted(os.listdir(path)):
                yield f"images/{inner}", path / inner
        else:
            yield entry, path


def _why_not(name: str, is_folder: bool = False) -> str:
    if is_folder and name.startswith("checkpoint-"):
        return "is a training checkpoint, with its optimizer. Leave it out with --skip-others."
    if name in OF_TEXTS:
        return "is for models that take texts, which this one does not. Leave it out with --skip-others."
    if name in EARLIER_CODE:
        return (
            "is code of an earlier version of this library. Load the model and save it in a new folder: "
            "model.save_pretrained(folder)."
        )
    if Path(name).suffix.lower() in PICKLED:
        return "may hold pickled objects, which run code when loaded. Delete it, or leave it out with --skip-others."
    return "does not belong to a published model. Delete it, or leave it out with --skip-others."
