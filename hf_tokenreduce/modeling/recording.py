# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""What a forward returns besides its result, on the way from the last layer to the model that was called."""

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """What one run of the layers returns besides its result. See `TokenReduceMixin` for the fields of the same names.

    Attributes:
        counts: (B, L) long, the number of tokens that leave each layer, prefix tokens included.
        patch_map: (B, N0) long, the row of the token that holds each patch, prefix tokens counted, or None.
        lengths: The number of tokens of each image after the last layer if they are packed, else None.
        kept_shares: (L,), the mean share of the tokens that leaves each layer if tokens are masked, else None.
        num_tokens: The number of tokens that entered the first layer, prefix tokens included.
        dropped: (B, N0) bool, the patches that no token holds, for a result with a row per patch. None: no patch can
            be dropped.
    """

    counts: Tensor
    patch_map: Tensor | None
    patch_weights: Tensor | None
    last_states: Tensor | None
    lengths: tuple[int, ...] | None
    kept_shares: Tensor | None
    num_tokens: int
    dropped: Tensor | None


class Recorder:
    """Collect the `Encoded` of the encoder runs of a forward.

    Args:
        track_patches: Whether the patch map is asked for.
        reads_prefix_alone: Whether only the prefix tokens of the last layer are read.
    """

    def __init__(self, track_patches: bool, reads_prefix_alone: bool):
        self.track_patches = track_patches
        self.reads_prefix_alone = reads_prefix_alone and not track_patches
        self.encoded: list[Encoded] = []


class CurrentRecorder:
    """The recorder of the running forward, if there is one. Each thread has its own, except while a model is compiled,
    because a compiler cannot read a `ContextVar`."""

    def __init__(self) -> None:
        self._variable: ContextVar[Recorder | None] = ContextVar("hf_tokenreduce_recorder", default=None)
        self._compiled: Recorder | None = None

    def get(self) -> Recorder | None:
        return self._compiled if torch.compiler.is_compiling() else self._variable.get()

    def set(self, recorder: Recorder) -> Any:
        if not torch.compiler.is_compiling():
            return self._variable.set(recorder)
        before, self._compiled = self._compiled, recorder
        return before

    def reset(self, token: Any) -> None:
        if torch.compiler.is_compiling():
            self._compiled = token
        else:
            self._variable.reset(token)


RECORDER = CurrentRecorder()
