"""Draw token maps with Pillow and NumPy.

A map is drawn over the image as the model saw it, resized and cropped. The image may have any size: the patches are
spread evenly over it. A dropped patch fades to white. Patches that became one token share their mean colour and an
outline. A patch that is still a token of its own shows the image as it is.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .maps import TokenMaps, strongest_token


FADE = 0.8  # how far a dropped patch is blended with white
PALE = 0.62  # how far a token of gathered patches (EViT) is blended with white
# Colours from no weight to the largest weight.
HEAT = np.array([(18, 14, 52), (78, 22, 110), (158, 42, 99), (222, 82, 58), (251, 160, 40), (252, 238, 150)], float)


def seen_images(pixel_values: Tensor, processor: Any) -> list[Image.Image]:
    """Turn pixel values back into images, by undoing the normalisation of the image processor.

    Args:
        pixel_values: Pixel values, (B, C, H, W).
        processor: The image processor that made them.

    Returns:
        `list` of `Image.Image`: The images as the model saw them.
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] not in (1, 3):
        raise ValueError(
            "Only pixel values (B, C, H, W) with 1 or 3 channels can be drawn, got the shape "
            f"{tuple(pixel_values.shape)}."
        )
    values = pixel_values.detach().float().cpu()
    if processor.do_normalize:
        mean, std = (torch.tensor(x).float().view(1, -1, 1, 1) for x in (processor.image_mean, processor.image_std))
        values = values * std + mean
    if processor.do_rescale:
        values = values / processor.rescale_factor
    values = values.round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    return [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in values]


def resized_to_cells(image: Image.Image, grid: tuple[int, int], size: int, patch: tuple[int, int]) -> Image.Image:
    """Crop an image to its patches, and resize it so that its longer side has about `size` pixels.

    Every patch gets the same number of pixels.
    """
    rows, columns = grid
    covered = image.crop((0, 0, columns * patch[1], rows * patch[0]))
    scale = size / max(covered.size)
    cell_width, cell_height = (max(2, round(side * scale)) for side in (patch[1], patch[0]))
    return covered.resize((columns * cell_width, rows * cell_height), Image.Resampling.LANCZOS)


def draw_token_map(
    image: Image.Image,
    patch_map: Any,
    grid: tuple[int, int],
    *,
    fade: float = FADE,
    pale: float = 0.0,
    fill: bool = True,
) -> Image.Image:
    """Draw which token holds which patch.

    Args:
        image: The image as the model saw it.
        patch_map: The token of each patch, (N,), row by row. -1: the patch was dropped.
        grid: Numbers of rows and columns of patches.
        fade: How far dropped patches are blended with white, from 0 to 1.
        pale: How far the mean colour of merged patches is blended with white, from 0 to 1.
        fill: Whether merged patches are filled with their mean colour. False: draw outlines only.

    Returns:
        `Image.Image`: The map, as large as the image.

    Example:
        >>> maps = token_maps(model, pixel_values)
        >>> draw_token_map(seen_images(pixel_values, processor)[0], maps.patch_maps[-1][0], maps.grid)
    """
    tokens = _on_grid(patch_map, grid, "patch_map").astype(int)
    for name, value in (("fade", fade), ("pale", pale)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value!r}.")
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    rows, columns = _cells(pixels, grid)
    token = tokens[rows][:, columns] + 1  # 0: dropped
    patches = np.bincount(tokens.ravel() + 1)
    dropped, merged = token == 0, (patches[token] > 1) & (token > 0)
    area = np.bincount(token.ravel()).clip(min=1)
    means = np.stack([np.bincount(token.ravel(), pixels[..., c].ravel()) / area for c in range(3)], axis=-1)
    means += pale * (255 - means)
    drawn = np.where(merged[..., None], means[token], pixels) if fill else pixels.copy()
    drawn[dropped] += fade * (255 - drawn[dropped])
    thickness = max(1, round(min(pixels.shape[0] / grid[0], pixels.shape[1] / grid[1]) / 20))
    border = _inner_border(token, thickness) & merged
    drawn[border] = _shade(means)[token[border]]
    return Image.fromarray(drawn.round().clip(0, 255).astype(np.uint8))


def draw_token_weights(
    image: Image.Image, weights: Any, grid: tuple[int, int], *, most: float | None = None
) -> Image.Image:
    """Draw the weight of each patch as a heat map over the image.

    Colours follow the square root of the weight, so that small weights can still be seen beside a sharp peak.

    Args:
        image: The image as the model saw it.
        weights: Weight of each patch, (N,), in one token or summed over tokens.
        grid: Numbers of rows and columns of patches.
        most: The weight that gets the brightest colour. None: the largest weight.

    Returns:
        `Image.Image`: The heat map, as large as the image.
    """
    values = _on_grid(weights, grid, "weights").astype(float)
    most = float(values.max()) if most is None else most
    if most <= 0:
        raise ValueError(f"most, the weight of the brightest colour, must be above 0, got {most!r}.")
    pixels = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64)
    rows, columns = _cells(pixels, grid)
    heat = np.sqrt((values / most).clip(0, 1))[rows][:, columns]
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(heat, stops, HEAT[:, c]) for c in range(3)], axis=-1)
    cover = 0.6 + 0.3 * heat[..., None]
    return Image.fromarray((cover * colours + (1 - cover) * pixels).round().clip(0, 255).astype(np.uint8))


def draw_layer(image: Image.Image, maps: TokenMaps, index: int, layer: int) -> Image.Image:
    """Draw the map of image `index` after a layer. In mixtures, a patch belongs to the token where it weighs most."""
    patch_map, weights = maps.patch_maps[layer], maps.patch_weights[layer]
    if weights is not None:
        return draw_token_map(image, strongest_token(weights[index]), maps.grid)
    if patch_map is None:
        raise ValueError(f"Layer {layer} has no map of its patches.")
    return draw_token_map(image, patch_map[index], maps.grid, pale=PALE if maps.gathers_the_rest() else 0.0)


def _on_grid(values: Any, grid: tuple[int, int], name: str) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.size != grid[0] * grid[1]:
        raise ValueError(f"{name} has {array.size} values for a grid of {grid[0]} x {grid[1]} patches.")
    return array.reshape(grid)


def _cells(pixels: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the row of patches for each row of pixels (H,), and the column of patches for each column (W,)."""
    height, width = pixels.shape[:2]
    if height < grid[0] or width < grid[1]:
        raise ValueError(f"An image of {height} x {width} pixels cannot show {grid[0]} x {grid[1]} patches.")
    return np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width


def _inner_border(token: np.ndarray, thickness: int) -> np.ndarray:
    """Find the pixels of each region that are at most `thickness` rows or columns from another region."""
    border = np.zeros(token.shape, dtype=bool)
    for step in range(1, thickness + 1):
        across, down = token[:, step:] != token[:, :-step], token[step:] != token[:-step]
        border[:, step:] |= across
        border[:, :-step] |= across
        border[step:] |= down
        border[:-step] |= down
    return border


def _shade(colours: np.ndarray) -> np.ndarray:
    """Make light colours (..., 3) darker and dark colours lighter."""
    light = colours @ (0.299, 0.587, 0.114) > 70
    return np.where(light[..., None], colours * 0.5, colours + 0.45 * (255 - colours))
