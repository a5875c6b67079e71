"""Token reduction for the vision transformers of Hugging Face: `reduce_tokens(model, ToMeConfig(r=13))`.

Importing this package loads torch and transformers alone, and registers the reduced classes with the Auto classes of
transformers. Every other name is imported when it is first asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import transformers

from .modeling.encoders import MODELS, PREFIX, auto_classes_of
from .modeling.modeling_tokenreduce import reduced_classes_beside, reduced_model_class
from .modeling.version import __version__ as __version__


if TYPE_CHECKING:
    from .calibration import calibrate
    from .convert import reduce_tokens, restore
    from .deploy import export, load_exported
    from .methods import Method, register_method
    from .modeling.ats import ATSConfig
    from .modeling.bat import BATConfig
    from .modeling.configuration_tokenreduce import TokenReduceDeiTConfig, TokenReduceViTConfig
    from .modeling.diffrate import DiffRateConfig
    from .modeling.dlvit import DLViTConfig
    from .modeling.dtem import DTEMConfig
    from .modeling.evit import EViTConfig
    from .modeling.grid import unmerge
    from .modeling.ltmp import LTMPConfig
    from .modeling.mctf import MCTFConfig
    from .modeling.modeling_tokenreduce import (
        TokenReduceDeiTForImageClassification,
        TokenReduceDeiTForImageClassificationWithTeacher,
        TokenReduceDeiTModel,
        TokenReduceViTForImageClassification,
        TokenReduceViTModel,
    )
    from .modeling.pitome import PiToMeConfig
    from .modeling.ppt import PPTConfig
    from .modeling.protected import ProtectedConfig
    from .modeling.shift import ShiftConfig
    from .modeling.sit import SiTConfig
    from .modeling.tome import ToMeConfig
    from .modeling.topk import TopKConfig
    from .thresholds import load_thresholds, save_thresholds
    from .tuning import tune


__all__ = [
    "ATSConfig",
    "BATConfig",
    "DLViTConfig",
    "DTEMConfig",
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

# The module of each name that is imported when it is first asked for. `TokenReduce...` classes are not listed here:
# `modeling/` makes them.
_MODULES = {
    "ATSConfig": ".modeling.ats",
    "BATConfig": ".modeling.bat",
    "DLViTConfig": ".modeling.dlvit",
    "DTEMConfig": ".modeling.dtem",
    "DiffRateConfig": ".modeling.diffrate",
    "EViTConfig": ".modeling.evit",
    "LTMPConfig": ".modeling.ltmp",
    "MCTFConfig": ".modeling.mctf",
    "Method": ".methods",
    "PPTConfig": ".modeling.ppt",
    "PiToMeConfig": ".modeling.pitome",
    "ProtectedConfig": ".modeling.protected",
    "ShiftConfig": ".modeling.shift",
    "SiTConfig": ".modeling.sit",
    "ToMeConfig": ".modeling.tome",
    "TopKConfig": ".modeling.topk",
    "calibrate": ".calibration",
    "export": ".deploy",
    "load_exported": ".deploy",
    "load_thresholds": ".thresholds",
    "reduce_tokens": ".convert",
    "register_method": ".methods",
    "restore": ".convert",
    "save_thresholds": ".thresholds",
    "tune": ".tuning",
    "unmerge": ".modeling.grid",
}


def _register() -> None:
    """Register the reduced classes, so that saved folders load without `trust_remote_code` in this process."""
    for name in MODELS:
        model_class = reduced_model_class(getattr(transformers, name))
        config_class = model_class.config_class
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto_class in auto_classes_of(name) or ["AutoModel"]:
            classes = reduced_classes_beside(model_class, auto_class)
            getattr(transformers, auto_class).register(config_class, classes, exist_ok=True)


_register()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for, or make the `TokenReduce...` class of a stock class."""
    if name in _MODULES:
        value = getattr(import_module(_MODULES[name], __name__), name)
        globals()[name] = value
        return value
    if name.startswith(PREFIX):
        from .modeling import configuration_tokenreduce, modeling_tokenreduce

        for module in (modeling_tokenreduce, configuration_tokenreduce):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
