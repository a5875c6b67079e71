"""Check that what prepares a model's inputs is sane: image processor, feature extractor, tokenizer."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .contents import IMAGES, OF_TEXTS, PROCESSOR, read_json, short


MOST_PIXELS = 2**12  # of a side
SIZES = ("size", "crop_size", "pad_size")
STATISTICS = ("image_mean", "image_std", "mean", "std", "rescale_factor")
MAY_BE_ZERO = ("image_mean", "mean")
LARGEST_OF_AUDIO = {"max_length": 2**16, "num_mel_bins": 2**12, "sampling_rate": 2**20, "feature_size": 2**12}
WORDS = ("tokenizer.json", "vocab.json", "added_tokens.json")  # their names are words, not settings


def check_processor(folder: Path, files: dict[str, int], of_audio: bool) -> None:
    """Raise a ValueError unless all files besides the model's are plain settings of classes of transformers."""
    settings: dict[str, Any] = {}
    for name in sorted(files):
        if name == IMAGES or (name in OF_TEXTS and name.endswith(".json")):
            values = read_json(folder / name)
            if not isinstance(values, dict):
                raise ValueError(f"{name} must hold an object, got {short(values)}.")
            if name not in WORDS:
                settings[name] = values
    for name, values in settings.items():
        for part in _parts(values):
            if part.get("auto_map"):
                raise ValueError(f"{name} has an auto_map: a processor with code of its own is not taken.")
            _check_images(name, part)
            if of_audio:
                _check_audio(name, part)
    if of_audio and "feature_extractor_type" not in settings[IMAGES]:
        raise ValueError(
            f"{IMAGES} has no feature_extractor_type, which a model of audio needs. Save its feature extractor with "
            "feature_extractor.save_pretrained(folder)."
        )
    processors = [settings[name] for name in (IMAGES, PROCESSOR) if name in settings]
    if PROCESSOR in settings and not any("processor_class" in values for values in processors):
        raise ValueError(
            f"{PROCESSOR} has no processor_class: AutoProcessor would find a part of it. Save the processor with "
            "processor.save_pretrained(folder)."
        )


def _parts(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the settings and every dictionary in them."""
    yield values
    for part in values.values():
        if isinstance(part, dict):
            yield from _parts(part)


def _check_images(name: str, values: dict[str, Any]) -> None:
    for size in SIZES:
        sizes = values.get(size) or 1
        for side in sizes.values() if isinstance(sizes, dict) else [sizes]:
            if not isinstance(side, int) or not 1 <= side <= MOST_PIXELS:
                raise ValueError(
                    f"{name}: {size} must have sides from 1 to {MOST_PIXELS:,} pixels, got {short(sizes)}."
                )
    for statistic in STATISTICS:
        given = values.get(statistic)
        for number in given if isinstance(given, list) else [given]:
            if number is None:
                continue
            is_number = isinstance(number, (int, float)) and math.isfinite(number)
            if not is_number or (number == 0 and statistic not in MAY_BE_ZERO):
                zero = "" if statistic in MAY_BE_ZERO else " other than 0"
                raise ValueError(f"{name}: {statistic} must be finite numbers{zero}, got {short(given)}.")


def _check_audio(name: str, values: dict[str, Any]) -> None:
    for setting, most in LARGEST_OF_AUDIO.items():
        number = values.get(setting, 1)
        if not isinstance(number, int) or not 1 <= number <= most:
            raise ValueError(f"{name}: {setting} must be an integer from 1 to {most:,}, got {short(number)}.")
