"""A small data set of drawn images: one shape on a cluttered background. The class of an image is its shape.

Most patches of such an image do not help to find the class, so token reduction can remove them. Position, size,
rotation, colour and background do not give the class away, because they have the same distributions in all classes.
"""

import colorsys
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from PIL.PngImagePlugin import PngInfo
from transformers.utils import logging

from ..files import known_settings, whole, write_whole


CLASSES = ("cross", "disc", "ring", "square", "star", "triangle")
SPLITS = ("train", "validation")
MANIFEST = "manifest.json"
BOX = "box"  # key of the note in each file that says where the shape is
VERSION = 2  # version of the drawing; images are not added to a folder of another version
SMALLEST = 32
TILT = math.radians(20)

logger = logging.get_logger(__name__)


class Drawing(NamedTuple):
    """Hold an image, and where its shape is.

    Attributes:
        image: The image.
        mask: Share of each pixel that the shape covers, float32, (size, size).
    """

    image: Image.Image
    mask: np.ndarray

    def box(self) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom of the shape in pixels. The last two are just outside of it."""
        down, across = np.nonzero(self.mask > 0)
        return int(across.min()), int(down.min()), int(across.max()) + 1, int(down.max()) + 1


def make_images(
    folder: str | Path, *, train: int = 6000, validation: int = 400, size: int = 96, seed: int = 0
) -> dict[str, int]:
    """Draw the data set as `train/<class>/00000.png` and `validation/...`, which `load_dataset("imagefolder")` reads.

    Every image has its own seed, so a larger data set contains the smaller one. Files that exist are kept, so an
    interrupted call goes on where it stopped.

    Args:
        folder: The folder for the images.
        train: Number of training images, spread evenly over the classes.
        validation: Number of validation images, spread evenly over the classes.
        size: Width and height of the images in pixels.
        seed: Seed of the data set.

    Returns:
        The number of images in each split.
    """
    folder, counts = Path(folder), {"train": train, "validation": validation}
    for split, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < len(CLASSES):
            raise ValueError(
                f"{split} counts images and must be at least {len(CLASSES)}, one per class, got {count!r}."
            )
    if isinstance(size, bool) or not isinstance(size, int) or size < SMALLEST:
        raise ValueError(f"size is in pixels and must be at least {SMALLEST}, got {size!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be an integer of at least 0, got {seed!r}.")
    _claim(folder, {"version": VERSION, "size": size, "seed": seed, "classes": list(CLASSES)})
    wanted = {
        folder / split / name / f"{index:05d}.png": (split, name, index)
        for split, count in counts.items()
        for label, name in enumerate(CLASSES)
        for index in range(len(range(label, count, len(CLASSES))))
    }
    present = {file for split in SPLITS for file in (folder / split).glob("*/*.png")}
    if more := sorted(present - wanted.keys()):
        raise ValueError(
            f"{folder} holds more images than train={train} and validation={validation}, such as {more[0]}. Ask for "
            "at least as many images as it holds, or give another folder."
        )
    missing = [file for file in wanted if file not in present]
    for file in logging.tqdm(missing, desc="drawing images", leave=False):
        file.parent.mkdir(parents=True, exist_ok=True)
        drawing = draw(*wanted[file], size=size, seed=seed)
        notes = PngInfo()
        notes.add_text(BOX, json.dumps(drawing.box()))
        with whole(file) as unfinished:
            drawing.image.save(unfinished, format="png", pnginfo=notes)
    return counts


def draw(split: str, name: str, index: int, *, size: int = 96, seed: int = 0) -> Drawing:
    """Draw image number `index` of a class. It is the same in every call."""
    rng = np.random.default_rng([VERSION, seed, SPLITS.index(split), CLASSES.index(name), index])
    background = _background(rng, size)
    mask = _mask(rng, SHAPES[name], size)
    return Drawing(_to_image(_place(rng, background, mask)), mask)


def _claim(folder: Path, settings: dict[str, object]) -> None:
    file = folder / MANIFEST
    if file.is_file():
        known_settings(file, settings)
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds other files and no {MANIFEST}. Give a new or empty folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(settings, indent=2) + "\n")


# Corners (across, down) of a shape in a circle of radius about 1.
Outline = list[tuple[float, float]]


def _circle(radius: float = 1.0, center: float = 0.0) -> Outline:
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return [(center + radius * math.cos(a), radius * math.sin(a)) for a in angles]


def _spikes(*radii: float, count: int) -> Outline:
    """Return `count` corners at the first radius, `count` at the next radius between them, and so on."""
    lengths = radii * count
    step = 2 * math.pi / len(lengths)
    return [(length * math.sin(step * i), -length * math.cos(step * i)) for i, length in enumerate(lengths)]


def _cross(arm: float = 0.3) -> Outline:
    quarter = [(arm, -1.0), (arm, -arm), (1.0, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return corners


# name -> (outline, hole or None). The radii make the shapes look equally large.
SHAPES: dict[str, tuple[Outline, Outline | None]] = {
    "cross": (_cross(), None),
    "disc": (_circle(0.85), None),
    "ring": (_circle(0.95), _circle(0.55)),
    "square": (_spikes(1.05, count=4), None),
    "star": (_spikes(1.1, 0.44, count=5), None),
    "triangle": (_spikes(1.1, count=3), None),
}


def _mask(rng: np.random.Generator, shape: tuple[Outline, Outline | None], size: int) -> np.ndarray:
    """Draw the whole shape at a random place, size and angle. Its circle is 30 to 40 % of the image wide."""
    radius = size * rng.uniform(0.15, 0.2)
    middle = rng.uniform(1.25 * radius, size - 1.25 * radius, 2)
    angle, stretch = rng.uniform(-TILT, TILT), rng.uniform(0.92, 1.08)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turn = turn @ np.diag([stretch, 1 / stretch])
    finer = 4
    canvas = Image.new("L", (size * finer, size * finer))
    pen = ImageDraw.Draw(canvas)
    for outline, fill in zip(shape, (255, 0), strict=True):
        if outline is not None:
            corners = (np.array(outline) @ turn.T * radius + middle) * finer
            pen.polygon([tuple(corner) for corner in corners.tolist()], fill=fill)
    return np.asarray(canvas.reduce(finer), np.float32) / 255


def _colour(rng: np.random.Generator, saturation: tuple[float, float], value: tuple[float, float]) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(*saturation), rng.uniform(*value)), np.float32)


def _noise(rng: np.random.Generator, cells: int, size: int) -> np.ndarray:
    """Return smooth noise, (size, size), between about -1 and 1, with `cells` hills across."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells + 2, cells + 2)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC, box=(1, 1, cells + 1, cells + 1)))


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Draw a background, (size, size, 3) from 0 to 1: a gradient, clouds, stripes, soft blobs, strokes and grain."""
    down, across = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    colours = [_colour(rng, (0.1, 0.5), (0.15, 0.5)) for _ in range(3)]

    def along(angle: float) -> np.ndarray:
        return across * math.cos(angle) + down * math.sin(angle)

    def mix(image: np.ndarray, colour: np.ndarray, share: np.ndarray) -> np.ndarray:
        return image + np.clip(share, 0, 1)[..., None] * (colour - image)

    image = mix(np.broadcast_to(colours[0], (size, size, 3)), colours[1], along(rng.uniform(0, 2 * math.pi)) + 0.5)
    clouds = sum((_noise(rng, cells, size) / cells**0.6 for cells in (3, 6, 12)), np.zeros((), np.float32))
    image = mix(image, colours[2], 0.35 + 0.9 * clouds)
    if rng.random() < 0.6:
        waves = along(rng.uniform(0, 2 * math.pi)) * rng.uniform(4, 14) + rng.uniform(0, 0.6) * clouds
        image = image + rng.uniform(0.03, 0.09) * np.sin(2 * math.pi * waves)[..., None]
    for _ in range(rng.integers(3, 7)):
        x, y, width = *rng.uniform(-0.5, 0.5, 2), rng.uniform(0.04, 0.14)
        hill = np.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * width**2))
        image = mix(image, _colour(rng, (0.1, 0.6), (0.1, 0.6)), rng.uniform(0.3, 0.7) * hill)
    image = _strokes(rng, image)
    image = image + 0.06 * _noise(rng, size // 3, size)[..., None]
    return image + rng.normal(0, 0.018, image.shape).astype(np.float32)


def _strokes(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Draw thin, half transparent curves across the image."""
    size, finer = len(image), 3
    canvas = _to_image(image).resize((size * finer, size * finer), Image.Resampling.BICUBIC)
    plain = np.asarray(canvas.reduce(finer), np.float32)
    pen = ImageDraw.Draw(canvas)
    steps = np.linspace(0, 1, 16)[:, None]
    for _ in range(rng.integers(4, 9)):
        first, middle, last = rng.uniform(-0.1, 1.1, (3, 2)) * size * finer
        curve = (1 - steps) ** 2 * first + 2 * steps * (1 - steps) * middle + steps**2 * last
        colour = tuple(int(255 * part) for part in _colour(rng, (0.1, 0.6), (0.1, 0.8)))
        width = round(size / 96 * finer * rng.uniform(0.7, 2.0))
        pen.line([tuple(point) for point in curve.tolist()], fill=colour, width=max(width, 1), joint="curve")
    drawn = np.asarray(canvas.reduce(finer), np.float32)
    return image + 0.6 * (drawn - plain) / 255


