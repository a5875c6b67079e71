"""Speed of reduced models against the dense model and against the slice oracle, all in one run.

    python examples/measure_speed.py --size small --batch_size 32

The slice oracle is the dense model that, after each attention, simply cuts the sequence to the length the method
leaves there: the ideal that no method can beat. Every repeat runs all models in turn; medians over repeats are
compared, so that noise of the machine falls on all of them alike. Memory is the peak of one forward, measured in a
process of its own. Random weights: the methods shown here do the same work whatever the weights are. Takes about
five minutes on two cores.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

from hf_tokenreduce import EViTConfig, ToMeConfig, TopKConfig, reduce_tokens


SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}
METHODS = {
    "ToMe r=13": ToMeConfig(r=13),
    "EViT 0.7": EViTConfig(keep_rate=0.7),
    "Top-K 0.7": TopKConfig(keep_rate=0.7),
}


def build(name: str, size: str) -> torch.nn.Module:
    width, heads = SIZES[size]
    torch.manual_seed(0)
    stock = ViTForImageClassification(
        ViTConfig(hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, num_labels=1000)
    ).eval()
    if name == "dense":
        return stock
    reduced = reduce_tokens(stock, METHODS[name.removesuffix(" oracle")])
    if not name.endswith(" oracle"):
        return reduced
    with torch.inference_mode():
        counts = reduced(torch.randn(1, 3, 224, 224)).token_counts[0].tolist()
    return SliceOracle(stock, counts)


class SliceOracle(torch.nn.Module):
    def __init__(self, stock, counts):
        super().__init__()
        self.stock, self.counts = stock, counts

    def forward(self, pixel_values):
        vit = self.stock.vit
        hidden = vit.embeddings(pixel_values)
        for layer, count in zip(vit.layers, self.counts, strict=True):
            hidden = (hidden + layer.attention(layer.layernorm_before(hidden))[0])[:, :count]
            hidden = hidden + layer.mlp(layer.layernorm_after(hidden))
        return self.stock.classifier(vit.layernorm(hidden)[:, 0])


def peak_memory(name: str, args: argparse.Namespace, results) -> None:
    """MiB that one forward needs at its peak above what the model and the images take (Linux only)."""
    torch.set_num_threads(args.threads)
    model = build(name, args.size)
    images = torch.randn(args.batch_size, 3, 224, 224)
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
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", help="also write the record to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    names = ["dense", *[row for name in METHODS for row in (name, f"{name} oracle")]]
    models = {name: build(name, args.size) for name in names}
    images = torch.randn(args.batch_size, 3, 224, 224)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for repeat in range(args.repeats + 1):
            for name, model in models.items():
                start = time.perf_counter()
                model(images)
                if repeat:  # the first is a warm-up
                    seconds[name].append(time.perf_counter() - start)
    context = multiprocessing.get_context("spawn")
    memory = {}
    for name in names:
        results = context.Queue()
        process = context.Process(target=peak_memory, args=(name, args, results))
        process.start()
        memory[name] = results.get()
        process.join()

    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        f"{args.size}, 224 pixels, batch {args.batch_size}, float32, {args.threads} threads, torch {torch.__version__}"
    )
    print(f"medians of {args.repeats}; dense: {args.batch_size / median['dense']:.1f} images/s\n")
    print("| | speed-up over dense | of the slice oracle | peak memory over dense |\n|---|---|---|---|")
    record = {"settings": vars(args), "torch": torch.__version__, "median_seconds": median, "peak_mib": memory}
    for name in METHODS:
        speedup, share = median["dense"] / median[name], median[f"{name} oracle"] / median[name]
        peak = f"{memory[name] / memory['dense']:.2f}" if memory["dense"] else "too small to see"
        print(f"| {name} | {speedup:.2f} | {share:.3f} | {peak} |")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
