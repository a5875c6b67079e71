"""`benchmark`: measure how fast reduced models are, compared with the dense model and with the ideal, in one run."""

import copy
import importlib
import platform
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from ..convert import reduce_tokens, restored, stock_name
from ..deploy.graphs import FORMATS
from ..deploy.recorded import record
from ..modeling.encoders import encoder_of, facts_of, fixed_fields, what_can_be_reduced
from ..modes import evaluating
from ..tasks import image_side
from ..timing import median_ratio, seconds_of
from .breakdown import breakdown
from .memory import peak_memory
from .oracle import SliceOracle
from .paying import nearest_that_pays
from .runtimes import RUNTIMES, Graphs, MainOutput, check_runtimes, compiled, many_compiled, why_not
from .speed_report import BenchmarkReport, SpeedRow


Timer = Callable[[Callable[[], Any]], float]

MOST_BATCHES = 16  # the repeats go through at most so many different batches


def benchmark(
    models: Mapping[str, PreTrainedModel],
    pixel_values: Tensor,
    *,
    batch_sizes: Sequence[int] = (1, 32),
    dtypes: Sequence[str] = ("float32",),
    repeats: int = 15,
    warmup: int = 2,
    threads: int | None = None,
    device: str | torch.device | None = None,
    runtimes: Sequence[str] = ("eager",),
    oracle: bool = True,
    breakdown: bool = True,
    memory: bool = True,
    suggest: bool = True,
    progress: bool = True,
    timer: Timer | None = None,
) -> BenchmarkReport:
    """Time models of one size, compared with the dense model.

    The dense model is the one that is not reduced. If all are reduced, `restore` makes it from the first one, under
    the name "dense". In every repeat all models run in turn, so that a disturbance of the machine affects all of them.

    Args:
        models: Models by name.
        pixel_values: Images (n, C, H, W). The repeats go through them batch by batch, and all models get the same
            batch, so adaptive methods are timed on different images. If there are fewer images than a batch needs,
            they are repeated.
        batch_sizes: Numbers of images per batch.
        dtypes: Names of floating types.
        repeats: Number of times that each model is timed.
        warmup: Number of rounds before that, which are not timed.
        threads: Number of CPU threads, for all models. By default torch's setting.
        device: Device, for all models. By default the device of the first model.
        runtimes: `"eager"`; `"compiled"`, which is torch.compile, on a GPU with CUDA graphs, where adaptive methods
            run eagerly; `"recorded"`, which on a GPU starts the kernels of an even model by one CUDA graph; or
            `"onnx"`, `"openvino"` and `"openvino-int8"`, on the CPU, as graphs, where adaptive methods run one image
            at a time. ONNX graphs take any number of images, and OpenVINO is told the number. Each model is compared
            with the dense one in the same runtime, and with the dense one in the first runtime.
        oracle: Also time the slice oracle of each reduced model: the dense model, cut to the mean number of tokens
            that each layer of the reduced model leaves of this batch. The cut takes no time. If images keep different
            numbers of tokens, a second oracle has the highest number instead of the mean ("padded").
        breakdown: Also measure where the time goes in an eager model.
        memory: Also measure the peak memory of a forward pass of an eager model.
        suggest: If a model is not faster than dense, look for the nearest setting of its method that is.
        progress: Show a progress bar.
        timer: Calls a function once and returns the seconds that it took. By default CUDA events or the clock.

    Returns:
        The report: one row for each model, batch size, dtype and runtime.

    Example:
        >>> report = benchmark({"tome": reduce_tokens(model, ToMeConfig(r=13))}, pixel_values)
        >>> print(report.to_markdown())
    """
    _check(models, pixel_values, batch_sizes, repeats, warmup)
    first = next(iter(models.values()))
    device = _device(first.device if device is None else device)
    types = {name: _floating(name) for name in dtypes}
    named = dict(models)
    dense_name = next((name for name, model in models.items() if _method(model) is None), None)
    if dense_name is None:
        dense_name = "dense"
        named = {"dense": restored(first), **named}
    check_runtimes(runtimes, device)
    named = {name: _unmasked(model) for name, model in named.items()}
    report = BenchmarkReport(_settings(named, device, threads, dtypes, runtimes, repeats, warmup, pixel_values))
    times = timer or partial(seconds_of, device=device)
    total = len(types) * len(batch_sizes) * (warmup + repeats)
    with (
        _on(device, threads),
        TemporaryDirectory() as folder,
        logging.tqdm(total=total, desc="timing", leave=False, disable=not progress) as bar,
    ):
        report.settings["threads"] = torch.get_num_threads()
        graphs = Graphs(folder, pixel_values, torch.get_num_threads())
        for dtype_name, dtype in types.items():
            ready = {name: _placed(model, device, dtype) for name, model in named.items()}
            images = pixel_values.to(device, dtype)
            with evaluating(*ready.values()), torch.no_grad():
                for batch_size in batch_sizes:
                    with many_compiled() if "compiled" in runtimes else nullcontext():
                        rows = _time_batches(
                            ready, dense_name, _batches(images, batch_size, repeats), dtype_name, repeats, warmup,
                            runtimes, graphs, oracle, times, bar, report.left_out,
                        )  # fmt: skip
                    eager = [row for row in rows if row.runtime == "eager"]
                    _measure_more(rows, ready, dense_name, _batches(images, batch_size, 1)[0], breakdown, memory)
                    if suggest and "eager" in runtimes:
                        _suggest(eager, ready, dense_name, _batches(images, batch_size, repeats), repeats, times)
                    report.rows += rows
    return report


