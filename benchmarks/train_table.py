"""Train every method on a data set, beside dense controls that train as long, and write the table.

    python benchmarks/train_table.py --model_name_or_path FOLDER_OR_HUB_ID --train_dir DATA/train \\
        --eval_dirs DATA/val DATA/tune --work_dir FOLDER --bf16

For each seed the checkpoint is first trained densely: the start. From there the dense control and every method train
with the same seed, and so on the same images in the same order, for the same number of epochs. All are evaluated on
the images of `--eval_dirs`, from which nothing is trained or chosen. The most telling cells come first; `--list` shows
them all.

Each cell becomes a JSON file in `benchmarks/results/train-<data>-<model>/`. A cell that is there is not run again, and
a run that was killed goes on from its last epoch: call the same command again. A cell that fails does not stop the
others. It is named at the end, and the command then ends with an error. An epoch of 1,800 images takes a tiny model
about one and a half minutes on two CPU cores.

With `--device cuda` the same command runs on a GPU, and the name of the folder ends in `-cuda`. One training of a tiny
model leaves most of a GPU idle, because a core cannot read images that fast: `--jobs` trains several cells at once.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from train_report import CONTROL, START, write_report
from training_free_table import run as predict
from transformers import AutoConfig

from hf_tokenreduce.files import refuse_other_settings, write_whole
from hf_tokenreduce.loading import load_images, load_model
from hf_tokenreduce.modeling.dlvit import DLViTConfig
from hf_tokenreduce.modeling.encoders import facts_of
from hf_tokenreduce.modeling.multiply_adds import shares_kept
from hf_tokenreduce.pictures import is_image
from hf_tokenreduce.training.origin import last_checkpoint


ROOT = Path(__file__).resolve().parents[1]
METHODS = ("tome", "evit", "bat", "ats", "ltmp", "sit", "dlvit")
OF_THE_PAPERS = (
    "bat",
    "ats",
    "ltmp",
    "sit",
    "dlvit",
)  # they get the seeds beyond `--full_seeds` too
LABEL_SHARE = 0.2  # DL-ViT's labels keep the fifth with the largest deltas: the sign of the others is mostly chance

# What else is asked of a method: by the name of the variant, its settings and the arguments of its training. What
# distillation is worth was measured with three slimming networks.
VARIANTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "topk": ("topk", {}, []),
    "bat-one-group": ("bat", {"cluster_share": 1.0, "fuse_share": 0.0}, []),
    "bat-no-clusters": ("bat", {"cluster_share": 0.0}, []),
    "bat-no-matching": ("bat", {"fuse_share": 0.0}, []),
    "sit-three-networks": ("sit", {"layers": [1, 3, 5]}, []),
    "sit-no-teacher": ("sit", {"layers": [1, 3, 5]}, ["--logits_weight", "0", "--token_weight", "0"]),
    "sit-logits-only": ("sit", {"layers": [1, 3, 5]}, ["--token_weight", "0"]),
    "sit-tokens-only": ("sit", {"layers": [1, 3, 5]}, ["--logits_weight", "0"]),
    "ltmp-merge-only": ("ltmp", {"prune": False}, []),
    "ltmp-prune-only": ("ltmp", {"merge": False}, []),
}


class Cell(NamedTuple):
    """One run. name: a method or a variant, START or CONTROL. share: None for dense models."""

    name: str
    share: float | None
    seed: int

    @property
    def stem(self) -> str:
        share = "" if self.share is None else f"-{self.share:g}"
        return f"{self.name}{share}-seed{self.seed}"


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    cells = plan(args.seeds, args.shares, args.methods, args.variants, args.full_seeds)
    folder = results_folder(args)
    missing = [cell for cell in cells if not (folder / f"{cell.stem}.json").is_file()]
    if args.list:
        for cell in cells:
            print(f"{'missing' if cell in missing else 'done   '}  {cell.stem}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        if cell not in missing:
            file = folder / f"{cell.stem}.json"
            refuse_other_settings(file, json.loads(file.read_text())["setting"], setting_of(cell, args))
    held_out = gather(args.eval_dirs, args.work_dir / "held-out")
    pixels, names = prepare(held_out, args.model_name_or_path)
    pixels = pixels.to(args.device)  # once, and not for each cell
    alone = threading.Lock()

    def run(cell: Cell) -> None:
        row = train(cell, args, held_out)
        with alone:  # loading a model changes settings of the whole process
            row |= evaluate(args.work_dir / cell.stem, pixels, names, args.device)
        keep(row, folder / f"{cell.stem}.json")

    def report(to_go: list[Cell]) -> str:
        if to_go:
            print(f"{len(to_go)} cells to go{time_left(folder, to_go, args)}", flush=True)
        return write_report(folder) if any(folder.glob("*.json")) else ""

    failed = run_all(lost_starts(missing, args.work_dir) + missing, args.jobs, run, report)
    print(report([]))
    if failed:
        sys.exit(f"These cells failed or begin from a start that failed: {', '.join(cell.stem for cell in failed)}")


def run_all(
    cells: list[Cell], jobs: int, run: Callable[[Cell], None], report: Callable[[list[Cell]], Any]
) -> list[Cell]:
    """Call `run` for each cell, for at most `jobs` of them at once, in their order as far as `may_begin` allows it.

    Each time that cells have begun, `report` is called with all that have not ended.

    Returns the cells that failed, and those that were left out because their start failed.
    """
    waiting, failed = list(cells), []
    running: dict[Future[None], Cell] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for cell in [*waiting]:
                if len(running) < jobs and may_begin(cell, waiting, running.values()):
                    waiting.remove(cell)
                    print(f"{cell.stem} begins", flush=True)
                    running[pool.submit(run, cell)] = cell
            report([*running.values(), *waiting])  # by this thread alone, while the others work
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, error = running.pop(future), future.exception()
                if error is not None:
                    traceback.print_exception(error)
                    left_out = [other for other in waiting if cell.name == START and other.seed == cell.seed]
                    waiting = [other for other in waiting if other not in left_out]
                    failed += [cell, *left_out]
    return failed


def may_begin(cell: Cell, waiting: Iterable[Cell], running: Iterable[Cell]) -> bool:
    """Whether the start of a cell is there, and no other cell uses the folder of its filter."""
    start = Cell(START, None, cell.seed)
    if cell != start and (start in waiting or start in running):
        return False
    return cell.name != "dlvit" or all((other.name, other.seed) != ("dlvit", cell.seed) for other in running)


def keep(row: dict[str, Any], file: Path) -> None:
    """Write the record of a cell."""
    if file.is_file():
        say_what_changed(file, row)
    else:
        write_whole(file, json.dumps(row, indent=1) + "\n")
    print(f"{file.stem}: top-1 {row['top1']:.2f}, {row['seconds'] / 60:.1f} minutes", flush=True)


def results_folder(args: argparse.Namespace) -> Path:
    """The folder of the records. A GPU rounds sums differently from a CPU, so each has its own."""
    name = f"train-{Path(args.train_dir).resolve().parent.name}-{Path(args.model_name_or_path).name}"
    return args.output_dir / (name if args.device == "cpu" else f"{name}-{args.device}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="the checkpoint that every start is trained from")
    parser.add_argument("--train_dir", required=True, help="an image folder: one folder per class")
    parser.add_argument("--eval_dirs", nargs="+", required=True, help="image folders that are evaluated together")
    parser.add_argument("--work_dir", type=Path, required=True, help="a folder for models and checkpoints")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--full_seeds",
        type=int,
        default=2,
        help="number of seeds with every method and share; the others train five methods at the first share",
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.65, 0.45])
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--variants", nargs="*", default=tuple(VARIANTS), choices=tuple(VARIANTS))
    parser.add_argument("--start_epochs", type=int, default=4, help="number of epochs of each start")
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs of everything else")
    parser.add_argument("--label_images", type=int, default=250, help="images that DL-ViT's filter learns from")
    parser.add_argument("--max_train_samples", type=int, help="train on fewer images")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16, as is always done on a GPU")
    parser.add_argument("--jobs", type=int, default=1, help="number of cells that are trained at the same time")
    parser.add_argument(
        "--dataloader_num_workers", type=int, default=0, help="processes that read images, for each training"
    )
    parser.add_argument("--list", action="store_true", help="show the cells and which are done, and stop")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(arguments)
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    args.bf16 = args.bf16 or args.device == "cuda"
    # The scripts are called from the root of this repository.
    args.train_dir, args.work_dir = str(Path(args.train_dir).resolve()), args.work_dir.resolve()
    if Path(args.model_name_or_path).is_dir():
        args.model_name_or_path = str(Path(args.model_name_or_path).resolve())
    return args


def plan(seeds: list[int], shares: list[float], methods: Any, variants: Any, full: int = 2) -> list[Cell]:
    """Every cell, the most telling first: all methods at the first share, then the second, then the next seed; then
    what takes the methods apart, and last the further seeds of the papers' methods. full: number of seeds with all."""
    cells = []
    for seed in seeds[:full]:
        cells += [Cell(START, None, seed), Cell(CONTROL, None, seed)]
        cells += [Cell(method, share, seed) for share in shares for method in methods]
    for seed in seeds[:full]:
        cells += [Cell(name, share, seed) for share in shares for name in variants]
    for seed in seeds[full:]:
        cells += [Cell(START, None, seed), Cell(CONTROL, None, seed)]
        cells += [Cell(method, shares[0], seed) for method in methods if method in OF_THE_PAPERS]
    return cells


