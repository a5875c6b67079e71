"""Compare what a search found with other settings, on images that the search did not see."""

import json
from pathlib import Path

from datasets import Dataset

from ..files import write_whole
from ..loading import contents
from ..modeling.configuration_base import ReductionConfig
from ..modeling.methods import parse_reduction
from .report import SEARCHED, read_tuned


def held_out_from(
    folder: str | Path, dataset: Dataset, *, image_column: str = "image"
) -> tuple[Dataset, list[ReductionConfig]]:
    """Prepare a comparison of what a search found with other settings, on images that the search did not see.

    Args:
        folder: The `output_dir` of `tune`.
        dataset (`Dataset`): Images. Images that the search used are left out, even if their files have other names.
        image_column: Column of the data set that holds the images.

    Returns:
        The other images, and the settings that were found: the chosen one, the best of each other method, and the
        front.

    Example:
        >>> images, found = held_out_from("tuned", photos)
        >>> comparison = compare(model, images, processor, shares=[0.65], tuned=found, output_dir="comparison")
    """
    report = read_tuned(folder)
    found = [parse_reduction(row["settings"]) for row in report["rows"] if set(row["roles"]) - {"default"}]
    seen = set(json.loads((Path(folder) / SEARCHED).read_text()))
    unseen = [row for row, name in enumerate(contents(dataset, image_column)) if name not in seen]
    if not unseen:
        raise ValueError(f"The search of {folder} used all of these {len(dataset)} images. Give other images.")
    return dataset.select(unseen), [setting for setting in found if setting is not None]


def bring_learned(folder: str | Path, output_dir: str | Path) -> None:
    """Copy what methods learned in a search, so that a comparison does not fit them to the images it reports on.

    Args:
        folder: The `output_dir` of `tune`.
        output_dir: The `output_dir` of the comparison, before you call `compare`.

    Example:
        >>> bring_learned("tuned", "comparison")
    """
    there = Path(output_dir) / "settings"
    for file in (Path(folder) / "search" / "held-out" / "settings").glob("*.safetensors"):
        if not (there / file.name).exists():
            there.mkdir(parents=True, exist_ok=True)
            write_whole(there / file.name, file.read_bytes())
