"""Load folders of images, whose subfolders are classes or splits."""

import glob
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, Features, NamedSplit, load_dataset
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from .pictures import ARCHIVES, IMAGE_SUFFIXES, files_in, find_in, linked_folders


# What `datasets` takes for a file about the images. It replaces the classes.
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")

# Endings of other pictures, which Pillow may not read.
OTHER_SUFFIXES = tuple(sorted(set(ImageFolder.EXTENSIONS) - IMAGE_SUFFIXES))

# What a split can be called, in lower case -> name of the split.
SPLITS = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}

Found = list[tuple[Path, Path]]  # the folder of a split, and an image in it


def load_image_folder(name: str | Path, any_depth: bool = False) -> DatasetDict:
    """Load an image folder: either class folders, which become the split "train", or one folder of them per split.

    There are splits if all subfolders with images hold only folders, and at least one is named like a split. The name
    of a class or of a file never decides the split, as it does in `load_dataset("imagefolder")`: a class may be
    "test tube". The folder of an image is its class. There must be at least two such folders, and all images must be
    equally deep.

    Args:
        name: The folder.
        any_depth: Allow images beside class folders, or deeper than others. Then no image has a label.

    Returns:
        The splits.
    """
    folder = Path(name)
    inner = sorted(path for path in folder.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
    named = [path for path in inner if path.name.lower() in SPLITS]
    filled = [path for path in inner if next(find_in(path), None) is not None]
    parts = {"train": [folder]}
    if set(named) & set(filled) and all(_holds_folders_only(path) for path in filled):
        parts = defaultdict(list)
        for path in sorted({*named, *filled}):
            parts[SPLITS.get(path.name.lower(), re.sub(r"\W", "_", path.name))].append(path)
    found: dict[str, Found] = {}
    for split, paths in parts.items():
        found[split] = [(path, file) for path in paths for file in find_in(path)]
        if not found[split]:
            raise ValueError(
                f"{folder} holds no images{'' if split == 'train' else ' for ' + split}. Give a folder of images "
                f"({', '.join(sorted(IMAGE_SUFFIXES))}), one folder per class; unpack archives and tables first."
            )
    endings = (*ARCHIVES, *OTHER_SUFFIXES, *METADATA)
    others = [file for paths in parts.values() for path in paths for file in files_in(path, endings)]
    for file in others:
        if file.name.lower().endswith(ARCHIVES):
            raise ValueError(f"{file} is an archive, and its pictures are not read. Unpack it, or move it away.")
        if file.suffix.lower() in OTHER_SUFFIXES:
            raise ValueError(f"{file} is of a kind that is not read. Convert it or move it away.")
    if any(file.name in METADATA for file in others):
        return _with_metadata(folder, parts, found)
    splits = classes_by_folder(found)
    if not any_depth and "label" not in next(iter(splits.values())).features:
        _check_depth(folder, [pair for pairs in found.values() for pair in pairs])
    return splits


def classes_by_folder(found: Mapping[str, Found]) -> DatasetDict:
    """Make the data set of each split. The folder of an image is its class. There must be at least two such folders,
    and the images of all splits must be equally deep; else there are no classes."""
    pairs = [pair for pairs in found.values() for pair in pairs]
    depths = {len(file.relative_to(path).parts) for path, file in pairs}
    classes = sorted({file.parent.name for _, file in pairs})
    features = Features({"image": ImageFeature()})
    if len(depths) == 1 and len(classes) > 1:
        features["label"] = ClassLabel(names=classes)
    splits = DatasetDict()
    for split, inside in found.items():
        files = sorted((file.absolute() for _, file in inside), key=str)
        columns = {"image": [str(file) for file in files], "label": [file.parent.name for file in files]}
        splits[split] = Dataset.from_dict(
            {name: columns[name] for name in features}, features=features, split=NamedSplit(split)
        )
    return splits


def _with_metadata(folder: Path, parts: Mapping[str, Iterable[Path]], found: Mapping[str, Found]) -> DatasetDict:
    """Load a folder with a file about its images, which `datasets` reads."""
    for path, place in sorted({(path, file.parent) for pairs in found.values() for path, file in pairs}):
        if any(part.startswith("__") for part in place.relative_to(path).parts):
            raise ValueError(
                f"{place} would be left out, because a name that begins with __ stands for files of a program. Rename "
                "it."
            )
    files = {}
    for split, paths in parts.items():
        places = [place for path in map(Path.resolve, paths) for place in (path, *linked_folders(path))]
        files[split] = [f"{glob.escape(str(place))}/**" for place in places]
    try:
        return load_dataset("imagefolder", data_files=files)
    except DatasetGenerationError as error:
        raise ValueError(f"{folder} cannot be read as a folder of images: {error.__cause__ or error}") from error


def _check_depth(folder: Path, images: Found) -> None:
    """Raise a ValueError if there are class folders, but not all images are in one."""
    depths = [len(file.relative_to(path).parts) for path, file in images]
    classes = {file.parent for (_, file), depth in zip(images, depths, strict=True) if depth > 1}
    if len(classes) < 2 or len(set(depths)) == 1:
        return
    usual = Counter(depth for depth in depths if depth > 1).most_common(1)[0][0]
    others = [str(file.relative_to(folder)) for (_, file), depth in zip(images, depths, strict=True) if depth != usual]
    some = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
    raise ValueError(
        f"{folder} has class folders, but these images are not in one of them: {some}. Move each into a class folder, "
        "all equally deep, or move it away. If the images have no classes, put all of them into one folder, or give "
        "tokenreduce tune --no-labels."
    )


def _holds_folders_only(folder: Path) -> bool:
    inside = [path for path in folder.iterdir() if os.path.isdir(path) or path.suffix.lower() in IMAGE_SUFFIXES]
    return bool(inside) and all(map(os.path.isdir, inside))


def folder_split(name: str | Path, *wanted: str) -> Dataset:
    """Return the first of the wanted splits that an image folder has."""
    found = load_image_folder(name)
    for split in wanted:
        if split in found:
            return found[split]
    raise ValueError(f"{name} has no {' or '.join(wanted)} folder, only {', '.join(found)}.")
