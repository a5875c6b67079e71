"""PiToMe, described."""

from ..modeling.pitome import PiToMeConfig
from .method import Method


PITOME = Method(
    PiToMeConfig,
    title="PiToMe",
    family="merging",
    summary=(
        "In every layer the most similar pairs of tokens are merged into their mean, as ToMe does. But who merges is "
        "decided by energy, which is high for tokens that have many others like them; tokens that stand alone are "
        "protected."
    ),
    paper="Accelerating Transformers with Spectrum-Preserving Token Merging",
    arxiv="2405.16148",
    details=(
        "The energy of a token is the mean of ELU(cosine - margin) over its cosines with all patch tokens, by the "
        "mean of their keys over the heads. By falling energy the tokens are dealt into sources and receivers in "
        "turn. In the first half of the layers the `r` sources that are most like a receiver merge. In the second "
        "half only the `2r` tokens of highest energy are dealt, and all their sources merge; all others are "
        "protected. Attention adds the logarithm of a token's size to its logits (`prop_attn`)."
    ),
    limits=(
        "A layer merges at most half of the patch tokens that are present. It compares all tokens with all, twice as "
        "much as ToMe and more."
    ),
    ours="a number of tokens per layer and no rate; equal energies and similarities go by index",
    at_share=PiToMeConfig.for_budget,
    key_settings=("r",),
)
