"""The description of DTEM."""

from ..modeling.dtem import DTEMConfig
from .method import FINE_TUNE, QUICK_FINE_TUNE, Method


DTEM = Method(
    DTEMConfig,
    title="DTEM",
    family="merging",
    summary=(
        "In every layer the most similar pairs of tokens merge into their mean, as in ToMe. But the similarity is that "
        "of embeddings, which a small linear layer learns only to decide what merges."
    ),
    paper="Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers",
    arxiv="2412.10569",
    details=(
        "Each layer that merges has a linear layer of its own, with `embedding_size` outputs. It reads what the "
        "attention reads, the normed tokens. ToMe's matching then uses the cosines of its outputs instead of those of "
        "the keys. Training learns these linear layers, and the backbone stays as it is, unless `freeze_backbone` is "
        "False. In training all tokens stay, and merging is soft: a source gives each of its three most similar "
        "receivers a share of itself, and tokens count in attention by what is left of them. The shares are those of "
        "`r` picks by a softmax over all pairs. The next layer merges the largest of the tokens. In eval mode tokens "
        "merge and are gone, as in ToMe."
    ),
    limits=(
        "A layer merges at most half of the patch tokens that are present. Before training it merges what ToMe merges, "
        "at a higher price. Training takes the time and memory of a dense model, and more. Linear layers learn only if "
        "their gradients are on, and the last layer's does not learn if the model reads only prefix tokens."
    ),
    ours=(
        "the linear layers begin with the keys, averaged over the heads; equal similarities are ordered by index; the "
        "schedule of the training"
    ),
    at_share=DTEMConfig.for_budget,
    key_settings=("r",),
    tuned_settings=None,
    recipes={
        "paper": {**FINE_TUNE, "freeze_backbone": True, "learning_rate": 1e-3},
        "quick": {**QUICK_FINE_TUNE, "freeze_backbone": True, "learning_rate": 1e-3},
    },
    paper_recipe=(
        "The paper freezes the backbone. All other values are our own decision: those of the other methods, with a "
        "higher learning rate, because only new layers learn."
    ),
)
