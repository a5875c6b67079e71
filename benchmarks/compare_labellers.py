"""Measure how well DL-ViT's cheap labellers rank patches, compared with the exact labeller, and how fast they are.

    python benchmarks/compare_labellers.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir IMAGE_FOLDER

The table shows Spearman's correlation between the deltas of each labeller and those of the exact labeller with the
same mask: the mean over images. 8 images of 224 pixels take about a minute with a tiny model on two cores.
"""

import argparse
import time

import torch
from torch import Tensor

from hf_tokenreduce import restore
from hf_tokenreduce.evaluation.accuracy import class_index
from hf_tokenreduce.loading import load_images, load_model
from hf_tokenreduce.training.deltas import embed, gradient_deltas, masked_deltas, patch_groups


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an image classifier.")
    parser.add_argument("--model_revision", default="main", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--data_dir", required=True, help="Folder of images, with one folder per class.")
    parser.add_argument("--max_samples", type=int, default=8, help="Use at most this many images.")
    parser.add_argument("--batch_size", type=int, default=64, help="Number of masked copies of images per batch.")
    args = parser.parse_args(arguments)

    model, processor = load_model(args.model_name_or_path, args.model_revision)
    if hasattr(model.config, "reduction"):
        model = restore(model)
    images = load_images(args.data_dir, limit=args.max_samples)
    names = images.features["label"].names
    targets = torch.tensor([class_index(names[label], model.config.label2id) for label in images["label"]])
    tokens = embed(model, [image.convert("RGB") for image in images["image"]], processor)

    pixels = processor([image.convert("RGB") for image in images["image"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model(pixels)  # the first call is slower
        begin = time.perf_counter()
        model(pixels)
        plain = len(tokens) / (time.perf_counter() - begin)
    print(f"{len(tokens)} images, plain forward: {plain:.1f} images/s\n")
    print("| labeller | mask | images/s | rank correlation to the exact one | share of patches above 0, by image |")
    print("|---|---|---|---|---|")
    for mask in ("remove", "zero"):
        exact = None
        for labeller in ("exact", "groups", "gradient") if mask == "zero" else ("exact", "groups"):
            begin = time.perf_counter()
            if labeller == "gradient":
                _, delta = gradient_deltas(model, tokens, targets, args.batch_size)
            else:
                groups = patch_groups(model, labeller)
                _, delta = masked_deltas(model, tokens, targets, groups, args.batch_size, mask)
            rate = len(tokens) / (time.perf_counter() - begin)
            exact = delta if exact is None else exact
            alike = torch.stack([spearman(one, other) for one, other in zip(delta, exact, strict=True)]).mean()
            shares = (delta > 0).float().mean(dim=1)
            print(
                f"| {labeller} | {mask} | {rate:.2f} | {alike:.2f} | {shares.min():.2f} to {shares.max():.2f} |",
                flush=True,
            )


def spearman(one: Tensor, other: Tensor) -> Tensor:
    return torch.corrcoef(torch.stack([values.argsort().argsort().double() for values in (one, other)]))[0, 1]


if __name__ == "__main__":
    main()