def _time_batches(
    ready: dict[str, PreTrainedModel],
    dense_name: str,
    batches: list[Tensor],
    dtype: str,
    repeats: int,
    warmup: int,
    runtimes: Sequence[str],
    graphs: Graphs,
    oracle: bool,
    times: Timer,
    bar: Any,
    left_out: list[str],
) -> list[SpeedRow]:
    batch_size = len(batches[0])
    counts = {name: [_token_counts(model, batch) for batch in batches] for name, model in ready.items()}
    even = {name: all(bool((c == c[:1]).all()) for c in found) for name, found in counts.items()}
    adaptive = {name for name, model in ready.items() if not even[name] or _keeps_varying(model)}
    # Keys are (runtime, name, kind). The kind is "" for the model, or "oracle" and "padded" for its slice oracles.
    runs: dict[tuple[str, str, str], Any] = {}
    oracles: dict[tuple[str, str, str], SliceOracle] = {}
    lengths: dict[tuple[str, str, str], list[list[int]]] = {}
    for runtime in runtimes:
        for name, model in ready.items():
            reason = why_not(runtime, name in adaptive, batch_size, dtype)
            timed_anyway = runtime == "compiled" and "eager" in runtimes
            if reason is None and name in adaptive and (timed_anyway or runtime == "recorded"):
                reason = "its shapes depend on the image"
            if reason is not None:
                left_out.append(f"{name} in {runtime} at batch {batch_size}: {reason}")
                continue
            if RUNTIMES[runtime]:
                bar.set_description(f"making the graph of {name}")
            prepare = partial(_prepared, runtime if name not in adaptive else "eager", images=batches[0])
            if RUNTIMES[runtime]:
                one_by_one = name in adaptive
                runs[runtime, name, ""] = graphs.open(name, MainOutput(model), runtime, batch_size, dtype, one_by_one)
            else:
                runs[runtime, name, ""] = prepare(image_side(model))
            if not oracle or _method(model) is None or (RUNTIMES[runtime] and name in adaptive):
                continue
            hook = model.config.reduction.hook
            # The oracle has the weights of a stock model, so that not even an unused hook takes time.
            ideal = {"oracle": [c.double().mean(dim=0).round().long().tolist() for c in counts[name]]}
            if name in adaptive and batch_size > 1:
                ideal["padded"] = [c.amax(dim=0).tolist() for c in counts[name]]
            for kind, wanted in ideal.items():
                dense = ready[dense_name]
                stock = restored(dense) if hasattr(dense.config, "reduction") else dense
                key = runtime, name, kind
                cut = SliceOracle(stock, hook, wanted[0])
                if RUNTIMES[runtime]:
                    runs[key] = graphs.open(f"{name} {kind}", cut, runtime, batch_size, dtype)
                else:
                    lengths[key], oracles[key] = wanted, cut
                    runs[key] = prepare(cut)

    bar.set_description("timing")
    if not runs:
        raise ValueError(f"Nothing can be timed: {'; '.join(left_out)}.")
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in runs}
    order, chance = list(runs), random.Random(0)
    for repeat in range(-warmup, repeats):
        which = max(repeat, 0) % len(batches)
        chance.shuffle(order)  # no model always follows the same one, whose memory or threads may slow it down
        for key in order:
            run = runs[key]
            if key in oracles:
                oracles[key].lengths = lengths[key][which]
            spent = times(lambda run=run, images=batches[which]: run(images))  # type: ignore[misc]
            if repeat >= 0:
                seconds[key].append(spent)
        bar.update()

    rows = []
    for runtime, name, kind in seconds:
        if kind:
            continue
        own = torch.tensor(seconds[runtime, name, ""], dtype=torch.float64)
        leaving = torch.cat([c[:, -1] for c in counts[name]]).double()
        speedup, interval = median_ratio(seconds[runtime, dense_name, ""], seconds[runtime, name, ""])
        row = SpeedRow(
            name=name,
            method=_method(ready[name]),
            batch_size=batch_size,
            dtype=dtype,
            runtime="eager" if not RUNTIMES[runtime] and name in adaptive else runtime,
            tokens={"mean": leaving.mean().item(), "min": leaving.min().item(), "max": leaving.max().item()},
            p50_ms=1000 * own.quantile(0.5).item(),
            p95_ms=1000 * own.quantile(0.95).item(),
            images_per_second=batch_size / own.quantile(0.5).item(),
            speedup=speedup,
            speedup_interval=interval,
        )
        if (runtimes[0], dense_name, "") in seconds and len(runtimes) > 1:
            row.speedup_over_first = median_ratio(seconds[runtimes[0], dense_name, ""], seconds[runtime, name, ""])[0]
        if (runtime, name, "oracle") in seconds:
            row.oracle_share, row.oracle_share_interval = median_ratio(
                seconds[runtime, name, "oracle"], seconds[runtime, name, ""]
            )
        if (runtime, name, "padded") in seconds:
            row.over_padded = median_ratio(seconds[runtime, name, "padded"], seconds[runtime, name, ""])[0]
        rows.append(row)
    return rows


