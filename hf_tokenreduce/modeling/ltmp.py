# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""LTMP: tokens merge or are pruned by learned thresholds of similarity and importance.

B images · N patch tokens, padded to the longest image · d features of a key
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .attention import AttentionView
from .checks import check_caps_fit, check_flag, checked_caps, is_number
from .configuration_base import ReductionConfig
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import directions_of
from .multiply_adds import similarity_cost
from .packed import as_numbers
from .tokens import (
    TokenMap,
    TokenState,
    apply_map,
    follow,
    full_precision,
    merge,
    move,
    ranks,
    remember_dropped,
    representatives,
    sum_by_target,
)


@dataclass(frozen=True)
class LTMPConfig(ReductionConfig):
    """Merge similar tokens and prune unimportant ones, by two learned thresholds in every layer (LTMP).

    After "Learned Thresholds Token Merging and Pruning for Vision Transformers". The importance of a token is the
    attention that it receives. The thresholds are learned in training or found by `calibrate`.

    Args:
        merge: Whether tokens merge if their similarity is above the merge threshold.
        prune: Whether tokens are pruned if their importance is not above the prune threshold.
        target: Share of the multiply-adds to keep, which training aims at. `calibrate` sets it to its own target. The
            loss of the training counts them without the search for pairs, as the authors' formula does.
        temperature: Temperature of the sigmoid that gives the thresholds their gradient in training.
        budget_weight: Factor of the squared distance from `target` in the loss.
        merge_threshold: Initial merge threshold of every layer, between 0 and 1. 1.0 merges nothing.
        prune_threshold: Initial prune threshold of every layer, between 0 and 1. 0.0 prunes nothing.
        max_tokens: Upper limit of the tokens that leave a layer, prefix tokens included. The most important tokens
            stay. One number, or a list with one number per layer. None: no limit.
    """

    method: ClassVar[str | None] = "ltmp"

    merge: bool = True
    prune: bool = True
    target: float = 0.75
    temperature: float = 0.1
    budget_weight: float = 10.0
    merge_threshold: float = 0.9
    prune_threshold: float = 0.0
    max_tokens: int | Sequence[int] | None = None

    def __post_init__(self):
        check_flag("LTMPConfig", "merge", self.merge)
        check_flag("LTMPConfig", "prune", self.prune)
        if not (self.merge or self.prune):
            raise ValueError("LTMPConfig: merge=False and prune=False leave nothing to do. Set one of them to True.")
        for name, low, high in (("target", 0, 1), ("merge_threshold", 0, 1), ("prune_threshold", 0, 1)):
            value = getattr(self, name)
            if not is_number(value) or not low <= value <= high:
                raise ValueError(f"LTMPConfig: {name} must lie between {low} and {high}, got {value!r}.")
        if self.target == 0:
            raise ValueError("LTMPConfig: target must be above 0. It is the share of the multiply-adds to keep.")
        for name in ("temperature", "budget_weight"):
            value = getattr(self, name)
            if not is_number(value) or not 0 < value < float("inf"):
                raise ValueError(f"LTMPConfig: {name} must be a number above 0, got {value!r}.")
        for name in ("target", "merge_threshold", "prune_threshold", "temperature", "budget_weight"):
            self._set(**{name: float(getattr(self, name))})
        self._set(max_tokens=checked_caps("LTMPConfig", self.max_tokens, None, "layer"))

    def cap(self, layer: int) -> int | None:
        """Return `max_tokens` of a layer."""
        caps: Any = self.max_tokens
        return caps[layer] if isinstance(caps, tuple) else caps

    def check_fit(self, facts: EncoderFacts) -> None:
        if isinstance(self.max_tokens, tuple) and len(self.max_tokens) != facts.num_hidden_layers:
            raise ValueError(
                f"LTMPConfig: a list max_tokens needs one value per layer, got {len(self.max_tokens)} values for "
                f"{facts.num_hidden_layers} layers: {list(self.max_tokens)}."
            )
        check_caps_fit("LTMPConfig", "max_tokens", self.max_tokens, facts)

    def untrained(self) -> str | None:
        return (
            "LTMP starts with the thresholds of its configuration and does not keep `target` yet. Fit the thresholds "
            "to images by hf_tokenreduce.calibrate(model, images, target), or train them."
        )

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        return similarity_cost(count, facts) if self.merge else 0


