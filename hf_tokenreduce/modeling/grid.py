# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Make one row per patch from tokens, for code that reads every patch of the image.

B images · T tokens per image, of which the first P are prefix tokens · N0 patches of the image · D features
"""

import torch
from torch import Tensor

from .tokens import TokenState, even_rows, full_precision, rows_at


MOST_PREFIX_TOKENS = 16  # no model has as many class tokens and registers


def on_grid(state: TokenState) -> Tensor:
    """Return a row per patch, (B, P + N0, D): that of its token, so that a merged token counts once per patch. A
    dropped patch has its last state if last states are kept, else the mean of the other rows."""
    if _is_untouched(state):
        return state.hidden_states
    hidden_states = even_rows(state)
    if state.patch_weights is not None:
        weights = state.patch_weights if state.size is None else state.patch_weights * state.size.detach()[..., None]
        patches = _unmerged(hidden_states, weights, "mean")
    else:
        assert state.patch_map is not None
        held = torch.where(state.patch_map < 0, -1, state.patch_map + state.num_prefix_tokens)
        patches = _unmerged(hidden_states, held, "mean" if state.last_states is None else state.last_states)
    return torch.cat([hidden_states[:, : state.num_prefix_tokens], patches], dim=1)


def dropped_patches(state: TokenState) -> Tensor | None:
    """Return the patches that no token holds, (B, N0) bool, or None if certainly none was dropped."""
    return None if _is_untouched(state) or state.patch_map is None else state.patch_map < 0


def _is_untouched(state: TokenState) -> bool:
    reduced = any(one is not None for one in (state.size, state.mask, state.lengths, state.patch_weights))
    return not reduced and state.hidden_states.shape[1] == state.num_prefix_tokens + state.num_patches


def unmerge(hidden_states: Tensor, patch_map: Tensor, fill: str | Tensor = "mean") -> Tensor:
    """Make one row per patch from the tokens of a reduced model.

    Args:
        hidden_states (`Tensor` of shape `(batch, tokens, features)`): Rows of tokens, prefix tokens included.
        patch_map (`Tensor`): `patch_map` of the model's output, of shape `(batch, patches)`: the row that holds each
            patch, -1 if it was dropped. For SiT, `patch_weights` of shape `(batch, patch tokens, patches)`: each patch
            then gets the mean of the tokens, weighted by its weight in each. Not for LTMP and DTEM in training
            mode, where emptied tokens still have rows: call `eval()` first.
        fill (`str` or `Tensor`): What a dropped patch gets: `"mean"`, the mean of the rows of all other patches of
            its image; `"zero"`; or its row of a tensor of shape `(batch, patches, features)`.

    Returns:
        `Tensor` of shape `(batch, patches, features)`, without the prefix tokens.

    Example:
        >>> output = model(pixel_values, output_patch_map=True)
        >>> features = unmerge(output.last_hidden_state, output.patch_map)
    """
    if isinstance(fill, str) and fill not in ("mean", "zero"):
        raise ValueError(f'fill must be "mean", "zero" or a tensor of one row per patch, got {fill!r}.')
    if patch_map is None:
        raise ValueError(
            "patch_map is None. Call the model with output_patch_map=True. For SiT give patch_weights instead."
        )
    spare = hidden_states.shape[1] - patch_map.shape[-1]
    if spare >= 0 and not patch_map.is_floating_point() and not torch.compiler.is_compiling():
        used = int(patch_map.max()) + 1 if patch_map.numel() else 0
        # More rows than tokens. In one image of a packed batch, those after its tokens are padding.
        if 0 < used < hidden_states.shape[1] and bool(hidden_states[:, used:].any()):
            raise ValueError(
                "These hidden states have more rows than tokens. Most likely they have a row per patch already, as in "
                f"CLIP, SigLIP, DINO and others: then the patches are hidden_states[:, {spare}:]. Or LTMP was in "
                "training mode, where tokens that were dropped or merged keep their rows: then call model.eval()."
            )
    if patch_map.is_floating_point():
        rows, (tokens, patches) = hidden_states.shape[1], patch_map.shape[1:]
        if rows >= patches > tokens + MOST_PREFIX_TOKENS:
            raise ValueError(
                f"These hidden states have {rows} rows for {tokens} patch tokens. Most likely they have a row per "
                f"patch already, as in CLIP, SigLIP, DINO and others: then the patches are hidden_states[:, {spare}:]."
            )
    return _unmerged(hidden_states, patch_map, fill)


def _unmerged(hidden_states: Tensor, patch_map: Tensor, fill: str | Tensor) -> Tensor:
    if patch_map.is_floating_point():
        shares = patch_map / patch_map.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        patches = hidden_states[:, hidden_states.shape[1] - patch_map.shape[1] :]
        with full_precision(patches):
            return (shares.transpose(1, 2) @ patches.float()).to(hidden_states.dtype)
    rows = rows_at(hidden_states, patch_map)
    dropped = (patch_map < 0)[..., None]
    if isinstance(fill, Tensor):
        return torch.where(dropped, fill, rows)
    return torch.where(dropped, 0.0, rows) if fill == "zero" else fill_by_mean(rows, dropped[..., 0])


def fill_by_mean(rows: Tensor, dropped: Tensor) -> Tensor:
    """Set the dropped rows (B, N) of (B, N, D) to the mean of the other rows of their image."""
    dropped = dropped[..., None]
    count = (~dropped).sum(dim=1, keepdim=True).clamp(min=1)
    mean = torch.where(dropped, 0.0, rows).float().sum(dim=1, keepdim=True) / count
    return torch.where(dropped, mean.to(rows.dtype), rows)
