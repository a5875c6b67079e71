"""The description of DiffRate."""

from collections.abc import Sequence
from typing import Any

from ..modeling.configuration_base import ReductionConfig
from ..modeling.diffrate import DiffRateConfig
from ..modeling.encoders import EncoderFacts
from .method import Method, spread_layers


def at_share(
    facts: EncoderFacts, share: float, *, layers: Sequence[int] | None = None, **settings: Any
) -> ReductionConfig:
    """Make the setting for a share, by default from the third of twelve layers on.

    The attention of the class token says little in the layers before.
    """
    layers = spread_layers(facts, *range(2, 12)) if layers is None else layers
    return DiffRateConfig.for_budget(facts, share, layers=layers, **settings)


DIFFRATE = Method(
    DiffRateConfig,
    title="DiffRate",
    family="pruning and merging",
    summary=(
        "In every layer the tokens that the class token attends to least are dropped, and each of the next ones "
        "merges into the remaining token that is most like it. Every layer has its own numbers of dropped and merged "
        "tokens."
    ),
    paper="DiffRate: Differentiable Compression Rate for Efficient Vision Transformers",
    arxiv="2305.17997",
    details=(
        "A layer removes the `r` patch tokens of the lowest class attention. The lowest of these, a share "
        "`prune_share`, are dropped. Each of the others merges into the remaining token whose hidden state is most "
        "like its own, by cosine. The new token is their plain mean. Attention adds the logarithm of a token's size "
        "to its logits (`prop_attn`). The authors learn the two numbers of each layer with labels. Here they are the "
        "settings `r` and `prune_share`, each one number or a list with one number per layer. For a share of the "
        "multiply-adds, every layer from the third of twelve on removes the same number."
    ),
    limits=(
        "A layer removes at most half of the patch tokens that are present. In an encoder without a class token "
        "(SigLIP, I-JEPA), the attention of the mean of all tokens gives the scores, which is our own decision."
    ),
    ours=(
        "the numbers of each layer, which the authors learn with labels: the first layers remove nothing, and a fifth "
        "of the removed tokens is dropped (chosen on photographs); equal scores are ordered by index"
    ),
    at_share=at_share,
    key_settings=("r",),
)
