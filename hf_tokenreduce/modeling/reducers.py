# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The table of methods: the name a configuration carries, and the module that does it in a layer."""

from transformers import PreTrainedConfig

from .clustering import BATReducer
from .filtering import DLViTReducer
from .hooks import Reducer
from .merging import LTMPReducer, ToMeReducer
from .pruning import EViTReducer, TopKReducer
from .sampling import ATSReducer
from .slimming import SiTReducer


REDUCERS: dict[str, type[Reducer]] = {
    "ats": ATSReducer,
    "bat": BATReducer,
    "dlvit": DLViTReducer,
    "ltmp": LTMPReducer,
    "sit": SiTReducer,
    "tome": ToMeReducer,
    "evit": EViTReducer,
    "topk": TopKReducer,
}


def build_reducer(config: PreTrainedConfig, layer: int) -> Reducer:
    """The reducer of one layer, by `config.reduction`."""
    if config.reduction is None:
        return Reducer(config, layer)
    config.reduction.check_fit(config)
    return REDUCERS[config.reduction.method](config, layer)
