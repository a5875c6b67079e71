"""ToMe, described."""

from ..modeling.tome import ToMeConfig
from .method import Method


TOME = Method(
    ToMeConfig,
    title="ToMe",
    family="merging",
    summary=(
        "In every layer, between attention and MLP, the most similar pairs of tokens are merged into their mean. A "
        "token that stands for several patches counts as that many in attention."
    ),
    paper="Token Merging: Your ViT But Faster",
    arxiv="2210.09461",
    ours="equal similarities go by index; sums in float32; the steps of a sloped schedule are exact",
    at_share=ToMeConfig.for_budget,
    key_settings=("r",),
)
