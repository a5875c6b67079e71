"""The description of PiToMe."""

from ..modeling.pitome import PiToMeConfig
from .method import Method


PITOME = Method(
    PiToMeConfig,
    title="PiToMe",
    family="merging",
    summary=(
        "In every layer the most similar pairs of tokens merge into their mean, as in ToMe. But an energy decides "
        "which tokens merge: it is high for tokens that have many others like them. Tokens of low energy are "
        "protected."
    ),
    paper="Accelerating Transformers with Spectrum-Preserving Token Merging",
    arxiv="2405.16148",
    details=(
        "The energy of a token is the mean of ELU(cosine - margin) over its cosines with all patch tokens. The "
        "cosines compare keys, averaged over the heads. Sorted by falling energy, tokens are sources and receivers in "
        "turn. In the first half of the layers, the `r` sources that are most like a receiver merge into it. In the "
        "second half, only the `2r` tokens of the highest energy take part, and all their sources merge; all other "
        "tokens are protected. Attention adds the logarithm of a token's size to its logits (`prop_attn`)."
    ),
    limits=(
        "A layer merges at most half of the patch tokens that are present. It compares every token with every other, "
        "which takes four to five times as many products as in ToMe."
    ),
    ours="a number of tokens per layer instead of a rate; equal energies and similarities are ordered by index",
    at_share=PiToMeConfig.for_budget,
    key_settings=("r",),
)
