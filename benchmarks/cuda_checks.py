"""Parts of `cuda_device.py`: what is checked on a CUDA device.

A part is a function that yields tasks: a key, and a call that returns what was found.
"""

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
from cuda_models import CHECKED, EVEN, NEWER, PACKED, Bench, Task, distance, moved
from cuda_report import CHECKED_IMAGES

from hf_tokenreduce.deploy import record
from hf_tokenreduce.evaluation.oracle import SliceOracle
from hf_tokenreduce.evaluation.runtimes import compiled as compile_model
from hf_tokenreduce.evaluation.runtimes import many_compiled
from hf_tokenreduce.modeling import attention, received
from hf_tokenreduce.timing import in_turns, median_ratio


@torch.no_grad()
def correct(bench: Bench) -> Iterator[Task]:
    """Logits on the device, compared with float32 logits on the CPU, for each method and data type."""
    size = bench.smallest
    stock, images = bench.stock(size), bench.images(size, CHECKED_IMAGES)
    torch.backends.cudnn.allow_tf32 = False  # it rounds the patch embedding to 10 bits

    def compare(name: str, dtype: torch.dtype) -> dict[str, Any]:
        model = bench.reduced(stock, name)
        wanted = model(images, **({} if name == "dense" else {"output_patch_map": True}))
        there = moved(model, bench.device, dtype)
        pixels = images.to(bench.device, dtype)
        found = there(pixels)
        answer = {"error": distance(found.logits, wanted.logits)}
        if name != "dense":
            whole = there(pixels, output_patch_map=True)
            counts, map_found, map_wanted = whole.token_counts.cpu(), whole.patch_map, wanted.patch_map
            answer["same_counts"] = (counts == wanted.token_counts).all(dim=1).float().mean().item()
            if map_found is not None:
                same = (map_found.cpu() == map_wanted).all(dim=1)
                answer["same_tokens"] = same.float().mean().item()
                if same.any():
                    answer["error_of_same"] = distance(found.logits.cpu()[same], wanted.logits[same])
            if name in (*EVEN, *NEWER) and not bench.smoke:
                run = record(there, pixels.roll(1, 0))
                answer["recorded"] = distance(run(pixels).logits, found.logits)
            alone = torch.cat([there(one).logits for one in pixels.split(1)])
            answer["alone_or_in_a_batch"] = distance(alone, found.logits)
        return answer

    for dtype in (torch.float32, bench.half):
        for name in ("dense", *EVEN, *PACKED, *CHECKED, *NEWER):
            yield f"{name}, {str(dtype).removeprefix('torch.')}", lambda n=name, d=dtype: compare(n, d)

    def kernel(name: str) -> dict[str, Any]:
        model = moved(bench.reduced(stock, name), bench.device, bench.half)
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
        return {"kernel_is_there": present, "kernel_to_loop": distance(by_kernel, by_loop)}

    for name in PACKED:
        yield f"{name}, one kernel beside the loop", lambda n=name: kernel(n)

    def columns(biased: bool) -> dict[str, Any]:
        from hf_tokenreduce.modeling.kernels import received_attention

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
        return {"error": distance(found, torch.cat(wanted))}

    for biased in () if bench.smoke else (False, True):  # triton needs a GPU
        yield f"columns of a map, {'with' if biased else 'without'} weights", lambda b=biased: columns(b)


@torch.no_grad()
def compiled(bench: Bench, turns: Path | None = None) -> Iterator[Task]:
    """Compiled models in CUDA graphs: the logits are the eager ones, a batch of the same shape makes no new graph, and
    the speed beside the compiled dense model and the compiled slice oracle."""

    made = torch._dynamo.utils.counters

    def checked(run: Any, model: Any, images: torch.Tensor) -> dict[str, Any]:
        errors = []
        for pixels in (images, images.roll(1, 0), images):
            found, wanted = run(pixels).logits.float().clone(), model(pixels).logits.float()
            errors.append((found - wanted).abs().amax(dim=1) / wanted.abs().max())
        return {
            "error": torch.cat(errors).max().item(),  # NaN if one of them is NaN
            "median_error": torch.cat(errors).median().item(),
            "graphs": made["stats"]["unique_graphs"],
            "without_cuda_graphs": made["inductor"]["cudagraph_skips"],
        }

    def compare(size: str, batch: int, name: str) -> dict[str, Any]:
        dense = moved(bench.stock(size), bench.device, bench.half)
        model = moved(bench.reduced(bench.stock(size), name), bench.device, bench.half)
        images = bench.images(size, batch).to(bench.device, bench.half)
        left = model(images).token_counts.double().mean(dim=0).round().long().tolist()
        runs = []
        with many_compiled():
            for one in (model, SliceOracle(dense, model.config.reduction.hook, left), dense):
                made.clear()
                begin = time.perf_counter()
                options = {"backend": "eager"} if bench.smoke else {}
                runs.append(compile_model(one, bench.device, fullgraph=True, **options))
                runs[-1](images)
                if one is model:
                    answer = {"seconds_to_compile": time.perf_counter() - begin, **checked(runs[-1], model, images)}
            with in_turn(turns):
                calls = [lambda run=run: run(images) for run in (*runs, model)]
                own, ideal, whole, eager = in_turns(calls, bench.repeats, bench.device)
        return {
            **answer,
            "ms": 1000 * statistics.median(own),
            "dense_ms": 1000 * statistics.median(whole),
            "over_dense": median_ratio(whole, own)[0],
            "of_oracle": median_ratio(ideal, own)[0],
            "over_eager": median_ratio(eager, own)[0],
        }

    for size, batch in bench.compiled_cells:
        for name in bench.compiled_names:
            yield f"{size}, batch {batch}, {name}", lambda s=size, b=batch, n=name: compare(s, b, n)


@torch.no_grad()
def waits(bench: Bench) -> Iterator[Task]:
    """How often the host waits for the device in one forward: at most once per layer that reduces."""
    size = bench.smallest
    stock, images = bench.stock(size), bench.images(size, CHECKED_IMAGES)

    def count(name: str) -> dict[str, Any]:
        model = moved(bench.reduced(stock, name), bench.device, bench.half)
        pixels = images.to(bench.device, bench.half)
        left = model(pixels).token_counts
        return {"waits": host_waits(lambda: model(pixels), bench.device), "layers": left.shape[1]}

    for name in (*EVEN, *PACKED, *NEWER):
        yield name, lambda n=name: count(n)


@contextmanager
def in_turn(turns: Path | None) -> Iterator[None]:
    """Say in the folder `turns` that this process is ready, wait until all processes are, and have the device alone
    until the end of the `with` block."""
    if turns is None:
        yield
        return
    parent = os.getppid()
    (turns / f"ready-{os.getpid()}").touch()
    while not (turns / "quiet").exists():
        if os.getppid() != parent:
            raise RuntimeError("The process that started this one has ended.")
        time.sleep(0.05)
    with (turns / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
