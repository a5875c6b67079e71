# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The encoders that can be reduced: how their layers look, where they are, and what the code after them reads.

A family is one entry of `TOWERS`. All other code asks `facts_of` for numbers and `encoder_of` for modules.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto


PREFIX = "TokenReduce"  # begins the names of reduced classes
TYPE_PREFIX = "tokenreduce_"  # begins their model types
PAGE = "docs/encoders.md"


@dataclass(frozen=True)
class Layout:
    """How the layers of some families look: the names of their parts.

    Attributes:
        after_attention, after_mlp: Modules or scaling parameters that a branch goes through before it is added.
        rotary: Whether queries and keys of patches are rotated by their places.
        pair_bias: The layer's module that gives a bias for each pair of places. The module may be None.
    """

    attention: str = "attention"
    norm_before: str = "layernorm_before"
    norm_after: str = "layernorm_after"
    o_proj: str = "o_proj"
    scaling: str = "scaling"
    attention_dropout: str = "attention_dropout"
    after_attention: tuple[str, ...] = ("dropout",)
    after_mlp: tuple[str, ...] = ("dropout",)
    rotary: bool = False
    pair_bias: str | None = None

    @property
    def has_places(self) -> bool:
        """Whether layers read where in the image a token is."""
        return self.rotary or self.pair_bias is not None


VIT = Layout()
CLIP = Layout("self_attn", "layer_norm1", "layer_norm2", "out_proj", "scale", "dropout", (), ())
DINOV2 = Layout("attention", "norm1", "norm2", after_attention=("layer_scale1", "drop_path"),
                after_mlp=("layer_scale2", "drop_path"))  # fmt: skip
DINOV3 = Layout("attention", "norm1", "norm2", attention_dropout="dropout", rotary=True,
                after_attention=("layer_scale1", "drop_path"), after_mlp=("layer_scale2", "drop_path"))  # fmt: skip
BEIT = Layout(after_attention=("dropout", "lambda_1", "drop_path"), after_mlp=("dropout", "lambda_2", "drop_path"),
              pair_bias="relative_position_bias")  # fmt: skip


def patch_grid(config: PreTrainedConfig) -> tuple[int, int]:
    """Return the rows and columns of patches of an image of the model's own size."""
    height, width = _both(config.image_size)
    patch_height, patch_width = _both(config.patch_size)
    return height // patch_height, width // patch_width