class ThresholdDecision(NamedTuple):
    """What the thresholds decide for the patch tokens of each image. Tensors are (B, N), but for `best`.

    Attributes:
        target: long, the output token that each token goes into. -1: pruned, or padding.
        receiver: long, the token that each token goes into before pruning: itself unless it merges.
        best: float32, (B, number of tokens that can merge), the cosine of each to its best match, and -inf for
            padding. None: nothing can merge.
        merged_importance: float32, the highest importance of the tokens in each receiver. -inf for padding, and for
            tokens that have merged into another.
    """

    target: Tensor
    receiver: Tensor
    best: Tensor | None
    merged_importance: Tensor

    def similarity(self, num_prefix_tokens: int) -> Tensor:
        """Return the cosine of each token to its best match, (B, N) float32. -inf for tokens that cannot merge."""
        similarity = torch.full_like(self.merged_importance, -torch.inf)
        if self.best is not None:
            similarity[:, _even(num_prefix_tokens)] = self.best
        return similarity

    def importance(self) -> Tensor:
        """Return the importance of the receiver of each token, (B, N) float32. -inf for padding."""
        return self.merged_importance.gather(1, self.receiver)


@torch.no_grad()
def decide_by_thresholds(
    keys: Tensor | None,
    importance: Tensor,
    valid: Tensor | None,
    merge_threshold: Tensor | float,
    prune_threshold: Tensor | float,
    num_prefix_tokens: int,
    max_kept: int | None = None,
) -> ThresholdDecision:
    """Merge similar tokens, then prune unimportant ones.

    keys: (B, N, d), None to merge nothing; importance: (B, N); valid: (B, N), None if there is no padding

    Even and odd positions of an image's sequence, prefix included, are two sets. An even token goes into its best
    match of the odd set if their cosine is above `merge_threshold`. Several tokens can go into the same one. After
    that, tokens whose importance is above `prune_threshold` stay, but only the `max_kept` most important ones. The
    output has the remaining even tokens first, then the odd ones. An image in which nothing merges keeps its order.
    """
    batch, num_tokens = importance.shape
    natural = torch.arange(num_tokens, device=importance.device)
    receiver, sequence, best = natural.expand(batch, -1), None, None
    if valid is not None:
        importance = importance.masked_fill(~valid, -torch.inf)
    if keys is not None and num_tokens > 1:
        even, odd = _even(num_prefix_tokens), _even(num_prefix_tokens + 1)
        best, match = _best_matches(keys, valid, even, odd)
        merges = best > merge_threshold
        receiver = receiver.clone()
        receiver[:, even] = torch.where(merges, match * 2 + odd.start, natural[even])
        dealt = torch.cat([natural[even], natural[odd]])
        sequence = torch.where(merges.any(dim=1, keepdim=True), dealt, natural)
        # No one goes into a token that has merged, so its importance stays -inf.
        importance = torch.full_like(importance, -torch.inf).scatter_reduce_(1, receiver, importance, "amax")
    if num_prefix_tokens == 0:  # an image must keep at least one token: the most important one
        importance = importance.scatter(1, importance.argmax(dim=1, keepdim=True), torch.inf)
    stays = importance > prune_threshold
    if max_kept is not None:
        stays &= ranks(importance.masked_fill(~stays, -torch.inf)) < max_kept
    if sequence is None:
        place = stays.cumsum(dim=1)
    else:
        place = torch.empty_like(sequence).scatter_(1, sequence, stays.gather(1, sequence).cumsum(dim=1))
    target = place * stays - 1
    if sequence is not None:
        target = target.gather(1, receiver)
    return ThresholdDecision(target, receiver, best, importance)


