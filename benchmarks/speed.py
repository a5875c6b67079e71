"""Measure the speed of every method beside the dense model and the slice oracle, at several sizes and batches.

    python benchmarks/speed.py --deit_tiny FOLDER_OR_HUB_ID --images PHOTOS
    python benchmarks/speed.py --sizes deit-s --batch_sizes 1 8 --repeats 5
    python benchmarks/speed.py --sizes deit-s --runtimes eager compiled onnx openvino openvino-int8

DeiT-Tiny runs with its real weights on photographs, and LTMP and ATS are fitted to the share. Other sizes run with
random weights on noise. There the number of tokens that adaptive methods keep means nothing, so only the other methods
are timed. Each size has one file in benchmarks/results, which is written after each batch size. The same command, also
with more batch sizes, measures only what the file does not have. All graphs are in memory at once: ViT-B in ONNX
Runtime, OpenVINO and 8 bits together needs more than 24 GB, so there take one of them at a time.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

from hf_tokenreduce import DLViTConfig, reduce_tokens
from hf_tokenreduce.budget import reduce_to_share
from hf_tokenreduce.evaluation import BenchmarkReport, benchmark
from hf_tokenreduce.evaluation.runtimes import RUNTIMES
from hf_tokenreduce.evaluation.speed import device_name
from hf_tokenreduce.evaluation.speed_report import combine
from hf_tokenreduce.files import write_whole
from hf_tokenreduce.loading import load_model, load_pictures
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.modeling.encoders import facts_of


SHAPES: dict[str, dict[str, Any]] = {
    "deit-s": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit-b": {},
}
EVEN = ("tome", "topk", "evit", "bat", "protected")


def models_of(dense: Any, share: float, images: torch.Tensor | None) -> dict[str, Any]:
    """Return the dense model and its reductions to one share. Methods that learn from images need `images`."""
    models = {"dense": dense, "nothing reduced": reduce_tokens(dense, None)}
    models |= {name: reduce_tokens(dense, name, share=share) for name in EVEN}
    torch.manual_seed(0)  # for untrained networks: what they decide does not change the time
    models["sit"] = reduce_tokens(dense, METHODS["sit"].at_share(facts_of(dense.config), share))
    models["dlvit"] = reduce_tokens(dense, DLViTConfig.for_budget(dense.config, share, trained=True))
    if images is not None:
        for name in ("ats", "ltmp"):
            models[name] = reduce_to_share(dense, name, share, images, None, {})
    return {name: model.eval() for name, model in models.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deit_tiny", help="Folder or Hub id of DeiT-Tiny. Needs --images.")
    parser.add_argument("--images", help="Folder of images for DeiT-Tiny.")
    parser.add_argument(
        "--sizes", nargs="*", choices=SHAPES, default=list(SHAPES), help="Sizes of models with random weights."
    )
    parser.add_argument("--share", type=float, default=0.65, help="Share of the multiply-adds to keep.")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32], help="Numbers of images per batch.")
    parser.add_argument("--repeats", type=int, default=15, help="Number of timed forwards of each model.")
    parser.add_argument("--threads", type=int, default=2, help="Number of CPU threads.")
    parser.add_argument(
        "--runtimes", nargs="+", choices=RUNTIMES, default=["eager"], help="Runtimes, measured in turn in one run."
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent / "results", help="Folder for the results."
    )
    args = parser.parse_args(arguments)
    if bool(args.deit_tiny) != bool(args.images):
        raise SystemExit("--deit_tiny and --images go together.")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for size in (["deit-tiny"] if args.deit_tiny else []) + args.sizes:
        runtimes = "" if args.runtimes == ["eager"] else "-" + "-".join(args.runtimes)
        file = args.output_dir / f"speed-{size}{runtimes}.json"
        found = json.loads(file.read_text()) if file.is_file() else None
        for batch_size in args.batch_sizes:
            if found is None or all(row["batch_size"] != batch_size for row in found["rows"]):
                if found is not None:
                    check_same(found, size, args)
                found = joined(found, size, batch_size, args)
                write_whole(file, json.dumps(found, indent=1) + "\n")
        print(f"\n## {size}, {found['share']:.0%} of the multiply-adds, {found['date']}\n")
        print(BenchmarkReport.from_dict(found).to_markdown())


def joined(found: dict[str, Any] | None, size: str, batch_size: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one more batch size, and return it together with what was found before on the same kind of machine."""
    report = measure(size, batch_size, args)
    if found is not None:
        report = combine([found, report])
    rows = sorted(report.rows, key=lambda row: row.batch_size)
    report = BenchmarkReport(report.settings, rows, report.left_out)
    return {"date": date.today().isoformat(), **made(args), **report.to_dict()}


def made(args: argparse.Namespace) -> dict[str, Any]:
    """Name what the numbers of a record depend on, beside the settings of its report."""
    return {"transformers": transformers.__version__, "vnni": has_vnni(), "share": args.share}


def check_same(found: dict[str, Any], size: str, args: argparse.Namespace) -> None:
    """Stop if a record was made on another machine or with other settings."""
    here = {**made(args), "device": device_name(torch.device("cpu")), "repeats": args.repeats, "threads": args.threads}
    there = {**found["settings"], **found}
    differing = [
        f"{name} is {there.get(name)} there and {it} here" for name, it in here.items() if there.get(name) != it
    ]
    if differing:
        raise SystemExit(
            f"The record of {size} was made in another way: {', '.join(differing)}. Give another --output_dir."
        )


def measure(size: str, batch_size: int, args: argparse.Namespace) -> BenchmarkReport:
    """Measure one size with one batch size."""
    count = 2 * batch_size
    if size == "deit-tiny":
        dense, processor = load_model(args.deit_tiny)
        pictures = load_pictures([args.images], max(count, 64))[0]
        images = processor(pictures, return_tensors="pt")["pixel_values"]
        models = models_of(dense, args.share, images[:64])
    else:
        torch.manual_seed(0)
        models = models_of(ViTForImageClassification(ViTConfig(**SHAPES[size])).eval(), args.share, None)
        images = torch.randn(count, 3, 224, 224)
    return benchmark(
        models,
        images,
        batch_sizes=[batch_size],
        repeats=args.repeats,
        threads=args.threads,
        runtimes=args.runtimes,
        suggest=False,
    )


def has_vnni() -> bool:
    """Return whether Linux says that the processor has instructions for sums of 8 bits."""
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and "_vnni" in flags.read_text()


if __name__ == "__main__":
    main()
