"""Measure how well DL-ViT's filter ranks the patches of images it did not learn from, beside other rankings.

    python benchmarks/rank_patches.py --model_name_or_path DENSE --filter_model FILTERED --data_dir IMAGE_FOLDER

DENSE is the classifier that the labels of the filter were made with, and FILTERED the reduced model that
`examples/run_delta_loss.py` wrote; several can be compared. The delta of a patch is how much the loss of DENSE grows
without its square of 2 x 2 patches. The patches to keep are those with the largest deltas of all images, a fifth
unless `--keep_share` says otherwise. Near the median a delta is close to zero, and its sign is chance. Each ranking
is measured by

- AUC: how often it puts a patch to keep above a patch to drop, of the same image. Chance is 0.5.
- precision: the share of patches to keep among the first of its ranking, a fifth of each image. Chance is a fifth.

The rankings are the filter, the class attention of the dense model in its layers, and how far each layer's MLP moves a
token. Writes `benchmarks/results/rank-patches-<data>-<model>.json`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_tokenreduce.evaluation.accuracy import class_index
from hf_tokenreduce.files import write_whole
from hf_tokenreduce.loading import load_images, load_model
from hf_tokenreduce.modeling.encoders import encoder_of, facts_of
from hf_tokenreduce.training.deltas import embed, masked_deltas, patch_groups


RESULTS = Path(__file__).resolve().parent / "results"
RESAMPLES = 2_000


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of the dense classifier.")
    parser.add_argument("--filter_model", nargs="+", required=True, help="Folders of models with a filter.")
    parser.add_argument("--data_dir", required=True, help="Folder of images, with one folder per class.")
    parser.add_argument("--max_samples", type=int, default=120, help="Use at most this many images.")
    parser.add_argument("--keep_share", type=float, default=0.2, help="Share of the patches that are to be kept.")
    parser.add_argument("--batch_size", type=int, default=64, help="Number of masked copies of images per batch.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Folder for the record.")
    args = parser.parse_args(arguments)

    model, processor = load_model(args.model_name_or_path)
    images = load_images(args.data_dir, limit=args.max_samples)
    names = images.features["label"].names
    targets = torch.tensor([class_index(names[label], model.config.label2id) for label in images["label"]])
    photos = [image.convert("RGB") for image in images["image"]]
    tokens = embed(model, photos, processor)
    _, deltas = masked_deltas(model, tokens, targets, patch_groups(model, "groups"), args.batch_size, "remove")
    keep = deltas > deltas.quantile(1 - args.keep_share)
    patches = tokens[:, -facts_of(model.config).num_patches :]
    with torch.no_grad():
        # The first is called "filter" in the record, and the others also by their folders.
        scores = {
            f"filter {short(folder)}" if place else "filter": filter_scores(folder, patches)
            for place, folder in enumerate(args.filter_model)
        }
        scores |= dense_scores(model, processor(photos, return_tensors="pt")["pixel_values"])
    first = round(args.keep_share * keep.shape[1])
    rows = {name: measured(ranking, keep, first) for name, ranking in scores.items()}
    data, called = Path(args.data_dir).resolve(), Path(args.model_name_or_path).resolve().name
    record = {
        "images": len(photos), "data": short(data), "model": called,
        "share_to_keep": round(keep.double().mean().item(), 3), "rows": rows,
    }  # fmt: skip
    file = args.output_dir / f"rank-patches-{data.parent.name}-{called}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(record, indent=1) + "\n")
    print("| ranking | AUC | precision |\n|---|---|---|")
    for name, row in rows.items():
        print(f"| {name} | {shown(row, 'auc')} | {shown(row, 'precision')} |")
    print(f"Written to {file}.")


def short(folder: str | Path) -> str:
    return "/".join(Path(folder).resolve().parts[-2:])


def filter_scores(folder: str, patches: Tensor) -> Tensor:
    return encoder_of(load_model(folder)[0]).reducers[0].logits(patches)


def dense_scores(model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Rankings (B, N0) that need no training: the class attention of each layer, and the way of a token in its MLP."""
    facts = facts_of(model.config)
    first = facts.num_prefix_tokens
    moved: list[Tensor] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, __, out: moved.append(out.norm(dim=-1)[:, first:]))
        for layer in encoder_of(model).layers
    ]
    model.set_attn_implementation("eager")
    attentions = model(pixels, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    scores = {}
    for layer, attention in enumerate(attentions):
        scores[f"class attention, layer {layer}"] = attention[:, :, 0, first:].mean(dim=1)
    for layer, way in enumerate(moved):
        scores[f"representation shift, layer {layer}"] = way
    return scores


def measured(scores: Tensor, keep: Tensor, first: int, seed: int = 0) -> dict[str, Any]:
    """AUC and precision of a ranking (B, N0) against what is to be kept, with 95 % intervals for other images."""
    auc, precision = per_image(scores, keep, first)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(auc), (RESAMPLES, len(auc)))
    row: dict[str, Any] = {}
    for name, values in (("auc", auc), ("precision", precision)):
        low, high = np.quantile(np.nanmean(values[drawn], axis=1), [0.025, 0.975])
        row |= {
            name: round(float(np.nanmean(values)), 4),
            f"{name}_interval": [round(float(low), 4), round(float(high), 4)],
        }
    return row


def per_image(scores: Tensor, keep: Tensor, first: int) -> tuple[np.ndarray, np.ndarray]:
    """The AUC of each image, nan where all its patches are alike, and the precision of the `first` of its ranking."""
    auc, precision = [], []
    for ranking, wanted in zip(scores.double(), keep, strict=True):
        above = ranking[wanted][:, None] - ranking[~wanted][None]
        auc.append((above.gt(0).double() + 0.5 * above.eq(0)).mean().item() if above.numel() else float("nan"))
        precision.append(wanted[ranking.topk(first).indices].double().mean().item())
    return np.array(auc), np.array(precision)


def shown(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()
