"""Measure ToMe of this library beside ToMe of its authors, in one run, with the same weights and images.

    git clone https://github.com/facebookresearch/ToMe
    pip install timm torchvision
    python benchmarks/authors_tome.py --tome_dir ToMe

The authors' code changes models of timm, so timm is needed, and an environment in which torchvision runs. The weights
are random: the time does not depend on them. First the logits of both are compared. Then four models take turns: dense
and reduced, of transformers and of timm. The result of each size is written to benchmarks/results as soon as it is
done, and is not measured again.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from hf_tokenreduce import ToMeConfig, reduce_tokens
from hf_tokenreduce.evaluation.speed import device_name
from hf_tokenreduce.files import write_whole
from hf_tokenreduce.timing import in_turns, median_ratio


SIZES: dict[str, dict[str, Any]] = {  # by the names of timm
    "deit_tiny_patch16_224": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "deit_small_patch16_224": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "deit_base_patch16_224": {},
}
PLACES = {  # our names of a layer, and timm's
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tome_dir", required=True, help="Folder of the authors' repository.")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="Models, by timm's names.")
    parser.add_argument("--r", type=int, default=13, help="Number of tokens that each layer merges.")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32], help="Numbers of images per batch.")
    parser.add_argument("--repeats", type=int, default=25, help="Number of timed forwards of each model.")
    parser.add_argument("--threads", type=int, default=2, help="Number of CPU threads.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent / "results", help="Folder for the results."
    )
    args = parser.parse_args(arguments)
    sys.path.insert(0, args.tome_dir)
    torch.set_num_threads(args.threads)
    for size in args.sizes:
        file = args.output_dir / f"authors-tome-{size}.json"
        if not file.is_file():
            args.output_dir.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(measure(size, args), indent=1) + "\n")
        found = json.loads(file.read_text())
        print(f"\n## {size}, r={found['r']}, {found['date']}\n\n{to_markdown(found['rows'])}")


@torch.no_grad()
def measure(size: str, args: argparse.Namespace) -> dict[str, Any]:
    """Compare logits and times of one size."""
    import timm

    theirs, theirs_dense = authors_model(size, args.r), timm.create_model(size).eval()
    dense = same_in_transformers(size, theirs)
    ours = reduce_tokens(dense, ToMeConfig(r=args.r)).eval()
    images = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    difference = (ours(images).logits - theirs(images)).abs().amax(dim=1)
    rows = []
    for batch_size in args.batch_sizes:
        batch = images.repeat(-(-batch_size // len(images)), 1, 1, 1)[:batch_size]
        calls = [partial(model, batch) for model in (ours, theirs, dense, theirs_dense)]
        in_turns(calls, 2, batch.device)
        own, authors, plain, timm_plain = in_turns(calls, args.repeats, batch.device)
        ratios = {
            "speed_over_authors": median_ratio(authors, own),
            "speedup": median_ratio(plain, own),
            "speedup_of_authors": median_ratio(timm_plain, authors),
        }
        taken = {"ours": own, "authors": authors, "dense": plain, "timm_dense": timm_plain}
        milliseconds = {name: 1000 * statistics.median(seconds) for name, seconds in taken.items()}
        rows.append({"batch_size": batch_size, "p50_ms": milliseconds} | ratios)
    return {
        "date": date.today().isoformat(),
        "processor": device_name(batch.device),
        "threads": args.threads,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "timm": timm.__version__},
        "r": args.r,
        "repeats": args.repeats,
        "images_with_equal_logits": int((difference < 1e-3).sum()),
        "largest_difference": difference.max().item(),
        "rows": rows,
    }


def authors_model(size: str, r: int) -> nn.Module:
    """Return a model of timm with random weights, changed by the authors' code."""
    import timm
    import tome

    torch.manual_seed(0)
    model = timm.create_model(size).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # timm's first weights are so small that all tokens are nearly alike
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    tome.patch.timm(model)
    model.r = r
    return model


def same_in_transformers(size: str, model: nn.Module) -> ViTForImageClassification:
    """Return the dense model of transformers with the weights of a model of timm."""
    config = ViTConfig(**SIZES[size], layer_norm_eps=1e-6, num_labels=1000)
    weights = renamed(model.state_dict(), config.num_hidden_layers)
    ours = ViTForImageClassification(config)
    ours.load_state_dict(weights)
    return ours.eval()


def renamed(theirs: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Return weights of timm by transformers' names."""
    ours = {
        "vit.embeddings.cls_token": theirs["cls_token"],
        "vit.embeddings.position_embeddings": theirs["pos_embed"],
    }
    for kind in ("weight", "bias"):
        ours[f"vit.embeddings.patch_embeddings.projection.{kind}"] = theirs[f"patch_embed.proj.{kind}"]
        ours[f"vit.layernorm.{kind}"] = theirs[f"norm.{kind}"]
        ours[f"classifier.{kind}"] = theirs[f"head.{kind}"]
        for layer in range(num_layers):
            to, source = f"vit.layers.{layer}", f"blocks.{layer}"
            for place, name in PLACES.items():
                ours[f"{to}.{place}.{kind}"] = theirs[f"{source}.{name}.{kind}"]
            for part, value in zip("qkv", theirs[f"{source}.attn.qkv.{kind}"].chunk(3), strict=True):
                ours[f"{to}.attention.{part}_proj.{kind}"] = value
    return ours


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table of one size."""
    lines = [
        "| batch | ours, times the speed of the authors' code | ours over dense transformers "
        "| authors' over dense timm | dense timm over dense transformers |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["batch_size"])]
        for name in ("speed_over_authors", "speedup", "speedup_of_authors"):
            middle, (low, high) = row[name]
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        cells.append(f"{row['p50_ms']['dense'] / row['p50_ms']['timm_dense']:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def table(results: Path) -> list[str]:
    """Return the lines of the section of the results page, with one table for each size."""
    records = {file: json.loads(file.read_text()) for file in sorted(results.glob("authors-tome-*.json"))}
    first = next(iter(records.values()))
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    lines = [
        "## ToMe beside the code of its authors",
        "",
        f"{first['processor']}, {first['threads']} threads, float32, {versions}, r={first['r']}. Both get the same "
        "random weights and images, and take turns. Command: `python benchmarks/authors_tome.py --tome_dir FOLDER`. "
        "The authors' code changes models of timm, which start fewer steps than those of transformers. The last "
        "column shows what this is worth; it is part of the second column too.",
    ]
    for file, found in records.items():
        size, difference = file.stem.removeprefix("authors-tome-"), found["largest_difference"]
        lines += [
            "",
            f"{size}, medians of {found['repeats']} repeats ([record](../benchmarks/results/{file.name})); largest "
            f"difference of the logits {difference:.0e}:",
        ]
        lines += ["", to_markdown(found["rows"])]
    return lines


if __name__ == "__main__":
    main()
