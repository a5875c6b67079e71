"""The dense model of the demonstration: a small stock ViT, trained from random weights on the drawn images.

Most of the training uses only the patches around the shape, a quarter of all patches, which makes it quick. The last
steps use whole images. The model is saved as an ordinary folder of transformers.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.utils import logging

from ..files import known_settings, model_folder, refuse_other_settings, whole, write_whole
from ..modeling.encoders import encoder_of
from .images import BOX, CLASSES, MANIFEST, SPLITS


STEPS = 2600
WHOLE = 0.13  # share of the steps that use whole images
BATCH = 16
LEARNING_RATE = 2e-3
WARM_UP = 0.1
WINDOW = 6  # width of the window around the shape, in patches
PATCH = 8
SAVE_EVERY = 200
RECORD, UNFINISHED = "training.json", "unfinished.pt"

Progress = Callable[[str], None]


class Images(NamedTuple):
    """Hold n images.

    Attributes:
        pixels: uint8, (n, 3, size, size).
        boxes: Left, top, right and bottom of each shape in pixels, long, (n, 4).
        labels: Class indices, long, (n,).
    """

    pixels: Tensor
    boxes: Tensor
    labels: Tensor


def train_dense(
    data_folder: str | Path,
    output_dir: str | Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a small ViT on the images of `make_images`, and save it with its image processor.

    Called again after an interruption, it goes on from its last checkpoint and ends with the same weights on the same
    machine. Called again after it was done, it returns its record.

    Args:
        data_folder: The folder of `make_images`.
        output_dir: The folder for the model.
        seed: Seed of the weights and of the training.
        steps: Number of training steps.
        progress: A function that gets a line of text every 200 steps. None: a progress bar is shown.

    Returns:
        The record, which is also saved beside the model. `top1` is the accuracy on the validation split in percent.
    """
    data_folder, output_dir = Path(data_folder), Path(output_dir)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1, got {steps!r}.")
    manifest = data_folder / MANIFEST
    if not manifest.is_file():
        raise ValueError(
            f"{data_folder} has no {MANIFEST}. Draw the images first by make_images({str(data_folder)!r})."
        )
    train, validation = (_load(data_folder / split) for split in SPLITS)
    settings = {
        "data": json.loads(manifest.read_text()),
        "train_images": len(train.labels),
        "eval_images": len(validation.labels),
        "seed": seed,
        "steps": steps,
    }
    record = output_dir / RECORD
    if record.is_file():
        return known_settings(record, settings)
    size = settings["data"]["size"]
    if size % PATCH:
        raise ValueError(
            f"The images are {size} pixels wide, which patches of {PATCH} do not cover. Draw images of another size."
        )
    output_dir.mkdir(parents=True, exist_ok=True)
    model = _new_model(size, seed)
    seconds = _train(model, train, output_dir / UNFINISHED, settings, progress)
    with model_folder(output_dir) as place:
        model.eval().save_pretrained(place)
        _processor(size).save_pretrained(place)
    result = {**settings, "top1": _top1(model, validation), "seconds": round(seconds, 1)}
    write_whole(record, json.dumps(result, indent=2) + "\n")
    (output_dir / UNFINISHED).unlink(missing_ok=True)
    return result


def _train(
    model: ViTForImageClassification,
    images: Images,
    unfinished: Path,
    settings: dict[str, Any],
    progress: Progress | None,
) -> float:
    """Train the model, and return the seconds it took, including those of interrupted calls."""
    steps, seed, size = settings["steps"], settings["seed"], settings["data"]["size"]
    matrices = [weight for weight in model.parameters() if weight.ndim > 1 and weight.shape[0] > 1]
    others = [weight for weight in model.parameters() if weight.ndim == 1 or weight.shape[0] == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps))
    first, seconds = 0, 0.0
    if unfinished.is_file():
        state = torch.load(unfinished, weights_only=True)
        refuse_other_settings(unfinished.parent, state["settings"], settings)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first, seconds = state["step"], state["seconds"]
    border = size // 12
    padded = Images(_padded(images.pixels, border), images.boxes, images.labels)
    whole_from = steps - max(1, round(WHOLE * steps))
    start, running = time.perf_counter() - seconds, 0.0
    model.train()
    bar = logging.tqdm(
        total=steps, initial=first, desc="training the dense model", disable=progress is not None or None
    )
    with bar:
        for step in range(first, steps):
            # One generator per step: a resumed call draws what an uninterrupted call would have drawn.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            pixels, boxes, labels = _batch(padded, size, border, generator)
            window = None if step >= whole_from else _window(boxes, size // PATCH, generator)
            loss = F.cross_entropy(_logits(model, pixels, window), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
            bar.update()
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                state = {
                    "settings": settings,
                    "step": step + 1,
                    "seconds": time.perf_counter() - start,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                }
                with whole(unfinished) as file:
                    torch.save(state, file)
                if progress is not None:
                    progress(f"step {step + 1} of {steps}, loss {running:.2f}")
    return time.perf_counter() - start


def _rate(done: float) -> float:
    """Return the factor of the learning rate after a share of the steps: a linear rise, then a cosine fall."""
    if done < WARM_UP:
        return max(done / WARM_UP, 0.01)
    return 0.02 + 0.49 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))


