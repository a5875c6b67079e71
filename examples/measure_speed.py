"""Speed of reduced models against the dense model and against the slice oracle, all in one run.

    python examples/measure_speed.py --size small --batch_size 32
    python examples/measure_speed.py --model_name_or_path FOLDER_OR_HUB_ID --data_dir IMAGES --methods ats ltmp

The slice oracle is the dense model that, where the method acts, simply cuts the sequence to the length the method
leaves there (the mean over the batch, where images differ): the ideal of removing tokens at no cost. "Padded" is the
same oracle cut to the longest image of the batch, the least that an implementation with padding computes. Every repeat
runs all models in turn; medians over repeats are compared, so that noise of the machine falls on all of them alike.
Memory is the peak of one forward, measured in a process of its own (Linux only). Without a model, weights are random:
enough for methods that do the same work whatever the weights are. Takes about a minute per method on two cores.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from transformers.utils import logging

from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    DLViTConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    ToMeConfig,
    TopKConfig,
    calibrate,
    reduce_tokens,
)


SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
METHODS = {
    "tome": ("ToMe r=13", ToMeConfig(r=13)),
    "evit": ("EViT 0.7", EViTConfig(keep_rate=0.7)),
    "topk": ("Top-K 0.7", TopKConfig(keep_rate=0.7)),
    "bat": ("BAT 0.7", BATConfig(keep_rate=0.7)),
    "sit": ("SiT 0.5", SiTConfig()),
    "dlvit": ("DL-ViT, share 0.5", DLViTConfig(keep_rate=0.5, trained=True)),
    "ats": ("ATS, all tokens as budget", ATSConfig()),
    "ltmp": ("LTMP calibrated to 0.65", LTMPConfig()),
}


class SliceOracle(torch.nn.Module):
    def __init__(self, stock: ViTForImageClassification, counts: list[int], hook: str):
        super().__init__()
        self.stock, self.counts, self.hook = stock, counts, hook

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        vit = self.stock.vit
        hidden = vit.embeddings(pixel_values)
        if self.hook == "before_encoder":
            hidden = hidden[:, : self.counts[0]]
        for layer, count in zip(vit.layers, self.counts, strict=True):
            hidden = hidden + layer.attention(layer.layernorm_before(hidden))[0]
            if self.hook != "after_layer":
                hidden = hidden[:, :count]
            hidden = (hidden + layer.mlp(layer.layernorm_after(hidden)))[:, :count]
        return self.stock.classifier(vit.layernorm(hidden)[:, 0])


def load(args: argparse.Namespace) -> tuple[ViTForImageClassification, torch.Tensor, torch.Tensor]:
    """The dense model, a batch of images, and others to calibrate on."""
    if args.model_name_or_path:
        model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, revision=args.model_revision)
    else:
        width, heads = SIZES[args.size]
        torch.manual_seed(0)
        shape = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
        model = ViTForImageClassification(ViTConfig(**shape, num_labels=1000))
    if args.data_dir is None:
        images = torch.randn(args.batch_size + 32, 3, model.config.image_size, model.config.image_size)
    else:
        files = sorted(file for file in args.data_dir.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png"))
        files = files[:: max(1, len(files) // (args.batch_size + 64))][: args.batch_size + 64]
        processor = AutoImageProcessor.from_pretrained(args.model_name_or_path, revision=args.model_revision)
        photos = [Image.open(file).convert("RGB") for file in files]
        images = processor(photos, return_tensors="pt").pixel_values
    return model.eval(), images[: args.batch_size], images[args.batch_size :]


def peak_memory(folder: Path, images: torch.Tensor, threads: int, results) -> None:
    """MiB that one forward needs at its peak above what the model and the images take."""
    torch.set_num_threads(threads)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        model(images[:1])
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
        model(images)
    results.put(resident("VmHWM") - before)


def resident(field: str) -> float:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(field)).split()[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["tome", "evit", "topk"])
    parser.add_argument("--size", choices=SIZES, default="small", help="of random weights")
    parser.add_argument("--model_name_or_path", help="a ViT classifier, instead of random weights")
    parser.add_argument("--model_revision", default="main")
    parser.add_argument("--data_dir", type=Path, help="a folder of images, instead of noise; needs a model")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="also write the record to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable_progress_bar()

    dense, images, others = load(args)
    models: dict[str, torch.nn.Module] = {"dense": dense}
    counts = {}
    for name in args.methods:
        models[name] = reduce_tokens(dense, METHODS[name][1])
        if name == "ltmp":
            calibrate(models[name], others, 0.65)
        with torch.inference_mode():
            counts[name] = models[name](images).token_counts
        mean, longest = counts[name].float().mean(dim=0).round().long().tolist(), counts[name].amax(dim=0).tolist()
        hook = METHODS[name][1].hook
        models[f"{name} oracle"] = SliceOracle(dense, mean, hook)
        if longest != mean:
            models[f"{name} padded"] = SliceOracle(dense, longest, hook)

    seconds: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                begin = time.perf_counter()
                model(images)
                if repeat:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in seconds.items()}

    memory = {}
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # below, what is freed goes back: then the peak is real
    context = multiprocessing.get_context("spawn")
    for name in ("dense", *args.methods):
        with tempfile.TemporaryDirectory() as folder:
            models[name].save_pretrained(folder)
            results = context.Queue()
            process = context.Process(target=peak_memory, args=(folder, images, args.threads, results))
            process.start()
            memory[name] = results.get()
            process.join()

    what = args.model_name_or_path or f"{args.size}, random weights"
    print(f"{what}, batch {args.batch_size}, float32, {args.threads} threads, torch {torch.__version__}")
    print(f"medians of {args.repeats}; dense: {args.batch_size / median['dense']:.1f} images/s\n")
    print(
        "| | tokens leaving the last layer | speed-up over dense | over padded | of the slice oracle | peak memory |"
    )
    print("|---|---|---|---|---|---|")
    for name in args.methods:
        speedup, share = median["dense"] / median[name], median[f"{name} oracle"] / median[name]
        padded = f"{median[f'{name} padded'] / median[name]:.2f}" if f"{name} padded" in median else ""
        peak = f"{memory[name] / memory['dense']:.2f}" if memory["dense"] else "too small to see"
        last = counts[name][:, -1].float()
        tokens = (
            f"{last.mean():.0f}"
            if last.min() == last.max()
            else f"{last.mean():.0f} ({last.min():.0f}-{last.max():.0f})"
        )
        print(f"| {METHODS[name][0]} | {tokens} | {speedup:.2f} | {padded} | {share:.3f} | {peak} |")
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        record = {"settings": settings, "torch": torch.__version__, "median_seconds": median, "peak_mib": memory}
        Path(args.json).write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
