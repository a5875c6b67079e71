"""Several token maps in one picture: of several images and layers, or of one image by several methods."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling.encoders import encoder_of
from ..pictures import as_rgb, check_one_size, read_picture
from .drawing import draw_layer, resized_to_cells, seen_images
from .maps import TokenMaps, checked_layers, token_maps


INK, PALE, FRAME = (32, 33, 36), (98, 102, 109), (208, 211, 216)

Images = Tensor | Image.Image | str | Path | Sequence[Image.Image | str | Path]


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
    """Draw one row per image: the image, and its tokens after some layers.

    Args:
        model: A reduced model.
        images: Pictures, files, or pixel values (B, C, H, W) that `processor` made.
        processor: The image processor of the model.
        layers: The layers to show, counted from 0. None: up to six of the layers that reduce.
        names: Names of the images. None: the names of the files.
        size: About how many pixels the longer side of one map has.

    Returns:
        `Image.Image`: The picture.

    Example:
        >>> token_map_grid(model, ["cat.jpg", "dog.jpg"], processor).save("maps.png")
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
    """Draw an image beside the tokens that several models have left of it after their last layer.

    Args:
        models: The reduced models, by their titles.
        image: A picture or a file.
        processor: The image processor of the models.
        size: About how many pixels the longer side of one map has.
        columns: Number of pictures per row, including the image itself. None: all are in one row.

    Returns:
        `Image.Image`: The picture.

    Example:
        >>> models = {f"ToMe, r={r}": reduce_tokens(model, ToMeConfig(r=r)) for r in (8, 16)}
        >>> method_comparison(models, "cat.jpg", processor).save("methods.png")
    """
    if not models:
        raise ValueError(
            "models is empty. Give at least one, such as {'ToMe': reduce_tokens(model, ToMeConfig(r=8))}."
        )
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
    """Return pixel values (B, C, H, W), and a name for each image."""
    if isinstance(images, (str, Path, Image.Image)):
        images = [images]
    if len(images) == 0:
        raise ValueError("images is empty. Give at least one picture, file or row of pixel values.")
    if names is not None and len(names) != len(images):
        raise ValueError(f"names needs one name per image, got {len(names)} for {len(images)} images.")
    if isinstance(images, Tensor):
        return images, list(names) if names is not None else [f"image {index}" for index in range(len(images))]
    default_names, pixels = [], []
    for index, image in enumerate(images):
        if isinstance(image, Image.Image):
            default_names.append(f"image {index}")
            picture = as_rgb(image)
        else:
            default_names.append(Path(image).stem)
            picture = read_picture(image)
        pixels.append(processor(picture, return_tensors="pt")["pixel_values"])
    check_one_size(pixels, "the images go through the model together")
    return torch.cat(pixels), list(names) if names is not None else default_names


def pictures_of(
    pixel_values: Tensor, processor: Any, maps: TokenMaps, model: PreTrainedModel, size: int
) -> list[Image.Image]:
    """Return the images as the model saw them, at the size at which maps are drawn."""
    if size < 32:
        raise ValueError(f"size is that of one map in pixels and must be at least 32, got {size}.")
    patch = encoder_of(model).patch_size
    return [resized_to_cells(image, maps.grid, size, patch) for image in seen_images(pixel_values, processor)]


def compose(rows: Sequence[Sequence[Cell]]) -> Image.Image:
    """Put pictures in rows on a white sheet, each with its caption below."""
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
            pen.rectangle((left - 1, top - 1, right_edge, bottom_edge), outline=FRAME)  # a map without tokens is white
            sheet.paste(cell.picture, (left, top))
            below = bottom_edge + round(text * 0.25)
            pen.text((left, below), _fitted(cell.title, large, width), INK, font=large)
            pen.text((left, below + round(text * 1.2)), _fitted(cell.detail, small, width), PALE, font=small)
    return sheet


def _fitted(text: str, font: Any, width: int) -> str:
    """Cut a text to a width in pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
