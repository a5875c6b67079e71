"""The description of ToMe."""

from ..modeling.tome import ToMeConfig
from .method import Method


TOME = Method(
    ToMeConfig,
    title="ToMe",
    family="merging",
    summary=(
        "In every layer, between attention and MLP, the most similar pairs of tokens merge into their mean. A token "
        "that stands for several patches counts as that many in attention."
    ),
    paper="Token Merging: Your ViT But Faster",
    arxiv="2210.09461",
    details=(
        "Between attention and MLP, the patch tokens are split by their places into two halves. For each token of the "
        "first half, the most similar token of the second half is found, by keys averaged over the heads. The `r` "
        "most similar pairs become one token each: their mean, weighted by the number of patches that each one holds. "
        "Attention adds the logarithm of that number to its logits (`prop_attn`)."
    ),
    limits="A layer merges at most half of the patch tokens that are present.",
    ours="equal similarities are ordered by index; sums in float32; with a tuple `r` the numbers of the layers are "
    "rounded down, exactly",
    at_share=ToMeConfig.for_budget,
    key_settings=("r",),
    tuned_settings={"prop_attn": (False,)},
)
