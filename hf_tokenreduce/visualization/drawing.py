"""Token maps as pictures, with Pillow and NumPy.

A picture is drawn over the image as the model saw it, resized and cropped. Any size will do: patches are spread
evenly over it. A dropped patch fades to white, the patches of one token share its mean colour and an outline, and a
patch that is still a token of its own shows the image as it is.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .maps import TokenMaps, strongest_token


FADE = 0.8  # how far a dropped patch is on its way to white
PALE = 0.62  # and a token that gathers what would else be dropped
# From no weight to the most.
HEAT = np.array([(18, 14, 52), (78, 22, 110), (158, 42, 99), (222, 82, 58), (251, 160, 40), (252, 238, 150)], float)


def seen_images(pixel_values: Tensor, processor: Any) -> list[Image.Image]:
    """(B, C, H, W) -> what the model saw: the image processor's normalisation is undone."""
    if pixel_values.ndim != 4 or pixel_values.shape[1] not in (1, 3):
        raise ValueError(
            f"Images with 1 or 3 channels can be drawn, (B, C, H, W); got pixel values {tuple(pixel_values.shape)}."
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
    """The part of an image that its patches cover, its longer side about `size` pixels, every patch equally many."""
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

    patch_map: (N,) the token of each patch, row by row, -1 if it was dropped
    fade: how far a dropped patch is blended to white
    pale: how far the mean colour of several patches is
    fill: whether the patches of one token take their mean colour. False: outlines only.
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
    """Draw how much each patch weighs, as heat over the image. The scale is that of the weight's square root, on which
    what is small beside the sharpest peak still shows.

    weights: (N,), of one token or summed over tokens
    most: the weight of the hottest colour. None: the largest there is.
    """
    values = _on_grid(weights, grid, "weights").astype(float)
    most = float(values.max()) if most is None else most
    if most <= 0:
        raise ValueError(f"most, the weight of the hottest colour, must be above 0, got {most!r}.")
    pixels = np.asarray(image.convert("L").convert("RGB"), dtype=np.float64)
    rows, columns = _cells(pixels, grid)
    heat = np.sqrt((values / most).clip(0, 1))[rows][:, columns]
    stops = np.linspace(0, 1, len(HEAT))
    colours = np.stack([np.interp(heat, stops, HEAT[:, c]) for c in range(3)], axis=-1)
    cover = 0.6 + 0.3 * heat[..., None]
    return Image.fromarray((cover * colours + (1 - cover) * pixels).round().clip(0, 255).astype(np.uint8))


def draw_layer(image: Image.Image, maps: TokenMaps, index: int, layer: int) -> Image.Image:
    """Image `index` of the maps after a layer. Of mixtures, each patch goes to the token in which it weighs most."""
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
    """The row and the column of patches that each row and column of pixels belongs to."""
    height, width = pixels.shape[:2]
    if height < grid[0] or width < grid[1]:
        raise ValueError(f"An image of {height} x {width} pixels cannot show {grid[0]} x {grid[1]} patches.")
    return np.arange(height) * grid[0] // height, np.arange(width) * grid[1] // width


def _inner_border(token: np.ndarray, thickness: int) -> np.ndarray:
    """The pixels of each region that are within `thickness` of another one, straight across."""
    border = np.zeros(token.shape, dtype=bool)
    for step in range(1, thickness + 1):
        across, down = token[:, step:] != token[:, :-step], token[step:] != token[:-step]
        border[:, step:] |= across
        border[:, :-step] |= across
        border[step:] |= down
        border[:-step] |= down
    return border


def _shade(colours: np.ndarray) -> np.ndarray:
    """(..., 3) -> a darker shade of light colours, a lighter one of dark colours."""
    light = colours @ (0.299, 0.587, 0.114) > 70
    return np.where(light[..., None], colours * 0.5, colours + 0.45 * (255 - colours))
