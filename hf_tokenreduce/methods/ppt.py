"""The description of PPT."""

from typing import Any

from ..modeling.configuration_base import ReductionConfig
from ..modeling.encoders import EncoderFacts
from ..modeling.ppt import PPTConfig
from .method import Method, spread_layers


def at_share(facts: EncoderFacts, share: float, **settings: Any) -> ReductionConfig:
    return PPTConfig.for_budget(facts, share, **{"layers": spread_layers(facts, 3, 6, 9), **settings})


PPT = Method(
    PPTConfig,
    title="PPT",
    family="pruning or merging",
    summary=(
        "In some layers each image either drops its least important tokens or merges its most similar ones, the same "
        "number either way. An image merges if no token is much more important than the others."
    ),
    paper="PPT: Token Pruning and Pooling for Efficient Vision Transformers",
    arxiv="2310.01812",
    details=(
        "The score of a patch token is the attention of the class token to it times the length of its value, divided "
        "by the sum over all patch tokens. If the variance of an image's scores is below `threshold`, its `r` most "
        "similar pairs merge, as in ToMe. Otherwise its `r` tokens of the lowest scores are dropped. All images keep "
        "the same number of tokens."
    ),
    limits=(
        "A layer removes at most half of the patch tokens that are present. It computes both ways for every image. "
        "In an encoder without a class token (SigLIP, I-JEPA), the attention of the mean of all tokens gives the "
        "scores, which is our own decision."
    ),
    ours="scores are shares of the sum over the patch tokens; equal scores are ordered by index",
    at_share=at_share,
    key_settings=("r",),
    shown_settings=("r", "prop_attn", "threshold"),
)
