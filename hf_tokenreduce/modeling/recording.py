# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""What a forward tells besides its result, on the way from the last layer to the model that was called."""

from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Encoded(NamedTuple):
    """What one run of the layers tells besides its result.

    counts: (B, L) long, the tokens that leave each layer, prefix tokens included
    patch_map: (B, N0) long, for each patch the row of the token that holds it, prefix tokens counted, or None
    kept_shares: (L,), the mean share of the tokens that each layer passes on, where tokens are masked
    dropped: (B, N0) bool, the patches that no token holds, where readers get a row per patch; None if none can be
    """

    counts: Tensor
    patch_map: Tensor | None
    patch_weights: Tensor | None
    last_states: Tensor | None
    lengths: tuple[int, ...] | None
    kept_shares: Tensor | None
    dropped: Tensor | None


class Recorder:
    """Collects the `Encoded` of the encoder runs of a forward.

    track_patches: whether the patch map is asked for
    reads_prefix_alone: whether nobody reads what patches leave the last layer with
    """

    def __init__(self, track_patches: bool, reads_prefix_alone: bool):
        self.track_patches = track_patches
        self.reads_prefix_alone = reads_prefix_alone and not track_patches
        self.encoded: list[Encoded] = []


class CurrentRecorder:
    """The recorder of the forward that runs, if there is one. Each thread has its own, but for what is being compiled:
    a compiler cannot look into a `ContextVar`."""

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
