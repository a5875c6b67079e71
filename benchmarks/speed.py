"""Every method beside the dense model and the slice oracle, at several sizes and batches, in one run.

    python benchmarks/speed.py --deit_tiny FOLDER_OR_HUB_ID --images PHOTOS
    python benchmarks/speed.py --sizes deit-s --batch_sizes 1 8 --repeats 5
    python benchmarks/speed.py --sizes deit-s --runtimes eager compiled onnx openvino openvino-int8

DeiT-Tiny runs with its real weights on photographs, with LTMP and ATS fitted to the share; other sizes run with random
weights on noise, where adaptive methods keep what such weights make of it, so only the even ones are timed. Each size
is written to benchmarks/results as soon as it is done, and a size that is there is not measured again.
"""

import argparse
import json
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

from hf_tokenreduce import DLViTConfig, SiTConfig, reduce_tokens
from hf_tokenreduce.budget import reduce_to_share
from hf_tokenreduce.evaluation import BenchmarkReport, benchmark
from hf_tokenreduce.evaluation.runtimes import RUNTIMES
from hf_tokenreduce.loading import load_model, load_pictures


SHAPES: dict[str, dict[str, Any]] = {
    "deit-s": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "vit-b": {},
}
EVEN = ("tome", "topk", "evit", "bat")


def models_of(dense: Any, share: float, images: torch.Tensor | None) -> dict[str, Any]:
    """The dense model and its reductions to one share; what learns from images only where they are given."""
    models = {"dense": dense, "nothing reduced": reduce_tokens(dense, None)}
    models |= {name: reduce_tokens(dense, name, share=share) for name in EVEN}
    torch.manual_seed(0)  # of networks that nobody has trained: what they decide does not change how long it takes
    models["sit"] = reduce_tokens(dense, SiTConfig.for_budget(dense.config, share))
    models["dlvit"] = reduce_tokens(dense, DLViTConfig.for_budget(dense.config, share, trained=True))
    if images is not None:
        for name in ("ats", "ltmp"):
            models[name] = reduce_to_share(dense, name, share, images, None, {})
    return {name: model.eval() for name, model in models.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deit_tiny", help="folder or Hub id of DeiT-Tiny")
    parser.add_argument("--images", help="a folder of photographs for it")
    parser.add_argument("--sizes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--share", type=float, default=0.65)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=["eager"], help="in one run, in turn")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    if bool(args.deit_tiny) != bool(args.images):
        raise SystemExit("--deit_tiny and --images go together.")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for size in (["deit-tiny"] if args.deit_tiny else []) + args.sizes:
        runtimes = "" if args.runtimes == ["eager"] else "-" + "-".join(args.runtimes)
        file = args.output_dir / f"speed-{size}{runtimes}.json"
        if not file.is_file():
            file.write_text(json.dumps(measure(size, args), indent=1) + "\n")
        found = json.loads(file.read_text())
        print(f"\n## {size}, {args.share:.0%} of the multiply-adds, {found['date']}\n")
        print(BenchmarkReport.from_dict(found).to_markdown())


def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run one size, and return its report with the versions and the date."""
    count = 2 * max(args.batch_sizes)
    if size == "deit-tiny":
        dense, processor = load_model(args.deit_tiny)
        pictures = load_pictures([args.images], max(count, 64))[0]
        images = processor(pictures, return_tensors="pt")["pixel_values"]
        models = models_of(dense, args.share, images[:64])
    else:
        torch.manual_seed(0)
        models = models_of(ViTForImageClassification(ViTConfig(**SHAPES[size])).eval(), args.share, None)
        images = torch.randn(count, 3, 224, 224)
    report = benchmark(
        models,
        images,
        batch_sizes=args.batch_sizes,
        repeats=args.repeats,
        threads=args.threads,
        runtimes=args.runtimes,
        suggest=False,
    )
    return {"date": date.today().isoformat(), "transformers": transformers.__version__, **report.to_dict()}


if __name__ == "__main__":
    main()
