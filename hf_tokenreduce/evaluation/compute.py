"""Multiply-adds, which is what papers call FLOPs."""

from torch import Tensor
from transformers import PreTrainedConfig


def encoder_multiply_adds(config: PreTrainedConfig, token_counts: Tensor, num_tokens: int) -> Tensor:
    """Multiply-adds of the encoder's layers for each image: (B,) float64.

    token_counts: long (B, L), the tokens that leave each layer, as a reduced model returns them
    num_tokens: tokens that enter the first layer, prefix tokens included

    Counts the linear layers and attention, as papers do: neither norms, activations, embedding and head, nor what a
    method itself computes. A method that samples inside attention (ATS) saves its queries and output rows too.
    """
    width, inner = config.hidden_size, config.intermediate_size
    leaving = token_counts.double()
    entering = leaving.roll(1, dims=1)
    entering[:, 0] = num_tokens
    reduction = getattr(config, "reduction", None)
    queries = leaving if reduction is not None and reduction.method == "ats" else entering
    attention = 2 * (entering + queries) * width**2 + 2 * queries * entering * width
    return (attention + 2 * leaving * width * inner).sum(dim=1)
