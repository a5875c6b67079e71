"""Several token maps in one picture: images x layers, or one image by several methods."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling.encoders import encoder_of
from ..pictures import as_rgb, read_picture
from .drawing import draw_layer, resized_to_cells, seen_images
from .maps import TokenMaps, checked_layers, token_maps


INK, PALE, FRAME = (32, 33, 36), (98, 102, 109), (208, 211, 216)

Images = Tensor | Sequence[Image.Image | str | Path]


class Cell(NamedTuple):
    picture: Image.Image
    title: str
    detail: str = ""


def token_map_grid(
    model: PreTrainedModel,
    images: Images,
    processor: Any,
    layers: Sequence[int] | None = None,
    *,
    names: Sequence[str] | None = None,
    size: int = 224,
) -> Image.Image:
    """One row per image: the image, and its tokens after each of `layers`. `.save("maps.png")` writes it.

    images: pictures, files, or pixel values that `processor` made, (B, C, H, W)
    layers: 0-based; by default up to six of those that reduce
    names: one per image, by default those of the files
    size: pixels of the longer side of one map, about
    """
    pixel_values, names = prepare_images(images, processor, names)
    maps = token_maps(model, pixel_values)
    shown = checked_layers(layers, maps, most=6)
    pictures = pictures_of(pixel_values, processor, maps, model, size)
    rows = []
    for index, (name, picture) in enumerate(zip(names, pictures, strict=True)):
        row = [Cell(picture, name, f"{maps.num_tokens} tokens")]
        row += [
            Cell(draw_layer(picture, maps, index, layer), f"layer {layer}", f"{int(maps.counts[index, layer])} tokens")
            for layer in shown
        ]
        rows.append(row)
    return compose(rows)


def method_comparison(
    models: Mapping[str, PreTrainedModel],
    image: Image.Image | str | Path,
    processor: Any,
    *,
    size: int = 336,
    columns: int | None = None,
) -> Image.Image:
    """One image beside what each of several models made of it by their last layer: `{"ToMe": model, ...}`.

    columns: how many pictures stand in a row, the image itself among them. None: all.
    """
    if not models:
        raise ValueError("models is empty: give at least one, as in {'ToMe': reduce_tokens(model, ToMeConfig(r=8))}.")
    if columns is not None and columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}.")
    pixel_values, _ = prepare_images([image], processor, None)
    cells: list[Cell] = []
    for name, model in models.items():
        maps = token_maps(model, pixel_values)
        picture = pictures_of(pixel_values, processor, maps, model, size)[0]
        if not cells:
            cells.append(Cell(picture, "Image", f"{maps.num_tokens} tokens"))
        drawn = draw_layer(picture, maps, 0, maps.counts.shape[1] - 1)
        detail = f"{int(maps.counts[0, -1])} tokens, {maps.shares[0]:.0%} of the multiply-adds"
        cells.append(Cell(drawn, name, detail))
    columns = columns or len(cells)
    return compose([cells[start : start + columns] for start in range(0, len(cells), columns)])


def prepare_images(images: Images, processor: Any, names: Sequence[str] | None) -> tuple[Tensor, list[str]]:
    """Pixel values (B, C, H, W) and a name for each."""
    if len(images) == 0:
        raise ValueError("images is empty: give at least one picture, file or row of pixel values.")
    if names is not None and len(names) != len(images):
        raise ValueError(f"names needs one name per image, got {len(names)} for {len(images)} images.")
    if isinstance(images, Tensor):
        return images, list(names) if names is not None else [f"image {index}" for index in range(len(images))]
    found, pixels = [], []
    for index, image in enumerate(images):
        if isinstance(image, Image.Image):
            found.append(f"image {index}")
            picture = as_rgb(image)
        else:
            found.append(Path(image).stem)
            picture = read_picture(image)
        pixels.append(processor(picture, return_tensors="pt")["pixel_values"])
    shapes = {tuple(values.shape[1:]) for values in pixels}
    if len(shapes) > 1:
        raise ValueError(
            f"The processor makes images of different sizes, {sorted(shapes)}, which cannot go through the model "
            "together. Set its size to one height and width, or let it crop."
        )
    return torch.cat(pixels), list(names) if names is not None else found


def pictures_of(
    pixel_values: Tensor, processor: Any, maps: TokenMaps, model: PreTrainedModel, size: int
) -> list[Image.Image]:
    """What the model saw, at the size that maps are drawn."""
    if size < 32:
        raise ValueError(f"size is that of one map in pixels, at least 32, got {size}.")
    patch = encoder_of(model).patch_size
    return [resized_to_cells(image, maps.grid, size, patch) for image in seen_images(pixel_values, processor)]


def compose(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Pictures in rows on white, each with its caption below."""
    width = max(cell.picture.width for row in rows for cell in row)
    height = max(cell.picture.height for row in rows for cell in row)
    text = max(11, round(max(width, height) / 15))
    large, small = ImageFont.load_default(text), ImageFont.load_default(max(10, round(text * 0.8)))
    gap, caption = max(4, text // 2), round(text * 2.6)
    across = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (gap + across * (width + gap), gap + len(rows) * (height + caption + gap) - gap // 2), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for down, row in enumerate(rows):
        for right, cell in enumerate(row):
            left, top = gap + right * (width + gap), gap + down * (height + caption + gap)
            right_edge, bottom_edge = left + cell.picture.width, top + cell.picture.height
            pen.rectangle((left - 1, top - 1, right_edge, bottom_edge), outline=FRAME)  # where all is dropped: white
            sheet.paste(cell.picture, (left, top))
            below = bottom_edge + round(text * 0.25)
            pen.text((left, below), _fitted(cell.title, large, width), INK, font=large)
            pen.text((left, below + round(text * 1.2)), _fitted(cell.detail, small, width), PALE, font=small)
    return sheet


def _fitted(text: str, font: Any, width: int) -> str:
    """As much of a text as fits into a width."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
