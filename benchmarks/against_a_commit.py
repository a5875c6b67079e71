"""Compare this checkout with an earlier commit: does it give the same answers in the same time?

    python benchmarks/against_a_commit.py a492df7
    python benchmarks/against_a_commit.py a492df7 --starts 1 --rounds 1 --model a-vit --images photographs

Two processes run the same models in turn, each with the code of one commit. A ratio below 1 means that this checkout
is faster. The output also shows the number of images and the largest difference of the logits.
"""

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification


HERE = Path(__file__).resolve().parents[1]
METHODS = {
    "dense": None,
    "tome": {"method": "tome", "r": 13},
    "evit": {"method": "evit"},
    "bat": {"method": "bat"},
    "ats": {"method": "ats"},
    "ltmp": {"method": "ltmp"},
}


def work(checkout: str, model: str, threads: int) -> None:
    """Answer requests on standard input: the name of a method and pixel values -> seconds and logits."""
    sys.path.insert(0, checkout)
    import hf_tokenreduce

    if not Path(hf_tokenreduce.__file__).is_relative_to(checkout):
        raise RuntimeError(f"{hf_tokenreduce.__file__} was imported instead of {checkout}.")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    stock = AutoModelForImageClassification.from_pretrained(model) if model else ViTForImageClassification(ViTConfig())
    reduced = {name: hf_tokenreduce.reduce_tokens(stock.eval(), setting) for name, setting in METHODS.items()}
    while True:
        name, pixels = pickle.load(sys.stdin.buffer)
        with torch.no_grad():
            start = time.perf_counter()
            logits = reduced[name](pixels).logits
            seconds = time.perf_counter() - start
        pickle.dump((seconds, logits), sys.stdout.buffer)
        sys.stdout.buffer.flush()


def ask(worker: subprocess.Popen, name: str, pixels: torch.Tensor) -> tuple[float, torch.Tensor]:
    pickle.dump((name, pixels), worker.stdin)
    worker.stdin.flush()
    return pickle.load(worker.stdout)


def batches_of(images: Path | None, model: str, batch_size: int) -> list[torch.Tensor]:
    if images is None:
        return [torch.randn(batch_size, 3, 224, 224, generator=torch.Generator().manual_seed(0))]
    from hf_tokenreduce.pictures import IMAGE_SUFFIXES, read_picture

    processor = AutoImageProcessor.from_pretrained(model)
    files = sorted(file for file in images.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    parts = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
    return [processor([read_picture(file) for file in part], return_tensors="pt")["pixel_values"] for part in parts]


def summary(ratios: list[float]) -> str:
    values, generator = np.array(ratios), np.random.default_rng(0)
    medians = np.median(generator.choice(values, (1000, len(values))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return f"time new / old: median {np.median(values):.3f} ({low:.3f} to {high:.3f}), {len(values)} pairs"


def start_worker(checkout: Path, given: argparse.Namespace) -> subprocess.Popen:
    command = [sys.executable, __file__, "--work", str(checkout), given.model, str(given.threads)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, env={**os.environ, "PYTHONPATH": ""})


def compare(workers: dict, method: str, batches: list, rounds: int, ratios: list[float], apart: dict) -> None:
    """Run every batch in both processes, in turn, and add the results to `ratios` and `apart`."""
    for worker in workers.values():
        ask(worker, method, batches[0])
    for turn in range(rounds):
        for batch in batches:
            order = ("old", "new") if len(ratios) % 2 == 0 else ("new", "old")
            answers = {name: ask(workers[name], method, batch) for name in order}
            ratios.append(answers["new"][0] / answers["old"][0])
            if turn == 0:
                difference = (answers["new"][1] - answers["old"][1]).abs().max().item()
                apart[method] = float(np.maximum(apart[method], difference))  # NaN stays


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="Commit to compare with.")
    parser.add_argument(
        "--starts",
        type=int,
        default=4,
        help="Number of times that both processes are started. Each start has another memory layout.",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=8,
        help="Number of times that every batch goes through both processes, per start.",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="Number of images per batch.")
    parser.add_argument("--threads", type=int, default=2, help="Number of CPU threads of each process.")
    parser.add_argument("--model", default="", help="Folder of a model. Default: a ViT-Base with random weights.")
    parser.add_argument("--images", type=Path, help="Folder of images. Default: noise.")
    parser.add_argument(
        "--methods", nargs="+", default=["tome", "evit", "ats", "ltmp"], choices=METHODS, help="Names of the methods."
    )
    given = parser.parse_args(arguments)
    if given.images is not None and not given.model:
        parser.error("--images needs --model, whose processor prepares them.")
    batches = batches_of(given.images, given.model, given.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        old = Path(folder, "old").resolve()
        subprocess.run(["git", "clone", "-q", "--no-checkout", HERE, old], check=True)
        subprocess.run(["git", "-C", old, "checkout", "-q", given.commit], check=True)
        ratios: dict[str, list[float]] = {method: [] for method in given.methods}
        apart = dict.fromkeys(given.methods, 0.0)
        for start in tqdm(range(given.starts), desc="starts"):
            names = ("old", "new") if start % 2 == 0 else ("new", "old")
            workers = {name: start_worker({"old": old, "new": HERE}[name], given) for name in names}
            try:
                for method in given.methods:
                    compare(workers, method, batches, given.rounds, ratios[method], apart)
            finally:
                for worker in workers.values():
                    worker.kill()
                    worker.wait()
    count = sum(map(len, batches))
    for method in given.methods:
        print(f"{method:6} {summary(ratios[method])}; {count} images, logits at most {apart[method]:.1e} apart")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
