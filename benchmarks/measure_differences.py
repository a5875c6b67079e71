"""Measure on real weights and photographs how exactly results agree.

Compared are an image alone and in a batch, a batch and the same batch in another order, and LTMP's masked graph for
training and its real removal.

    python benchmarks/measure_differences.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir IMAGES

It uses 14 photographs (at least 7), and prints the largest differences of the logits and whether the same tokens were
kept. It takes half a minute.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import logging

from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    DLViTConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    ToMeConfig,
    calibrate,
    reduce_tokens,
)


SETTINGS = {
    "ToMe r=13": ToMeConfig(r=13),
    "EViT 0.7": EViTConfig(keep_rate=0.7),
    "BAT 0.7": BATConfig(keep_rate=0.7),
    "SiT 0.5": SiTConfig(),
    "DL-ViT, random filter": DLViTConfig(trained=True),
    "ATS": ATSConfig(),
    "ATS per head, 100 tokens": ATSConfig(score="per_head", num_tokens=100),
    "LTMP at 0.65": LTMPConfig(),
    "LTMP at 0.65, merge only": LTMPConfig(prune=False),
    "LTMP at 0.65, prune only": LTMPConfig(merge=False),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="Folder or Hub id of an image classifier.")
    parser.add_argument("--model_revision", default="main", help="Commit, tag or branch of the Hub id.")
    parser.add_argument("--data_dir", type=Path, required=True, help="Folder of at least 7 images.")
    args = parser.parse_args(arguments)
    logging.disable_progress_bar()
    dense = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    files = sorted(file for file in args.data_dir.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
    files = files[:: max(1, len(files) // 14)][:14]
    images = processor([Image.open(file).convert("RGB") for file in files], return_tensors="pt").pixel_values

    print("| | alone - batch of 7 | shuffled - in order | kept tokens the same | masked - removed |")
    print("|---|---|---|---|---|")
    for name, setting in SETTINGS.items():
        model = reduce_tokens(dense.eval(), setting)
        if setting.method == "ltmp":
            calibrate(model, images, 0.65)
        order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            batch = model(images[:7], output_patch_map=True)
            shuffled = model(images[:7][order], output_patch_map=True)
            alone = [model(image[None], output_patch_map=True) for image in images[:7]]
            masked = model.train()(images[:7]).logits if setting.method == "ltmp" else None
        one_by_one = torch.cat([kept(output) for output in alone])
        same = torch.equal(one_by_one, kept(batch)) and torch.equal(kept(shuffled), kept(batch)[order])
        by_itself = (torch.cat([output.logits for output in alone]) - batch.logits).abs().max()
        reordered = (shuffled.logits - batch.logits[order]).abs().max()
        trained = "" if masked is None else f"{(masked - batch.logits).abs().max():.1e}"
        print(f"| {name} | {by_itself:.1e} | {reordered:.1e} | {'yes' if same else 'no'} | {trained} |", flush=True)


def kept(output) -> torch.Tensor:
    """Return the token of each patch, or the numbers of tokens if they are mixtures (SiT)."""
    return output.token_counts if output.patch_map is None else output.patch_map


if __name__ == "__main__":
    main()
