"""Measure how many images per second the loader gives, by its number of workers, and how many a training step takes.

    python benchmarks/loader_speed.py --model_name_or_path FOLDER_OR_HUB_ID --train_dir IMAGES/train

If the loader is slower than the step, training waits for images: take more workers (`--dataloader_num_workers`). The
numbers are written to benchmarks/results/loader-speed.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Image
from torch.utils.data import DataLoader

from hf_tokenreduce import reduce_tokens
from hf_tokenreduce.files import write_whole
from hf_tokenreduce.image_folders import folder_split
from hf_tokenreduce.loading import load_model
from hf_tokenreduce.training import BatchTransform, Collator, TrainTransform
from hf_tokenreduce.training.recipes import AUGMENTATION


RESULTS = Path(__file__).parent / "results" / "loader-speed.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an image classifier.")
    parser.add_argument("--model_revision", default="main", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--train_dir", required=True, help="Folder of images, with one folder per class.")
    parser.add_argument("--reduction", default="tome", help="Name of the method whose step is measured.")
    parser.add_argument("--share", type=float, default=0.65, help="Share of the multiply-adds to keep.")
    parser.add_argument("--augmentation", default="light", choices=AUGMENTATION, help="Augmentation of the images.")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="Numbers of workers of the loader.")
    parser.add_argument("--batch_size", type=int, default=32, help="Number of images per batch.")
    parser.add_argument("--batches", type=int, default=20, help="Number of timed batches.")
    parser.add_argument("--output_file", type=Path, default=RESULTS, help="File of the numbers.")
    args = parser.parse_args(arguments)

    dense, processor = load_model(args.model_name_or_path, args.model_revision)
    augmentation = dict(AUGMENTATION[args.augmentation])
    mixing = {name: augmentation.pop(name) for name in ("mixup", "cutmix") if name in augmentation}
    transform = BatchTransform(TrainTransform(processor, **augmentation))
    train = folder_split(args.train_dir, "train").cast_column("image", Image(decode=False)).with_transform(transform)
    collate = Collator(**mixing, num_labels=dense.config.num_labels) if mixing else Collator()
    found: dict[str, Any] = {
        "settings": {
            **{name: getattr(args, name) for name in ("reduction", "share", "augmentation", "batch_size", "batches")},
            "model": Path(args.model_name_or_path).name,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "loader": {
            str(workers): images_per_second(train, collate, args.batch_size, args.batches, workers)
            for workers in args.workers
        },
        "step": {},
    }
    pixels = torch.stack([train[place % len(train)]["pixel_values"] for place in range(args.batch_size)])
    labels = torch.arange(len(pixels)) % dense.config.num_labels
    models = {
        "dense": reduce_tokens(dense, None, copy=True),
        args.reduction: reduce_tokens(dense, args.reduction, share=args.share, copy=True),
    }
    for name, model in models.items():
        found["step"][name] = len(pixels) / seconds(training_step(model, pixels, labels), args.batches)
    write_whole(args.output_file, json.dumps(found, indent=1))
    for kind in ("loader", "step"):
        for name, speed in found[kind].items():
            print(f"{kind} {name}{' workers' if kind == 'loader' else ''}: {speed:.1f} images/s")


def images_per_second(train: Any, collate: Collator, batch_size: int, batches: int, workers: int) -> float:
    """Return the speed of the loader alone. The first batch, which starts the workers, is not counted."""
    endless = torch.utils.data.RandomSampler(train, replacement=True, num_samples=(batches + 1) * batch_size)
    loader = iter(DataLoader(train, batch_size, sampler=endless, collate_fn=collate, num_workers=workers))
    next(loader)
    begin = time.perf_counter()
    count = sum(len(batch["labels"]) for batch in loader)
    return count / (time.perf_counter() - begin)


def training_step(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)

    def step() -> None:
        torch.nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Callable[[], None], repeats: int) -> float:
    """Return the median time of a step. The first one is not counted."""
    step()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


if __name__ == "__main__":
    main()
