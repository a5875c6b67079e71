"""`reduce_tokens` and `restore`: a loaded model with other classes around the same weights."""

from copy import copy as shallow_copy
from copy import deepcopy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .modeling.configuration_base import ReductionConfig
from .modeling.encoders import MODELS, PREFIX, encoder_of, fixed_fields, what_can_be_reduced
from .modeling.modeling_tokenreduce import reduced_model_class


logger = logging.get_logger(__name__)


def reduce_tokens(
    model: PreTrainedModel,
    reduction: ReductionConfig | dict[str, Any] | str | type[ReductionConfig] | None,
    *,
    share: float | None = None,
    images: Any = None,
    image_processor: Any = None,
    copy: bool = False,
    **settings: Any,
) -> PreTrainedModel:
    """Make a model that computes what `model` does on fewer tokens.

    The result shares the parameters of `model`, which stays usable and as it was; dtype, device and train or eval mode
    are kept, and the result has a mode of its own. What changes a parameter in place, such as training or
    `.to(torch.bfloat16)`, changes it in both, unless `copy=True`. Learned parts of a method are shared if `reduction`
    is what the model runs already; else they start untrained.

    Args:
        model (`PreTrainedModel`): A model of transformers whose vision encoder can be reduced, such as a
            `ViTForImageClassification`, a `CLIPModel` or a `Dinov2Model`, or one that is reduced already: then the
            method is swapped.
        reduction: A method configuration such as `ToMeConfig(r=13)`, its dictionary form, or None. Or a method by its
            name or configuration class, `"tome"` or `ToMeConfig`, with `share` and `settings`.
        share (`float`, *optional*): The share of the encoder's multiply-adds to keep.
        images (`Tensor`, `str` or `Path`, *optional*): Unlabelled images for methods that need them to be fitted to a
            share: pixel values, or a folder.
        image_processor: The model's, for a folder.
        copy (`bool`): Give the result parameters of its own.
        settings: Further fields of the method's configuration.

    Returns:
        `PreTrainedModel`, a `TokenReduce...` class of the same kind.

    Example:
        >>> model = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224")
        >>> reduced = reduce_tokens(model, ToMeConfig(r=13))
        >>> reduced = reduce_tokens(model, "bat", share=0.65)
        >>> reduced = reduce_tokens(model, LTMPConfig, share=0.65, images="photos", image_processor=processor)
    """
    if copy and stock_name(model) is not None:
        model = deepcopy(model)
    by_name = isinstance(reduction, (str, type))
    if not by_name and (share is not None or settings or images is not None or image_processor is not None):
        given = [*(["share"] if share is not None else []), *settings, *(["images"] if images is not None else [])]
        raise ValueError(
            f"{', '.join(given) or 'image_processor'} goes with a method's name or configuration class, such as "
            f'reduce_tokens(model, "tome", share=0.65), not with {reduction!r}, which is set already.'
        )
    if by_name:
        from .budget import reduce_to_share

        return reduce_to_share(model, reduction, share, images, image_processor, settings)
    reduced = with_reduction(model, reduction)
    untrained = None if reduced.config.reduction is None else reduced.config.reduction.untrained()
    if untrained is not None and not _runs(model, reduced.config.reduction):
        logger.warning_once(untrained)
    return reduced


def with_reduction(model: PreTrainedModel, reduction: Any) -> PreTrainedModel:
    """`reduce_tokens` by a setting, for callers that let the method learn what it needs themselves."""
    name = stock_name(model)
    if name is None:
        raise ValueError(
            f"reduce_tokens cannot reduce a {type(model).__name__}. {what_can_be_reduced()} Of a wrapped model (PEFT, "
            "compiled, parallel), pass the model inside."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("This model holds an adapter (add_adapter), which would be lost. Merge it first.")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"This {name} is quantised, so its layers are no longer those that are reduced. Reduce it first, save it, "
            "then load the folder with quantization_config."
        )
    reduced = _around_the_weights_of(model, reduced_model_class(getattr(transformers, name)))
    reduced._set_reduction(reduction)
    if _runs(model, reduced.config.reduction):
        for ours, theirs in zip(encoder_of(reduced).layers, encoder_of(model).layers, strict=True):
            ours.reducer = theirs.reducer
    return reduced


