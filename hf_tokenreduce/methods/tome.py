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
    details=(
        "Between attention and MLP, the patch tokens are split by their places into two halves. Each token of the "
        "first half finds the most similar token of the second half, by the mean of its keys over the heads. The "
        "`r` most similar pairs become one token each, which is their mean weighted by how many patches they hold. "
        "Attention adds the logarithm of that number to its logits (`prop_attn`)."
    ),
    limits="A layer merges at most half of the patch tokens that are present.",
    ours="equal similarities go by index; sums in float32; the steps of a sloped schedule are exact",
    at_share=ToMeConfig.for_budget,
    key_settings=("r",),
    tuned_settings={"prop_attn": (False,)},
)
