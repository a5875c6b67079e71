"""The description of representation shift."""

from ..modeling.shift import ShiftConfig
from .method import Method, by_keep_rate


SHIFT = Method(
    ShiftConfig,
    title="Shift",
    family="pruning",
    summary=(
        "Some layers keep only the patch tokens that their MLP has moved furthest. This needs neither a class token "
        "nor an attention map."
    ),
    paper="Representation Shift: Unifying Token Compression with FlashAttention",
    arxiv="2508.00367",
    details=(
        "The score of a token is the length of the vector that the layer's MLP adds to it. A share `keep_rate` of the "
        "patch tokens present, rounded up, goes on to the next layer. The others are dropped."
    ),
    limits=(
        "The layer that scores is computed for all tokens, so the saving begins with the next layer. Without training "
        "the method is weak: on ImageNet's DeiT-Tiny and ViT-Tiny it loses more accuracy than Top-K."
    ),
    ours="the layers; equal scores are ordered by index",
    at_share=by_keep_rate(ShiftConfig, 3, 6, 9),
    keep_rate_may_change=True,
)
