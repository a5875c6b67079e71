# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""DTEM: token merging by similarities that a small linear layer learns.

B images · N patch tokens · A sources, R receivers among them · d features of an embedding
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .attention import AttentionView
from .checks import check_size
from .encoders import EncoderFacts
from .hooks import Reducer
from .matching import directions_of, sizes_of
from .tokens import TokenState, apply_map, full_precision, mix
from .tome import ToMeConfig, match_most_similar


NUM_CANDIDATES = 3  # a source can go into its most similar receivers only
TEMPERATURE = 0.1  # of the similarities, and again of the softmax over all pairs
LEAST = torch.finfo(torch.float32).eps  # the smallest share of itself that a token keeps, because of the logarithm


@dataclass(frozen=True)
class DTEMConfig(ToMeConfig):
    """Merge the most similar tokens in every layer, by embeddings that are learned for this (DTEM).

    After "Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers". A linear layer in each
    layer that merges makes the embeddings. It begins with the keys that ToMe compares. The other arguments are those
    of `ToMeConfig`.

    Args:
        embedding_size: Number of features of an embedding.
    """

    method: ClassVar[str | None] = "dtem"

    embedding_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        check_size("DTEMConfig", "embedding_size", self.embedding_size)
        self._set(embedding_size=int(self.embedding_size))

    def untrained(self) -> str | None:
        return (
            "DTEM's linear layers begin with the keys of the model, so an untrained model merges about as ToMe does. "
            "Train them, for example by tokenreduce train with the recipe of DTEM."
        )

    def own_multiply_adds(self, layer: int, count: int, facts: EncoderFacts) -> int:
        if self.leaving(layer, count, facts) == count:
            return 0
        sources = count // 2
        return (count * facts.hidden_size + sources * (count - sources)) * self.embedding_size


def merge_softly(
    embeddings: Tensor, size: Tensor, num_live: int, r: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """Let r of the first `num_live` patch tokens go into other ones by parts, with gradients.

    embeddings: (B, N, d); size: (B, N); both float32

    The sources and receivers are those of ToMe. No token is removed: a source loses the share of its size that the
    receivers get. The output is sorted by falling size. Returns the weight of each token in each output token,
    (B, N, N), and the new sizes (B, N).
    """
    natural = torch.arange(num_live, device=embeddings.device)
    even, odd = natural[num_prefix_tokens % 2 :: 2], natural[1 - num_prefix_tokens % 2 :: 2]
    directions = directions_of(embeddings)
    with full_precision(embeddings):
        cosines = torch.bmm(directions[:, even], directions[:, odd].transpose(1, 2))
    shares = share_out(cosines, r)
    left = 1 - shares.sum(dim=-1)
    left = left + (left.clamp(min=LEAST) - left).detach()
    given = size[:, even, None] * shares
    received = size[:, odd] + given.sum(dim=1)
    sizes = size.index_copy(1, even, size[:, even] * left).index_copy(1, odd, received)
    weights = torch.ones_like(size).index_copy(1, odd, size[:, odd] / received).diag_embed()
    weights[:, even[:, None], odd] = given / received[:, None]
    order = sizes.argsort(dim=1, descending=True, stable=True)
    return weights.gather(2, order[:, None].expand_as(weights)), sizes.gather(1, order)


def share_out(similarity: Tensor, r: int) -> Tensor:
    """Choose r sources by similarities (B, A, R) softly: return the share of each one that goes into each receiver.

    Sources are picked r times, each time by a softmax over all pairs. A source that was picked becomes less likely in
    the next pick.
    """
    best = similarity.topk(min(NUM_CANDIDATES, similarity.shape[2]), dim=-1)
    scores, shares = best.values / TEMPERATURE, torch.zeros_like(best.values)
    for _ in range(r):
        picked = (scores / TEMPERATURE).flatten(1).softmax(dim=-1).view_as(scores)
        shares = shares + picked
        scores = scores + (1 - picked.sum(dim=-1, keepdim=True)).clamp(min=LEAST).log()
    shares = shares / shares.sum(dim=-1, keepdim=True).detach().clamp(min=1)
    return torch.zeros_like(similarity).scatter_(2, best.indices, shares)


class DTEMReducer(Reducer):
    """Merge tokens of similar embeddings, after attention.

    While the linear layer learns, tokens are not removed but merge softly, because a hard choice has no gradient. Then
    the first `state.num_live` tokens are those that are left.
    """

    serves_every_setting = True

    def __init__(self, facts: EncoderFacts, layer: int):
        super().__init__(facts, layer)
        self.r = facts.reduction.schedule(facts.num_hidden_layers)[layer]
        self.prop_attn = facts.reduction.prop_attn
        if self.r > 0:
            self.metric = nn.Linear(facts.hidden_size, facts.reduction.embedding_size)

    def init_weights(self, attention: Any) -> None:
        """Begin with the keys that ToMe compares, averaged over the heads, then those of each head, as far as there is
        room."""
        for name, own in self.named_parameters():
            of_heads = getattr(attention.k_proj, name.removeprefix("metric."))
            if of_heads is None or getattr(own, "_is_hf_initialized", False):
                continue  # keys without a bias, or loaded: the keys beside it may then be quantised
            mean = of_heads.unflatten(0, (-1, attention.head_dim)).float().mean(dim=0)
            rows = torch.cat([mean.to(own.dtype), of_heads.to(own.dtype)])[: len(own)]
            init.copy_(own, torch.cat([rows, own[len(rows) :]]))

    def after_attention(self, view: AttentionView, state: TokenState) -> TokenState:
        present, prefix = state.num_live, state.num_prefix_tokens
        r = min(self.r, present // 2)
        if r == 0:
            return state
        embeddings = self.metric(view.hidden_states[:, prefix:].detach()).float()
        # LoRA freezes the weight, and adds parameters that learn.
        learns = self.training and any(parameter.requires_grad for parameter in self.metric.parameters())
        if learns or state.live is not None:  # another layer may be frozen
            size = sizes_of(state.size, embeddings)
            return mix(state, *merge_softly(embeddings, size, present, r, prefix), num_live=present - r)
        return apply_map(state, match_most_similar(embeddings, state.size, r, prefix))
