"""`reduce_tokens` and `restore`: put other model classes around the same weights."""

from collections.abc import Iterator
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
from .modeling.hooks import take_over
from .modeling.modeling_tokenreduce import adapted, reduced_model_class


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
    """Make a reduced form of a model: the same task and the same weights, on fewer tokens.

    The result shares its parameters with `model`, and `model` stays as it was. The result has the same dtype and
    device, and begins in the same train or eval mode. If something changes a parameter in place, such as training or
    `.to(torch.bfloat16)`, the parameter changes in both models, unless `copy=True`. Learned parts of a method are
    shared if the model already runs this `reduction`. Those of DL-ViT and DTEM are shared under every setting of their
    method. Otherwise learned parts start untrained.

    Args:
        model (`PreTrainedModel`): A model of transformers whose vision encoder can be reduced, such as a
            `ViTForImageClassification`, a `CLIPModel` or a `Dinov2Model`. If it is already reduced, the result has the
            new method instead.
        reduction: A method configuration such as `ToMeConfig(r=13)`, its dictionary form, or None, which reduces
            nothing. Or a method by its name or configuration class, `"tome"` or `ToMeConfig`, with `share` and
            `settings`.
        share (`float`, *optional*): Share of the encoder's multiply-adds to keep.
        images (`Tensor`, `str` or `Path`, *optional*): Images without labels, for methods that are fitted to a share
            on images: pixel values, or a folder.
        image_processor: Image processor of the model. It is needed if `images` is a folder, and for a share of an
            encoder that takes any image size, such as DINOv2, whose configuration names another size.
        copy (`bool`): Give the result its own parameters.
        settings: Further fields of the method's configuration.

    Returns:
        `PreTrainedModel`: The reduced model. Its class is `TokenReduce` and the name of the stock class.

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
            f"{', '.join(given) or 'image_processor'} can be given with a method's name or configuration class, such "
            f'as reduce_tokens(model, "tome", share=0.65), but not with {reduction!r}, which has all its settings.'
        )
    if by_name:
        from .budget import reduce_to_share

        return reduce_to_share(model, reduction, share, images, image_processor, settings)
    reduced = with_reduction(model, reduction)
    untrained = None if reduced.config.reduction is None else reduced.config.reduction.untrained()
    known = {id(parameter) for parameter in model.parameters()}
    own = [parameter for reducer in encoder_of(reduced).reducers for parameter in reducer.parameters()]
    if untrained is not None and not any(id(parameter) in known for parameter in own):
        logger.warning(untrained)
    return reduced


def with_reduction(model: PreTrainedModel, reduction: Any) -> PreTrainedModel:
    """Reduce a model by a setting, without a warning if the method is untrained. See `reduce_tokens`."""
    name = stock_name(model)
    if name is None:
        raise ValueError(
            f"reduce_tokens cannot reduce a {type(model).__name__}. {what_can_be_reduced()} If the model is wrapped "
            "(compiled, parallel), pass the model inside. If it has an adapter of PEFT, merge it first: "
            "peft_model.merge_and_unload()."
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("This model has an adapter (add_adapter), which would be lost. Merge it first.")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"This {name} is quantised, so its layers have other classes and cannot be reduced. Reduce the model "
            "first, save it, then load the folder with quantization_config."
        )
    devices = {place for place in getattr(model, "hf_device_map", {}).values() if place not in ("cpu", "disk")}
    if len(devices) > 1:  # what moves tokens from one device to the next is on the layers, which get new classes
        raise ValueError(
            f"This {name} is spread over {len(devices)} devices by device_map. Load it on one device, and reduce it "
            "there."
        )
    reduced = _around_the_weights_of(model, reduced_model_class(getattr(transformers, name)))
    reduced._set_reduction(reduction)
    if _runs(model, reduced.config.reduction):
        for new_layer, old_layer in zip(encoder_of(reduced).layers, encoder_of(model).layers, strict=True):
            new_layer.reducer = _own_modules(old_layer.reducer)  # the same parameters, in a mode of its own
        if hasattr(model.config, "calibrated_share"):
            reduced.config.calibrated_share = model.config.calibrated_share
    elif type(model).__name__ != name:
        take_over(encoder_of(reduced).reducers, encoder_of(model).reducers)
    return reduced


def _runs(model: PreTrainedModel, reduction: ReductionConfig | None) -> bool:
    """Return whether a model is reduced by this very setting, even if it has another copy of the setting's class."""
    if type(model).__name__ == stock_name(model):
        return False
    # The reducers, because a configuration can have been changed, or be that of two models.
    built_for = encoder_of(model).reducers[0].built_for
    wanted, own = (None if one is None else one.to_dict() for one in (reduction, built_for))
    return wanted == own


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Make the stock model of transformers with the weights of a reduced model.

    The stock model of a reduced `ViTMAEModel` masks nothing: its `mask_ratio` is 0, as it was in the reduced one. Set
    `config.mask_ratio` if you want to train it by masking.

    Args:
        model (`PreTrainedModel`): A model that `reduce_tokens` made, or that was loaded as a `TokenReduce...` class.

    Returns:
        `PreTrainedModel`: The stock model. It shares its parameters with `model`, but has no learned parts of the
            method.

    Example:
        >>> dense = restore(reduce_tokens(model, ToMeConfig(r=13)))
    """
    if isinstance(model, PreTrainedModel) and adapted(model):
        raise ValueError(
            "This model has an adapter of PEFT, and the stock model could not be saved and loaded with it. Merge it "
            "first: peft_model.merge_and_unload()."
        )
    return restored(model)


def restored(model: PreTrainedModel) -> PreTrainedModel:
    """Make the stock model as `restore` does, also around an adapter of PEFT.

    It is for a model that is only run and never saved, such as a teacher.
    """
    name = stock_name(model)
    if name is None or type(model).__name__ == name:
        raise ValueError(
            f"restore takes a model that reduce_tokens made, or a TokenReduce... class, got a {type(model).__name__}."
        )
    return _around_the_weights_of(model, getattr(transformers, name))


def stock_name(model: Any) -> str | None:
    """Return the name of the stock class of a stock or reduced model. None: it is another kind of model."""
    # The class must match exactly, because a subclass may compute something else. A model that was loaded from a
    # repository has a copy of the reduced class in another module, so there the name decides.
    own = type(model)
    name = own.__name__.removeprefix(PREFIX)
    if name not in MODELS:
        return None
    stock = getattr(transformers, name)
    if own is stock:
        return name
    from_repository = own.__module__.startswith("transformers_modules.") and own.__name__ == PREFIX + name
    return name if from_repository or own is reduced_model_class(stock) else None


def _convert_config(config: PreTrainedConfig, config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """Make a configuration of another class with the same values, without the reduction."""
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


def _parts(old: PreTrainedConfig, new: PreTrainedConfig) -> Iterator[tuple[PreTrainedConfig, PreTrainedConfig]]:
    """Generate the configurations inside two configurations, side by side."""
    for name in old.sub_configs:
        one, other = getattr(old, name, None), getattr(new, name, None)
        if isinstance(one, PreTrainedConfig) and isinstance(other, PreTrainedConfig):
            yield one, other
            yield from _parts(one, other)


def _attention_kernels(config: PreTrainedConfig) -> Any:
    """Return the attention kernels of the model and of its parts, which may differ."""
    kernels = {part: getattr(config, part)._attn_implementation for part in config.sub_configs}
    return {"": config._attn_implementation, **kernels} if kernels else config._attn_implementation


def _around_the_weights_of(model: PreTrainedModel, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """Make a model of another class that shares the parameters of a model."""
    config = _convert_config(model.config, model_class.config_class)
    config.architectures = [model_class.__name__]
    options: dict[str, Any] = {}
    if hasattr(model, "pooler"):
        options["add_pooling_layer"] = model.pooler is not None
    with torch.device("meta"):
        shell = model_class(config, **options)
    # No checkpoint holds this very model. PEFT would write the name into an adapter, which would load on that one.
    shell.name_or_path = ""
    encoder = encoder_of(model)
    containers = {id(part) for layer in encoder.layers for part in (layer, encoder.attention(layer))}
    if encoder.tower.norm is not None:
        containers.add(id(encoder.module.get_submodule(encoder.tower.norm)))
    if fixed_fields(encoder.config):  # the embeddings read these fields from their configuration
        containers.add(id(encoder.module.embeddings))
    _adopt(shell, model, containers)
    own = {id(old): new for old, new in _parts(model.config, config)}
    for module in shell.modules():  # text towers and other copied modules read the configuration of the new model
        if id(getattr(module, "config", None)) in own:
            module.config = own[id(module.config)]
    if "_loss_function" in vars(model):  # the user's own
        shell.loss_function = model.loss_function
    if hasattr(model, "generation_config"):
        shell.generation_config = deepcopy(model.generation_config)
    return shell


def _adopt(shell: nn.Module, model: nn.Module, containers: set[int]) -> None:
    """Give `shell` the parameters and submodules of `model`. Containers are not shared: each model has its own."""
    hooks = (*model._forward_pre_hooks.values(), *model._forward_hooks.values(), *model._backward_hooks.values())
    if any(getattr(hook, "__name__", "") != "output_capturing_hook" for hook in hooks):  # transformers leaves its own
        logger.warning(
            f"The hooks on the {type(model).__name__} are not kept, because the new model has one of another class. "
            "Register them on the new model."
        )
    if hasattr(model, "_hf_hook") and any(parameter.is_meta for parameter in model.parameters(recurse=False)):
        # accelerate brings these parameters in when the module is called, and the new one is not known to it
        raise ValueError(
            f"The weights of a {type(model).__name__} lie on the CPU or the disk (device_map, cpu_offload), and this "
            "model could not bring them in when it is converted. Convert it on one device, save it, and load the "
            "folder with device_map."
        )
    shell.training = model.training
    shell._parameters.update(model._parameters)
    shell._buffers.update(model._buffers)
    if isinstance(shell, GradientCheckpointingLayer) and model.gradient_checkpointing:
        shell.gradient_checkpointing = True
        shell._gradient_checkpointing_func = model._gradient_checkpointing_func
    for name, child in shell.named_children():
        if name == "reducer":
            continue
        source = getattr(model, name)
        if any(id(part) in containers for part in source.modules()):
            _adopt(child, source, containers)
        else:
            setattr(shell, name, _own_modules(source))


def _own_modules(module: nn.Module) -> nn.Module:
    """Copy a module and its submodules. The copy shares parameters and buffers, but has its own train or eval mode."""
    own = shallow_copy(module)
    for name, value in vars(module).items():
        if isinstance(value, dict):  # the dictionaries of parameters, buffers and hooks
            own.__dict__[name] = value.copy()
    own._modules = {name: child and _own_modules(child) for name, child in module._modules.items()}
    return own
