"""The parts of `cuda_device.py`: what is checked and what is timed on a CUDA device.

A part is a function that yields tasks: a key, and a call that returns what was found.
"""

import copy
import fcntl
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cuda_report import CHECKED_IMAGES
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import ViTConfig, ViTForImageClassification

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
from hf_tokenreduce.evaluation.oracle import SliceOracle
from hf_tokenreduce.evaluation.runtimes import compiled as compile_model
from hf_tokenreduce.modeling import attention, received
from hf_tokenreduce.timing import in_turns, median_ratio, seconds_of


DEIT_T = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}
DEIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
SIZES: dict[str, dict[str, Any]] = {
    "deit-s": DEIT_S, "deit-t": DEIT_T, "vit-b": {}, "deit-s-384": {**DEIT_S, "image_size": 384},
}  # fmt: skip
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
# What is timed, the most telling first, because the time may end before all is done.
CELLS = [
    ("deit-s", 256), ("deit-t", 1), ("vit-b", 256), ("deit-s", 1), ("deit-s", 32), ("deit-s-384", 256),
    ("deit-t", 256), ("vit-b", 1), ("vit-b", 32), ("deit-t", 32), ("deit-s-384", 32), ("deit-s-384", 1),
]  # fmt: skip
COMPILED_CELLS = [("deit-s", 256), ("vit-b", 256), ("deit-s", 1)]
COMPILED = ("dense", "tome", "evit", "bat", "sit")

Task = tuple[str, Callable[[], Any]]


class Bench:
    """Hold the device, and make the models and images for it."""

    def __init__(self, smoke: bool):
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        # On CPUs bfloat16 rounds so differently from processor to processor that near ties fall otherwise.
        self.half = torch.float16 if smoke else torch.bfloat16
        self.cells = [("tiny", 3)] if smoke else CELLS
        self.compiled_cells = [("tiny", 3)] if smoke else COMPILED_CELLS
        self.compiled_names = ("dense", "tome") if smoke else COMPILED
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
        if name == "dense":
            return stock
        torch.manual_seed(1)
        if name in NEWER:
            return reduce_tokens(stock, name, share=0.65).eval()
        setting = {**EVEN, **PACKED}[name]()
        return reduce_tokens(stock, setting).eval()

    def images(self, size: str, count: int) -> torch.Tensor:
        side = self.sizes[size].get("image_size", 224)
        return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))

    @property
    def smallest(self) -> str:
        return "tiny" if self.smoke else "deit-t"


@torch.no_grad()
def correct(bench: Bench) -> Iterator[Task]:
    """Logits on the device, compared with float32 logits on the CPU, for each method and data type."""
    size = bench.smallest
    stock, images = bench.stock(size), bench.images(size, CHECKED_IMAGES)
    torch.backends.cudnn.allow_tf32 = False  # it rounds the patch embedding to 10 bits

    def compare(name: str, dtype: torch.dtype) -> dict[str, Any]:
        model = bench.reduced(stock, name)
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
        for module in (attention, received):
            module.has_varlen_kernel = lambda *seen: False
        try:
            by_loop = model(pixels).logits
        finally:
            for module in (attention, received):
                module.has_varlen_kernel = used
        present = attention.varlen_attn is not None and not bench.smoke
        return {"kernel_is_there": present, "kernel_to_loop": _distance(by_kernel, by_loop)}

    for name in PACKED:
        yield f"{name}, one kernel beside the loop", lambda n=name: kernel(n)

    def columns(biased: bool) -> dict[str, Any]:
        from hf_tokenreduce.modeling.received_kernel import received_attention

        draw, lengths = torch.Generator().manual_seed(0), [197, 5, 64, 130]
        ends = torch.tensor([0, *lengths]).cumsum(0)
        query, key = (torch.randn(6, sum(lengths), 64, generator=draw).to(bench.half).float() for _ in range(2))
        bias = torch.rand(sum(lengths), generator=draw)
        wanted, log_sums = [], []
        for begin, end in pairwise(ends.tolist()):
            logits = query[:, begin:end] @ key[:, begin:end].transpose(1, 2) / 8 + (bias[begin:end] if biased else 0)
            log_sums.append(logits.logsumexp(dim=-1))
            wanted.append(logits.softmax(dim=-1).mean(dim=(0, 1)))
        inputs = query.to(bench.device, bench.half), key.to(bench.device, bench.half)
        sums, ends = torch.cat(log_sums, dim=1).to(bench.device), ends.to(bench.device, torch.int32)
        found = received_attention(*inputs, bias.to(bench.device) if biased else None, sums, ends, max(lengths), 0.125)
        return {"error": _distance(found, torch.cat(wanted))}

    for biased in () if bench.smoke else (False, True):  # triton needs a GPU
        yield f"columns of a map, {'with' if biased else 'without'} weights", lambda b=biased: columns(b)


