"""`reduce_tokens` and `restore`: a loaded model with other classes around the same weights."""

from typing import Any

import torch
from torch import nn
from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    PreTrainedConfig,
    PreTrainedModel,
    ViTForImageClassification,
    ViTModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from .modeling.configuration_base import ReductionConfig
from .modeling.configuration_methods import parse_reduction
from .modeling.modeling_tokenreduce_deit import (
    TokenReduceDeiTForImageClassification,
    TokenReduceDeiTForImageClassificationWithTeacher,
    TokenReduceDeiTModel,
)
from .modeling.modeling_tokenreduce_vit import TokenReduceViTForImageClassification, TokenReduceViTModel


# stock class -> reduced class
PAIRS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    ViTModel: TokenReduceViTModel,
    ViTForImageClassification: TokenReduceViTForImageClassification,
    DeiTModel: TokenReduceDeiTModel,
    DeiTForImageClassification: TokenReduceDeiTForImageClassification,
    DeiTForImageClassificationWithTeacher: TokenReduceDeiTForImageClassificationWithTeacher,
}


def reduce_tokens(model: PreTrainedModel, reduction: ReductionConfig | dict[str, Any] | None) -> PreTrainedModel:
    """A model that computes what `model` does on fewer tokens.

    Takes a ViT or DeiT of transformers, or one that is reduced already (then the method is swapped), and a method
    configuration such as `ToMeConfig(r=13)` or its dictionary form. The result shares the weights of `model`, which
    stays usable and as it was; dtype, device and train or eval mode are kept. Learned parts of a method are shared
    if `reduction` is what the model runs already; else they start untrained.
    """
    for stock_class, reduced_class in PAIRS.items():
        is_reduced = _is_ours(model, reduced_class)
        if is_reduced or type(model) is stock_class:
            if getattr(model, "_hf_peft_config_loaded", False):
                raise ValueError("This model holds an adapter (add_adapter), which would be lost. Merge it first.")
            reduced = _around_the_weights_of(model, reduced_class)
            reduced.set_reduction(reduction)
            if is_reduced and reduced.config.reduction == parse_reduction(model.config.reduction):
                for ours, theirs in zip(reduced.base_model.layers, model.base_model.layers, strict=True):
                    ours.reducer = theirs.reducer
            return reduced
    raise ValueError(
        f"reduce_tokens cannot reduce a {type(model).__name__}. It takes one of "
        f"{', '.join(stock_class.__name__ for stock_class in PAIRS)}, or a model that is reduced already; of a "
        "wrapped model (PEFT, compiled, parallel), pass the model inside."
    )


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """The stock transformers model with the weights of a reduced one. Learned parts of the method stay behind."""
    for stock_class, reduced_class in PAIRS.items():
        if _is_ours(model, reduced_class):
            return _around_the_weights_of(model, stock_class)
    raise ValueError(
        f"restore takes a model made by reduce_tokens or a TokenReduce... class, got a {type(model).__name__}."
    )


def _is_ours(model: Any, reduced_class: type[PreTrainedModel]) -> bool:
    # Exactly this class: a subclass may compute something else. One loaded from a repository is our class by another
    # module, so there the name decides.
    theirs = type(model)
    return theirs is reduced_class or (
        theirs.__name__ == reduced_class.__name__ and theirs.__module__.startswith("transformers_modules.")
    )


def _convert_config(config: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    values = config.to_dict()
    for name in ("model_type", "transformers_version", "reduction", "auto_map"):
        values.pop(name, None)
    converted = config_class(**values)
    converted._attn_implementation = config._attn_implementation
    converted.name_or_path = config.name_or_path
    return converted


def _around_the_weights_of(model: PreTrainedModel, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    config = _convert_config(model.config, model_class.config_class)
    config.architectures = [model_class.__name__]
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
