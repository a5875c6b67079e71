# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""Configurations with a `reduction`: the classes `TokenReduce<Stock>Config`, each made when it is first asked for.

For example, `TokenReduceViTConfig` is a `ViTConfig` with a `reduction`. Every stock configuration of a model that can
be reduced has such a class. The parts inside a composite configuration stay stock.
"""

from typing import Any, ClassVar

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .encoders import PREFIX, TYPE_PREFIX, auto_classes_of, base_model_of, facts_of, fixed_fields
from .methods import parse_reduction
from .version import __version__


_StockConfig: Any = object  # the mixin is only used in front of a stock configuration, whose methods it extends

# Outputs of reduced models that stock models do not have. Trainer must not take them for predictions.
EXTRA_OUTPUTS = (
    "token_counts",
    "patch_map",
    "patch_weights",
    "last_states",
    "task_loss",
    "auxiliary_loss",
    "kept_shares",
)


class TokenReduceConfigMixin(_StockConfig):
    """What the configuration of a reduced model adds to the stock one.

    Args:
        reduction: A method configuration, its dictionary form, or None. With None the model computes what the stock
            model does. The value is checked whenever it is set, and stored as a method configuration.
    """

    base_model_type: ClassVar[str]
    reduction: Any

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for name, value in fixed_fields(self).items():
            setattr(self, name, value)
        if self.reduction is not None:
            self.reduction.check_fit(facts_of(self))

    def __setattr__(self, key, value):
        if key == "reduction":
            value = parse_reduction(value)
            parts = [getattr(self, part, None) for part in self.sub_configs]
            if value is not None and all(isinstance(part, PreTrainedConfig) for part in parts):  # else checked later
                value.check_fit(facts_of(self))
        super().__setattr__(key, value)

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: class token, distillation token, registers."""
        return facts_of(self).num_prefix_tokens

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self.reduction is not None:
            output["reduction"] = self.reduction.to_dict()
        return output

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        before = config_dict.get("reduction")
        if "reduction" in kwargs and parse_reduction(kwargs["reduction"]) != parse_reduction(before):
            config_dict = {name: value for name, value in config_dict.items() if name != "calibrated_share"}
        return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory, *args, **kwargs):
        # Made again, because the code is saved beside the weights: no entry may still point to an earlier place.
        self.auto_map = self._code_references()
        self.hf_tokenreduce_version = __version__  # of the code that is saved beside it
        super().save_pretrained(save_directory, *args, **kwargs)

    def _code_references(self) -> dict[str, str]:
        """Return which class of which file each Auto class finds in a saved folder."""
        found = {"AutoConfig": f"configuration_tokenreduce.{type(self).__name__}"}
        architecture = (self.architectures or [""])[0].removeprefix(PREFIX)
        base = base_model_of(self)
        models = {"AutoModel": base} if base is not None else {}
        if architecture:  # here AutoModel finds a class that no other Auto class knows
            models |= dict.fromkeys(auto_classes_of(architecture) or ["AutoModel"], architecture)
        return found | {auto: f"modeling_tokenreduce.{PREFIX}{name}" for auto, name in models.items()}

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        part = cls.base_config_key
        if part and part in config_dict:  # the folder holds a larger model with this part inside
            reduction = config_dict.get("reduction")
            config_dict = {"model_type": cls.base_model_type, **config_dict[part], "reduction": reduction}
        found = config_dict.get("model_type", cls.model_type)
        if found == cls.base_model_type:
            config_dict = {**config_dict, "model_type": cls.model_type}
        elif found != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {found!r} model, which {cls.__name__} cannot load: it takes "
                f"{cls.base_model_type!r} and {cls.model_type!r}. Use the class of the matching backbone: "
                f"TokenReduceViT... for 'vit' (this includes facebook/deit-*-patch16-*), TokenReduceDeiT... for "
                f"'deit' (the distilled ones)."
            )
        return config_dict, kwargs


def reduced_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """Return the class `TokenReduce<Stock>Config` of a stock configuration class."""
    name = PREFIX + stock.__name__
    if name not in globals():
        ignored = [*getattr(stock, "keys_to_ignore_at_inference", []), *EXTRA_OUTPUTS]
        body = {
            "__module__": __name__,
            "__doc__": f"A `{stock.__name__}` with a `reduction`: a method configuration, its dictionary, or None.",
            "__annotations__": {"reduction": Any},
            "reduction": None,
            "model_type": TYPE_PREFIX + stock.model_type,
            "base_model_type": stock.model_type,
            "keys_to_ignore_at_inference": ignored,
        }
        made = strict(type(name, (TokenReduceConfigMixin, stock), body))
        made.register_for_auto_class()
        globals()[name] = made
    return globals()[name]


def __getattr__(name: str) -> Any:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if not (isinstance(stock, type) and issubclass(stock, PreTrainedConfig)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return reduced_config_class(stock)
