"""Where the time of a forward pass goes: attention, linear layers, the method's decisions, moving tokens, the rest."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import PreTrainedModel
from transformers.utils import logging

from ..modeling.encoders import encoder_of
from ..tasks import image_side


# An operation counts for the first of these parts that it lies in. A projection inside scoring is scoring, not linear.
PARTS = ("moving", "scoring", "linear", "attention")
HOOKS = ("before_encoder", "select_queries", "after_attention", "after_layer")
MOVES = ("apply_map", "mix", "move", "pad", "unpad")
PREFIX = "hf_tokenreduce::"

logger = logging.get_logger(__name__)


def breakdown(model: PreTrainedModel, pixel_values: Tensor, repeats: int = 3) -> dict[str, float] | None:
    """Measure the share of the time that each part of a forward pass takes. The shares sum to 1.

    torch.profiler measures the time: the time of the kernels on CUDA, else the time of the CPU, Python included.
    Profiling itself takes time, most of all for small operations. So the shares say where to look, and the benchmark
    says how long a forward pass takes.

    Args:
        model: The model, stock or reduced.
        pixel_values: Images (B, C, H, W).
        repeats: Number of forward passes that are profiled.

    Returns:
        The share of each part:

        - `attention`: products and softmax of the attention.
        - `linear`: projections of the attention, and the MLP with its activation.
        - `scoring`: what the method computes to decide: scores, similarities, matching, sorting.
        - `moving`: applying the decision to hidden states, sizes and maps.
        - `other`: embedding, norms, residuals, head.

        None: the profiler told no times, for example because another one uses the GPU.

    Example:
        >>> breakdown(model, pixel_values)["scoring"]
    """
    cuda = pixel_values.is_cuda
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    run = image_side(model)
    with torch.no_grad(), labelled(model):
        run(pixel_values)
        with profile(activities=activities) as profiler:
            for _ in range(repeats):
                with record_function(PREFIX + "other"):
                    run(pixel_values)
            if cuda:
                torch.cuda.synchronize(pixel_values.device)
    seconds = dict.fromkeys((*PARTS, "other"), 0.0)
    for event in profiler.events():
        part = _part_of(event)
        if part is not None:
            seconds[part] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(seconds.values())
    if not total:  # speeds were measured before, and an error would lose them
        logger.warning_once("Where the time goes is left out, because the profiler of this GPU told no times.")
        return None
    return {part: spent / total for part, spent in seconds.items()}


def _part_of(event: Any) -> str | None:
    """Return the part that an event's own time counts for. None: the event is not inside a forward pass."""
    if event.device_type != DeviceType.CPU:  # a kernel counts for the operation that launched it
        return None
    labels = set()
    while event is not None:
        if event.name.startswith(PREFIX):
            labels.add(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    if "other" not in labels:
        return None
    return next((part for part in PARTS if part in labels), "other")


@contextmanager
def labelled(model: PreTrainedModel) -> Iterator[None]:
    """Give the parts of a model, stock or reduced, their names in a profile, for the duration of a `with` block.

    The model computes the same, and afterwards everything is as it was.
    """
    with ExitStack() as stack:
        encoder = encoder_of(model)
        for layer in encoder.layers:
            attention = encoder.attention(layer)
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            projections.append(getattr(attention, encoder.tower.layout.o_proj))
            stack.enter_context(_as_attribute(attention, "forward", _named("attention", attention.forward)))
            for module in (*projections, layer.mlp):
                stack.enter_context(_as_attribute(module, "forward", _named("linear", module.forward)))
            for hook in HOOKS if hasattr(layer, "reducer") else ():
                act = getattr(layer.reducer, hook)
                stack.enter_context(_as_attribute(layer.reducer, hook, _named("scoring", act)))
        for module, name in _movers(model):
            stack.enter_context(_as_attribute(module, name, _named("moving", getattr(module, name))))
        yield


def _movers(model: nn.Module) -> list[tuple[Any, str]]:
    """List the functions that move tokens, in every module that defines a class of the model.

    A model that was loaded from a repository has its own copies of these functions.
    """
    written_in = {part.__module__ for module in model.modules() for part in type(module).__mro__}
    found = []
    for name in sorted(written_in):
        module = sys.modules.get(name)
        for move in MOVES:
            function = getattr(module, move, None)
            if function is not None and getattr(function, "__module__", "").split(".")[-1] == "tokens":
                found.append((module, move))
    return found


def _named(part: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + part):
            return call(*args, **kwargs)

    return recorded


@contextmanager
def _as_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    was_own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
