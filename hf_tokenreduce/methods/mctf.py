"""MCTF, described."""

from ..modeling.mctf import MCTFConfig
from .method import Method


MCTF = Method(
    MCTFConfig,
    title="MCTF",
    family="merging",
    summary=(
        "In every layer tokens merge that are similar, receive little attention and stand for few patches, both ways "
        "between two halves of the tokens."
    ),
    paper="Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers",
    arxiv="2403.10030",
    details=(
        "The weight of a pair is the cosine of its keys, moved to between 0 and 1, times two criteria for each of "
        "both: how little attention it receives from all tokens, and for how few patches it stands. Half of the `r` "
        "tokens go from the first half of the tokens into the second, then the other half the other way. The new "
        "token is their mean, weighted by attention received times size."
    ),
    limits=(
        "A layer merges at most half of the patch tokens that are present. It needs the attention map of every layer "
        "that merges, so its attention is slower than that of the other methods."
    ),
    ours=(
        "it acts after the attention whose map it reads, where the authors reduce what enters the layer; the second "
        "way compares tokens as they were before the first; attention proportional to size"
    ),
    at_share=MCTFConfig.for_budget,
    key_settings=("r",),
)
