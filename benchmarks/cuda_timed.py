"""Parts of `cuda_device.py`: what is timed on a CUDA device, beside other ways to the same."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from cuda_models import BLOCKS, EVEN, NEWER, PACKED, Bench, Task, distance, moved
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_tokenreduce.evaluation import benchmark
from hf_tokenreduce.modeling import attention
from hf_tokenreduce.modeling.tokens import merge, merge_by_product, merge_by_sums
from hf_tokenreduce.timing import in_turns, median_ratio


CALLS_OF_GRAPH = 20


def by_graph(bench: Bench, calls: dict[str, Callable[[], torch.Tensor]]) -> dict[str, list[float]]:
    """Time calls in turn. Many of each are one CUDA graph, so that the host's time hardly counts."""
    runs, calls_of_graph = [], 1 if bench.smoke else CALLS_OF_GRAPH
    for call in calls.values():
        if bench.smoke:
            runs.append(call)
            continue
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls_of_graph):
                call()
        runs.append(graph.replay)
    found = in_turns(runs, bench.repeats, bench.device)
    return {name: [one / calls_of_graph for one in seconds] for name, seconds in zip(calls, found, strict=True)}


@torch.no_grad()
def weighing(bench: Bench) -> Iterator[Task]:
    """Weights of keys as extra channels of the heads, as a float mask, which flash kernels do not take, and in our own
    kernel with several sizes of its blocks."""

    def compare(batch: int, tokens: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(batch, 6, tokens, 64, generator=draw).to(bench.device, bench.half) for _ in range(3)
        )
        bias = torch.rand(batch, tokens, generator=draw).to(bench.device)

        def by_mask() -> torch.Tensor:
            mask = bias.to(query.dtype)[:, None, None, :]
            return F.scaled_dot_product_attention(query, key, value, mask)

        def by_channels() -> torch.Tensor:
            wide = attention.fold_key_bias(query, key, value, bias[:, None], 64**-0.5)
            return F.scaled_dot_product_attention(*wide, scale=64**-0.5)[..., :64]

        def by_cudnn() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return by_mask()

        def by_own_kernel(*blocks: int) -> torch.Tensor:
            own = attention.gpu_kernels().weighted
            return own(query, key, value, bias, 64**-0.5, blocks).transpose(1, 2)

        calls = {
            "mask": by_mask,
            "channels": by_channels,
            "no_weights": lambda: F.scaled_dot_product_attention(query, key, value),
        }
        if not bench.smoke:
            calls |= {"cudnn": by_cudnn}
            calls |= {f"own_{a}_{b}": (lambda a=a, b=b: by_own_kernel(a, b)) for a, b in BLOCKS}
        seconds = by_graph(bench, calls)
        answer = {f"{name}_ms": 1000 * statistics.median(found) for name, found in seconds.items()}
        if not bench.smoke:
            answer["error_of_own_kernel"] = distance(by_own_kernel(*BLOCKS[0]), by_mask())
        return {
            "channels_over_mask": median_ratio(seconds["channels"], seconds["mask"])[0],
            **answer,
            "error": distance(by_channels(), by_mask()),
        }

    for tokens in (17,) if bench.smoke else (197, 577):
        for batch in (3,) if bench.smoke else (1, 32, 256):
            yield f"batch {batch}, {tokens} tokens", lambda b=batch, t=tokens: compare(b, t)


@torch.no_grad()
def merging(bench: Bench) -> Iterator[Task]:
    """Merging by one product in half precision, compared with sums in float32."""

    def compare(batch: int, tokens: int) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(0)
        rows = torch.randn(batch, tokens, 384, generator=draw).to(bench.device, bench.half)
        left = tokens - 13
        slot = torch.randint(left, (batch, tokens), generator=draw).to(bench.device)
        weight = merge(slot, left, torch.ones(batch, tokens, device=bench.device), keeps_all=True).weight
        ways = {
            "product": lambda: merge_by_product(rows, slot, left, weight),
            "sums": lambda: merge_by_sums(rows, slot, left, weight),
        }
        seconds = by_graph(bench, ways)
        return {
            **{f"{name}_ms": 1000 * statistics.median(found) for name, found in seconds.items()},
            "sums_over_product": median_ratio(seconds["sums"], seconds["product"])[0],
            "error": distance(ways["product"](), ways["sums"]()),
        }

    for tokens in (16,) if bench.smoke else (197, 577):
        for batch in (3,) if bench.smoke else (1, 32, 256):
            yield f"batch {batch}, {tokens} tokens", lambda b=batch, t=tokens: compare(b, t)


def speed_recorded(bench: Bench) -> Iterator[Task]:
    """Speed of models whose kernels are started by one CUDA graph, beside the dense model and the slice oracle."""
    runtime = "eager" if bench.smoke else "recorded"
    names = ["tome"] if bench.smoke else list(EVEN)
    for place, (size, batch) in enumerate(bench.cells):
        yield (
            f"{size}, batch {batch}, recorded",
            lambda s=size, b=batch: _measured(bench, s, b, ["dense", *names], runtime),
        )
        if not place and not bench.smoke:
            yield (
                f"{size}, batch {batch}, newer methods",
                lambda s=size, b=batch: _measured(bench, s, b, ["dense", *NEWER], runtime),
            )


def speed(bench: Bench) -> Iterator[Task]:
    """Speed of every method beside the dense model and the slice oracle: rows of `benchmark`."""
    for size, batch in bench.cells:
        names = ["tome", "ats"] if bench.smoke else [*EVEN, *PACKED]
        yield f"{size}, batch {batch}, eager", lambda s=size, b=batch, n=names: _measured(bench, s, b, ["dense", *n])


def profile(bench: Bench) -> Iterator[Task]:
    """The kernels that a forward of the GPU spends most time in, in milliseconds."""

    def kernels(size: str, batch: int, name: str) -> dict[str, Any]:
        model = moved(bench.reduced(bench.stock(size), name), bench.device, bench.half)
        images = bench.images(size, batch).to(bench.device, bench.half)
        with torch.no_grad():
            model(images)
            with torch.profiler.profile() as seen:
                model(images)
        spent = [(one.device_time_total, one.count, one.key[:60]) for one in seen.key_averages()
                 if one.device_type == torch.autograd.DeviceType.CUDA]  # fmt: skip
        longest = sorted(spent, reverse=True)[:20]
        return {
            "all": sum(one[0] for one in spent) / 1000,
            "kernels": sum(one[1] for one in spent),
            # Numbered, because names are cut off, and then some are the same.
            **{f"{place}. {key} ({count} times)": time / 1000 for place, (time, count, key) in enumerate(longest, 1)},
        }

    size, batch = bench.cells[0]
    for name in ("tome",) if bench.smoke else ("dense", "tome", "bat", "evit", "ltmp", "ats"):
        yield f"{size}, batch {batch}, {name}", lambda n=name: kernels(size, batch, n)


WARMUP = 2


def _measured(bench: Bench, size: str, batch: int, names: list[str], runtime: str = "eager") -> list[dict[str, Any]]:
    stock = bench.stock(size)
    report = benchmark(
        {name: moved(bench.reduced(stock, name), bench.device, bench.half) for name in names},
        bench.images(size, batch),
        batch_sizes=(batch,),
        dtypes=("bfloat16",),
        repeats=bench.repeats,
        warmup=WARMUP,
        runtimes=[runtime],
        breakdown=False,
        memory=not bench.smoke and runtime == "eager",
        suggest=False,
        progress=False,
    )
    return report.to_dict()["rows"]
