"""Representation shift, described."""

from ..modeling.shift import ShiftConfig
from .method import Method, by_keep_rate


SHIFT = Method(
    ShiftConfig,
    title="Shift",
    family="pruning",
    summary=(
        "After some layers only the patch tokens stay that the layer's MLP has moved furthest. It needs neither a "
        "class token nor an attention map."
    ),
    paper="Representation Shift: Unifying Token Compression with FlashAttention",
    arxiv="2508.00367",
    details=(
        "The score of a token is the length of what the MLP of the layer adds to it. A share `keep_rate` of the patch "
        "tokens present, rounded up, goes on to the next layer; the others are dropped."
    ),
    limits=(
        "The layer that scores is computed whole, so the saving begins with the next one. Without training it is "
        "weak: on ImageNet's DeiT-Tiny and ViT-Tiny it loses more than Top-K does."
    ),
    ours="the layers; equal scores go by index",
    at_share=by_keep_rate(ShiftConfig, 3, 6, 9),
    keep_rate_may_change=True,
)
