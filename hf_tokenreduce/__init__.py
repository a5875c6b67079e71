"""Token reduction for the vision transformers of Hugging Face: `reduce_tokens(model, ToMeConfig(r=13))`."""

from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from .calibration import calibrate
from .convert import reduce_tokens, restore
from .modeling.configuration_methods import (
    ATSConfig,
    BATConfig,
    DLViTConfig,
    EViTConfig,
    LTMPConfig,
    SiTConfig,
    ToMeConfig,
    TopKConfig,
)
from .modeling.configuration_tokenreduce import TokenReduceDeiTConfig, TokenReduceViTConfig
from .modeling.modeling_tokenreduce_deit import (
    TokenReduceDeiTForImageClassification,
    TokenReduceDeiTForImageClassificationWithTeacher,
    TokenReduceDeiTModel,
)
from .modeling.modeling_tokenreduce_vit import TokenReduceViTForImageClassification, TokenReduceViTModel
from .thresholds import load_thresholds, save_thresholds


__version__ = "0.1.0"

__all__ = [
    "ATSConfig",
    "BATConfig",
    "DLViTConfig",
    "EViTConfig",
    "LTMPConfig",
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
    "load_thresholds",
    "reduce_tokens",
    "restore",
    "save_thresholds",
]

# Folders that carry our code load with it through `trust_remote_code`; with this package imported, without.
AutoConfig.register("tokenreduce_vit", TokenReduceViTConfig)
AutoModel.register(TokenReduceViTConfig, TokenReduceViTModel)
AutoModelForImageClassification.register(TokenReduceViTConfig, TokenReduceViTForImageClassification)
AutoConfig.register("tokenreduce_deit", TokenReduceDeiTConfig)
AutoModel.register(TokenReduceDeiTConfig, TokenReduceDeiTModel)
AutoModelForImageClassification.register(
    TokenReduceDeiTConfig,
    (TokenReduceDeiTForImageClassification, TokenReduceDeiTForImageClassificationWithTeacher),
)
