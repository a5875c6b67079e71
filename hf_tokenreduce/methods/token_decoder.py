"""The token decoder of SiT: it turns slim tokens into one token per patch again, to compare them with a teacher's.

Only training by distillation needs it. Published models do not contain it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..modeling.encoders import encoder_of, facts_of
from ..modeling.sit import SiTConfig


class ReverseSlimming(nn.Module):
    """The token decoder of one layer: K slim tokens -> N tokens, (B, K, D) -> (B, N, D).

    A first network mixes the tokens, K -> 4N -> N, without a shortcut. A second one mixes the features, D -> 4D -> D,
    with a shortcut.

    Args:
        num_slim: Number of slim tokens, K.
        num_tokens: Number of patches, N.
        hidden_size: Number of features, D.
    """

    def __init__(self, num_slim: int, num_tokens: int, hidden_size: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.token_fc1 = nn.Linear(num_slim, 4 * num_tokens)
        self.token_fc2 = nn.Linear(4 * num_tokens, num_tokens)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-5)
        self.feature_fc1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.feature_fc2 = nn.Linear(4 * hidden_size, hidden_size)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, slim: Tensor) -> Tensor:
        slim = slim.to(self.norm1.weight.dtype)  # the model may have a half type, this network learns in float32
        along_tokens = self.norm1(slim).transpose(1, 2)
        tokens = self.token_fc2(F.gelu(self.token_fc1(along_tokens))).transpose(1, 2)
        return tokens + self.feature_fc2(F.gelu(self.feature_fc1(self.norm2(tokens))))


def reverse_modules(model: PreTrainedModel) -> nn.ModuleDict:
    """Make the token decoders of a SiT model: a `ReverseSlimming` for each layer from the first that slims on.

    Args:
        model: A model that SiT reduces.

    Returns:
        The token decoders, by the index of the layer as a string.
    """
    reduction = getattr(model.config, "reduction", None)
    if reduction is None or reduction.method != SiTConfig.method:
        raise ValueError(
            f"This {type(model).__name__} is not reduced by SiT, so it has no slim tokens to decode. Reduce it first: "
            "reduce_tokens(model, SiTConfig())."
        )
    facts = facts_of(model.config)
    slim, modules = facts.num_patches, nn.ModuleDict()
    for layer in range(facts.num_hidden_layers):
        slim = reduction.leaving(layer, slim, facts)
        if slim < facts.num_patches:
            modules[str(layer)] = ReverseSlimming(slim, facts.num_patches, facts.hidden_size)
    return modules.to(model.device)


def restore_hidden_states(model: PreTrainedModel, reverse: nn.ModuleDict) -> "Hooks":
    """Make the model return hidden states of all tokens in training, also for layers that return slim tokens.

    This is done by hooks, so that the token decoder runs within the model's forward. A wrapper of the model for many
    processes only watches parameters that are used there.

    Args:
        model: A model that SiT reduces.
        reverse: Its token decoders, from `reverse_modules`.

    Returns:
        The hooks. Call `remove()` on them to end this.
    """
    encoder = encoder_of(model)
    prefix = encoder.facts.num_prefix_tokens
    slim: list[Tensor] = []

    def begin(model: nn.Module, args: Any) -> None:
        slim.clear()

    def keep(layer: nn.Module, args: Any, output: Any) -> None:
        slim.append(output.hidden_states)

    def full_length(model: nn.Module, args: Any, outputs: Any) -> None:
        if model.training and outputs.hidden_states is not None:
            outputs.hidden_states = (
                outputs.hidden_states[0],
                *(
                    torch.cat([hidden[:, :prefix], reverse[str(layer)](hidden[:, prefix:]).to(hidden)], dim=1)
                    if str(layer) in reverse
                    else hidden
                    for layer, hidden in enumerate(slim)
                ),
            )

    handles = [layer.register_forward_hook(keep) for layer in encoder.layers]
    return Hooks([model.register_forward_pre_hook(begin), *handles, model.register_forward_hook(full_length)])


class Hooks:
    """Several hooks, which are removed together."""

    def __init__(self, handles: list[RemovableHandle]):
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
