"""The description of EViT."""

from ..modeling.evit import EViTConfig
from .method import FINE_TUNE, QUICK_FINE_TUNE, Method, by_keep_rate
from .topk import KEPT, LIMITS


EVIT = Method(
    EViTConfig,
    title="EViT",
    family="pruning",
    summary=(
        "In some layers the patch tokens that the class token attends to least are removed. Their sum, weighted by "
        "that attention, stays as one token."
    ),
    paper="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
    arxiv="2202.07800",
    details=KEPT + "The other tokens become one extra token: their sum, weighted by attention.",
    limits=LIMITS,
    ours="equal scores are ordered by index",
    at_share=by_keep_rate(EViTConfig, 3, 6, 9),
    recipes={"paper": {**FINE_TUNE, "keep_rate_warmup": 0.3}, "quick": QUICK_FINE_TUNE},
    paper_recipe=(
        "The schedule is that of the authors' fine-tuning of DeiT. Our own decision is the share of the steps over "
        "which the keep rate falls (`keep_rate_warmup`)."
    ),
    keep_rate_may_change=True,
    gathers_the_rest=lambda config: config.fuse,
)
