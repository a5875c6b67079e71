"""Check and measure this package on one CUDA device, in one run of at most 8 minutes.

    make bench-cuda                          # or: python benchmarks/cuda_device.py
    python benchmarks/cuda_device.py --smoke        # the same on the CPU with tiny models, as a trial

The parts are:

- correct: every method and layout is compared with the CPU, and the attention kernel of variable length with the loop.
- compiled: compiled graphs and CUDA graphs are compared with the eager models.
- waits: counts how often the host waits for the device.
- weighing: compares two ways to weigh keys in attention.
- speed: every method is timed beside the dense model and beside the ideal.

Each part runs in its own process with a time limit, and writes each result at once. A failure is reported and the rest
goes on. A run that was stopped goes on where it stopped.
"""

import argparse
import copy
import json
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification
from transformers.utils import logging

import hf_tokenreduce
from hf_tokenreduce import (
    ATSConfig,
    BATConfig,
    DLViTConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    ToMeConfig,
    TopKConfig,
    reduce_tokens,
)
from hf_tokenreduce.evaluation import benchmark
from hf_tokenreduce.evaluation.speed import device_name
from hf_tokenreduce.modeling import attention
from hf_tokenreduce.timing import in_turns


HERE = Path(__file__).parent
DEIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
SIZES: dict[str, dict[str, Any]] = {"deit-s": DEIT_S, "vit-b": {}, "deit-s-384": {**DEIT_S, "image_size": 384}}
TINY = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 64}
EVEN = {
    "tome": lambda: ToMeConfig(r=13),
    "topk": lambda: TopKConfig(keep_rate=0.7),
    "evit": lambda: EViTConfig(keep_rate=0.7),
    "bat": lambda: BATConfig(keep_rate=0.7),
    "sit": lambda: SiTConfig(),
    "dlvit-even": lambda: DLViTConfig(keep_rate=0.65, trained=True),
}
PACKED = {
    "ats": lambda: ATSConfig(),
    "ltmp": lambda: LTMPConfig(merge_threshold=0.9, prune_threshold=0.004),
    "dlvit": lambda: DLViTConfig(threshold=0.5, trained=True),
}
# They come after the others, whose results are to be there if the time ends.
NEWER = ("protected", "pitome", "diffrate", "ppt", "mctf", "shift", "dtem")
# Time limits of the parts in seconds, together less than 8 minutes.
LIMITS = {"correct": 90, "compiled": 120, "waits": 30, "weighing": 30, "speed": 200}
BATCHES = (1, 32, 256)

Task = tuple[str, Callable[[], Any]]


class Bench:
    """Hold the device, and make the models and images for it."""

    def __init__(self, smoke: bool):
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        # On CPUs bfloat16 rounds so differently from processor to processor that near ties fall otherwise.
        self.half = torch.float16 if smoke else torch.bfloat16
        self.batches = (3,) if smoke else BATCHES
        self.repeats = 2 if smoke else 15
        self.sizes = {"tiny": TINY} if smoke else SIZES

    def stock(self, size: str) -> ViTForImageClassification:
        torch.manual_seed(0)
        model = ViTForImageClassification(ViTConfig(**self.sizes[size], num_labels=100))
        with torch.no_grad():  # larger weights than the initial ones, so that decisions have margins
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.mul_(3.0 if "position" not in name else 20.0)
        return model.eval()

    def reduced(self, stock: Any, name: str) -> Any:
        torch.manual_seed(1)
        if name in NEWER:
            return reduce_tokens(stock, name, share=0.65).eval()
        setting = {**EVEN, **PACKED}[name]()
        return reduce_tokens(stock, setting).eval()

    def images(self, size: str, count: int) -> torch.Tensor:
        side = self.sizes[size].get("image_size", 224)
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))

    @property
    def first_size(self) -> str:
        return next(iter(self.sizes))


