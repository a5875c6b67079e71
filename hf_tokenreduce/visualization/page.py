"""Write token maps as one HTML file that contains its pictures, has no scripts and loads nothing else."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..files import write_whole
from ..methods import method_of
from ..modeling.encoders import encoder_of
from ..modes import evaluating
from ..tasks import class_scores, is_one_by_one, is_regression, score_text
from .composing import Images, pictures_of, prepare_images
from .drawing import draw_layer, draw_token_weights
from .maps import TokenMaps, checked_layers, token_maps
from .template import PAGE


MAP_SIZE, THUMBNAIL, HEAT_SIZE = 256, 112, 128  # approximate length of the longer side in pixels
RANKED = 6  # number of images at either end of the ranking, if there are more than twice as many
MIXTURES = 6  # number of mixed tokens that are shown for each image


class Picture(NamedTuple):
    source: str
    width: int
    height: int


class Guess(NamedTuple):
    label: str
    full_label: str
    score: str
    decided: tuple[str, ...]


def write_page(
    model: PreTrainedModel,
    images: Images,
    processor: Any,
    path: str | Path,
    *,
    dense: PreTrainedModel | None = None,
    names: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    title: str | None = None,
) -> Path:
    """Write an HTML page that shows what a reduced model did to each image.

    Args:
        model: A reduced model.
        images: Pictures, files, or pixel values (B, C, H, W) that `processor` made. The page has about 100 KB for
            each image.
        processor: The image processor of the model.
        path: The HTML file to write.
        dense: A classifier to compare the predictions with, such as `restore(model)` if the model was not trained.
            Of other models it is not used.
        names: Names of the images. None: the names of the files.
        layers: The layers whose maps are shown, counted from 0. None: up to five of the layers that reduce.
        title: Title of the page.

    Returns:
        `Path`: The path of the page.

    Example:
        >>> write_page(model, ["cat.jpg", "dog.jpg"], processor, "tokens.html", dense=restore(model))
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Give the name of a file in it, such as {path / 'tokens.html'}.")
    pixel_values, names = prepare_images(images, processor, names)
    maps = token_maps(model, pixel_values)
    shown = checked_layers(layers, maps, most=5)
    pictures = pictures_of(pixel_values, processor, maps, model, MAP_SIZE)
    guesses = _guesses(maps.logits, model)
    compared = dense is not None and guesses is not None
    dense_guesses = _guesses(_dense_logits(dense, pixel_values), dense) if compared else None
    rows = []
    for index in logging.tqdm(range(len(names)), desc="drawing token maps", leave=False):
        rows.append(
            {
                "name": names[index],
                "share": float(maps.shares[index]),
                "picture": _embedded(pictures[index]),
                "maps": [
                    {
                        "layer": layer,
                        "tokens": int(maps.counts[index, layer]),
                        "picture": _embedded(draw_layer(pictures[index], maps, index, layer)),
                    }
                    for layer in shown
                ],
                "guess": guesses and guesses[index],
                "dense": dense_guesses and dense_guesses[index],
            }
        )
    reduction = maps.reduction
    method = "no reduction" if reduction is None else type(reduction).__name__.removesuffix("Config")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    html = environment.from_string(PAGE).render(
        title=title or f"What {method} did to each image",
        model=Path(model.config.name_or_path).name or model.config.model_type,
        method=method,
        settings={} if reduction is None else _settings(reduction),
        thresholds=_thresholds(model),
        rows=rows,
        maps=maps,
        mean_counts=maps.counts.double().mean(dim=0).tolist(),
        least_counts=maps.counts.amin(dim=0).tolist(),
        most_counts=maps.counts.amax(dim=0).tolist(),
        share=float(maps.shares.mean()),
        agreeing=None if is_regression(model.config) else _agreeing(guesses, dense_guesses),
        chart=_chart(maps, names),
        adaptive=maps.differ(),
        ranking=_ranking(maps, names, pictures) if maps.differ() else {},
        heats=_heats(maps, names, pictures),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, html)
    return path


def _settings(reduction: Any) -> dict[str, str]:
    """Return the settings that matter now: without those for training, and without thresholds that were learned."""
    values = reduction.to_dict()
    shown = method_of(reduction).shown_settings
    names = tuple(values) if shown is None else shown
    return {name: _setting(values[name]) for name in names if name != "method" and values[name] is not None}