def _logits(model: ViTForImageClassification, pixels: Tensor, window: Tensor | None) -> Tensor:
    """Return the logits (B, C) from the patches in `window` (B, k) only, or from all patches if it is None."""
    if window is None:
        return model(pixels).logits
    encoder = encoder_of(model)
    tokens = encoder.embed(pixels)
    index = F.pad(window + 1, (1, 0))  # with the class token
    tokens = tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))
    return encoder.run(tokens).logits


def _window(boxes: Tensor, grid: int, generator: torch.Generator) -> Tensor:
    """Return the patches of a square around each shape, (B, k) indices. It is shifted at random by up to one patch."""
    across = min(WINDOW, grid)
    middle = torch.stack([boxes[:, 1] + boxes[:, 3], boxes[:, 0] + boxes[:, 2]], dim=1) / (2 * PATCH)
    off = 2 * torch.rand(len(boxes), 2, generator=generator) - 1
    start = (middle - across / 2 + off).round().long().clamp(0, grid - across)
    steps = torch.arange(across)
    rows, columns = start[:, :1] + steps, start[:, 1:] + steps
    return (rows[:, :, None] * grid + columns[:, None, :]).flatten(1)


def _batch(images: Images, size: int, border: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw random images, shifted, mirrored and with swapped colour channels: pixel values, boxes, labels."""
    chosen = torch.randint(len(images.labels), (BATCH,), generator=generator)
    shifts = torch.randint(2 * border + 1, (BATCH, 2), generator=generator)
    mirrored = torch.rand(BATCH, generator=generator) < 0.5
    pixels, boxes = [], images.boxes[chosen].clone()
    for place, index in enumerate(chosen.tolist()):
        top, left = shifts[place].tolist()
        image = images.pixels[index, torch.randperm(3, generator=generator), top : top + size, left : left + size]
        pixels.append(image.flip(-1) if mirrored[place] else image)
    boxes -= (shifts - border)[:, [1, 0, 1, 0]]
    boxes[mirrored] = torch.stack([size - boxes[:, 2], boxes[:, 1], size - boxes[:, 0], boxes[:, 3]], dim=1)[mirrored]
    return _pixel_values(torch.stack(pixels)), boxes, images.labels[chosen]


def _pixel_values(pixels: Tensor) -> Tensor:
    """Turn uint8 pixels into pixel values, as the image processor does."""
    return pixels.float() / 127.5 - 1


def _padded(pixels: Tensor, border: int) -> Tensor:
    """Extend images by their mirror images at the border, so that a shifted image has no empty edge."""
    return torch.from_numpy(np.pad(pixels.numpy(), ((0, 0), (0, 0), (border, border), (border, border)), "reflect"))


@torch.no_grad()
def _top1(model: ViTForImageClassification, images: Images) -> float:
    batches = zip(images.pixels.split(50), images.labels.split(50), strict=True)
    correct = sum((model(_pixel_values(x)).logits.argmax(dim=-1) == y).sum().item() for x, y in batches)
    return 100 * correct / len(images.labels)


def _new_model(size: int, seed: int) -> ViTForImageClassification:
    """Make a model whose initial weights suit a short training.

    The size of the weights follows their width, and the position embeddings begin as waves over the grid. The stock
    initialisation is for long training: the model would learn nothing for hundreds of steps.
    """
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=size,
        patch_size=PATCH,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: index for index, name in enumerate(CLASSES)},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
        embeddings = model.vit.embeddings
        with torch.no_grad():
            _scale(embeddings.patch_embeddings.projection.weight)
            embeddings.patch_embeddings.projection.bias.zero_()
            embeddings.position_embeddings[0, 1:] = 0.3 * _waves(size // PATCH, config.hidden_size)
            for layer in model.vit.layers:
                attention = layer.attention
                for linear in (attention.q_proj, attention.k_proj, attention.v_proj, layer.mlp.fc1):
                    _scale(linear.weight)
                for linear in (attention.o_proj, layer.mlp.fc2):
                    _scale(linear.weight, 0.5 / math.sqrt(config.num_hidden_layers))
    return model


def _scale(weight: Tensor, factor: float = 1.0) -> None:
    nn.init.normal_(weight, std=factor / math.sqrt(weight[0].numel()))


def _waves(grid: int, width: int) -> Tensor:
    """Return sines and cosines of row and column, (grid * grid, width)."""
    frequencies = 100 ** (-torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (rows, columns)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1)


def _processor(size: int) -> ViTImageProcessor:
    half = [0.5, 0.5, 0.5]
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=half, image_std=half)


def _load(folder: Path) -> Images:
    pixels, boxes, labels = [], [], []
    for label, name in enumerate(CLASSES):
        for file in sorted((folder / name).glob("*.png")):
            with Image.open(file) as image:
                pixels.append(np.asarray(image.convert("RGB")).transpose(2, 0, 1))
                boxes.append(json.loads(image.info[BOX]))
            labels.append(label)
    if not labels:
        raise ValueError(f"{folder} holds no images. Draw them first by make_images.")
    return Images(torch.from_numpy(np.stack(pixels)), torch.tensor(boxes), torch.tensor(labels))