@torch.no_grad()
def correct(bench: Bench) -> Iterator[Task]:
    """Logits on the device, compared with float32 logits on the CPU, for each method and data type."""
    size = bench.first_size
    stock, images = bench.stock(size), bench.images(size, 8)

    def compare(name: str, dtype: torch.dtype) -> dict[str, Any]:
        model = stock if name == "dense" else bench.reduced(stock, name)
        wanted = model(images, **({} if name == "dense" else {"output_patch_map": True}))
        there = _moved(model, bench.device, dtype)
        pixels = images.to(bench.device, dtype)
        found = there(pixels)
        answer = {"error": _distance(found.logits, wanted.logits)}
        if name != "dense":
            whole = there(pixels, output_patch_map=True)
            counts, map_found, map_wanted = whole.token_counts.cpu(), whole.patch_map, wanted.patch_map
            answer["same_counts"] = (counts == wanted.token_counts).all(dim=1).float().mean().item()
            if map_found is not None:
                same = (map_found.cpu() == map_wanted).all(dim=1)
                answer["same_tokens"] = same.float().mean().item()
                if same.any():
                    answer["error_of_same"] = _distance(found.logits.cpu()[same], wanted.logits[same])
            alone = torch.cat([there(one).logits for one in pixels.split(1)])
            answer["alone_or_in_a_batch"] = _distance(alone, found.logits)
        return answer

    for dtype in (torch.float32, bench.half):
        for name in ("dense", *EVEN, *PACKED, *NEWER):
            yield f"{name}, {str(dtype).removeprefix('torch.')}", lambda n=name, d=dtype: compare(n, d)

    def kernel(name: str) -> dict[str, Any]:
        model = _moved(bench.reduced(stock, name), bench.device, bench.half)
        pixels = images.to(bench.device, bench.half)
        used, by_kernel = attention.has_varlen_kernel, model(pixels).logits
        attention.has_varlen_kernel = lambda *seen: False
        try:
            by_loop = model(pixels).logits
        finally:
            attention.has_varlen_kernel = used
        present = attention.varlen_attn is not None and not bench.smoke
        return {"kernel_is_there": present, "kernel_to_loop": _distance(by_kernel, by_loop)}

    for name in PACKED:
        yield f"{name}, one kernel beside the loop", lambda n=name: kernel(n)


@torch.no_grad()
def compiled(bench: Bench) -> Iterator[Task]:
    """Compiled graphs and CUDA graphs: the logits are the same, and a batch of the same shape makes no new graph."""
    size = bench.first_size
    stock = _moved(bench.stock(size), bench.device, bench.half)
    first, second = (bench.images(size, 4).to(bench.device, bench.half).roll(turn, 0) for turn in (0, 1))

    def compare(name: str, mode: str | None) -> dict[str, Any]:
        torch._dynamo.reset()
        made = torch._dynamo.utils.counters
        made.clear()
        model = stock if name == "dense" else _moved(bench.reduced(stock, name), bench.device, bench.half)
        options = {"backend": "eager"} if bench.smoke else {"mode": mode}
        run = torch.compile(model, fullgraph=True, **options)
        begin = time.perf_counter()
        errors = [_distance(run(pixels).logits.clone(), model(pixels).logits) for pixels in (first, second, first)]
        return {
            "seconds": time.perf_counter() - begin,
            "error": torch.tensor(errors).max().item(),  # NaN if one of them is NaN
            "graphs": made["stats"]["unique_graphs"],
        }

    for mode in (None,) if bench.smoke else (None, "reduce-overhead"):
        for name in ("dense", "tome") if bench.smoke else ("dense", *EVEN, *(() if mode else NEWER)):
            yield f"{name}, {mode or 'default'}", lambda n=name, m=mode: compare(n, m)


@torch.no_grad()
def waits(bench: Bench) -> Iterator[Task]:
    """How often the host waits for the device in one forward: at most once per layer that reduces."""
    size = bench.first_size
    stock, images = bench.stock(size), bench.images(size, 8)

    def count(name: str) -> dict[str, Any]:
        model = _moved(bench.reduced(stock, name), bench.device, bench.half)
        pixels = images.to(bench.device, bench.half)
        left = model(pixels).token_counts
        return {"waits": host_waits(lambda: model(pixels), bench.device), "layers": left.shape[1]}

    for name in (*EVEN, *PACKED, *NEWER):
        yield name, lambda n=name: count(n)