def image_shape(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the shape of one image, without the batch: channels, height and width."""
    return (config.num_channels, *_both(config.image_size))


def two_products(config: PreTrainedConfig) -> int:
    """Return the multiply-adds per token of an MLP with two linear layers."""
    return 2 * config.hidden_size * config.intermediate_size


@dataclass(frozen=True)
class Tower:
    """A family of encoders: its classes, and where they keep what is reduced.

    Attributes:
        model_type: Model type of its configuration.
        classes: Stock classes that hold its layers.
        models: Stock classes that can be reduced, the one without a head first.
        layers: Path from a class of `classes` to its list of layers.
        num_prefix_tokens: Number of tokens before the patches. The first one is the class token.
        wants_grid: Whether the code after the last layer reads all patches, not only the prefix tokens.
        norm: Path from a class of `classes` to the norm that all rows go through before they are read, or None.
        any_size: Whether it takes images of any size. If not, they need `interpolate_pos_encoding=True`.
        mlp_products: Multiply-adds of the MLP for one token.
        patches: Rows and columns of patches.
        inputs: Shape of one input, without the batch.
        fixed: Fields of the configuration that a reduced model sets.
    """

    model_type: str
    classes: tuple[str, ...]
    models: tuple[str, ...]
    layout: Layout
    layers: str = "layers"
    num_prefix_tokens: Callable[[Any], int] = lambda config: 1
    wants_grid: bool = True
    norm: str | None = None
    any_size: bool = False
    mlp_products: Callable[[Any], int] = two_products
    patches: Callable[[Any], tuple[int, int]] = patch_grid
    inputs: Callable[[Any], tuple[int, ...]] = image_shape
    fixed: Mapping[str, Any] | None = None


def _with_registers(config: Any) -> int:
    return 1 + config.num_register_tokens


def _dinov2_products(config: Any) -> int:
    inner = int(config.hidden_size * config.mlp_ratio)
    if config.use_swiglu_ffn:
        return 3 * config.hidden_size * ((int(inner * 2 / 3) + 7) // 8 * 8)
    return 2 * config.hidden_size * inner


def _dinov3_products(config: Any) -> int:
    return (3 if config.use_gated_mlp else 2) * config.hidden_size * config.intermediate_size


def _spectrogram_grid(config: Any) -> tuple[int, int]:
    rows = (config.num_mel_bins - config.patch_size) // config.frequency_stride + 1
    return rows, (config.max_length - config.patch_size) // config.time_stride + 1


TOWERS = (
    Tower("vit", ("ViTModel",), ("ViTModel", "ViTForImageClassification"), VIT, wants_grid=False),
    Tower(
        "deit",
        ("DeiTModel",),
        ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
        VIT,
        num_prefix_tokens=lambda config: 2,
        wants_grid=False,
    ),
    Tower("vit_msn", ("ViTMSNModel",), ("ViTMSNModel", "ViTMSNForImageClassification"), VIT, wants_grid=False),
    Tower(
        "ijepa",
        ("IJepaModel",),
        ("IJepaModel", "IJepaForImageClassification"),
        VIT,
        num_prefix_tokens=lambda config: 0,
        norm="layernorm",
    ),
    # A reduced encoder masks nothing and keeps the patches in their order, as features need it.
    Tower("vit_mae", ("ViTMAEModel",), ("ViTMAEModel",), VIT, norm="layernorm", fixed={"mask_ratio": 0.0}),
    Tower(
        "audio-spectrogram-transformer",
        ("ASTModel",),
        ("ASTModel", "ASTForAudioClassification"),
        VIT,
        num_prefix_tokens=lambda config: 2,
        wants_grid=False,
        patches=_spectrogram_grid,
        inputs=lambda config: (config.max_length, config.num_mel_bins),
    ),
    Tower(
        "clip_vision_model",
        ("CLIPVisionModel",),
        ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification", "CLIPModel"),
        CLIP,
        "encoder.layers",
    ),
    Tower(
        "siglip_vision_model",
        ("SiglipVisionModel",),
        ("SiglipVisionModel", "SiglipForImageClassification", "SiglipModel"),
        CLIP,
        "encoder.layers",
        num_prefix_tokens=lambda config: 0,
        norm="post_layernorm",
    ),
    Tower(
        "dinov2",
        ("Dinov2Model", "Dinov2Backbone"),
        ("Dinov2Model", "Dinov2ForImageClassification", "Dinov2Backbone"),
        DINOV2,
        "encoder.layer",
        norm="layernorm",
        any_size=True,
        mlp_products=_dinov2_products,
    ),
    Tower(
        "dinov2_with_registers",
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersBackbone"),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersBackbone"),
        DINOV2,
        "encoder.layer",
        num_prefix_tokens=_with_registers,
        norm="layernorm",
        any_size=True,
        mlp_products=_dinov2_products,
    ),
    Tower(
        "dinov3_vit",
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        ("DINOv3ViTModel", "DINOv3ViTBackbone"),
        DINOV3,
        "model.layer",
        num_prefix_tokens=_with_registers,
        norm="norm",
        any_size=True,
        mlp_products=_dinov3_products,
    ),
    Tower("beit", ("BeitModel",), ("BeitModel", "BeitForImageClassification"), BEIT, norm="layernorm", any_size=True),
)

# Models of several parts, one of which is an encoder of `TOWERS`.
COMPOSITES = ("LlavaModel", "LlavaForConditionalGeneration", "DepthAnythingForDepthEstimation")

# The heads of these read each patch by itself, so a dropped patch keeps its last state.
READ_EVERY_PATCH = (*COMPOSITES, "Dinov2Backbone", "Dinov2WithRegistersBackbone", "DINOv3ViTBackbone")

# The heads of these read only the prefix tokens, so no patch has to leave the last layer.
READ_PREFIX_ALONE = (
    "ViTForImageClassification", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher",
    "ViTMSNForImageClassification", "ASTForAudioClassification",
)  # fmt: skip

# The loss of these is the mean over the batch, even if Trainer gives the number of items of all batches.
TAKE_MEAN_LOSS = ("CLIPForImageClassification", "SiglipForImageClassification", "BeitForImageClassification")

MODELS = (*dict.fromkeys(name for tower in TOWERS for name in tower.models), *COMPOSITES)

_BY_TYPE = {tower.model_type: tower for tower in TOWERS}
_BY_CLASS = {name: tower for tower in TOWERS for name in tower.classes}

AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForImageClassification",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForDepthEstimation",
    "AutoModelForAudioClassification",
    "AutoModelForImageTextToText",
    "AutoBackbone",
)


def auto_classes_of(model: str) -> list[str]:
    """Return the Auto classes through which transformers finds a stock class, given its name."""

    def finds(auto_class: str) -> bool:
        known = getattr(modeling_auto, auto_class)._model_mapping._model_mapping.values()
        return any(model in (names if isinstance(names, (tuple, list)) else [names]) for names in known)

    return [name for name in AUTO_CLASSES if finds(name)]


class EncoderFacts(NamedTuple):
    """What methods and counts need to know of an encoder.

    Attributes:
        reduction: The method configuration of the model, or None.
        grid: Rows and columns of patches of an image of the model's own size.
        mlp_products: Multiply-adds of the MLP for one token.
        has_places: Whether layers read where in the image a token is (rotation, or a bias per pair).
    """

    reduction: Any
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_prefix_tokens: int
    grid: tuple[int, int]
    mlp_products: int
    has_places: bool

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """The number of tokens of an image of the model's own size, prefix tokens included."""
        return self.num_prefix_tokens + self.num_patches


def facts_of(config: PreTrainedConfig | EncoderFacts) -> EncoderFacts:
    """Return the facts of the encoder that a configuration describes, stock or reduced, alone or as a part."""
    if not isinstance(config, PreTrainedConfig):
        return config  # these are facts, perhaps made by another copy of this module
    inner, tower = _tower_config(config)
    if inner.num_hidden_layers < 1 or inner.num_attention_heads < 1:
        raise ValueError(
            f"num_hidden_layers={inner.num_hidden_layers} and num_attention_heads={inner.num_attention_heads} must be "
            "at least 1. Correct config.json."
        )
    rows, columns = tower.patches(inner)
    if min(rows, columns) < 1:
        raise ValueError(f"The sizes in config.json give {rows} x {columns} patches. There must be at least one.")
    return EncoderFacts(
        reduction=getattr(config, "reduction", None),
        hidden_size=inner.hidden_size,
        num_hidden_layers=inner.num_hidden_layers,
        num_attention_heads=inner.num_attention_heads,
        num_prefix_tokens=tower.num_prefix_tokens(inner),
        grid=(rows, columns),
        mlp_products=tower.mlp_products(inner),
        has_places=tower.layout.has_places,
    )


def stock_type(config: Any) -> str:
    """Return the model type of the stock configuration that this one is, or extends."""
    return type(config).model_type.removeprefix(TYPE_PREFIX)


def base_model_of(config: Any) -> str | None:
    """Return the stock class without a head, if the configuration describes an encoder alone."""
    tower = _BY_TYPE.get(stock_type(config))
    return None if tower is None else tower.models[0]


def fixed_fields(config: Any) -> Mapping[str, Any]:
    """Return the fields of the configuration that a reduced model sets."""
    tower = _BY_TYPE.get(stock_type(config))
    return (None if tower is None else tower.fixed) or {}


def encoder_config(config: Any) -> Any:
    """Return the configuration of the encoder alone: a part of a larger configuration, or the whole one."""
    return _tower_config(config)[0]


def _tower_config(config: Any) -> tuple[Any, Tower]:
    tower = _BY_TYPE.get(stock_type(config))
    if tower is not None:
        return config, tower
    for name in ("vision_config", "backbone_config"):
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig) and stock_type(inner) in _BY_TYPE:
            return inner, _BY_TYPE[stock_type(inner)]
    raise ValueError(f"A {type(config).__name__} has no encoder that can be reduced. {what_can_be_reduced()}")


