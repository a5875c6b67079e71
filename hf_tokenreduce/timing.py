"""Measure the time of a call, on the CPU or on a CUDA device."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that one call takes. On a CUDA device this includes its kernels, measured by CUDA events."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def in_turns(calls: Sequence[Callable[[], Any]], repeats: int, device: torch.device) -> list[list[float]]:
    """Time each call `repeats` times after a warm-up, and return the seconds of each.

    The calls take turns, so that a short disturbance of the machine affects all of them.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for taken, call in zip(seconds, calls, strict=True):
            spent = seconds_of(call, device)
            if repeat:
                taken.append(spent)
    return seconds
