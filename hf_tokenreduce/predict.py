"""`predict`: label every image of a folder, with a PyTorch model or an exported one."""

import json
import os
import sys
import time
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
from .modeling.version import __version__
from .modes import evaluating
from .pictures import UNREADABLE, find_in, is_image, read_picture
from .tasks import all_layers_act, class_scores, is_regression, task_of_model


SETTINGS = "settings.json"
ENOUGH_FAILURES = 64  # so many images that all fail, before any works, end a run

Answer = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A function: pixel values (B, C, H, W) -> logits (B, classes), and tokens that leave the last layer, (B,)."""


def predict(
    model: PreTrainedModel | ExportedModel,
    images: str | Path | Sequence[str | Path],
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
        images: Files, and folders with or without subfolders. One of them, or a list.
        image_processor: Image processor of the model. An exported model has its own.
        top_k (`int`): Number of classes to return for each image.
        batch_size (`int`): Number of images per batch.
        num_workers (`int`): Number of processes that read images.
        output_dir (`str` or `Path`, *optional*): Folder to which predictions are written as they come, one line of
            JSON each. The first process writes `part-0.jsonl`, and so on. If you call again, images that have a label
            in these files are left out. Images with an error are tried again, unless they are as unreadable as they
            were. So the last line of an image counts.
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
        raise ValueError(
            "There is no image_processor. Give the image processor of the model, or save it in the folder of the "
            "graph: AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained(FOLDER)."
        )
    _check_classifier(model)
    device = model.device if isinstance(model, PreTrainedModel) else torch.device("cpu")
    processes = launched_processes(device)
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None and (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds a model. Give another folder for the predictions.")
    done: set[str] = set()
    worked = False
    base = os.getcwd()  # names of files are relative to it
    if folder is not None:
        labels = digest([json.dumps(model.config.id2label).encode()])
        processor = json.loads(json.dumps(image_processor.to_dict(), default=str))
        settings = {"model": _told(model), "labels": labels, "processor": processor, "top_k": top_k}
        settings |= {"version": __version__, "problem_type": getattr(model.config, "problem_type", None)}
        if isinstance(model, ExportedModel):  # of a PyTorch model, the digest tells it
            settings["dtype"] = model.dtype
        if processes.rank == 0 and not (folder / SETTINGS).is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / SETTINGS, json.dumps({**settings, "base": base}, indent=1))
        processes.wait()
        base = known_settings(folder / SETTINGS, settings).get("base", base)
        finished = [row for part in sorted(folder.glob("part-*.jsonl")) for row in _done(part, base)]
        done = {file for file, _ in finished}
        worked = any(has_label for _, has_label in finished)
        processes.wait()  # no process writes before all have read
    files = [file for file in find_images(images) if os.path.abspath(file) not in done]
    mine = files[processes.rank :: processes.world]
    where = None if folder is None else folder / f"part-{processes.rank}.jsonl"
    show = progress and processes.rank == 0
    # From another folder, names that are relative to that one would not be found here.
    keep = None if where is None else _Keeper(where, os.getcwd() == base)
    return _predict(model, mine, image_processor, top_k, batch_size, num_workers, keep, device, show, worked)


def _predict(
    model: Any, files: list[str], image_processor: Any, top_k: int, batch_size: int, num_workers: int,
    keep: "_Keeper | None", device: torch.device, show: bool, worked: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    parts = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    reader = _Reader(parts, image_processor)
    loader: Any = DataLoader(reader, batch_size=None, num_workers=min(num_workers, len(parts)))
    labels, numbers = model.config.id2label, is_regression(model.config)
    failures: list[tuple[str, str]] = []
    answer = model.with_counts if isinstance(model, ExportedModel) else _of_torch(model)
    with logging.tqdm(total=len(files), desc="predicting", leave=False, disable=not show, file=sys.stderr) as bar:
        for readable, errors, pixel_values in loader:
            some, failed, logits, tokens = _answered(answer, readable, [one.to(device) for one in pixel_values])
            worked = worked or bool(some)
            failures += failed if len(readable) > 1 and not worked else []  # an image alone just has an error
            rows = [{"file": file, "error": error} for file, error in [*errors, *failed]]
            if some:
                best = class_scores(logits, model.config).topk(min(top_k, logits.shape[-1]))
                for file, scores, indices, count in zip(
                    some, best.values.tolist(), best.indices.tolist(), tokens.tolist(), strict=True
                ):
                    named = [
                        {"label": str(labels.get(index, index)), "score": score if numbers else round(score, 6)}
                        for index, score in zip(indices, scores, strict=True)
                    ]
                    row: dict[str, Any] = {"file": file, **named[0], "tokens": count}
                    rows.append(row if top_k == 1 else {**row, "others": named[1:]})
            for row in rows:
                if keep is not None:
                    keep(row)
                yield row
            bar.update(len(rows))
            if not worked and len(failures) >= ENOUGH_FAILURES:
                break
    if failures and not worked:
        of = "every image" if len(failures) < ENOUGH_FAILURES else f"the first {len(failures)} images"
        raise ValueError(f"The model fails on {of}. On {failures[0][0]}: {failures[0][1]}.")


def _done(part: Path, base: str) -> Iterator[tuple[str, bool]]:
    """List the images that need no other try, by their absolute names, and whether they have a label."""
    for row in read_lines(part):
        file, error = os.path.normpath(os.path.join(base, row["file"])), row.get("error")
        repaired = error is not None and _changed(file) > row.get("tried", part.stat().st_mtime)
        if error is None or (UNREADABLE in error and not repaired):
            yield file, error is None


def count_unlabelled(folder: str | Path) -> int:
    """Return how many images have an error and no label in the files of a folder, also from earlier runs. Images that
    were removed since do not count."""
    folder = Path(folder)
    base = json.loads((folder / SETTINGS).read_text())["base"]
    failed: dict[str, bool] = {}
    for part in folder.glob("part-*.jsonl"):
        for row in read_lines(part):
            file = os.path.normpath(os.path.join(base, row["file"]))
            failed[file] = failed.get(file, True) and "error" in row
    return sum(os.path.exists(file) for file, has_error in failed.items() if has_error)


def _changed(file: str) -> float:
    """Return when a file was changed, or put in the place of another one, which may be newer than its content."""
    if not os.path.isfile(file):
        return 0.0
    found = os.stat(file)
    return max(found.st_mtime, found.st_ctime)


def find_images(names: str | Path | Sequence[str | Path]) -> list[str]:
    """List image files, and the image files in folders, sorted by name within each folder, each once."""
    found: dict[str, None] = {}
    for name in [names] if isinstance(names, (str, Path)) else names:
        path = Path(name)
        inside = [str(path)] if path.is_file() and is_image(path) else sorted(map(str, find_in(path)))
        if not inside:
            raise ValueError(f"{name} is neither an image nor a folder of images.")
        found.update(dict.fromkeys(inside))
    return list(found)


class _Keeper:
    """Append rows to a file. The names of their images are as they were given, or absolute."""

    def __init__(self, where: Path, as_given: bool):
        self.where, self.as_given = where, as_given

    def __call__(self, row: dict[str, Any]) -> None:
        row = {**row, "tried": time.time()} if "error" in row else row
        append_line(self.where, row if self.as_given else {**row, "file": os.path.abspath(row["file"])})


class _Reader(torch.utils.data.Dataset):
    """Batches of files for a `DataLoader`: (readable files, other files with their errors, pixel values).

    Pixel values are one tensor for all images, or one for each image if they cannot be prepared together.
    """

    def __init__(self, parts: list[list[str]], image_processor: Any):
        self.parts, self.image_processor = parts, image_processor

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> tuple[list[str], list[tuple[str, str]], list[Tensor]]:
        files, pictures, errors = [], [], []
        for file in self.parts[number]:
            try:
                pictures.append(read_picture(file))
                files.append(file)
            except ValueError as error:
                errors.append((file, str(error)))
        try:
            return files, errors, [self._prepared(pictures)] if files else []
        except Exception:  # some image may be too small, or their sizes may differ
            prepared: dict[str, Tensor] = {}
            for file, picture in zip(files, pictures, strict=True):
                try:
                    prepared[file] = self._prepared([picture])
                except Exception as error:
                    errors.append((file, f"the image processor failed: {_said(error)}"))
            return list(prepared), errors, list(prepared.values())

    def _prepared(self, pictures: list[Any]) -> Tensor:
        return self.image_processor(pictures, return_tensors="pt")["pixel_values"]


def _answered(
    answer: Answer, files: list[str], pixel_values: list[Tensor]
) -> tuple[list[str], list[tuple[str, str]], Tensor, Tensor]:
    """Run the model on a batch. If it fails, run it image by image, so that only the images that fail are lost.

    Returns the files that worked, the other files with their errors, and logits and tokens of the files that worked.
    """
    if len(pixel_values) == 1:
        try:
            logits, tokens = answer(pixel_values[0])
            if logits.isfinite().all():
                return files, [], logits, tokens
        except torch.OutOfMemoryError as error:
            if len(files) > 1:
                raise ValueError(
                    f"A batch of {len(files)} images does not fit into the memory of the device. Give a smaller "
                    "batch_size (--batch-size)."
                ) from error
        except Exception:  # each runtime has its own exceptions; below it is told of which image it is
            pass
    broken: list[tuple[str, str]] = []
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for file, pixels in zip(files, (row for part in pixel_values for row in part.split(1)), strict=True):
        try:
            logits, tokens = answer(pixels)
        except Exception as error:
            broken.append((file, f"the model failed: {_said(error)}"))
            continue
        if logits.isfinite().all():
            found[file] = logits, tokens
        else:
            broken.append((file, "the output of the model is not finite; try to load it in float32"))
    if not found:
        return [], broken, torch.empty(0), torch.empty(0)
    logits, tokens = (torch.cat(parts) for parts in zip(*found.values(), strict=True))
    return list(found), broken, logits, tokens


def _said(error: Exception) -> str:
    """Return the first line of an error. Some errors have no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