def _thresholds(model: PreTrainedModel) -> dict[str, list[float]]:
    """Return the numbers that the method has learned for each layer."""
    reduction = model.config.reduction
    return method_of(reduction).learned_numbers(model)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(_setting(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _embedded(picture: Image.Image) -> Picture:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=82, subsampling=0, optimize=True)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(f"data:image/jpeg;base64,{data}", *picture.size)


@torch.no_grad()
def _dense_logits(dense: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    options = encoder_of(dense).size_arguments(pixel_values)
    with evaluating(dense):
        batches = [batch.to(dense.device, dense.dtype) for batch in pixel_values.split(32)]
        outputs = [dense(batch, **options) for batch in batches]
        return torch.cat([output.logits.float().cpu() for output in outputs])


def _guesses(logits: Tensor | None, model: PreTrainedModel) -> list[Guess] | None:
    """Return the most probable label of each image. None if the model is not a classifier.

    What a model decides is this label, or all with a score above a half if it scores each class alone. A regression
    head decides nothing.
    """
    if logits is None:
        return None
    if not logits.isfinite().all():
        raise ValueError("What the model computes for an image is not finite. Try to load the model in float32.")
    config, guesses = model.config, []
    names = [str(config.id2label.get(index, index)) for index in range(logits.shape[-1])]
    for row in class_scores(logits, config):
        label, score = names[int(row.argmax())], score_text(row.max().item(), config)
        decided: tuple[str, ...] = (label,)
        if is_regression(config):
            decided = ()
        elif is_one_by_one(logits, config):
            decided = tuple(name for name, one in zip(names, row.tolist(), strict=True) if one > 0.5)
        guesses.append(Guess(label.split(",")[0], label, score, decided))
    return guesses


def _agreeing(guesses: list[Guess] | None, dense: list[Guess] | None) -> int | None:
    if guesses is None or dense is None:
        return None
    return sum(guess.decided == other.decided for guess, other in zip(guesses, dense, strict=True))


def _ranking(
    maps: TokenMaps, names: Sequence[str], pictures: Sequence[Image.Image]
) -> dict[str, list[dict[str, Any]]]:
    """Rank images by the multiply-adds they took, from the fewest. If there are many, return those at either end."""
    last = maps.counts.shape[1] - 1

    def entry(index: int) -> dict[str, Any]:
        drawn = draw_layer(pictures[index], maps, index, last)
        drawn.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        return {
            "name": names[index],
            "picture": _embedded(drawn),
            "share": float(maps.shares[index]),
            "tokens": int(maps.counts[index, last]),
        }

    order = maps.shares.argsort(stable=True).tolist()
    groups = {"": order}
    if len(order) > 2 * RANKED:
        groups = {"Easiest": order[:RANKED], "Hardest": order[-RANKED:]}
    return {label: [entry(index) for index in group] for label, group in groups.items()}


def _heats(maps: TokenMaps, names: Sequence[str], pictures: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Draw the weight of each patch in all tokens together, and in some tokens alone, if tokens are mixtures."""
    weights = maps.patch_weights[-1]
    if weights is None:
        return []
    heats = []
    for name, picture, of_image in zip(names, pictures, weights, strict=True):
        small = picture.copy()
        small.thumbnail((HEAT_SIZE, HEAT_SIZE), Image.Resampling.LANCZOS)
        sharpest = of_image.amax(dim=1).argsort(descending=True, stable=True)[:MIXTURES].tolist()
        heats.append(
            {
                "name": name,
                "total": _embedded(draw_token_weights(small, of_image.sum(dim=0), maps.grid)),
                "tokens": [
                    {"token": token, "picture": _embedded(draw_token_weights(small, of_image[token], maps.grid))}
                    for token in sharpest
                ],
            }
        )
    return heats


def _chart(maps: TokenMaps, names: Sequence[str]) -> dict[str, Any]:
    """Compute the lines of the chart, one per image, in a drawing of 760 x 240. If all are equal, only their mean."""
    left, right, top, bottom = 46.0, 640.0, 14.0, 206.0
    num_layers = maps.counts.shape[1]

    def across(stage: int) -> float:
        return round(left + (right - left) * stage / num_layers, 1)

    def up(tokens: float) -> float:
        return round(bottom - (bottom - top) * tokens / maps.num_tokens, 1)

    def line(counts: Sequence[float]) -> dict[str, Any]:
        stages = enumerate([maps.num_tokens, *counts])
        points = " ".join(f"{across(stage)},{up(tokens)}" for stage, tokens in stages)
        return {"points": points, "end": up(counts[-1]), "tokens": counts[-1]}

    mean = line(maps.counts.double().mean(dim=0).tolist())
    lines = []
    if maps.differ():
        lines = [{"name": name, **line(counts)} for name, counts in zip(names, maps.counts.tolist(), strict=True)]
    ticks = sorted({0, round(maps.num_tokens / 4), round(maps.num_tokens / 2), round(maps.num_tokens * 3 / 4)})
    return {
        "left": left,
        "right": right,
        "bottom": bottom,
        "mean": mean,
        "lines": lines,
        "ticks": [(tick, up(tick)) for tick in [*ticks, maps.num_tokens]],
        "stages": [("in", across(0))] + [(layer, across(layer + 1)) for layer in range(num_layers)],
    }