@torch.no_grad()
def weighing(bench: Bench) -> Iterator[Task]:
    """Weights of keys as extra channels of the heads, compared with a float mask, which flash kernels do not take."""

    def compare(batch: int, tokens: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(batch, 6, tokens, 64, generator=draw).to(bench.device, bench.half) for _ in range(3)
        )
        bias = torch.rand(batch, tokens, generator=draw).to(bench.device)

        def by_mask() -> torch.Tensor:
            mask = bias.to(query.dtype)[:, None, None, :]
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)

        def by_channels() -> torch.Tensor:
            wide = attention.fold_key_bias(query, key, value, bias, 64**-0.5)
            return torch.nn.functional.scaled_dot_product_attention(*wide, scale=64**-0.5)[..., :64]

        mask, channels = in_turns([by_mask, by_channels], bench.repeats, bench.device)
        ratios = [one / other for one, other in zip(channels, mask, strict=True)]
        return {"channels_over_mask": statistics.median(ratios), "error": _distance(by_channels(), by_mask())}

    for tokens in (17,) if bench.smoke else (197, 577):
        for batch in bench.batches:
            yield f"batch {batch}, {tokens} tokens", lambda b=batch, t=tokens: compare(b, t)


def speed(bench: Bench) -> Iterator[Task]:
    """Speed of every method beside the dense model and the slice oracle, eager and compiled: rows of `benchmark`."""

    def measure(size: str, batch: int, compile: bool) -> list[dict[str, Any]]:
        stock = bench.stock(size)
        names = list(EVEN if compile else {**EVEN, **PACKED})
        if bench.smoke:
            names = ["tome", "ats"]
        models = {"dense": stock, **{name: bench.reduced(stock, name) for name in names}}
        report = benchmark(
            {name: _moved(model, bench.device, bench.half) for name, model in models.items()},
            bench.images(size, batch),
            batch_sizes=(batch,),
            dtypes=("bfloat16",),
            repeats=bench.repeats,
            runtimes=["compiled" if compile else "eager"],
            breakdown=not compile and not bench.smoke,  # a profile takes seconds on a CPU
            memory=not bench.smoke,
            suggest=False,
            progress=False,
        )
        return report.to_dict()["rows"]

    for compile in (False,) if bench.smoke else (False, True):
        for size in bench.sizes:
            for batch in bench.batches:
                key = f"{size}, batch {batch}, {'compiled' if compile else 'eager'}"
                yield key, lambda s=size, b=batch, c=compile: measure(s, b, c)


PARTS = {part.__name__: part for part in (correct, compiled, waits, weighing, speed)}


def host_waits(call: Callable[[], Any], device: torch.device) -> int:
    """Count the calls that wait for the device. CUDA reports them; elsewhere, count calls of `Tensor.tolist`."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in seen)
    found, stock = [0], torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> Any:
        found[0] += 1
        return stock(tensor)

    torch.Tensor.tolist = counted  # type: ignore[method-assign]
    try:
        call()
    finally:
        torch.Tensor.tolist = stock  # type: ignore[method-assign]
    return found[0]


def _moved(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a copy on the device. Models share weights, so `.to` would move those of all of them."""
    return copy.deepcopy(model).to(device=device, dtype=dtype).eval()