def _place(rng: np.random.Generator, background: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the shape on the background: in a colour that stands out, lit from one side, with a soft shadow."""
    size = len(mask)
    where = mask[..., None]
    below = (background * where).sum(axis=(0, 1)) / where.sum()
    candidates = [_colour(rng, (0.3, 0.9), (0.85, 1.0)) for _ in range(12)]
    contrasts = [float(np.abs(colour - below) @ np.array([0.6, 1.2, 0.5])) for colour in candidates]
    choice = next((i for i, contrast in enumerate(contrasts) if contrast > 0.75), int(np.argmax(contrasts)))
    soft = (
        np.asarray(
            Image.fromarray((mask * 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(size / 48)), np.float32
        )
        / 255
    )
    angle, reach = rng.uniform(0, 2 * math.pi), size / 40
    shift = [round(reach * math.sin(angle)), round(reach * math.cos(angle))]
    shadow = _shifted(soft, shift)
    background = background * (1 - 0.5 * shadow[..., None])
    rim = _shifted(soft, [-part for part in shift]) - shadow  # bright towards the light, dark away from it
    lit = candidates[choice] * (1 + 0.25 * rim[..., None]) + 0.12 * rim[..., None]
    return background + where * (lit - background)


def _shifted(image: np.ndarray, by: list[int]) -> np.ndarray:
    """Move an image by whole pixels (down, across). The shape is not at the border, so nothing wraps around."""
    return np.roll(image, by, axis=(0, 1))


def _to_image(values: np.ndarray) -> Image.Image:
    return Image.fromarray((np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8))
