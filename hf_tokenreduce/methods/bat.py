"""The description of BAT."""

from ..modeling.bat import BATConfig
from .method import FINE_TUNE, QUICK_FINE_TUNE, Method, by_keep_rate


BAT = Method(
    BATConfig,
    title="BAT",
    family="clustering and merging",
    summary=(
        "In some layers the tokens that the class token attends to least are clustered, and the most similar of the "
        "other tokens are fused. So the tokens that stay are both important and diverse."
    ),
    paper="Beyond Attentive Tokens: Incorporating Token Importance and Diversity for Efficient Vision Transformers",
    arxiv="2211.11315",
    details=(
        "The tokens that the class token attends to least are clustered by density peaks, and each cluster becomes "
        "one token. The other tokens stay, except that the most similar of them are fused. `cluster_share` and "
        "`fuse_share` say how the kept tokens are split between clusters and other tokens. Their defaults were chosen "
        "on photographs; [a sweep](../../benchmarks/results/bat-sweep-deit-tiny-patch16-224.md) has the table."
    ),
    limits=(
        "It computes the distances between all tokens that it clusters, which takes more time than its multiply-adds "
        "show."
    ),
    ours=(
        "the authors published no code, so: how the kept tokens are split (chosen on photographs), how merged tokens "
        "are weighted, their size in attention, the distances in the density"
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
        "The authors' training logs give the epochs, the batch, the learning rate with its end at 2e-6, the weight "
        "decay and no warm-up."
    ),
    keep_rate_may_change=True,
    tuned_settings={"cluster_share": (0.0, 0.15, 0.5), "fuse_share": (0.5, 0.8), "prop_attn": (False,)},
)