def _prepared(runtime: str, model: Any, images: Tensor) -> Any:
    """Return what runs a model in a runtime of PyTorch, for batches of the shape of `images`."""
    if runtime == "compiled":
        return compiled(model, images.device)
    return record(model, images) if runtime == "recorded" else model


def _measure_more(
    rows: list[SpeedRow],
    ready: dict[str, PreTrainedModel],
    dense_name: str,
    images: Tensor,
    with_breakdown: bool,
    with_memory: bool,
) -> None:
    eager = [row for row in rows if row.runtime == "eager"]  # the models run eagerly here
    for row in eager:
        model = ready[row.name]
        if with_breakdown:
            row.breakdown = breakdown(model, images)
        if with_memory:
            row.peak_memory_mib = peak_memory(image_side(model), images)
    dense = next((row.peak_memory_mib for row in eager if row.name == dense_name), None)
    for row in rows:
        if row.peak_memory_mib is not None and dense:
            row.memory_over_dense = row.peak_memory_mib / dense


def _suggest(
    rows: list[SpeedRow],
    ready: dict[str, PreTrainedModel],
    dense_name: str,
    batches: list[Tensor],
    repeats: int,
    times: Timer,
) -> None:
    for row in rows:
        if row.method is not None and not row.pays:
            row.nearest = nearest_that_pays(ready[row.name], ready[dense_name], batches, repeats, times)


def _token_counts(model: PreTrainedModel, images: Tensor) -> Tensor:
    """Return the number of tokens that leave each layer: (B, C, H, W) -> (B, L)."""
    output = image_side(model)(images)
    if _method(model) is not None:
        return output.token_counts.cpu()
    encoder = encoder_of(model)
    return torch.full((len(images), encoder.facts.num_hidden_layers), encoder.embed(images[:1]).shape[1])


def _keeps_varying(model: PreTrainedModel) -> bool:
    """Return whether a method is adaptive, even if these images happen to keep the same number of tokens."""
    reduction = getattr(model.config, "reduction", None)
    if reduction is None:
        return False
    try:
        facts = facts_of(model.config)
        reduction.leaving(0, facts.num_patches, facts)
    except ValueError:
        return True
    return False


