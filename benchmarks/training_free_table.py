"""Compare all methods that need no training at equal multiply-adds, and write a table.

    python benchmarks/training_free_table.py --models FOLDER_OR_HUB_ID ... --data_dir IMAGE_FOLDER
    python benchmarks/training_free_table.py --models FOLDER_OR_HUB_ID ... --data_dir IMAGE_FOLDER --speed

Every method gets its own setting for each model and each share of the multiply-adds. All are evaluated on the same
images. The table shows the accuracy, the drop from the dense model's accuracy with a paired interval of 95 %, and two
numbers that vary less between sets of images: the share of the images that get the dense model's class, and the mean
Kullback-Leibler divergence of the probabilities from those of the dense model, in nats.

Defaults of our own methods were chosen on the even rows of the data set, so by default the odd rows are evaluated.
Methods that learn from images without labels use rows that are not evaluated. With `--rows all`, they use some of the
evaluated rows.

`--speed` also measures the speed of the models in the table: in eager PyTorch, where all settings of a share run in
turn with the dense model, and as graphs in ONNX Runtime, for models that can be exported. It needs a machine that does
nothing else.

Every result is written to `training-free-<rows>.json` in `--output_dir` as it comes, and is not measured again. A
setting takes about as long as the dense model: 500 images of 224 pixels take about 20 seconds with a tiny model on one
core.
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
from hf_tokenreduce.evaluation.resume import digest_of_data
from hf_tokenreduce.files import refuse_other_settings, write_whole
from hf_tokenreduce.loading import load_images, load_model
from hf_tokenreduce.methods import METHODS
from hf_tokenreduce.modeling.encoders import encoder_of
from hf_tokenreduce.modeling.multiply_adds import shares_kept
from hf_tokenreduce.tasks import all_layers_act


ROWS = {"odd": slice(1, None, 2), "even": slice(0, None, 2), "all": slice(None)}
BEST: dict[str, Any] = {"top1": max, "agreement": max, "divergence": min}
TO_LEARN = 100  # number of images for methods that learn from images without labels


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="Folders or Hub ids of image classifiers.")
    parser.add_argument("--data_dir", required=True, help="Folder of images, with one folder per class.")
    parser.add_argument("--rows", choices=ROWS, default="odd", help="Rows of the data set to evaluate.")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.8, 0.65, 0.5], help="Shares of the multiply-adds to keep."
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[name for name, m in METHODS.items() if m.needs != "labels"],
        help="Names of the methods.",
    )
    parser.add_argument("--batch_size", type=int, default=25, help="Number of images per batch.")
    parser.add_argument("--threads", type=int, default=1, help="Number of CPU threads.")
    parser.add_argument("--speed", action="store_true", help="Also measure the speed of the models in the table.")
    parser.add_argument("--speed_batch_size", type=int, default=32, help="Number of images per batch for the speed.")
    parser.add_argument("--repeats", type=int, default=11, help="Number of timed forwards of each model.")
    parser.add_argument(
        "--output_dir", type=Path, default=Path(__file__).parent / "results", help="Folder for the results."
    )
    args = parser.parse_args(arguments)

    torch.set_num_threads(args.threads)
    dataset = load_images(args.data_dir)
    file = args.output_dir / f"training-free-{args.rows}.json"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    photos = digest_of_data(dataset, "image", list(dataset["label"]))
    settings = {"rows": args.rows, "images": len(range(len(dataset))[ROWS[args.rows]]), "photos": photos, **versions}
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
    """Measure the missing results of one model."""
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
    """Return the logits of each image, and for a reduced model the number of tokens that leave each layer."""
    outputs = [model(part, **all_layers_act(model)) for part in pixels.split(batch_size)]
    counts = [output.get("token_counts") for output in outputs]
    return torch.cat([output.logits for output in outputs]), None if counts[0] is None else torch.cat(counts)


def accuracy_row(model: Any, pixels: Tensor, labels: np.ndarray, dense: Tensor, batch_size: int) -> dict[str, Any]:
    """Return accuracies and differences in percent, with 95 % intervals. dense: logits of the dense model."""
    logits, counts = run(model, pixels, batch_size)
    classes, dense_classes = logits.argmax(dim=-1).numpy(), dense.argmax(dim=-1).numpy()
    right, was_right = classes == labels, dense_classes == labels
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
        "agreement": round(100 * float((classes == dense_classes).mean()), 2),
        "divergence": round(divergence(dense, logits), 5),
        "kept": round(shares_kept(model.config, counts, num_tokens, reduction).mean().item(), 4),
        "settings": reduction.to_dict(),
    }


def divergence(dense: Tensor, reduced: Tensor) -> float:
    """Return the mean divergence of the probabilities from those of the dense model, in nats."""
    return F.kl_div(
        reduced.log_softmax(dim=-1), dense.log_softmax(dim=-1), log_target=True, reduction="batchmean"
    ).item()


def speed_of(dense: Any, models: dict[str, Any], pixels: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the speed-ups over the dense model, eager and as graphs."""
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
    """Measure the speed-up of each graph over the dense model's graph, in turn: median and quartiles."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    sessions = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model in {"dense": dense, **models}.items():
            if name != "dense" and METHODS[name].is_adaptive(model.config.reduction):
                continue  # these keep different numbers of tokens per image, which a graph cannot do
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
    """Write a table for each model: one row per method, and for each share the results and the measured speed."""
    settings = found["settings"]
    lines = ["# Training-free methods at equal multiply-adds", ""]
    lines += [
        f"Top-1 in percent on {settings['images']} images ({settings['rows']} rows of the data set). In parentheses: "
        "the drop from the dense model with its paired interval of 95 %. Then: the percentage of the images that get "
        "the dense model's class, and the mean divergence from its probabilities in nats. Bold: the best method of "
        "each share. Made by `benchmarks/training_free_table.py`.",
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
