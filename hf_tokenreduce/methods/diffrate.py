"""DiffRate, described."""

from collections.abc import Sequence
from typing import Any

from ..modeling.configuration_base import ReductionConfig
from ..modeling.diffrate import DiffRateConfig
from ..modeling.encoders import EncoderFacts
from .method import Method, spread_layers


def at_share(
    facts: EncoderFacts, share: float, *, layers: Sequence[int] | None = None, **settings: Any
) -> ReductionConfig:
    """By default from the third of twelve layers on: what the class token attends to before says little."""
    layers = spread_layers(facts, *range(2, 12)) if layers is None else layers
    return DiffRateConfig.for_budget(facts, share, layers=layers, **settings)


DIFFRATE = Method(
    DiffRateConfig,
    title="DiffRate",
    family="pruning and merging",
    summary=(
        "In every layer the tokens that the class token attends to least are dropped, and the next ones merge into "
        "what is most like them among the others. How many of both is a number for each layer."
    ),
    paper="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
    arxiv="2305.17997",
    details=(
        "Patch tokens are ordered by class attention. Of the `r` that go, the share `prune_share` that comes last is "
        "dropped, and each of the others goes into the remaining token whose hidden state is most like its own, by "
        "cosine. The new token is their plain mean. Attention adds the logarithm of a token's size to its logits "
        "(`prop_attn`). The authors learn the two numbers of each layer with labels; here they are settings, `r` and "
        "`prune_share`, each one number or a list with one per layer. For a share of the multiply-adds the same "
        "number goes in every layer from the third of twelve on."
    ),
    limits=(
        "A layer removes at most half of the patch tokens that are present. An encoder without a class token is "
        "scored by the attention of the mean token, which is our own way."
    ),
    ours=(
        "the numbers of each layer, which the authors learn with labels: the first layers remove nothing, a fifth of "
        "what goes is dropped (chosen on photographs); equal scores go by index"
    ),
    at_share=at_share,
    key_settings=("r",),
)
