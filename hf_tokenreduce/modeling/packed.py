# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Numbers of tokens, as Python numbers and on a device, and where the rows of packed images are.

B images · T tokens of the longest image
"""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor


class PackedLayout(NamedTuple):
    """Where the rows of packed images are. T is the length of the longest image.

    Attributes:
        starts: (B, 1) long, the first row of each image.
        ends: (B + 1,) int32, the same, and then the number of all rows.
        places: (sum of lengths,) long, the place of each row among the rows of all images if they are padded.
        real: (B, T) bool, which tokens of padded images are not padding.
    """

    starts: Tensor
    ends: Tensor
    places: Tensor
    real: Tensor


class Counts(tuple[int, ...]):
    """The number of tokens of each packed image. It remembers what was computed from it, because the steps of a layer
    ask for the same again and again, and the host needs long to turn a list into a tensor."""

    known: dict[Any, Any]

    def __new__(cls, numbers: Iterable[int]) -> "Counts":
        counts = super().__new__(cls, numbers)
        counts.known = {}
        return counts

    def plus(self, number: int) -> "Counts":
        """Return the counts with a number added to each."""
        if number not in self.known:
            self.known[number] = Counts(number + count for count in self)
        return self.known[number]

    def layout(self, device: torch.device) -> PackedLayout:
        """Return where the rows are."""
        if device not in self.known:
            self.known[device] = _make_layout(self, device)
        return self.known[device]


def layout_of(lengths: tuple[int, ...], device: torch.device) -> PackedLayout:
    """Return where the rows of packed images are."""
    if isinstance(lengths, Counts) and not torch.compiler.is_compiling():
        return lengths.layout(device)
    return _make_layout(lengths, device)


def _make_layout(lengths: tuple[int, ...], device: torch.device) -> PackedLayout:
    # No number is read from the device, so the host does not wait for it.
    total, longest = sum(lengths), max(lengths)
    starts = list(accumulate(lengths, initial=0))
    counts, first = on_device([lengths, starts[:-1]], device).unbind()
    within = torch.arange(longest, device=device)
    image = torch.arange(len(lengths), device=device)
    shifts = (image * longest - first).repeat_interleave(counts, output_size=total)
    return PackedLayout(
        first[:, None],
        on_device(starts, device, torch.int32),
        torch.arange(total, device=device) + shifts,
        within < counts[:, None],
    )


def as_numbers(counts: Tensor, most: int) -> tuple[int, ...]:
    """Turn the number of tokens that each image keeps, (B,) long and at most `most`, into Python numbers.

    While a graph is exported these are symbols, and the exporter must know their bounds. With fewer than two tokens
    some steps would differ.
    """
    if torch.jit.is_tracing():
        raise ValueError(
            "torch.jit.trace would fix the number of tokens to that of these images. Use hf_tokenreduce.export, which "
            "can write adaptive methods, or a method that keeps the same number of tokens in every image."
        )
    numbers = tuple(counts.tolist())
    if torch.compiler.is_compiling():
        for number in numbers:
            torch._check(number >= 2)
            torch._check(number <= most)
        return numbers
    return Counts(numbers)


def on_device(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor of Python numbers on a device. The host does not wait for a GPU."""
    return torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)


def same_of_all(numbers: Iterable[int], num_images: int, device: torch.device) -> Tensor:
    """Make a tensor (B, L) long of the numbers of all images, which are the same."""
    if device.type == "cuda" and (torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()):
        # CUDA graphs take no copy from the CPU.
        row = torch.stack([torch.full((), number, dtype=torch.long, device=device) for number in numbers])
    else:
        row = on_device(numbers, device)
    return row.repeat(num_images, 1)


def for_each_row(values: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Repeat the values of each image, (B, ...), for each of its packed rows: (1, sum of lengths, ...)."""
    return values.repeat_interleave(on_device(lengths, values.device), dim=0, output_size=sum(lengths))[None]