def what_can_be_reduced() -> str:
    families = dict.fromkeys(re.sub(r"(Vision)?(Model|For|Backbone)\w*$", "", name) for name in MODELS)
    return f"These can be reduced: {', '.join(families)}. {PAGE} lists the classes and says how to add a family."


@dataclass(frozen=True)
class Encoder:
    """The encoder inside a model, stock or reduced. `module` is the part that holds it, perhaps the model itself."""

    model: PreTrainedModel
    module: Any
    tower: Tower

    @property
    def config(self) -> Any:
        return self.module.config

    @property
    def facts(self) -> EncoderFacts:
        return facts_of(self.module.config)._replace(reduction=getattr(self.model.config, "reduction", None))

    @property
    def layers(self) -> Any:
        """The list of the encoder's layers."""
        return self.module.get_submodule(self.tower.layers)

    @property
    def reducers(self) -> list[Any]:
        """The reducers of a reduced model, one for each layer."""
        return [layer.reducer for layer in self.layers]

    def attention(self, layer: Any) -> Any:
        return getattr(layer, self.tower.layout.attention)

    @property
    def patch_projection(self) -> nn.Conv2d:
        return next(part for part in self.module.embeddings.modules() if isinstance(part, nn.Conv2d))

    @property
    def image_size(self) -> tuple[int, int]:
        return _both(self.config.image_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        return _both(self.config.patch_size)

    def size_arguments(self, pixel_values: Tensor) -> dict[str, Any]:
        """Return the arguments that a forward needs for images of this size."""
        fits = self.tower.any_size or not hasattr(self.config, "image_size")  # spectrograms have no such size
        fits = fits or tuple(pixel_values.shape[-2:]) == self.image_size
        return {} if fits else {"interpolate_pos_encoding": True}

    def embed(self, *inputs: Any, **kwargs: Any) -> Tensor:
        """Run a forward up to the first layer and return the tokens that enter it, (B, P + N0, D)."""

        def stop(hidden_states: Tensor) -> Tensor:
            raise _Entered(hidden_states)

        with self._entrance(stop):
            try:
                getattr(self.model, "get_image_features", self.model)(*inputs, **kwargs)
            except _Entered as entered:
                return entered.args[0]
        raise RuntimeError(f"{type(self.model).__name__} did not run its encoder. Give it images.")

    def run(self, tokens: Tensor, **kwargs: Any) -> Any:
        """Return the model's output if `tokens` (B, P + N0, D) enter its first layer."""
        shape = self.tower.inputs(self.config)
        inputs = tokens.new_zeros(1, *shape).expand(len(tokens), *shape)
        embeddings = self.module.embeddings
        embeddings.forward = lambda *args, **kwargs: tokens  # embeds nothing: the tokens are replaced anyway
        try:
            with self._entrance(lambda hidden_states: tokens):
                return self.model(inputs, **kwargs)
        finally:
            del embeddings.forward

    @contextmanager
    def _entrance(self, see: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Send what enters the first layer through `see`, inside the `with` block."""
        first = self.layers[0]
        if hasattr(first, "reducer"):
            first.entrance = see
            try:
                yield
            finally:
                del first.entrance
            return
        handle = first.register_forward_pre_hook(lambda layer, args: (see(args[0]), *args[1:]))
        try:
            yield
        finally:
            handle.remove()


class _Entered(Exception):
    """Ends a forward at the first layer. Its argument is what enters there."""


def encoder_of(model: Any) -> Encoder:
    """Return the encoder of a model that is reduced or can be. Any other model raises a `ValueError`."""
    for module in model.modules() if isinstance(model, nn.Module) else ():
        tower = _BY_CLASS.get(type(module).__name__.removeprefix(PREFIX))
        if tower is not None and isinstance(module, PreTrainedModel):
            return Encoder(model, module, tower)
    raise ValueError(f"A {type(model).__name__} has no encoder that can be reduced. {what_can_be_reduced()}")


def _both(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
