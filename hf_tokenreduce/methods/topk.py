"""The description of Top-K."""

from ..modeling.topk import TopKConfig
from .method import Method, by_keep_rate


KEPT = (
    "Each of `layers` keeps the patch tokens that the class token attends to most: a share `keep_rate` of those "
    "present, rounded up. "
)
LIMITS = (
    "In an encoder without a class token (SigLIP, I-JEPA), the attention of the mean of all tokens gives the scores, "
    "which is our own decision."
)

TOPK = Method(
    TopKConfig,
    title="Top-K",
    family="pruning",
    summary=(
        "Some layers keep only the patch tokens that the class token attends to most. The others are dropped, without "
        "the fused token of EViT."
    ),
    details=KEPT + "The others are dropped.",
    limits=LIMITS,
    ours="EViT without its fused token",
    at_share=by_keep_rate(TopKConfig, 3, 6, 9),
    keep_rate_may_change=True,
)
