"""Token reduction for the vision transformers of Hugging Face: `reduce_tokens(model, ToMeConfig(r=13))`."""

from typing import Any

import transformers

from .calibration import calibrate
from .convert import reduce_tokens, restore
from .deploy import export, load_exported
from .methods import Method, register_method
from .modeling.ats import ATSConfig
from .modeling.bat import BATConfig
from .modeling.configuration_tokenreduce import TokenReduceDeiTConfig, TokenReduceViTConfig
from .modeling.diffrate import DiffRateConfig
from .modeling.dlvit import DLViTConfig
from .modeling.encoders import MODELS, PREFIX, auto_classes_of
from .modeling.evit import EViTConfig
from .modeling.ltmp import LTMPConfig
from .modeling.mctf import MCTFConfig
from .modeling.modeling_tokenreduce import (
    TokenReduceDeiTForImageClassification,
    TokenReduceDeiTForImageClassificationWithTeacher,
    TokenReduceDeiTModel,
    TokenReduceViTForImageClassification,
    TokenReduceViTModel,
    reduced_model_class,
)
from .modeling.pitome import PiToMeConfig
from .modeling.ppt import PPTConfig
from .modeling.protected import ProtectedConfig
from .modeling.shift import ShiftConfig
from .modeling.sit import SiTConfig
from .modeling.tokens import unmerge
from .modeling.tome import ToMeConfig
from .modeling.topk import TopKConfig
from .thresholds import load_thresholds, save_thresholds


__version__ = "0.1.0"

__all__ = [
    "ATSConfig",
    "BATConfig",
    "DLViTConfig",
    "DiffRateConfig",
    "EViTConfig",
    "LTMPConfig",
    "MCTFConfig",
    "Method",
    "PPTConfig",
    "PiToMeConfig",
    "ProtectedConfig",
    "ShiftConfig",
    "SiTConfig",
    "ToMeConfig",
    "TokenReduceDeiTConfig",
    "TokenReduceDeiTForImageClassification",
    "TokenReduceDeiTForImageClassificationWithTeacher",
    "TokenReduceDeiTModel",
    "TokenReduceViTConfig",
    "TokenReduceViTForImageClassification",
    "TokenReduceViTModel",
    "TopKConfig",
    "calibrate",
    "export",
    "load_exported",
    "load_thresholds",
    "reduce_tokens",
    "register_method",
    "restore",
    "save_thresholds",
    "tune",
    "unmerge",
]


def _register() -> None:
    """Folders that carry our code load with it through `trust_remote_code`; with this package imported, without."""
    found: dict[tuple[str, Any], list[Any]] = {}
    for name in MODELS:
        model_class = reduced_model_class(getattr(transformers, name))
        for auto_class in auto_classes_of(name) or ["AutoModel"]:
            found.setdefault((auto_class, model_class.config_class), []).append(model_class)
        transformers.AutoConfig.register(model_class.config_class.model_type, model_class.config_class, exist_ok=True)
    for (auto_class, config_class), classes in found.items():
        getattr(transformers, auto_class).register(
            config_class, classes[0] if len(classes) == 1 else tuple(classes), exist_ok=True
        )


_register()


def __getattr__(name: str) -> Any:
    """`TokenReduce...`, the reduced class of any model that can be reduced, and its configuration; and `tune`, whose
    imports take a second."""
    if name == "tune":
        from .tuning import tune

        return tune
    from .modeling import configuration_tokenreduce, modeling_tokenreduce

    for module in (modeling_tokenreduce, configuration_tokenreduce) if name.startswith(PREFIX) else ():
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
