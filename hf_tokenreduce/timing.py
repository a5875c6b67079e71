"""Measure the time of a call, on the CPU or on another device."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds that one call takes. On a GPU this includes its kernels, on CUDA measured by its events."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        call()
        last.record()
        torch.cuda.synchronize(device)
        return first.elapsed_time(last) / 1000
    if device.type != "cpu":  # an Apple or Intel GPU also goes on after the call has returned
        torch.accelerator.synchronize(device)
    begin = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
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


def median_ratio(above: list[float], below: list[float]) -> tuple[float, tuple[float, float]]:
    """Return the median of the ratios of each repeat, and its interval of at least 95 %, without assuming a shape.

    Each ratio is above or below the true median like a coin toss. The ends of the interval are ratios chosen by that
    rule. With fewer than 6 ratios the interval spans all of them, and `coverage` says how much it covers.
    """
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    count, outside, chance = len(ratios), 0, 0.0
    while chance + math.comb(count, outside) / 2**count <= 0.025:
        chance += math.comb(count, outside) / 2**count
        outside += 1
    outside = max(outside - 1, 0)
    return statistics.median(ratios), (ratios[outside], ratios[-1 - outside])


def coverage(repeats: int) -> float:
    """Return how many percent the interval of `median_ratio` covers at least. All ratios are on one side of the true
    median with a chance of 2 in 2 ** repeats."""
    return min(95.0, 100 - 200 / 2**repeats)
