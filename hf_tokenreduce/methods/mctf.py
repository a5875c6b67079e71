"""The description of MCTF."""

from ..modeling.mctf import MCTFConfig
from .method import Method


MCTF = Method(
    MCTFConfig,
    title="MCTF",
    family="merging",
    summary=(
        "In every layer tokens merge that are similar, receive little attention and stand for few patches. They merge "
        "from one half of the tokens into the other, then the other way."
    ),
    paper="Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers",
    arxiv="2403.10030",
    details=(
        "The tokens are split by their places into two halves. The weight of a pair is the cosine of its keys, scaled "
        "to lie between 0 and 1, times two criteria for each of both tokens: how little attention it receives from "
        "all tokens, and how few patches it stands for. Half of the `r` tokens merge from the first half into the "
        "second, then the others from the second half into the first. The new token is the mean, weighted by "
        "attention received times size."
    ),
    limits=(
        "A layer merges at most half of the patch tokens that are present. It must know how much attention each token "
        "receives. On a CPU, and in float32, this takes the attention map of every layer that merges, so its "
        "attention is slower than that of most other methods."
    ),
    ours=(
        "it acts after the attention whose map it reads, while the authors reduce the tokens that enter the layer; "
        "the second step compares tokens as they were before the first; attention proportional to size"
    ),
    at_share=MCTFConfig.for_budget,
    key_settings=("r",),
)