def _distance(values: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, divided by the largest expected value."""
    values, expected = values.float().cpu(), expected.float().cpu()
    return ((values - expected).abs().max() / expected.abs().max()).item()


def run_part(name: str, folder: Path, smoke: bool) -> None:
    """Run the tasks that are missing in the file of a part, and write each result as it comes."""
    logging.set_verbosity_error()
    file = folder / f"{name}.jsonl"
    known = {json.loads(line)["key"] for line in file.read_text().splitlines()} if file.is_file() else set()
    for key, task in PARTS[name](Bench(smoke)):
        if key in known:
            continue
        try:
            with torch.no_grad():
                answer: dict[str, Any] = {"found": task()}
        except Exception as error:  # a failure is reported, and the rest goes on
            answer = {"failed": f"{type(error).__name__}: {error}"[:500]}
        with file.open("a") as lines:
            lines.write(json.dumps({"key": key, **answer}) + "\n")


def table(found: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    lines = [f"# {found['device']}", "", f"torch {found['torch']}, transformers {found['transformers']}, "
             f"{found['date']}. By `benchmarks/cuda_device.py`.", ""]  # fmt: skip
    for part, rows in found["parts"].items():
        lines += [f"## {part}", "", (PARTS[part].__doc__ or "").strip(), ""]
        if part == "speed":
            lines += ["| | model | ms | over dense | of the oracle | peak over dense |", "|---|---|---|---|---|---|"]
            for row in rows:
                for one in row.get("found", ()):
                    oracle, memory = (_short(one[key] or "") for key in ("oracle_share", "memory_over_dense"))
                    low, high = one["speedup_interval"]
                    lines.append(
                        f"| {row['key']} | {one['name']} | {one['p50_ms']:.2f} | {one['speedup']:.2f} "
                        f"({low:.2f}-{high:.2f}) | {oracle} | {memory} |"
                    )
        else:
            for row in rows:
                told = ", ".join(f"{key} {_short(value)}" for key, value in row.get("found", {}).items())
                lines.append(f"- {row['key']}: {told or 'FAILED'}")
        lines += [f"- {row['key']}: {row['failed']}" for row in rows if "failed" in row]
        if found["stopped"].get(part):
            lines.append(f"- **{found['stopped'][part]}**")
        lines.append("")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="Run on the CPU, with tiny models.")
    parser.add_argument("--output_dir", type=Path, default=HERE / "results", help="Folder for the results.")
    parser.add_argument("--part", choices=PARTS, help="Run only this part, in this process.")
    args = parser.parse_args(arguments)
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device. With --smoke everything runs on the CPU.")
    name = "smoke" if args.smoke else re.sub(r"\W+", "-", torch.cuda.get_device_name(0)).strip("-").lower()
    folder = args.output_dir / f"cuda-{name}.parts"
    folder.mkdir(parents=True, exist_ok=True)
    if args.part:
        run_part(args.part, folder, args.smoke)
        return
    stopped = {}
    for part, seconds in LIMITS.items():
        command = [sys.executable, __file__, "--part", part, "--output_dir", str(args.output_dir)]
        print(f"{part}: at most {seconds} s", flush=True)
        try:
            limit = 600 if args.smoke else seconds  # these limits are not for CPUs
            done = subprocess.run(command + (["--smoke"] if args.smoke else []), timeout=limit)
            if done.returncode:
                stopped[part] = f"The part stopped with exit code {done.returncode}."
        except subprocess.TimeoutExpired:
            stopped[part] = f"The part was stopped after {seconds} s. Run it again to continue."
    parts = {
        part: [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        for part in LIMITS
        if (folder / f"{part}.jsonl").is_file()
    }
    found = {
        "device": device_name(torch.device("cpu" if args.smoke else "cuda")), "torch": torch.__version__,
        "transformers": transformers.__version__, "hf_tokenreduce": hf_tokenreduce.__version__,
        "python": platform.python_version(), "date": date.today().isoformat(), "stopped": stopped, "parts": parts,
    }  # fmt: skip
    (args.output_dir / f"cuda-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output_dir / f"cuda-{name}.md").write_text(table(found) + "\n")
    failed = [f"{part}: {row['key']}" for part, rows in parts.items() for row in rows if "failed" in row]
    print(f"Saved to {args.output_dir / f'cuda-{name}.md'}. Failed: {', '.join(failed + list(stopped)) or 'nothing'}.")


if __name__ == "__main__":
    main()