@torch.no_grad()
def compiled(bench: Bench) -> Iterator[Task]:
    """Compiled models in CUDA graphs: the logits are the eager ones, and a batch of the same shape makes no new graph.

    Slice oracles are compiled too, so that `speed_compiled` finds all in the cache of the compiler.
    """

    def compare(size: str, batch: int, name: str) -> dict[str, Any]:
        torch._dynamo.reset()
        made = torch._dynamo.utils.counters
        made.clear()
        stock = bench.stock(size)
        model = _moved(bench.reduced(stock, name), bench.device, bench.half)
        images = bench.images(size, batch).to(bench.device, bench.half)
        begin = time.perf_counter()
        options = {"backend": "eager"} if bench.smoke else {}
        run = compile_model(model, bench.device, fullgraph=True, **options)
        errors = []
        for pixels in (images, images.roll(1, 0), images):
            found, wanted = run(pixels).logits.float().clone(), model(pixels).logits.float()
            errors.append((found - wanted).abs().amax(dim=1) / wanted.abs().max())
        answer = {
            "error": torch.cat(errors).max().item(),  # NaN if one of them is NaN
            "median_error": torch.cat(errors).median().item(),
            "graphs": made["stats"]["unique_graphs"],
            "without_cuda_graphs": made["inductor"]["cudagraph_skips"],
            "seconds": time.perf_counter() - begin,
        }
        if name != "dense" and not bench.smoke:
            counts = model(images).token_counts.double().mean(dim=0).round().long().tolist()
            dense = _moved(stock, bench.device, bench.half)
            compile_model(SliceOracle(dense, model.config.reduction.hook, counts), bench.device)(images)
        return answer

    for size, batch in bench.compiled_cells:
        for name in bench.compiled_names:
            yield f"{size}, batch {batch}, {name}", lambda s=size, b=batch, n=name: compare(s, b, n)


@torch.no_grad()
def waits(bench: Bench) -> Iterator[Task]:
    """How often the host waits for the device in one forward: at most once per layer that reduces."""
    size = bench.smallest
    stock, images = bench.stock(size), bench.images(size, CHECKED_IMAGES)

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
            wide = attention.fold_key_bias(query, key, value, bias[:, None], 64**-0.5)
            return torch.nn.functional.scaled_dot_product_attention(*wide, scale=64**-0.5)[..., :64]

        def by_cudnn() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return by_mask()

        def without() -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(query, key, value)

        calls = {"mask": by_mask, "channels": by_channels, "cudnn": by_cudnn, "no_weights": without}
        if bench.smoke:
            calls.pop("cudnn")
        seconds = dict(zip(calls, in_turns(list(calls.values()), bench.repeats, bench.device), strict=True))
        answer = {f"{name}_ms": 1000 * statistics.median(found) for name, found in seconds.items()}
        return {
            "channels_over_mask": median_ratio(seconds["channels"], seconds["mask"])[0],
            **answer,
            "error": _distance(by_channels(), by_mask()),
        }

    for tokens in (17,) if bench.smoke else (197, 577):
        for batch in (3,) if bench.smoke else (1, 32, 256):
            yield f"batch {batch}, {tokens} tokens", lambda b=batch, t=tokens: compare(b, t)


def speed(bench: Bench) -> Iterator[Task]:
    """Speed of every method beside the dense model and the slice oracle: rows of `benchmark`."""
    for size, batch in bench.cells:
        names = ["tome", "ats"] if bench.smoke else [*EVEN, *PACKED]
        yield f"{size}, batch {batch}, eager", lambda s=size, b=batch, n=names: _measured(bench, s, b, ["dense", *n])
    if not bench.smoke:
        size, batch = bench.cells[0]
        yield f"{size}, batch {batch}, newer methods", lambda: _measured(bench, size, batch, ["dense", *NEWER])
        names = ["dense", "tome", "ats", "ltmp"]  # a profile takes seconds
        yield f"{size}, batch {batch}, profiled", lambda: _measured(bench, size, batch, names, profiled=True)


def speed_compiled(bench: Bench, turns: Path | None = None) -> Iterator[Task]:
    """Speed of compiled models, in CUDA graphs, beside the compiled dense model and the compiled slice oracle."""

    def measure(size: str, batch: int) -> list[dict[str, Any]]:
        names = list(bench.compiled_names)
        untimed = WARMUP * (2 * len(names) - 1)  # every model and the oracle of each reduced one
        with in_turn(turns, untimed, bench.device) as timer:
            return _measured(bench, size, batch, names, "eager" if bench.smoke else "compiled", timer=timer)

    for size, batch in bench.compiled_cells:
        yield f"{size}, batch {batch}, compiled", lambda s=size, b=batch: measure(s, b)


WARMUP = 2


def _measured(
    bench: Bench,
    size: str,
    batch: int,
    names: list[str],
    runtime: str = "eager",
    profiled: bool = False,
    timer: Any = None,
) -> list[dict[str, Any]]:
    stock = bench.stock(size)
    report = benchmark(
        {name: _moved(bench.reduced(stock, name), bench.device, bench.half) for name in names},
        bench.images(size, batch),
        batch_sizes=(batch,),
        dtypes=("bfloat16",),
        repeats=bench.repeats,
        warmup=WARMUP,
        runtimes=[runtime],
        breakdown=profiled,
        memory=not bench.smoke,
        suggest=False,
        progress=False,
        timer=timer,
    )
    return report.to_dict()["rows"]


@contextmanager
def in_turn(turns: Path | None, untimed: int, device: torch.device) -> Iterator[Any]:
    """Make a timer for one of several processes. Its first `untimed` calls, which compile, run at once. Then it says
    in the folder `turns` that it is ready, waits until all are, and has the device to itself until the end."""
    calls, lock, parent = 0, None, os.getppid()

    def timer(call: Callable[[], Any]) -> float:
        nonlocal calls, lock
        calls += 1
        if turns is not None and calls > untimed and lock is None:
            (turns / f"ready-{os.getpid()}").touch()
            while not (turns / "quiet").exists():
                if os.getppid() != parent:
                    raise RuntimeError("The process that started this one has ended.")
                time.sleep(0.05)
            lock = (turns / "lock").open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)
        return seconds_of(call, device)

    try:
        yield timer
    finally:
        if lock is not None:
            lock.close()


PARTS = {part.__name__: part for part in (correct, compiled, waits, weighing, speed, speed_compiled)}


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
