"""`predict`: label every image of a folder, with a PyTorch model or an exported one."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.utils import logging

from .deploy import ExportedModel
from .evaluation.compute import tokens_entering
from .evaluation.resume import append_line, digest, digest_of_model, launched_processes, read_lines
from .files import known_settings, write_whole
from .modes import evaluating
from .pictures import is_image, read_picture
from .tasks import all_layers_act, task_of_model


SETTINGS = "settings.json"

Answer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function: pixel values (B, C, H, W) -> logits (B, classes), and tokens that leave the last layer, (B,)."""


def predict(
    model: PreTrainedModel | ExportedModel,
    images: Sequence[str | Path],
    image_processor: Any = None,
    *,
    top_k: int = 1,
    batch_size: int = 32,
    num_workers: int = 0,
    output_dir: str | Path | None = None,
    progress: bool = True,
) -> Iterator[dict[str, Any]]:
    """Label images one after the other, as they are read.

    If a file cannot be read, its result has an `error` and no label, and the next files follow. Processes of
    `accelerate launch` or `torchrun` share the images. Each process returns and writes its own part.

    Args:
        model: An image classifier, or the result of `load_exported`.
        images: Files, and folders with or without subfolders.
        image_processor: Image processor of the model. An exported model has its own.
        top_k (`int`): Number of classes to return for each image.
        batch_size (`int`): Number of images per batch.
        num_workers (`int`): Number of processes that read images.
        output_dir (`str` or `Path`, *optional*): Folder to which predictions are written as they come, one line of
            JSON each. The first process writes `part-0.jsonl`, and so on. If you call again, images that are in these
            files are left out.
        progress (`bool`): Show a progress bar.

    Returns:
        An iterator over one `dict` per image: `file`, `label`, `score`, `tokens`, and `others` if `top_k` is above 1;
            or `file` and `error`.

    Example:
        >>> for row in predict(load_exported("vit-tome-onnx"), ["photos"]):
        ...     print(row["file"], row["label"], row["score"], row["tokens"])
    """
    if top_k < 1 or batch_size < 1 or num_workers < 0:
        raise ValueError(
            f"top_k and batch_size must be at least 1, and num_workers at least 0, got {top_k}, {batch_size} and "
            f"{num_workers}."
        )
    image_processor = image_processor or getattr(model, "image_processor", None)
    if image_processor is None:
        raise ValueError("There is no image_processor. Give the image processor of the model.")
    _check_classifier(model)
    device = model.device if isinstance(model, PreTrainedModel) else torch.device("cpu")
    processes = launched_processes(device)
    folder = None if output_dir is None else Path(output_dir)
    done: set[str] = set()
    if folder is not None:
        labels = digest([json.dumps(model.config.id2label).encode()])
        processor = json.loads(json.dumps(image_processor.to_dict(), default=str))
        settings = {"model": _told(model), "labels": labels, "processor": processor, "top_k": top_k}
        if processes.rank == 0 and not (folder / SETTINGS).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / SETTINGS, json.dumps(settings, indent=1))
        processes.wait()
        known_settings(folder / SETTINGS, settings)
        done = {row["file"] for part in sorted(folder.glob("part-*.jsonl")) for row in read_lines(part)}
        processes.wait()  # no process writes before all have read
    files = [file for file in find_images(images) if file not in done]
    mine = files[processes.rank :: processes.world]
    where = None if folder is None else folder / f"part-{processes.rank}.jsonl"
    show = progress and processes.rank == 0
    return _predict(model, mine, image_processor, top_k, batch_size, num_workers, where, device, show)


