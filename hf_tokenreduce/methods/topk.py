"""Top-K, described."""

from ..modeling.topk import TopKConfig
from .method import Method, by_keep_rate


KEPT = (
    "In each of `layers` the patch tokens that the class token attends to most are kept: a share `keep_rate` of those "
    "present, rounded up. "
)
LIMITS = "An encoder without a class token is scored by the attention of the mean token, which is our own way."

TOPK = Method(
    TopKConfig,
    title="Top-K",
    family="pruning",
    summary=(
        "In some layers only the patch tokens stay that the class token attends to most. The others are dropped, "
        "without the fused token of EViT."
    ),
    details=KEPT + "The others are dropped.",
    limits=LIMITS,
    ours="EViT without its fused token",
    at_share=by_keep_rate(TopKConfig, 3, 6, 9),
    keep_rate_may_change=True,
)