def _batches(images: Tensor, batch_size: int, most: int) -> list[Tensor]:
    """Split images into at most `most` full batches. If there are too few for one batch, they are repeated."""
    if len(images) < batch_size:
        images = images.repeat(-(-batch_size // len(images)), 1, 1, 1)
    count = min(len(images) // batch_size, most, MOST_BATCHES)
    return list(images[: count * batch_size].split(batch_size))


def _placed(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model itself if it has this device and type, else a copy: the caller's model stays as it is."""
    if model.device == device and model.dtype == dtype:
        return model
    return copy.deepcopy(model).to(device=device, dtype=dtype)


@contextmanager
def _on(device: torch.device, threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    finally:
        torch.set_num_threads(before)


def _unmasked(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model itself, or instead of an MAE that masks patches, one that computes all, as reduced ones do."""
    if _method(model) is None and fixed_fields(model.config):
        return restored(reduce_tokens(model, None))
    return model


def _method(model: PreTrainedModel) -> str | None:
    reduction = getattr(model.config, "reduction", None)
    return None if reduction is None else reduction.method


def _device(device: str | torch.device) -> torch.device:
    try:
        return torch.device(device)
    except RuntimeError as error:  # it lists many names that are of no use here
        raise ValueError(f"device={device!r} is no device of torch. Use cpu, cuda, cuda:1 or mps.") from error


def _floating(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{name!r} is not a floating type of torch. Use float32, bfloat16 or float16.")
    return found


def _settings(named, device, threads, dtypes, runtimes, repeats, warmup, pixel_values) -> dict[str, Any]:
    kernels = {model.config._attn_implementation for model in named.values()}
    if len(kernels) > 1:
        raise ValueError(
            f"The models use different attention kernels, {sorted(kernels)}, so their speeds cannot be compared. Call "
            "set_attn_implementation on each, with the same name."
        )
    return {
        "device": device_name(device),
        "threads": threads,
        "dtypes": list(dtypes),
        "attention": kernels.pop(),
        "runtimes": {name: version_of(name) for name in runtimes},
        "torch": torch.__version__,
        "repeats": repeats,
        "warmup": warmup,
        "images": list(pixel_values.shape),
    }


def version_of(runtime: str) -> str:
    """Return the version of the package that runs models in a runtime."""
    packages = FORMATS[RUNTIMES[runtime]].runs if RUNTIMES[runtime] else ("torch",)
    return str(importlib.import_module(packages[0]).__version__)


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    facts = facts_of(model.config)
    return {
        "hidden_size": facts.hidden_size,
        "intermediate_size": facts.mlp_products / facts.hidden_size,
        "num_hidden_layers": facts.num_hidden_layers,
        "num_attention_heads": facts.num_attention_heads,
        "patch_size": facts.grid,
    }


def _check(models: Any, pixel_values: Tensor, batch_sizes: Sequence[int], repeats: int, warmup: int) -> None:
    if not models:
        raise ValueError('There is nothing to time. Give models by name, such as {"tome": reduce_tokens(...)}.')
    for name, model in models.items():
        if stock_name(model) is None:
            raise ValueError(
                f"{name!r} is a {type(model).__name__}, which cannot be timed here. {what_can_be_reduced()} If the "
                "model is wrapped, give the model inside."
            )
    if "dense" in models and _method(models["dense"]) is not None and all(map(_method, models.values())):
        raise ValueError("The model called 'dense' is reduced. Give it the name of its method.")
    first = next(iter(models.values()))
    for name, model in models.items():
        sizes = _sizes(model)
        differing = [key for key, value in _sizes(first).items() if sizes[key] != value]
        if differing:
            raise ValueError(
                f"{name!r} differs from the first model in {differing}. Time models of one size together."
            )
    if pixel_values.ndim != 4 or len(pixel_values) == 0:
        raise ValueError(f"pixel_values must be (n, C, H, W) with n above 0, got {tuple(pixel_values.shape)}.")
    if not batch_sizes or min(batch_sizes) < 1 or repeats < 1 or warmup < 0:
        raise ValueError(
            f"batch_sizes={list(batch_sizes)} and repeats={repeats} must be at least 1, warmup={warmup} at least 0."
        )