def lost_starts(missing: list[Cell], work_dir: Path) -> list[Cell]:
    """Starts that were trained once, from which missing cells begin, and whose models are no longer there."""
    starts = dict.fromkeys(Cell(START, None, cell.seed) for cell in missing)
    return [
        start for start in starts if start not in missing and not (work_dir / start.stem / "record.json").is_file()
    ]


def say_what_changed(file: Path, row: dict[str, Any]) -> None:
    """Warn if a start that was trained once more is not what it was. Its first record stays."""
    before = json.loads(file.read_text())["right"]
    changed = sum(old != new for old, new in zip(before, row["right"], strict=True))
    if changed:
        print(
            f"{file.stem} was trained once more, and {changed} of {len(before)} images now come out otherwise. The "
            "cells of this seed begin from two starts.",
            flush=True,
        )


def setting_of(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """What a cell's numbers depend on; a file with another one is not this cell's."""
    return {
        "model": Path(args.model_name_or_path).name,
        "train": "/".join(Path(args.train_dir).parts[-2:]),
        "eval": ["/".join(Path(folder).resolve().parts[-2:]) for folder in args.eval_dirs],
        "start_epochs": args.start_epochs,
        "epochs": args.start_epochs if cell.name == START else args.epochs,
        "max_train_samples": args.max_train_samples,
        "label_images": args.label_images if cell.name == "dlvit" else None,
        "label_share": LABEL_SHARE if cell.name == "dlvit" else None,
        "device": args.device,
        "bf16": args.bf16,
        # The order of the images is the same with workers, but each of them draws its own crops.
        "dataloader_num_workers": args.dataloader_num_workers or None,
    }


def gather(folders: list[str], target: Path) -> Path:
    """One image folder of links to the images of several, and of no others."""
    wanted = {}
    for folder in map(Path, folders):
        for image in filter(is_image, sorted(folder.glob("*/*"))):
            link = target / image.parent.name / f"{folder.name}-{image.name}"
            if wanted.setdefault(link, image) != image:
                raise ValueError(f"{wanted[link]} and {image} have the same name. Rename one of the folders.")
    for left in target.glob("*/*"):
        if left not in wanted or left.resolve() != wanted[left].resolve():
            left.unlink()
    for link, image in wanted.items():
        if not link.is_symlink():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(image.resolve())
    return target


def prepare(folder: Path, model: str) -> tuple[Tensor, list[str]]:
    """The images of a folder as pixel values (n, 3, H, W), and the name of each one's class."""
    dataset, processor = load_images(folder), load_model(model)[1]
    prepared = [processor(image.convert("RGB"), return_tensors="pt")["pixel_values"] for image in dataset["image"]]
    classes = dataset.features["label"].names
    return torch.cat(prepared), [classes[label] for label in dataset["label"]]


def belongs(out: Path, setting: dict[str, Any]) -> None:
    """Refuse a folder of `--work_dir` with the model or checkpoints of another setting."""
    file = out / "cell.json"
    if file.is_file():
        refuse_other_settings(out, json.loads(file.read_text()), setting)
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(setting, indent=1))


