"""Read the record of a run, as the training script writes it, and put its values into words for a card."""

from pathlib import Path
from typing import Any

from ..evaluation.accuracy import wilson_interval
from ..modeling.methods import METHOD_CLASSES, parse_reduction
from .card_text import plain
from .contents import read_json, short


Record = dict[str, Any]

TEXTS = ("base_model", "dataset", "eval_dataset", "command", "machine", "found_by")
# name -> lowest value, highest value, and whether it is a whole number
NUMBERS = {
    "eval_images": (1, 10**9, True),
    "seed": (0, 2**64, True),
    "speed_batch_size": (1, 10**6, True),
    "epochs": (0, 10**6, False),
    "streamed_images": (0, 10**12, True),
    "seconds": (0, 10**9, False),
    "top1": (0, 100, False),
    "baseline_top1": (0, 100, False),
    "control_top1": (0, 100, False),
    "mult_adds_ratio": (0, 10, False),
    "speedup": (0, 10**4, False),
}


def read_record(record: Record | str | Path) -> Record:
    """Read a record or its file, and check the values that a card shows. What is missing or null is unknown."""
    name = "The record"
    if not isinstance(record, dict):
        path = Path(record)
        if not path.is_file():
            raise ValueError(f"There is no record {path}. It is the record.json that a training run writes.")
        name, record = str(path), read_json(path)
    if not isinstance(record, dict):
        raise ValueError(f"{name} must be an object, got {short(record)}.")
    method = record.get("method")
    if "method" not in record or not (method is None or (isinstance(method, str) and method in METHOD_CLASSES)):
        raise ValueError(f"{name} has method {short(method)}; it must be null for dense, or one of {_known()}.")
    settings = record.get("settings") or {}
    if not isinstance(settings, dict):
        raise ValueError(f"{name}: settings must be an object, got {short(settings)}.")
    if method is not None:
        parse_reduction({**settings, "method": method})
    for key in TEXTS:
        if not isinstance(record.get(key), str | None):
            raise ValueError(f"{name}: {key} must be text, got {short(record[key])}.")
    earlier = record.get("earlier_commands") or []
    if not isinstance(earlier, list) or not all(isinstance(line, str) for line in earlier):
        raise ValueError(f"{name}: earlier_commands must list texts, got {short(earlier)}.")
    for key, (least, most, counts) in NUMBERS.items():
        value = record.get(key)
        if value is None:
            continue
        kinds = int if counts else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{name}: {key} must be a number from {least} to {most}, got {short(value)}.")
    tokens = record.get("tokens_per_layer")
    if tokens is not None and not (
        isinstance(tokens, list) and tokens and all(isinstance(n, (int, float)) and 0 <= n < 10**6 for n in tokens)
    ):
        raise ValueError(f"{name}: tokens_per_layer must list a number per layer, got {short(tokens)}.")
    return record


def read_report(path: str | Path) -> Record:
    """Read what a card shows from the report.json of `evaluate_model`."""
    found = read_json(Path(path)) if Path(path).is_file() else None
    if not isinstance(found, dict) or not {"images", "top1", "tokens_per_layer"} <= set(found):
        raise ValueError(
            f"{path} is not a report of an evaluation. Make one: tokenreduce evaluate MODEL IMAGES -o FOLDER writes "
            "FOLDER/report.json."
        )
    record = {key: found.get(key) for key in ("top1", "baseline_top1", "mult_adds_ratio", "tokens_per_layer")}
    record |= {key: found[key] for key in ("method", "settings", "dense") if key in found}
    # The record's own name of the data and its number of images are those of other numbers.
    record |= {"eval_images": found["images"], "eval_dataset": None, "control_top1": None}
    read_record({"method": None, "settings": None, **record})
    return record


def accuracy(record: Record, key: str = "top1") -> str | None:
    """Show an accuracy in per cent, with its interval if the number of images is known."""
    value, total = record.get(key), record.get("eval_images")
    if value is None:
        return None
    if total is None:
        return f"{value:.1f} %"
    low, high = wilson_interval(value / 100 * total, total)
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def drop(record: Record) -> str | None:
    """Show the loss of accuracy in points of top-1; a gain has a minus.

    It is the loss against `control_top1`, a dense model that was trained as long, if the record has it, because more
    training helps a dense model too. Otherwise it is the loss against `baseline_top1`, the model before.
    """
    dense = record.get("baseline_top1") if record.get("control_top1") is None else record["control_top1"]
    if record.get("top1") is None or dense is None:
        return None
    return f"{dense - record['top1']:.1f}".replace("-0.0", "0.0")


def number(record: Record, key: str, digits: int) -> str | None:
    return None if record.get(key) is None else f"{record[key]:.{digits}f}"


def duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def trained_how(record: Record) -> str | None:
    """Say for how long the model was trained, on which images. None: that is unknown."""
    epochs, seconds, seed = record.get("epochs"), duration(record.get("seconds")), record.get("seed")
    dataset = record.get("dataset")
    if epochs == 0:
        untrained = "Not trained after the reduction. " if record.get("method") else ""
        return (untrained + plain(record.get("found_by") or "")).strip() or None
    length = epochs and f"{epochs:g} epoch{'' if epochs == 1 else 's'}"
    if record.get("streamed_images"):  # the epochs of a stream mean nothing
        length = f"{record['streamed_images']:,} images of a stream"
    parts = [
        length and f"{length}{f' on {plain(dataset)}' if dataset else ''}",
        seconds and f"in {seconds}",
        seed is not None and f"seed {seed}",
    ]
    text = ", ".join(part for part in parts if part)
    return f"{text[0].upper()}{text[1:]}." if text else None


def measured_on(record: Record) -> str | None:
    """Return the name of the images on which the accuracy was measured."""
    return record["eval_dataset"] if "eval_dataset" in record else record.get("dataset")


def _known() -> str:
    return ", ".join(sorted(METHOD_CLASSES))
