# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The ViT and DeiT configurations that carry the configuration of a method."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import DeiTConfig, ViTConfig

from .configuration_methods import parse_reduction


_StockConfig: Any = object  # the mixin is only used in front of a stock configuration, whose methods it extends


class TokenReduceConfigMixin(_StockConfig):
    """What the configuration of a reduced backbone adds to the stock one.

    reduction: a method configuration, its dictionary form, or None (then the model computes what the stock one does).
        It is checked whenever it is set, and read back as a method configuration.
    """

    base_model_type: ClassVar[str]
    num_prefix_tokens: ClassVar[int]
    default_auto_map: ClassVar[dict[str, str]]
    reduction: Any
    keys_to_ignore_at_inference = [
        "token_counts",
        "patch_map",
        "patch_weights",
        "task_loss",
        "auxiliary_loss",
        "kept_shares",
    ]

    def __setattr__(self, key, value):
        if key == "reduction":
            value = parse_reduction(value)
            if value is not None:
                value.check_fit(self)
        super().__setattr__(key, value)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        if self.reduction is not None:
            output["reduction"] = self.reduction.to_dict()
        return output

    def save_pretrained(self, save_directory, *args, **kwargs):
        # The code is saved beside the weights, so no entry may go on pointing at the repository it was loaded from.
        recorded = {name: reference.split("--")[-1] for name, reference in getattr(self, "auto_map", {}).items()}
        self.auto_map = {**self.default_auto_map, **recorded}
        super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
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


@strict
class TokenReduceViTConfig(TokenReduceConfigMixin, ViTConfig):
    """A `ViTConfig` with a `reduction`."""

    model_type = "tokenreduce_vit"
    base_model_type = "vit"
    num_prefix_tokens = 1
    default_auto_map = {
        "AutoConfig": "configuration_tokenreduce.TokenReduceViTConfig",
        "AutoModel": "modeling_tokenreduce_vit.TokenReduceViTModel",
        "AutoModelForImageClassification": "modeling_tokenreduce_vit.TokenReduceViTForImageClassification",
    }

    reduction: Any = None


@strict
class TokenReduceDeiTConfig(TokenReduceConfigMixin, DeiTConfig):
    """A `DeiTConfig` with a `reduction`. The class and the distillation token are prefix tokens."""

    model_type = "tokenreduce_deit"
    base_model_type = "deit"
    num_prefix_tokens = 2
    default_auto_map = {
        "AutoConfig": "configuration_tokenreduce.TokenReduceDeiTConfig",
        "AutoModel": "modeling_tokenreduce_deit.TokenReduceDeiTModel",
        "AutoModelForImageClassification": "modeling_tokenreduce_deit.TokenReduceDeiTForImageClassification",
    }

    reduction: Any = None


TokenReduceViTConfig.register_for_auto_class()
TokenReduceDeiTConfig.register_for_auto_class()
