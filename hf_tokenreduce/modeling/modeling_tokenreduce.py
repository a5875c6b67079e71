# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Stock models whose encoder reduces its tokens: the classes `TokenReduce<Stock>`, each made when first asked for.

For example, `TokenReduceViTForImageClassification` is `ViTForImageClassification` with reduced layers. Every class in
`encoders.MODELS` has such a class. Parameters keep their stock names; a method's own are `reducer.*` of each layer.
"""

import inspect
from dataclasses import dataclass
from functools import wraps
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import ModelOutput, logging
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from .configuration_tokenreduce import EXTRA_OUTPUTS, reduced_config_class
from .encoders import (
    MODELS,
    PREFIX,
    READ_EVERY_PATCH,
    READ_PREFIX_ALONE,
    TAKE_MEAN_LOSS,
    TOWERS,
    TYPE_PREFIX,
    auto_classes_of,
    encoder_of,
)
from .hooks import Reducer, take_over
from .layers import ReducedLayer, inject, is_watched
from .methods import build_reducer, write_extra_method
from .packed import on_device
from .recording import RECORDER, Encoded, Recorder


_StockModel: Any = nn.Module  # the mixin is only used in front of a stock model, whose methods it extends

logger = logging.get_logger(__name__)


class TokenReduceMixin(_StockModel):
    """What a reduced model adds to the stock one.

    `forward` takes the arguments of the stock model and `output_patch_map`. Its output also has the fields below.

    Attributes:
        token_counts: (B, L) long, the number of tokens that leave each layer, prefix tokens included. If a classifier
            reads only prefix tokens, its last layer computes no patches unless `output_patch_map=True`. The last
            number is then what the method would leave there, or what entered if that depends on the image.
        patch_map: (B, N0) long, the row of the token that holds each patch, prefix tokens counted. -1: the patch was
            dropped. Only with `output_patch_map=True`. Some models, such as CLIP and DINO, return a row per patch
            already; for others `unmerge(last_hidden_state, patch_map)` makes one.
        patch_weights: (B, M, N0) float32, the weight of each patch in each of the last patch tokens. It replaces
            `patch_map` if tokens are mixtures of patches (SiT, and DTEM while it learns).
        last_states: (B, N0, D), the last state of each dropped patch. Only with `output_patch_map=True`, and only for
            models whose head reads every patch by itself.
        auxiliary_loss: The method's own loss in training, if it has one. `loss` is the sum of it and `task_loss`. If
            you compute the loss of the task yourself, without `labels`, add it.
        kept_shares: (L,), the mean share of the tokens that leaves each layer. `auxiliary_loss` is computed from it.
    """

    def __init__(self, config, *inputs, **kwargs):
        # Compared by name, because code from a folder has other classes than this package.
        if type(config).model_type != self.config_class.model_type:
            raise ValueError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got a {type(config).__name__}. Make one "
                f"by {self.config_class.__name__}.from_pretrained(..., reduction=...), or reduce a loaded model by "
                "hf_tokenreduce.reduce_tokens."
            )
        super().__init__(config, *inputs, **kwargs)
        encoder = encoder_of(self)
        if encoder.module is not self and encoder.config is config:  # a head on the model itself
            encoder.module.__class__ = reduced_model_class(type(encoder.module))
            # Every version looks up the class's name. From 5.23 on, the dictionary itself would set another key.
            recorded = encoder.module._can_record_outputs
            dict.__setitem__(_CAN_RECORD_REGISTRY, str(type(encoder.module)), recorded)
        inject(encoder, encoder.facts, type(self).__name__.removeprefix(PREFIX) in READ_EVERY_PATCH)
        for layer in encoder.layers:
            self._initialize(layer)
            names = {name for name, _ in layer.reducer.named_parameters()}
            self._keep_in_fp32_modules_strict |= names & set(layer.reducer.in_float32)

    def set_reduction(self, reduction) -> None:
        """Change the method in place.

        The weights stay as they are. The learned parts of the old method are dropped, and those of the new method
        start untrained. Only the filter of DL-ViT and the networks of DTEM stay under another setting of the method.

        Args:
            reduction: A method configuration, its dictionary form, or None to reduce nothing.

        Example:
            >>> model.set_reduction(EViTConfig(keep_rate=0.5))
        """
        kept = self._set_reduction(reduction)
        untrained = None if self.config.reduction is None else self.config.reduction.untrained()
        if untrained is not None and not kept:
            logger.warning(untrained)

    def _set_reduction(self, reduction) -> bool:
        """Do so without a warning. Return whether learned parts were kept."""
        before, self.config.reduction = self.config.reduction, reduction
        encoder = encoder_of(self)
        old = [layer.reducer for layer in encoder.layers]
        try:
            for index, layer in enumerate(encoder.layers):
                like = next(p for p in (*layer.mlp.parameters(), *layer.parameters()) if p.is_floating_point())
                layer.reducer = build_reducer(encoder.facts, index).to(device=like.device, dtype=like.dtype)
                layer.reducer.train(layer.training)
                self._initialize(layer)
            kept = take_over([layer.reducer for layer in encoder.layers], old)
            check_place(self)
        except Exception:
            self.config.reduction = before
            for layer, reducer in zip(encoder.layers, old, strict=True):
                layer.reducer = reducer
            raise
        self.config.__dict__.pop("calibrated_share", None)  # it belongs to the old method and what that had learned
        return kept

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Let an Auto class choose between the classes of one configuration, such as DeiT with and without a teacher.

        When an Auto class loads a folder, it notes one model class for the class of the configuration. transformers
        names the code of a local folder after the last part of its path, so another folder of the same name has the
        very same configuration class. It would be loaded as the class of the first folder.
        """
        super().register_for_auto_class(auto_class)
        if isinstance(auto_class, str):
            return
        noted = auto_class._model_mapping._extra_content
        for config_class in [config_class for config_class, found in noted.items() if found is cls]:
            auto_class.register(config_class, reduced_classes_beside(cls, auto_class.__name__), exist_ok=True)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no, so that new weights are initialised as in the stock model. Custom code would skip some modules."""
        return False

    def initialize_weights(self):
        # The methods of transformers initialise linear layers and norms, but do not know reducers.
        super().initialize_weights()
        for layer in self.modules():  # none is reduced yet while the stock model is built
            if isinstance(layer, ReducedLayer):
                layer.init_reducer()

    def _initialize(self, layer: ReducedLayer) -> None:
        if any(parameter.is_meta for parameter in layer.reducer.parameters()):
            return  # weights are loaded later, and missing ones are initialised then
        for module in layer.reducer.modules():
            self._initialize_weights(module)
        layer.init_reducer()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        loaded = super().from_pretrained(*args, **kwargs)
        check_place(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def save_pretrained(self, save_directory, *args, save_original_format: bool = False, **kwargs):
        """Save as the stock model does, but with the current names of the parameters instead of those of older
        versions, because Trainer resumes from a checkpoint without renaming."""
        if any(_values(reducer.built_for) != _values(self.config.reduction) for reducer in encoder_of(self).reducers):
            raise ValueError(
                "config.reduction is not what this model runs. It was set without set_reduction, or by another model "
                "that shares the configuration. Call model.set_reduction(...) with the setting you want, then save."
            )
        if adapted(self) and not getattr(self, "_hf_peft_config_loaded", False):
            # Only said: a training that saves its checkpoints must not be lost.
            logger.warning(
                "This model has an adapter of PEFT inside, so its weights are saved by names that from_pretrained "
                "does not know. Merge the adapter first: peft_model.merge_and_unload(). Or save the adapter alone: "
                "peft_model.save_pretrained(folder)."
            )
        # A stock folder does not tell that there is no pooler, and loads with a random one.
        if hasattr(self, "pooler") and (self.pooler is None or hasattr(self.config, "add_pooling_layer")):
            self.config.add_pooling_layer = self.pooler is not None
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)
        write_extra_method(save_directory, self.config.reduction)

    def _upload_modified_files(self, working_dir, *args, **kwargs):
        write_extra_method(working_dir, self.config.reduction)  # save_pretrained uploads before it returns
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _check_inputs(self, inputs: Any, attention_mask: Any, can_resize: bool, interpolates: bool) -> None:
        if attention_mask is not None and len(self.input_modalities) == 1:
            raise ValueError(
                "attention_mask does not work with token reduction, because its tokens may be gone. Leave it out, or "
                "use the stock model: hf_tokenreduce.restore(model)."
            )
        if not isinstance(inputs, Tensor):
            if self.main_input_name in ("pixel_values", "input_values") and len(self.input_modalities) == 1:
                raise ValueError(f"{self.main_input_name} is missing. Pass a batch.")
            return
        if inputs.shape[0] == 0:
            raise ValueError("The batch is empty. Pass at least one image.")
        encoder = encoder_of(self)
        if encoder.tower.any_size or not can_resize or interpolates or inputs.ndim != 4:
            return
        (height, width), expected = inputs.shape[-2:], encoder.image_size
        if (height, width) != expected:
            raise ValueError(
                f"The images are {height}x{width}, the model takes {expected[0]}x{expected[1]}. Resize them, or pass "
                "interpolate_pos_encoding=True."
            )

    def _run_recorded(
        self, stock_forward: Any, args: Any, kwargs: dict[str, Any], output_patch_map: bool
    ) -> tuple[Any, list[Encoded]]:
        outer = RECORDER.get()
        if outer is not None:  # this model is inside a model with a head
            return stock_forward(self, *args, return_dict=True, **kwargs), outer.encoded
        encoder = encoder_of(self).module
        # A hook on the encoder or its last norm may read more than the prefix.
        alone = type(self).__name__.removeprefix(PREFIX) in READ_PREFIX_ALONE
        recorder = Recorder(output_patch_map, alone and not is_watched(encoder, *encoder.children()))
        token = RECORDER.set(recorder)
        try:
            output = stock_forward(self, *args, return_dict=True, **kwargs)
        finally:
            RECORDER.reset(token)
        return output, recorder.encoded

    def _check_nothing_is_lost(self, output_patch_map: bool) -> None:
        """Raise a ValueError if something needs what the layers did not tell, because a part is compiled alone."""
        learns = type(encoder_of(self).reducers[0]).auxiliary_loss is not Reducer.auxiliary_loss
        if output_patch_map or (self.training and learns):
            raise ValueError(
                "A part of this model runs compiled and the rest does not, so the layers cannot tell where tokens "
                "went. Compile the whole model with an even method, or compile nothing."
            )

    def _extended(self, output: Any, encoded: list[Encoded], num_items: Any, labels: Any) -> Any:
        """Add our fields to the stock model's output. The encoder ran once, or not at all if there are no images."""
        lengths = encoded[0].lengths if len(encoded) == 1 else None
        if lengths is not None and output.get("last_hidden_state") is not None:
            output["last_hidden_state"] = self._without_padding(output["last_hidden_state"], lengths)
        if RECORDER.get() is not None and not is_watched(self):
            return output  # the model with a head that this one is inside adds the fields
        values = dict(output.items())
        if len(encoded) == 1:
            one = encoded[0]
            values |= {
                "token_counts": one.counts,
                "patch_map": one.patch_map,
                "patch_weights": one.patch_weights,
                "last_states": one.last_states,
                "kept_shares": one.kept_shares,
            }
            if one.kept_shares is not None:
                auxiliary_loss = encoder_of(self).reducers[0].auxiliary_loss(one.kept_shares, one.num_tokens)
                if num_items is not None and getattr(self, "accepts_loss_kwargs", True):
                    # Trainer then divides nothing itself: the parts of all accumulated batches and processes must add
                    # up to a mean. An item is a label of an image, or a word that is predicted.
                    if labels is not None and len(self.input_modalities) > 1:
                        labels = labels[..., 1:]
                    items = len(one.counts) if labels is None else (labels != -100).sum()
                    auxiliary_loss = auxiliary_loss * items / num_items
                values["auxiliary_loss"] = auxiliary_loss
                if values.get("loss") is not None:
                    values["task_loss"] = values["loss"]
                    values["loss"] = values["loss"] + auxiliary_loss
        return reduced_output_class(type(output))(**values)

    def _without_padding(self, hidden: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Set padding rows to zero again, because a norm has changed them. A row per patch has no padding."""
        if encoder_of(self).tower.wants_grid:
            return hidden
        ends = on_device(lengths, hidden.device)[:, None]
        real = torch.arange(hidden.shape[1], device=hidden.device) < ends
        return hidden.masked_fill(~real[..., None], 0.0)


def check_place(model: PreTrainedModel) -> None:
    """Raise a ValueError if accelerate keeps learned parts of the method on the CPU or the disk.

    It brings weights in when their module is called, but a reducer acts inside a layer and is never called itself."""
    encoder = encoder_of(model)
    away = any(parameter.is_meta for reducer in encoder.reducers for parameter in reducer.parameters())
    if away and any(hasattr(module, "_hf_hook") for module in encoder.module.modules()):
        raise ValueError(
            f"{type(encoder.reducers[0].built_for).__name__} has learned parts in the layers, which cannot lie on the "
            'CPU or the disk (device_map, cpu_offload). Put the layers on one device, such as device_map="cpu" or '
            "device_map=0, or use a method without learned parts, such as ToMe."
        )


def adapted(model: nn.Module) -> bool:
    """Return whether layers of a model are those of an adapter of PEFT, such as LoRA, around the model's own."""
    return any(hasattr(module, "base_layer") and hasattr(module, "lora_A") for module in model.modules())


def _values(reduction: Any) -> Any:
    """Return the values of a setting, to compare settings whose classes come from different copies of the code."""
    return None if reduction is None else reduction.to_dict()


_output_classes: dict[type[ModelOutput], type[ModelOutput]] = {}


def reduced_output_class(stock: type[ModelOutput]) -> type[ModelOutput]:
    """Return the class `TokenReduce<Stock>Output`: the stock output with `EXTRA_OUTPUTS`."""
    if stock not in _output_classes:
        name = PREFIX + stock.__name__
        body = {
            "__module__": __name__,
            "__doc__": f"A `{stock.__name__}` with the fields that `TokenReduceMixin` describes.",
            "__annotations__": dict.fromkeys(EXTRA_OUTPUTS, Tensor | None),
            **dict.fromkeys(EXTRA_OUTPUTS),
        }
        _output_classes[stock] = globals()[name] = dataclass(type(name, (stock,), body))
    return _output_classes[stock]


def _recorded(stock_forward: Any) -> Any:
    """Make a `forward`, or `get_image_features`, that runs the stock one and adds our fields to its output."""
    signature = inspect.signature(stock_forward)
    parameters = list(signature.parameters.values())
    place = len(parameters) - (parameters[-1].kind == inspect.Parameter.VAR_KEYWORD)
    flag = inspect.Parameter("output_patch_map", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    main = next(name for name in ("pixel_values", "input_values") if name in signature.parameters)
    places = {name: place for place, name in enumerate(signature.parameters, start=-1)}
    can_resize = "interpolate_pos_encoding" in signature.parameters
    ordered = "noise" in signature.parameters  # patches are shuffled unless `noise` gives their order

    @wraps(stock_forward)
    def forward(self, *args, output_patch_map: bool = False, return_dict: bool | None = None, **kwargs):
        def given(name: str) -> Any:
            place = places.get(name, len(args))
            return args[place] if place < len(args) else kwargs.get(name)

        inputs = given(main)
        self._check_inputs(inputs, given("attention_mask"), can_resize, bool(given("interpolate_pos_encoding")))
        if self._is_for_inference and kwargs.get("labels") is not None:
            raise ValueError(
                f"{type(self).__name__} is for inference only and has no loss. To train, load the checkpoint as "
                "TokenReduceDeiTForImageClassification."
            )
        if ordered and given("noise") is None:
            patch_height, patch_width = encoder_of(self).patch_size
            count = (inputs.shape[-2] // patch_height) * (inputs.shape[-1] // patch_width)
            order = torch.arange(count, device=inputs.device).expand(inputs.shape[0], -1)
            if places["noise"] < len(args):
                args = (*args[: places["noise"]], order, *args[places["noise"] + 1 :])
            else:
                kwargs["noise"] = order
        output, encoded = self._run_recorded(stock_forward, args, kwargs, output_patch_map)
        if not encoded and isinstance(inputs, Tensor) and not torch.compiler.is_compiling():
            self._check_nothing_is_lost(output_patch_map)
        output = self._extended(output, encoded, kwargs.get("num_items_in_batch"), given("labels"))
        returns_dict = self.config.return_dict if return_dict is None else return_dict
        return output if returns_dict else output.to_tuple()

    forward.__signature__ = signature.replace(parameters=[*parameters[:place], flag, *parameters[place:]])  # type: ignore[attr-defined]
    return forward


def _constructor(stock: type[PreTrainedModel]) -> Any:
    """Make an `__init__` with the arguments of the stock one, because transformers reads them."""

    may_lack_pooler = "add_pooling_layer" in inspect.signature(stock.__init__).parameters

    @wraps(stock.__init__)
    def __init__(self, config, *inputs, **kwargs):
        if may_lack_pooler and not inputs and not getattr(config, "add_pooling_layer", True):
            kwargs.setdefault("add_pooling_layer", False)
        TokenReduceMixin.__init__(self, config, *inputs, **kwargs)

    return __init__


def reduced_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return the class `TokenReduce<Stock>` of a stock class in `MODELS`."""
    name = PREFIX + stock.__name__
    if name in globals():
        return globals()[name]
    config_class = reduced_config_class(stock.config_class)
    body = {
        "__module__": __name__,
        "__doc__": f"`{stock.__name__}` with token reduction. See `TokenReduceMixin` for what it adds.",
        "__annotations__": {"config": config_class},
        "config_class": config_class,
        "forward": _recorded(stock.forward),
        "_is_for_inference": "labels" not in inspect.signature(stock.forward).parameters and "Teacher" in name,
    }
    body["__init__"] = _constructor(stock)
    if stock.__name__ in TAKE_MEAN_LOSS:
        body["accepts_loss_kwargs"] = False
    if hasattr(stock, "get_image_features"):
        body["get_image_features"] = _recorded(stock.get_image_features)
    made: Any = type(name, (TokenReduceMixin, stock), body)
    returned = inspect.unwrap(stock.forward).__annotations__.get("return")
    for output in (returned, *get_args(returned)):
        if isinstance(output, type) and issubclass(output, ModelOutput):
            reduced_output_class(output)  # made now, because a compiled forward cannot make a class
    # Checkpoints on the Hub still have the key names of older versions of transformers.
    model_type = stock.config_class.model_type
    for stock_key, own_key in ((stock.__name__, name), (model_type, TYPE_PREFIX + model_type)):
        conversions = get_checkpoint_conversion_mapping(stock_key)
        if conversions is not None:
            register_checkpoint_conversion_mapping(own_key, conversions, overwrite=True)
    made.register_for_auto_class((auto_classes_of(stock.__name__) or ["AutoModel"])[0])
    globals()[name] = made
    return made


def reduced_classes_beside(model_class: type[PreTrainedModel], auto_class: str) -> Any:
    """Return the reduced classes with the same configuration that an Auto class finds, given its name: one class, or
    a tuple, of which transformers takes the one that the configuration names."""
    stock = model_class.__name__.removeprefix(PREFIX)
    names = next((tower.models for tower in TOWERS if stock in tower.models), (stock,))
    classes = [
        reduced_model_class(getattr(transformers, name))
        for name in names
        if auto_class in (auto_classes_of(name) or ["AutoModel"])
    ]
    beside = [found for found in classes if found.config_class is model_class.config_class]
    return tuple(beside) if len(beside) > 1 else model_class


def __getattr__(name: str) -> Any:
    stock = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or stock not in MODELS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return reduced_model_class(getattr(transformers, stock))