def train(cell: Cell, args: argparse.Namespace, held_out: Path) -> dict[str, Any]:
    """Train a cell, or go on with it."""
    began = time.perf_counter()
    out = args.work_dir / cell.stem
    filter_of: dict[str, Any] = {}
    source = args.model_name_or_path if cell.name == START else args.work_dir / f"{START}-seed{cell.seed}"
    if cell.name == "dlvit":
        source, filter_of = learn_filter(cell, args, Path(source))
    belongs(out, {**setting_of(cell, args), "from": digest(Path(source)) if Path(source).is_dir() else str(source)})
    resumed = last_checkpoint(out)
    was_trained = (out / "record.json").is_file()
    if not was_trained:
        call("examples/run_image_classification.py", training(cell, args, source, held_out, resumed), args.jobs)
    record = json.loads((out / "record.json").read_text())
    return {
        "name": cell.name,
        "share": cell.share,
        "seed": cell.seed,
        "setting": setting_of(cell, args),
        "method": record["method"],
        "settings": record["settings"],
        "command": record["command"],
        "earlier_commands": record["earlier_commands"],
        **filter_of,
        # Of a run that was killed, only what came after it is known.
        "seconds": round(time.perf_counter() - began, 1),
        "resumed": resumed is not None or was_trained,
        "jobs": args.jobs,  # at most as many cells were trained at the same time
        "start": None if cell.name == START else digest(args.work_dir / f"{START}-seed{cell.seed}"),
        "machine": machine_of(args.device),
    }


