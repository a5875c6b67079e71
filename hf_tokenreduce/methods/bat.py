"""BAT, described."""

from ..modeling.bat import BATConfig
from .method import FINE_TUNE, QUICK_FINE_TUNE, Method, by_keep_rate


BAT = Method(
    BATConfig,
    title="BAT",
    family="clustering and merging",
    summary=(
        "In some layers the tokens that the class token attends to little are clustered, and among those that it "
        "attends to much the most similar are fused. So what is kept is both important and diverse."
    ),
    paper="Beyond Attentive Tokens: Incorporating Token Importance and Diversity for Efficient Vision Transformers",
    arxiv="2211.11315",
    details=(
        "Tokens that the class token attends to little are clustered by density peaks. Tokens that it attends to "
        "much are kept, except that the most alike among them are fused. `cluster_share` and `fuse_share` say how "
        "the kept share is split; they were chosen on photographs, and the table is in "
        "[model_cards/sweeps](../../model_cards/sweeps)."
    ),
    limits="It computes distances between all tokens of a layer, which costs more time than its multiply-adds show.",
    ours=(
        "no code was published: how what is kept is split (chosen on photographs), how merged tokens are weighted, "
        "their size in attention, distances in the density"
    ),
    at_share=by_keep_rate(BATConfig, 3, 6, 9),
    recipes={
        "paper": {
            **FINE_TUNE,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr": 2e-6},
        },
        "quick": QUICK_FINE_TUNE,
    },
    paper_recipe=(
        "From the training logs of its authors: epochs, batch, learning rate with its end at 2e-6, weight "
        "decay, no warm-up."
    ),
    keep_rate_may_change=True,
    tuned_settings={"cluster_share": (0.0, 0.15, 0.5), "fuse_share": (0.5, 0.8), "prop_attn": (False,)},
)
