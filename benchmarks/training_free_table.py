"""The neutral table: every method that needs no training, at equal multiply-adds, by one harness.

    python benchmarks/training_free_table.py --models FOLDER_OR_HUB_ID ... --data_dir IMAGE_FOLDER
    python benchmarks/training_free_table.py --models FOLDER_OR_HUB_ID ... --data_dir IMAGE_FOLDER --speed

For each model and each share of the multiply-adds every method gets its own setting for that share. All see the same
images. Accuracy stands beside that of the dense model on them: the drop, with a paired interval of 95 %. Beside it
stand two numbers that vary less from one set of images to another: the share of the images that get the dense model's
class, and the mean divergence (Kullback-Leibler, in nats) of the probabilities from the dense model's. Defaults of our
own methods were chosen on the even rows of the data set, so by default the odd rows are evaluated. Methods that
learn from images without labels see rows that are not evaluated (with `--rows all`, some of them).

`--speed` times what the table has: eager in PyTorch, all settings of a share in turn with the dense model, and as
graphs in ONNX Runtime, those that can be exported. It wants a quiet machine.

Every result is written to `training-free-<rows>.json` in `--output_dir` as it comes, and one that is there is not
measured again. A setting takes about as long as the dense model does: 500 images of 224 pixels in a tiny model take
about 20 seconds on one core.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from hf_tokenreduce import export
from hf_tokenreduce.budget import reduce_to_share
from hf_tokenreduce.evaluation import benchmark
from hf_tokenreduce.evaluation.accuracy import class_indices, paired_bootstrap, wilson_interval
from hf_tokenreduce.files import refuse_other_settings, write_whole
from hf_tokenreduce.loading import load_images, load_model
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.modeling.encoders import encoder_of
from hf_tokenreduce.modeling.multiply_adds import shares_kept
from hf_tokenreduce.tasks import all_layers_act


ROWS = {"odd": slice(1, None, 2), "even": slice(0, None, 2), "all": slice(None)}
BEST: dict[str, Any] = {"top1": max, "agreement": max, "divergence": min}
TO_LEARN = 100  # images without labels, for the methods that learn from them


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="image classifiers: folders or Hub ids")
    parser.add_argument("--data_dir", required=True, help="an image folder: one folder per class")
    parser.add_argument("--rows", choices=ROWS, default="odd")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5])
    parser.add_argument("--methods", nargs="+", default=[name for name, m in METHODS.items() if m.needs != "labels"])
    parser.add_argument("--batch_size", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--speed", action="store_true", help="time what the table has")
    parser.add_argument("--speed_batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    dataset = load_images(args.data_dir)
    file = args.output_dir / f"training-free-{args.rows}.json"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings = {"rows": args.rows, "images": len(range(len(dataset))[ROWS[args.rows]]), **versions}
    found: dict[str, Any] = {"settings": settings, "results": [], "speed": []}
    if file.is_file():
        found = json.loads(file.read_text())
        refuse_other_settings(file, found["settings"], settings)
    for name in args.models:
        measure_model(name, dataset, args, found, file)
    table = to_markdown(found)
    write_whole(file.with_suffix(".md"), table)
    print(table)


def measure_model(name: str, dataset: Any, args: argparse.Namespace, found: dict[str, Any], file: Path) -> None:
    """Measure what is missing of one model."""
    short = Path(name).name
    cells = [(method, share) for share in args.shares for method in args.methods]
    known = {(row["method"], row["share"]) for row in found["results"] if row["model"] == short}
    timed = {row["share"] for row in found["speed"] if row["model"] == short}
    missing = [cell for cell in [(None, 1.0), *cells] if cell not in known]
    if not missing and not (args.speed and set(args.shares) - timed):
        return
    dense, processor = load_model(name)
    classes = class_indices(dataset, "label", dense.config.label2id)
    labels = np.array([classes[label] if classes else label for label in dataset["label"]])[ROWS[args.rows]]
    prepared = (processor(image.convert("RGB"), return_tensors="pt")["pixel_values"] for image in dataset["image"])
    pixels = torch.cat(list(prepared))
    unlabelled = pixels if args.rows == "all" else pixels[ROWS["odd" if args.rows == "even" else "even"]]
    unlabelled = unlabelled[:: -(-len(unlabelled) // TO_LEARN)]
    pixels = pixels[ROWS[args.rows]]

    def reduced(method: str, share: float) -> Any:
        described = METHODS[method]
        learns = described.prepare is not None or described.at_share is None
        return reduce_to_share(dense, method, share, unlabelled if learns else None, processor, {}).eval()

    logits: Tensor | None = None
    for method, share in missing:
        if logits is None:
            logits = run(dense, pixels, args.batch_size)[0]
        row: dict[str, Any] = {"model": short, "method": method, "share": share}
        began = time.perf_counter()
        try:
            model = dense if method is None else reduced(method, share)
        except ValueError as error:
            row["left_out"] = str(error)
        else:
            row |= accuracy_row(model, pixels, labels, logits, args.batch_size)
        found["results"].append(row)
        write_whole(file, json.dumps(found, indent=1) + "\n")
        print(
            f"{short} {method or 'dense'} {share}: {row.get('top1', 'left out')} ({time.perf_counter() - began:.0f} s)"
        )
    for share in args.shares if args.speed else ():
        if share not in timed:
            models = {}
            for row in found["results"]:
                if row["model"] == short and row["share"] == share and row["method"] in args.methods and "top1" in row:
                    models[row["method"]] = reduced(row["method"], share)
            found["speed"].append({"model": short, "share": share, **speed_of(dense, models, pixels, args)})
            write_whole(file, json.dumps(found, indent=1) + "\n")


@torch.no_grad()
def run(model: Any, pixels: Tensor, batch_size: int) -> tuple[Tensor, Tensor | None]:
    """The logits of each image, and the tokens that leave each layer, of a reduced model."""
    outputs = [model(part, **all_layers_act(model)) for part in pixels.split(batch_size)]
    counts = [output.get("token_counts") for output in outputs]
    return torch.cat([output.logits for output in outputs]), None if counts[0] is None else torch.cat(counts)


def accuracy_row(model: Any, pixels: Tensor, labels: np.ndarray, dense: Tensor, batch_size: int) -> dict[str, Any]:
    """Accuracies and their differences are in percent, intervals are of 95 %. dense: the dense model's logits"""
    logits, counts = run(model, pixels, batch_size)
    classes, theirs = logits.argmax(dim=-1).numpy(), dense.argmax(dim=-1).numpy()
    right, was_right = classes == labels, theirs == labels
    row: dict[str, Any] = {
        "top1": round(100 * float(right.mean()), 2),
        "top1_interval": [round(value, 2) for value in wilson_interval(int(right.sum()), len(right))],
    }
    if counts is None:
        return row
    low, high = paired_bootstrap(right, was_right)
    reduction = model.config.reduction
    num_tokens = encoder_of(model).embed(pixels[:1]).shape[1]
    return row | {
        "drop": round(100 * float(was_right.mean() - right.mean()), 2),
        "drop_interval": [round(low, 2), round(high, 2)],
        "agreement": round(100 * float((classes == theirs).mean()), 2),
        "divergence": round(divergence(dense, logits), 5),
        "kept": round(shares_kept(model.config, counts, num_tokens, reduction).mean().item(), 4),
        "settings": reduction.to_dict(),
    }


