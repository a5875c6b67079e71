"""Find and read image files."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Whatever the name of a file. Pillow knows more, such as EPS, for which it would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "GIF")
UNREADABLE = "cannot be read as an image"
# A processor that sets the shorter side would make a narrower picture so long that it needs gigabytes.
MOST_NARROW = 200  # the longer side, divided by the shorter one
IMAGE_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".gif",
}  # fmt: skip


# Each holds several pictures, which are not read.
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_image(file: Path) -> bool:
    """Return whether a file is an image by its name. Names with a dot in front are not: macOS leaves such files."""
    if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.startswith(".") or not os.path.isfile(file):
        return False
    try:
        str(file).encode()
    except UnicodeEncodeError:
        name = file.name.encode(errors="surrogateescape")
        raise ValueError(f"{file.parent} holds a file whose name is not UTF-8, {name!r}. Rename it.") from None
    return True


def find_in(folder: str | Path) -> Iterator[Path]:
    """Generate the images in a folder and its subfolders, also in those that are links, but not in hidden ones."""
    for where, names in _folders(str(folder)):
        yield from (file for name in names if is_image(file := Path(where, name)))


def files_in(folder: str | Path, endings: tuple[str, ...]) -> Iterator[Path]:
    """Generate the files with one of some endings in a folder and its subfolders, but not in hidden ones."""
    for where, names in _folders(str(folder)):
        yield from (Path(where, name) for name in names if name.lower().endswith(endings) and name[0] != ".")


def linked_folders(folder: str | Path) -> list[Path]:
    """Return the subfolders that are links, of those in which `find_in` looks. The pattern `**` enters none."""
    inside = (where for where, _ in _folders(str(folder)) if where != str(folder))
    return sorted(Path(where).absolute() for where in inside if os.path.islink(where))


def _folders(folder: str, above: tuple[str, ...] = ()) -> Iterator[tuple[str, list[str]]]:
    """Generate a folder and its subfolders, with the names of the files in each, in order.

    Links are followed, but not those that lead to a folder above, which would never end. above: where they are.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except PermissionError:
        logger.warning(f"{folder} may not be read, so its images are left out.")
        return
    except OSError:  # not a folder
        return
    above = (*above, os.path.realpath(folder))
    kinds = [(entry, _is_folder(entry)) for entry in entries]
    yield folder, [entry.name for entry, is_folder in kinds if is_folder is False]
    for entry in (entry for entry, is_folder in kinds if is_folder):
        real = os.path.realpath(entry.path)
        ends = not any(Path(one).is_relative_to(real) for one in above)
        if ends and not entry.name.startswith("."):  # thumbnails and the like
            yield from _folders(entry.path, above)


def _is_folder(entry: os.DirEntry[str]) -> bool | None:
    """Return whether it is a folder. None: it is a link that cannot be followed."""
    try:
        return entry.is_dir()
    except OSError as error:  # a link into a folder that may not be read, or to itself
        logger.warning(f"{entry.path} cannot be followed, so it is left out: {error.strerror}.")
        return None


def upright(picture: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF data say. One that stands already is not copied."""
    return ImageOps.exif_transpose(picture) if picture.getexif().get(ExifTags.Base.Orientation, 1) != 1 else picture


def is_too_narrow(picture: Image.Image) -> bool:
    """Return whether a processor that keeps the shape of a picture would make gigabytes of it."""
    return max(picture.size) > MOST_NARROW * min(picture.size)


def as_rgb(picture: Image.Image) -> Image.Image:
    """Convert a picture to RGB, turned upright as its EXIF data say.

    Of 16 bits per pixel the upper 8 are taken; Pillow would clip almost all to white.
    """
    if is_too_narrow(picture):
        width, height = picture.size
        raise ValueError(f"a picture of {width} x {height} pixels is too narrow. Crop it")
    picture = upright(picture)
    if picture.mode.startswith("I") or picture.mode == "F":
        values = np.asarray(picture)
        of_8_bits = picture.mode == "I" and 0 < values.max() < 257  # all of it would become black
        if picture.mode == "F" or values.min() < 0 or values.max() > 65535 or of_8_bits:
            raise ValueError(
                f"a picture of mode {picture.mode!r} has no known range of values. Save it with 8 or 16 bits per pixel"
            )
        picture = Image.fromarray((values // 257).astype(np.uint8))
    # Converting to RGBA first avoids Pillow's warning about transparent palettes.
    return picture.convert("RGBA" if "transparency" in picture.info else "RGB").convert("RGB")


def decoded_picture(image: Any) -> Image.Image:
    """Decode an image of a data set to the last byte, turned upright: its `bytes`, or the file at its `path`.

    `datasets` would let Pillow try every format, also those for which it starts another program.
    """
    content, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (None, image)
    if content is None and "://" in str(path):  # inside an archive, or on another machine
        from datasets import Image as ImageFeature

        return ImageFeature().decode_example(image)
    source: Any = path if content is None else io.BytesIO(content)
    with Image.open(source, formats=FORMATS) as picture:
        picture.load()
        return upright(picture)


def read_picture(file: str | Path) -> Image.Image:
    """Read an image file as RGB, turned upright as its EXIF data say."""
    try:
        return as_rgb(decoded_picture(str(file)))
    except Exception as error:  # the parsers of broken files raise many kinds
        if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:  # of the system, not of Pillow
            raise ValueError(f"{file} could not be opened ({error!r}). Try again.") from error
        raise ValueError(f"{file} {UNREADABLE} ({error}). Remove it or replace it.") from error


def check_one_size(found: list[Any], why: str) -> None:
    """Raise a ValueError unless all pixel values, (1, C, H, W) each, have one size. why: why they must"""
    sizes = sorted({tuple(pixels.shape[2:]) for pixels in found})
    if len(sizes) > 1:
        raise ValueError(
            f"The image processor makes images of {len(sizes)} sizes, such as {sizes[0]} and {sizes[-1]} (height, "
            f"width), and {why}. Set its size to one height and width, or let it crop the images, or set "
            "image_processor.keep_aspect_ratio = False if it has that."
        )


def spread(count: int, most: int) -> list[int]:
    """Return at most `most` indices below `count`, evenly spread, because images of one class are neighbours."""
    chosen = min(count, most)
    return [place * count // chosen for place in range(chosen)]
