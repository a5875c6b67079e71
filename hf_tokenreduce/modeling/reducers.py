# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The table of methods: the name a configuration carries, and the module that does it in a layer."""

from .clustering import BATReducer
from .encoders import EncoderFacts
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


def build_reducer(facts: EncoderFacts, layer: int) -> Reducer:
    """The reducer of one layer, by `facts.reduction`."""
    if facts.reduction is None:
        return Reducer(facts, layer)
    facts.reduction.check_fit(facts)
    return REDUCERS[facts.reduction.method](facts, layer)
