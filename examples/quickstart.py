"""Reduce a ViT by every method that runs untrained, see what that saves, and load the results without this package.

    python examples/quickstart.py --output_dir demo
    python examples/quickstart.py --output_dir demo --model_name_or_path facebook/deit-small-patch16-224 --share 0.5

Every method is set to keep a share of the multiply-adds (ATS has no such setting: what it keeps is up to the image).
Without a model it takes one of DeiT-Tiny's size with random weights, and needs no network. Two minutes on two cores.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    ToMeConfig,
    TopKConfig,
    calibrate,
    reduce_tokens,
)


EVEN = (ToMeConfig, TopKConfig, EViTConfig, BATConfig, SiTConfig)

# Runs in another process, in which `import hf_tokenreduce` fails: the code comes from the saved folder.
LOAD = """
import sys
sys.modules["hf_tokenreduce"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
images = load_file(sys.argv[1])["images"]
for folder in sys.argv[2:]:
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        save_file({"logits": model(images).logits}, folder + "/logits.safetensors")
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model_name_or_path")
    parser.add_argument("--model_revision", default="main")
    parser.add_argument("--share", type=float, default=0.65, help="of the multiply-adds to keep")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    logging.disable_progress_bar()

    if args.model_name_or_path:
        dense = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    else:
        torch.manual_seed(0)
        dense = ViTForImageClassification(ViTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768))
    size = dense.config.image_size
    images = torch.randn(args.batch_size, 3, size, size, generator=torch.Generator().manual_seed(0))
    models = {"dense": dense.eval()}
    reductions = [config_class.for_budget(dense.config, args.share) for config_class in EVEN]
    reductions += [ATSConfig(), LTMPConfig()]
    models |= {json.dumps(setting.to_dict()): reduce_tokens(dense, setting) for setting in reductions}
    calibrate(list(models.values())[-1], images, args.share)

    print(f"timing {len(models)} models, {args.repeats} times each, side by side ...", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    outputs = {}
    with torch.inference_mode():
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                start = time.perf_counter()
                outputs[name] = model(images)
                if repeat:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)

    print("saving each and loading it in a fresh process without this package ...", flush=True)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    save_file({"images": images}, args.output_dir / "images.safetensors")
    folders = []
    for number, name in enumerate(list(models)[1:]):
        folders.append(args.output_dir / f"{number}-{reductions[number].method}")
        models[name].save_pretrained(folders[-1])
    command = [sys.executable, "-c", LOAD, args.output_dir / "images.safetensors", *folders]
    subprocess.run([str(part) for part in command], check=True, stderr=subprocess.DEVNULL)

    print("\n| reduction | tokens leaving the layers, mean | speed-up | logits of the fresh process differ by |")
    print("|---|---|---|---|")
    for name, folder in zip(list(models)[1:], folders, strict=True):
        speedup = statistics.median(seconds["dense"]) / statistics.median(seconds[name])
        loaded = load_file(folder / "logits.safetensors")["logits"]
        (folder / "logits.safetensors").unlink()
        difference = (loaded - outputs[name].logits).abs().max()
        counts = " ".join(f"{count:.0f}" for count in outputs[name].token_counts.float().mean(dim=0).tolist())
        print(f"| {name} | {counts} | {speedup:.2f} | {difference:.1e} |")
        if difference > 1e-4:
            raise SystemExit(f"{folder} computes something else than the model that was saved there.")
    print(f"\nThe folders in {args.output_dir} are what you would upload to the Hub.")


if __name__ == "__main__":
    main()