def _predict(
    model: Any, files: list[str], image_processor: Any, top_k: int, batch_size: int, num_workers: int,
    where: Path | None, device: torch.device, show: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    parts = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    reader = _Reader(parts, image_processor)
    loader: Any = DataLoader(reader, batch_size=None, num_workers=min(num_workers, len(parts)))
    labels = model.config.id2label
    answer = model.with_counts if isinstance(model, ExportedModel) else _of_torch(model)
    with logging.tqdm(total=len(files), desc="predicting", leave=False, disable=not show, file=sys.stderr) as bar:
        for some, errors, pixel_values in loader:
            rows = [{"file": file, "error": error} for file, error in errors]
            some, failed, logits, tokens = _answered(answer, some, pixel_values.to(device))
            rows += [{"file": file, "error": error} for file, error in failed]
            if some:
                best = logits.float().softmax(dim=-1).topk(min(top_k, logits.shape[-1]))
                for file, scores, indices, count in zip(
                    some, best.values.tolist(), best.indices.tolist(), tokens.tolist(), strict=True
                ):
                    named = [
                        {"label": str(labels[index]), "score": round(score, 6)}
                        for index, score in zip(indices, scores, strict=True)
                    ]
                    row: dict[str, Any] = {"file": file, **named[0], "tokens": count}
                    rows.append(row if top_k == 1 else {**row, "others": named[1:]})
            for row in rows:
                if where is not None:
                    append_line(where, row)
                yield row
            bar.update(len(rows))


def find_images(names: Sequence[str | Path]) -> list[str]:
    """List image files, and the image files in folders, sorted by name within each folder, each once."""
    found: dict[str, None] = {}
    for name in names:
        path = Path(name)
        inside = [str(path)] if path.is_file() and is_image(path) else sorted(_walk(path)) if path.is_dir() else []
        if not inside:
            raise ValueError(f"{name} is neither an image nor a folder of images.")
        found.update(dict.fromkeys(inside))
    return list(found)


def _walk(folder: Path) -> Iterator[str]:
    seen = set()  # a link may lead to a folder above it
    for where, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(where))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(where, name)) not in seen]
        yield from (os.path.join(where, name) for name in names if is_image(Path(where, name)))


class _Reader(torch.utils.data.Dataset):
    """Batches of files for a `DataLoader`: (readable files, other files with their errors, pixel values)."""

    def __init__(self, parts: list[list[str]], image_processor: Any):
        self.parts, self.image_processor = parts, image_processor

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[list[str], list[tuple[str, str]], Tensor]:
        files, pictures, errors = [], [], []
        for file in self.parts[number]:
            try:
                pictures.append(read_picture(file))
                files.append(file)
            except ValueError as error:
                errors.append((file, str(error)))
        if not files:
            return files, errors, torch.empty(0)
        return files, errors, self.image_processor(pictures, return_tensors="pt")["pixel_values"]


def _answered(
    answer: Answer, files: list[str], pixel_values: Tensor
) -> tuple[list[str], list[tuple[str, str]], Tensor, Tensor]:
    """Run the model on a batch. If it fails, run it image by image, so that only the images that fail are lost.

    Returns the files that worked, the other files with their errors, and logits and tokens of the files that worked.
    """
    if not files:
        return [], [], pixel_values, pixel_values
    try:
        return files, [], *answer(pixel_values)
    except Exception as error:  # each runtime has its own exceptions
        if len(files) == 1:
            reason = f"the model failed: {str(error).strip().splitlines()[0]}"
            return [], [(files[0], reason)], pixel_values, pixel_values
    rows: list[str] = []
    broken: list[tuple[str, str]] = []
    parts: list[tuple[Tensor, Tensor]] = []
    for at, file in enumerate(files):
        some, failed, logits, tokens = _answered(answer, [file], pixel_values[at : at + 1])
        rows, broken = rows + some, broken + failed
        if some:
            parts.append((logits, tokens))
    if not parts:
        raise ValueError(f"The model fails on every image. On {broken[0][0]}: {broken[0][1]}.")
    return rows, broken, torch.cat([one for one, _ in parts]), torch.cat([one for _, one in parts])


def _of_torch(model: PreTrainedModel) -> Answer:
    def answer(pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        with evaluating(model), torch.inference_mode():
            output: Any = model(pixel_values.to(model.dtype), **all_layers_act(model))
        counts = output.get("token_counts")
        if counts is None:
            return output.logits, torch.full((len(pixel_values),), tokens_entering(model, pixel_values[:1]))
        return output.logits, counts[:, -1]

    return answer


def _check_classifier(model: Any) -> None:
    if isinstance(model, ExportedModel):
        if model.record["input"] != "pixel_values":
            raise ValueError(f"{model.folder} takes {model.record['input']} and not images.")
        if model.record["output"] == "logits":
            return
        raise ValueError(
            f"{model.folder} returns features and not classes. To get them, call the model that load_exported returns."
        )
    task = task_of_model(model).name
    if task != "image-classification":
        raise ValueError(f"A {type(model).__name__} is for {task}. It does not predict classes of images.")


def _told(model: Any) -> Any:
    """Return a digest of the model. If it changes, predictions may change."""
    if not isinstance(model, ExportedModel):
        return digest_of_model(model)
    files = sorted(
        file for file in model.folder.iterdir() if file.suffix in (".json", ".onnx", ".data", ".xml", ".bin", ".pt2")
    )
    return digest(file.read_bytes() for file in files)