def _runs(model: PreTrainedModel, reduction: ReductionConfig | None) -> bool:
    """Whether a model is reduced by this very setting, whatever copy of its class either is of."""
    if type(model).__name__ == stock_name(model):
        return False
    ours, theirs = (None if one is None else one.to_dict() for one in (reduction, model.config.reduction))
    return ours == theirs


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Make the stock transformers model with the weights of a reduced one.

    Args:
        model (`PreTrainedModel`): A model made by `reduce_tokens`, or loaded as a `TokenReduce...` class.

    Returns:
        `PreTrainedModel` of transformers. Learned parts of the method stay behind.

    Example:
        >>> dense = restore(reduce_tokens(model, ToMeConfig(r=13)))
    """
    name = stock_name(model)
    if name is None or type(model).__name__ == name:
        raise ValueError(
            f"restore takes a model made by reduce_tokens or a TokenReduce... class, got a {type(model).__name__}."
        )
    return _around_the_weights_of(model, getattr(transformers, name))


def stock_name(model: Any) -> str | None:
    """The name of the stock class that this is, or reduces. None of any other model."""
    # Exactly such a class: a subclass may compute something else. One loaded from a repository is our class by another
    # module, so there the name decides.
    theirs = type(model)
    name = theirs.__name__.removeprefix(PREFIX)
    if name not in MODELS:
        return None
    stock = getattr(transformers, name)
    if theirs is stock:
        return name
    from_repository = theirs.__module__.startswith("transformers_modules.") and theirs.__name__ == PREFIX + name
    return name if from_repository or theirs is reduced_model_class(stock) else None


def _convert_config(config: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    values = config.to_dict()
    for name in (
        "model_type",
        "transformers_version",
        "hf_tokenreduce_version",
        "reduction",
        "auto_map",
        "calibrated_share",
    ):
        values.pop(name, None)
    converted = config_class(**values)
    converted._attn_implementation = _attention_kernels(config)
    converted.name_or_path = config.name_or_path
    return converted


def _attention_kernels(config: PreTrainedConfig) -> Any:
    """Return the attention kernels of the model and of its parts, which may differ."""
    kernels = {part: getattr(config, part)._attn_implementation for part in config.sub_configs}
    return {"": config._attn_implementation, **kernels} if kernels else config._attn_implementation


def _around_the_weights_of(model: PreTrainedModel, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    config = _convert_config(model.config, model_class.config_class)
    config.architectures = [model_class.__name__]
    options: dict[str, Any] = {}
    if hasattr(model, "pooler"):
        options["add_pooling_layer"] = model.pooler is not None
    with torch.device("meta"):
        shell = model_class(config, **options)
    encoder = encoder_of(model)
    containers = {id(part) for layer in encoder.layers for part in (layer, encoder.attention(layer))}
    if encoder.tower.norm is not None:
        containers.add(id(encoder.module.get_submodule(encoder.tower.norm)))
    if fixed_fields(encoder.config):  # which the embeddings read in their configuration
        containers.add(id(encoder.module.embeddings))
    _adopt(shell, model, containers)
    if hasattr(model, "generation_config"):
        shell.generation_config = deepcopy(model.generation_config)
    return shell


def _adopt(shell: nn.Module, model: nn.Module, containers: set[int]) -> None:
    """Give `shell` the parameters and submodules of `model`, down to the containers, of which both have their own."""
    shell.training = model.training
    shell._parameters.update(model._parameters)
    shell._buffers.update(model._buffers)
    if isinstance(shell, GradientCheckpointingLayer) and model.gradient_checkpointing:
        shell.gradient_checkpointing = True
        shell._gradient_checkpointing_func = model._gradient_checkpointing_func
    for name, child in shell.named_children():
        if name == "reducer":
            continue
        theirs = getattr(model, name)
        if any(id(part) in containers for part in theirs.modules()):
            _adopt(child, theirs, containers)
        else:
            setattr(shell, name, _own_modules(theirs))


def _own_modules(module: nn.Module) -> nn.Module:
    """A copy of a module and of those inside it that shares parameters and buffers, but not the train or eval mode."""
    own = shallow_copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # of parameters, of buffers, of hooks
            own.__dict__[name] = value.copy()
    own._modules = {name: child and _own_modules(child) for name, child in module._modules.items()}
    return own
