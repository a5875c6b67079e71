"""The description of DTEM."""

from ..modeling.dtem import DTEMConfig
from .method import FINE_TUNE, QUICK_FINE_TUNE, Method


DTEM = Method(
    DTEMConfig,
    title="DTEM",
    family="merging",
    summary=(
        "In every layer the most similar pairs of tokens merge into their mean, as in ToMe. But tokens are compared "
        "by embeddings of a small linear layer, which learns only what should merge."
    ),
    paper="Learning to Merge Tokens via Decoupled Embedding for Efficient Vision Transformers",
    arxiv="2412.10569",
    details=(
        "Each layer that merges has a linear layer of its own, with `embedding_size` outputs. It reads the normed "
        "tokens, as attention does. Tokens then merge as in ToMe, by the cosines of these outputs instead of keys. "
        "The recipes train only these linear layers; with `freeze_backbone` False the backbone learns too. In "
        "training all tokens stay, and merging is soft: a source gives parts of itself to its three most similar "
        "receivers, and a token counts in attention by the size that is left of it. The parts come from `r` picks, "
        "each by a softmax over all pairs. The next layer merges only the largest tokens, as many as would be left. "
        "In eval mode the tokens really merge."
    ),
    limits=(
        "A layer merges at most half of the patch tokens that are present. Before training DTEM merges about what "
        "ToMe merges, and costs a little more. Training removes no token, so it takes at least as much time and "
        "memory as that of a dense model. The linear layer of the last layer learns nothing if the model reads only "
        "prefix tokens."
    ),
    ours=(
        "the linear layers begin with the keys; equal similarities are ordered by index; the schedule of the training"
    ),
    at_share=DTEMConfig.for_budget,
    key_settings=("r",),
    tuned_settings=None,  # untrained, it is ToMe at a higher cost
    recipes={
        "paper": {**FINE_TUNE, "freeze_backbone": True, "learning_rate": 1e-3},
        "quick": {**QUICK_FINE_TUNE, "freeze_backbone": True, "learning_rate": 3e-4},
    },
    paper_recipe=(
        "The authors freeze the backbone. All other values are our own decision. They are those of the other methods, "
        "with higher learning rates, because only small new layers learn."
    ),
)
