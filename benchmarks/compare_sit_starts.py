"""Measure what calibration is worth to SiT: the same short training from random and from calibrated networks.

    python benchmarks/compare_sit_starts.py --model_name_or_path FOLDER_OR_HUB_ID \
        --train_dir IMAGES --validation_dir IMAGES

Both trainings use the same batches in the same order, and plain cross-entropy. Images are only resized. The table
shows top-1 on the validation images during training. 60 steps of 32 images take two minutes per training with a tiny
model on two cores.
"""

import argparse

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed
from transformers.utils import logging

from hf_tokenreduce import SiTConfig, calibrate, reduce_tokens
from hf_tokenreduce.image_folders import folder_split


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an image classifier.")
    parser.add_argument("--model_revision", default="main", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--train_dir", required=True, help="Folder of training images, with one folder per class.")
    parser.add_argument(
        "--validation_dir", required=True, help="Folder of validation images, with one folder per class."
    )
    parser.add_argument("--steps", type=int, default=60, help="Number of training steps.")
    parser.add_argument("--eval_steps", type=int, default=30, help="Number of steps between two evaluations.")
    parser.add_argument("--batch_size", type=int, default=32, help="Number of images per batch.")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="Learning rate.")
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 8, 9], help="Layers that slim, counted from 0.")
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()

    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    train, validation = folder_split(args.train_dir, "train"), folder_split(args.validation_dir, "validation", "train")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    order = order.repeat(-(-args.steps * args.batch_size // len(order)))
    names = train.features["label"].names

    print("| start | " + " | ".join(f"step {step}" for step in range(0, args.steps + 1, args.eval_steps)) + " |")
    print("|---" * (2 + args.steps // args.eval_steps) + "|")
    for start in ("random", "calibrated"):
        set_seed(0)
        model = AutoModelForImageClassification.from_pretrained(
            args.model_name_or_path,
            revision=args.model_revision,
            num_labels=len(names),
            ignore_mismatched_sizes=True,
        )
        model = reduce_tokens(model, SiTConfig(layers=args.layers))
        if start == "calibrated":
            photos = train.select(order[:100].unique().tolist())["image"]
            calibrate(model, torch.cat([pixels(processor, [photo]) for photo in photos]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
        row = [top1(model, processor, validation)]
        for step, rows in enumerate(order[: args.steps * args.batch_size].split(args.batch_size), start=1):
            batch = train[rows.tolist()]
            loss = model.train()(pixels(processor, batch["image"]), labels=torch.tensor(batch["label"])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % args.eval_steps == 0:
                row.append(top1(model, processor, validation))
        print(f"| {start} | " + " | ".join(f"{value:.1f}" for value in row) + " |", flush=True)


def pixels(processor, photos) -> torch.Tensor:
    return processor([photo.convert("RGB") for photo in photos], return_tensors="pt").pixel_values


@torch.no_grad()
def top1(model, processor, images) -> float:
    correct = 0
    for first in range(0, len(images), 50):
        batch = images[first : first + 50]
        predictions = model.eval()(pixels(processor, batch["image"])).logits.argmax(dim=-1)
        correct += (predictions == torch.tensor(batch["label"])).sum().item()
    return 100 * correct / len(images)


if __name__ == "__main__":
    main()