def _even(num_prefix_tokens: int) -> slice:
    """Return the patch tokens that are at even positions of the sequence."""
    return slice(num_prefix_tokens % 2, None, 2)


def _best_matches(keys: Tensor, valid: Tensor | None, sources: slice, receivers: slice) -> tuple[Tensor, Tensor]:
    """Return the cosine and the place of each source's best match among the receivers, (B, number of sources)."""
    keys = directions_of(keys)
    with full_precision(keys):
        if keys.shape[0] == 1 and torch.compiler.is_compiling():
            # AOTInductor cannot compile a batched product whose number of rows depends on the image.
            products = torch.mm(keys[0, sources], keys[0, receivers].T)[None]
        else:
            products = torch.bmm(keys[:, sources], keys[:, receivers].transpose(1, 2))
        if valid is not None:  # no match in padding
            products = products.masked_fill(~valid[:, None, receivers], -torch.inf)
        best, match = products.max(dim=-1)
    best = best.clamp(max=1.0)  # a threshold of 1 merges nothing, despite rounding
    return best if valid is None else best.masked_fill(~valid[:, sources], -torch.inf), match


def budget_share(kept: Tensor, num_tokens: int, hidden_size: int, mlp_products: int) -> Tensor:
    """Return the share of the multiply-adds if the share kept[l] of the tokens leaves layer l, by LTMP's formula.

    mlp_products: multiply-adds of the MLP for one token. In the authors' formula they are 8 * hidden_size**2.
    """
    before = F.pad(kept[:-1], (1, 0), value=1.0)
    n, d = num_tokens, hidden_size
    cost = 4 * before * n * d**2 + 2 * (before * n) ** 2 * d + mlp_products * kept * n
    return cost.mean() / (4 * n * d**2 + 2 * n**2 * d + mlp_products * n)


