"""`reduce_tokens` and `restore`: a loaded model with other classes around the same weights."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from .modeling.configuration_tokenreduce import ReductionConfig, TokenReduceDeiTConfig, TokenReduceViTConfig
from .modeling.modeling_tokenreduce_deit import (
    TokenReduceDeiTForImageClassification,
    TokenReduceDeiTForImageClassificationWithTeacher,
    TokenReduceDeiTModel,
)
from .modeling.modeling_tokenreduce_vit import TokenReduceViTForImageClassification, TokenReduceViTModel


class Pair(NamedTuple):
    stock: type[PreTrainedModel]
    stock_config: type[PreTrainedConfig]
    reduced: type[PreTrainedModel]
    reduced_config: type[PreTrainedConfig]


PAIRS = [
    Pair(ViTModel, ViTConfig, TokenReduceViTModel, TokenReduceViTConfig),
    Pair(ViTForImageClassification, ViTConfig, TokenReduceViTForImageClassification, TokenReduceViTConfig),
    Pair(DeiTModel, DeiTConfig, TokenReduceDeiTModel, TokenReduceDeiTConfig),
    Pair(DeiTForImageClassification, DeiTConfig, TokenReduceDeiTForImageClassification, TokenReduceDeiTConfig),
    Pair(
        DeiTForImageClassificationWithTeacher,
        DeiTConfig,
        TokenReduceDeiTForImageClassificationWithTeacher,
        TokenReduceDeiTConfig,
    ),
]


def reduce_tokens(model: PreTrainedModel, reduction: ReductionConfig | dict[str, Any] | None) -> PreTrainedModel:
    """A model that computes what `model` does on fewer tokens.

    Takes a ViT or DeiT of transformers, or one that is reduced already (then the method is swapped), and a method
    configuration such as `ToMeConfig(r=13)` or its dictionary form. The result shares the weights of `model`, which
    stays usable and as it was; dtype, device and train or eval mode are kept.
    """
    for pair in PAIRS:
        if _is_a(model, pair.stock) or _is_a(model, pair.reduced):
            config = _convert_config(model.config, pair.reduced_config)
            config.reduction = reduction
            reduced = _around_the_weights_of(model, pair.reduced, config)
            reduced.set_reduction(reduction)
            return reduced
    raise ValueError(
        f"reduce_tokens cannot reduce a {type(model).__name__}. It takes one of "
        f"{', '.join(pair.stock.__name__ for pair in PAIRS)}, or a model that is reduced already; of a wrapped model "
        "(PEFT, compiled, parallel), pass the model inside."
    )


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """The stock transformers model with the weights of a reduced one. Learned parts of the method stay behind."""
    for pair in PAIRS:
        if _is_a(model, pair.reduced):
            return _around_the_weights_of(model, pair.stock, _convert_config(model.config, pair.stock_config))
    raise ValueError(
        f"restore takes a model made by reduce_tokens or a TokenReduce... class, got a {type(model).__name__}."
    )


def _is_a(model: Any, model_class: type[PreTrainedModel]) -> bool:
    # Exactly this class: a subclass may compute something else. One loaded from a repository is our class by another
    # module, so there the name decides.
    theirs = type(model)
    return theirs is model_class or (
        theirs.__name__ == model_class.__name__ and theirs.__module__.startswith("transformers_modules.")
    )


def _convert_config(config: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    values = config.to_dict()
    for name in ("model_type", "transformers_version", "reduction", "auto_map"):
        values.pop(name, None)
    converted = config_class(**values)
    converted._attn_implementation = config._attn_implementation
    converted.name_or_path = config.name_or_path
    return converted


def _around_the_weights_of(model: PreTrainedModel, model_class: type, config: PreTrainedConfig) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if model.base_model is model:
        options["add_pooling_layer"] = model.pooler is not None
    with torch.device("meta"):
        shell = model_class(config, **options)
    _adopt(shell, model)
    return shell


def _adopt(shell: nn.Module, model: nn.Module) -> None:
    """Give `shell` the submodules of `model`, down to those that both kinds of model have in common."""
    shell.training = model.training
    if isinstance(shell, GradientCheckpointingLayer) and model.gradient_checkpointing:
        shell.gradient_checkpointing = True
        shell._gradient_checkpointing_func = model._gradient_checkpointing_func
    for name, child in shell.named_children():
        if name == "reducer":
            continue
        if name == "attention" or isinstance(child, (PreTrainedModel, nn.ModuleList, GradientCheckpointingLayer)):
            _adopt(child, getattr(model, name))
        else:
            setattr(shell, name, getattr(model, name))