def divergence(dense: Tensor, reduced: Tensor) -> float:
    """The mean over images of how far the probabilities are from the dense model's, in nats."""
    return F.kl_div(
        reduced.log_softmax(dim=-1), dense.log_softmax(dim=-1), log_target=True, reduction="batchmean"
    ).item()


def speed_of(dense: Any, models: dict[str, Any], pixels: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """How much faster than the dense model, eager and as graphs."""
    size = args.speed_batch_size
    report = benchmark(
        {"dense": dense, **models}, pixels[: 4 * size], batch_sizes=[size], repeats=args.repeats,
        threads=args.threads, oracle=False, breakdown=False, memory=False, suggest=False,
    )  # fmt: skip
    eager = {name: [report.row(name).speedup, *(report.row(name).speedup_interval or ())] for name in models}
    return {
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "batch_size": size,
        "repeats": args.repeats,
        "eager": eager,
        "onnxruntime": graphs_speed(dense, models, pixels[:size], args),
    }


def graphs_speed(
    dense: Any, models: dict[str, Any], pixels: Tensor, args: argparse.Namespace
) -> dict[str, list[float]]:
    """How much faster than the dense model's graph each graph is, in turn with it: the median and the quartiles."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in {"dense": dense, **models}.items():
            if name != "dense" and METHODS[name].is_adaptive(model.config.reduction):
                continue  # an image of these keeps as many tokens as it needs, which no graph can
            export(model, Path(folder) / name)
            sessions[name] = onnxruntime.InferenceSession(Path(folder) / name / "model.onnx", options)
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for repeat in range(-1, args.repeats):
        for name, session in sessions.items():
            began = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - began)
    ratios = {
        name: [a / b for a, b in zip(seconds["dense"], taken, strict=True)]
        for name, taken in seconds.items()
        if name != "dense"
    }
    return {name: [statistics.median(r), *np.quantile(r, [0.25, 0.75]).tolist()] for name, r in ratios.items()}


def to_markdown(found: dict[str, Any]) -> str:
    """A table for each model: a row per method; per share the accuracy, the drop, and the speed where it is known."""
    settings = found["settings"]
    lines = ["# Training-free methods at equal multiply-adds", ""]
    lines += [
        f"Top-1 in percent on {settings['images']} images ({settings['rows']} rows of the data set); in parentheses "
        "the drop from the dense model with its paired interval of 95 %; then the percent of the images that get the "
        "dense model's class, and the mean divergence from its probabilities in nats. Bold: the best of the share. By "
        "`benchmarks/training_free_table.py`.",
        "",
    ]
    for model in dict.fromkeys(row["model"] for row in found["results"]):
        rows = {(row["method"], row["share"]): row for row in found["results"] if row["model"] == model}
        speeds = {row["share"]: row for row in found["speed"] if row["model"] == model}
        shares = sorted({share for method, share in rows if method is not None}, reverse=True)
        dense = rows[None, 1.0]
        low, high = dense["top1_interval"]
        lines += [f"## {model}", "", f"Dense: {dense['top1']:.1f} ({low:.1f} to {high:.1f} on other images).", ""]
        lines.append("| method | " + " | ".join(f"at {share}" for share in shares) + " |")
        lines.append("|---" * (1 + len(shares)) + "|")
        done = {share: [row for (_, at), row in rows.items() if at == share and "drop" in row] for share in shares}
        best = {
            share: {name: choose(row[name] for row in done[share]) for name, choose in BEST.items()}
            for share in shares
            if done[share]
        }
        for method in [name for name in METHODS if any(name == method for method, _ in rows)]:
            cells = [_cell(rows.get((method, share)), best.get(share, {}), speeds.get(share)) for share in shares]
            lines.append(f"| {METHODS[method].title} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, best: dict[str, float], speed: dict[str, Any] | None) -> str:
    if row is None or "top1" not in row:
        return "cannot keep so little" if row else ""
    shown = {
        "top1": f"{row['top1']:.1f}",
        "agreement": f"{row['agreement']:.1f}",
        "divergence": f"{row['divergence']:.3f}",
    }
    shown = {name: f"**{text}**" if row[name] == best[name] else text for name, text in shown.items()}
    low, high = row["drop_interval"]
    less = f"keeps {row['kept']:.2f}: " if row["kept"] < row["share"] - 0.05 else ""
    drop = f"{row['drop']:.1f}: {low:.1f} to {high:.1f}"
    text = f"{less}{shown['top1']} ({drop}), {shown['agreement']}, {shown['divergence']}"
    times = [
        f"{speed[way][row['method']][0]:.2f} times as fast, {way}"
        for way in ("eager", "onnxruntime")
        if speed and row["method"] in speed[way]
    ]
    return "; ".join([text, *times])


if __name__ == "__main__":
    main()