class LTMPReducer(Reducer):
    """Merge and prune tokens by two thresholds, after attention.

    In eval mode tokens are removed. In train mode, where the thresholds learn, they are masked: attention weighs keys
    by a mask of ones and zeros, which has the gradient of a sigmoid. For live tokens a masked model computes the same
    as a model that removes the others.
    """

    merge_threshold: nn.Parameter
    prune_threshold: nn.Parameter

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.max_tokens = self.settings.cap(layer)
        self.hidden_size, self.mlp_products = facts.hidden_size, facts.mlp_products
        self.prop_attn = self.settings.merge
        self.needs_received = self.settings.prune or self.max_tokens is not None
        if self.settings.merge:
            self.merge_threshold = _threshold(self.settings.merge_threshold)
        if self.settings.prune:
            self.prune_threshold = _threshold(self.settings.prune_threshold)

    in_float32 = ("merge_threshold", "prune_threshold")

    @property
    def settings(self) -> Any:
        return self.built_for

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move thresholds to another device with the model, but keep them in float32: a half type would round them."""
        exact = {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters(recurse=False):
            if parameter.dtype != torch.float32 and not exact[name].is_meta:
                parameter.data = exact[name].to(device=parameter.device, dtype=torch.float32)
        return self

    def init_weights(self, attention: Any) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            init.constant_(parameter, getattr(self.settings, name))

    def before_encoder(self, state: TokenState) -> TokenState:
        if not self.training:
            return state
        mask = torch.ones(state.hidden_states.shape[0], state.num_patch_tokens, device=state.hidden_states.device)
        return state._replace(mask=mask, rank=_positions(mask))

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        if state.num_patch_tokens == 0:
            return state
        if state.mask is not None and state.rank is not None:
            return self._mask(view, state, state.mask, state.rank)
        return self._remove(view, state)

    def _decide(self, view: AttentionView, state: TokenState, valid: Tensor | None, order: Tensor | None = None):
        prefix = state.num_prefix_tokens
        keys = view.patch_keys().detach() if self.settings.merge else None
        if view.received is None:
            importance = torch.ones(state.num_images, state.num_patch_tokens, device=view.key.device)
        else:
            importance = view.received[:, prefix:]
        if order is not None:
            keys = None if keys is None else keys.gather(1, order[..., None].expand_as(keys))
            importance = importance.gather(1, order)
        return decide_by_thresholds(
            keys,
            importance,
            valid,
            self.merge_threshold.float() if self.settings.merge else torch.inf,
            self.prune_threshold.float() if self.settings.prune else -torch.inf,
            prefix,
            None if self.max_tokens is None else self.max_tokens - prefix,
        )

    def _remove(self, view: AttentionView, state: TokenState) -> TokenState:
        decision = self._decide(view, state, state.valid())
        counts = as_numbers(decision.target.amax(dim=1) + 1, state.num_patch_tokens)
        entering = decision.target.numel()
        if state.lengths is not None:
            entering = sum(state.lengths) - len(counts) * state.num_prefix_tokens
        if not torch.compiler.is_compiling() and sum(counts) == entering:
            return state  # no image loses a token; a compiled graph cannot check this
        if not self.settings.merge:
            return apply_map(state, TokenMap(decision.target, counts))
        size = torch.ones(decision.target.shape, device=view.key.device) if state.size is None else state.size
        return apply_map(state, merge(decision.target, counts, size, mass_is_size=True))

    def _mask(self, view: AttentionView, state: TokenState, mask: Tensor, rank: Tensor) -> TokenState:
        # Live tokens come first, in the order that they have when the others are removed, and decide alone.
        live = mask > 0.5
        order = torch.where(live, rank, rank.shape[1]).argsort(dim=1, stable=True)
        back = torch.empty_like(order).scatter_(1, order, _positions(order))
        decision = self._decide(view, state, live.gather(1, order), order)
        target, similarity, importance = (
            values.gather(1, back)
            for values in (decision.target, decision.similarity(state.num_prefix_tokens), decision.importance())
        )
        if self.settings.prune:
            mask = mask * self._step(importance, self.prune_threshold)
        if self.max_tokens is not None:
            mask = mask * (target >= 0)
        before, patch_map = state, state.patch_map
        if self.settings.merge:
            mask = mask * (1 - self._step(similarity, self.merge_threshold))
            receiver = order.gather(1, decision.receiver).gather(1, back)
            merged = receiver != _positions(receiver)
            size = torch.ones_like(similarity) if state.size is None else state.size
            means = move(
                state.hidden_states,
                merge(receiver, receiver.shape[1], size, keeps_all=True),
                state.num_prefix_tokens,
            )
            origin = state.origin
            if origin is not None:
                inherited = representatives(origin, state.size, receiver, receiver.shape[1], order=back)
                origin = torch.where(merged, origin, inherited)
            unchanged = F.pad(merged, (state.num_prefix_tokens, 0))[..., None]  # these rows are masked from now on
            state = state._replace(
                hidden_states=torch.where(unchanged, state.hidden_states, means),
                size=torch.where(merged, size, sum_by_target(size, receiver, receiver.shape[1])),
                origin=origin,
            )
            patch_map = None if patch_map is None else follow(patch_map, receiver, fill=-1)
        if patch_map is not None:
            patch_map = follow(patch_map, torch.where(target < 0, -1, _positions(target)), fill=-1)
        return state._replace(
            mask=mask,
            rank=torch.where(mask > 0.5, target, -1),
            patch_map=patch_map,
            last_states=remember_dropped(before, patch_map),
        )

    def _step(self, scores: Tensor, threshold: Tensor) -> Tensor:
        """Return 1 where a score is above the threshold, else 0, with the gradient of a sigmoid for the threshold."""
        soft = torch.sigmoid((scores.clamp(min=-1e4) - threshold.float()) / self.settings.temperature)
        return (scores > threshold).float() + (soft - soft.detach())  # this order gives exactly 0 or 1

    def auxiliary_loss(self, kept: Tensor, num_tokens: int) -> Tensor:
        share = budget_share(kept, num_tokens, self.hidden_size, self.mlp_products)
        return self.settings.budget_weight * (share - self.settings.target) ** 2


def _threshold(value: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor([float(value)], dtype=torch.float32))


def _positions(like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device).repeat(like.shape[0], 1)