def machine_of(device: str) -> str:
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, transformers {transformers.__version__}"


def evaluate(folder: Path, pixels: Tensor, names: list[str], device: str) -> dict[str, Any]:
    """Which of the images a trained model gets right, and what it keeps of the multiply-adds. Then its checkpoints,
    which are large, are deleted."""
    model, _ = load_model(folder)
    logits, counts = predict(model.eval().to(device), pixels.to(device), 32)
    labels = torch.tensor([model.config.label2id[name] for name in names])
    right = (logits.argmax(dim=-1).cpu() == labels).tolist()
    shares = shares_kept(model.config, counts.cpu(), facts_of(model.config).num_tokens, model.config.reduction)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return {
        "top1": round(100 * sum(right) / len(right), 3),
        "mult_adds_ratio": round(shares.mean().item(), 4),
        "tokens_per_layer": [round(count, 1) for count in counts.double().mean(dim=0).tolist()],
        "right": "".join("1" if one else "0" for one in right),
    }


def training(cell: Cell, args: argparse.Namespace, source: Any, held_out: Path, resumed: Path | None) -> list[Any]:
    """The arguments of a cell's training."""
    words: list[Any] = ["--model_name_or_path", source, "--train_dir", args.train_dir, "--validation_dir", held_out]
    words += ["--output_dir", args.work_dir / cell.stem, "--seed", cell.seed, "--eval_strategy", "no"]
    words += ["--disable_tqdm", "True", "--bf16", args.bf16, "--use_cpu", args.device == "cpu"]
    words += ["--max_eval_samples", 32]  # all images are evaluated afterwards, one by one
    if args.dataloader_num_workers:
        words += ["--dataloader_num_workers", args.dataloader_num_workers]
    words += [] if args.max_train_samples is None else ["--max_train_samples", args.max_train_samples]
    words += [] if resumed is None else ["--resume_from_checkpoint", resumed]
    if cell.name == START:
        words += ["--ignore_mismatched_sizes", "True", "--num_train_epochs", args.start_epochs]
        words += ["--learning_rate", "1e-4"]
        return words
    words += ["--num_train_epochs", args.epochs]
    if cell.name not in (CONTROL, "dlvit"):  # DL-ViT's model comes reduced from the fit of its filter
        method, settings, more = VARIANTS.get(cell.name, (cell.name, {}, []))
        words += ["--reduction", method, "--share", cell.share, "--reduction_args", json.dumps(settings), *more]
    return words


def learn_filter(cell: Cell, args: argparse.Namespace, start: Path) -> tuple[Path, dict[str, Any]]:
    """DL-ViT's first stage: the model with a fitted filter, and what is known of the filter. The labels of a start are
    made once, for all shares."""
    keep_rate = DLViTConfig.for_budget(AutoConfig.from_pretrained(start), cell.share).keep_rate
    out = args.work_dir / f"filter-seed{cell.seed}"
    words = ["--model_name_or_path", start, "--train_dir", args.train_dir, "--output_dir", out, "--seed", cell.seed]
    words += ["--max_train_samples", args.label_images, "--labeller", "groups", "--keep_share", LABEL_SHARE]
    words += ["--reduction_args", json.dumps({"keep_rate": keep_rate})]
    words += ["--use_cpu"] if args.device == "cpu" else []
    call("examples/run_delta_loss.py", words, args.jobs)
    return out / "model", json.loads((out / "results.json").read_text())


def digest(folder: Path) -> str:
    """What tells the weights of a start from those of the same start that was trained on another machine."""
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]


def call(script: str, words: list[Any], jobs: int) -> None:
    """Run a script of this repository in a process of its own, which gives its memory back."""
    command = [sys.executable, script, *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, env=environment(jobs))


def environment(jobs: int) -> dict[str, str]:
    """The environment of a script. Scripts that run at the same time share the cores."""
    threads = {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    return {**threads, **os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}


def time_left(folder: Path, cells: list[Cell], args: argparse.Namespace) -> str:
    """How long the cells will take, by those that are done and had as many beside them."""
    rows = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    rows = [row for row in rows if not row["resumed"] and row.get("jobs", 1) == args.jobs]
    if not rows or not cells:
        return ""
    per_epoch = statistics.mean(row["seconds"] / row["setting"]["epochs"] for row in rows)
    epochs = sum(args.start_epochs if cell.name == START else args.epochs for cell in cells)
    return f", about {per_epoch * epochs / min(args.jobs, len(cells)) / 60:.0f} minutes"


if __name__ == "__main__":
    main()
