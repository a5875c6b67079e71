# Copyright 2026 The hf_tokenreduce authors. Licensed under the Apache License, Version 2.0.
"""The table of methods, and how a configuration is made and its reducer built from it."""

import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .ats import ATSConfig, ATSReducer
from .bat import BATConfig, BATReducer
from .configuration_base import ReductionConfig
from .diffrate import DiffRateConfig, DiffRateReducer
from .dlvit import DLViTConfig, DLViTReducer
from .dtem import DTEMConfig, DTEMReducer
from .encoders import EncoderFacts
from .evit import EViTConfig, EViTReducer
from .extra_methods import EXTRA_METHODS
from .hooks import Reducer
from .ltmp import LTMPConfig, LTMPReducer
from .mctf import MCTFConfig, MCTFReducer
from .pitome import PiToMeConfig, PiToMeReducer
from .ppt import PPTConfig, PPTReducer
from .protected import ProtectedConfig, ProtectedReducer
from .shift import ShiftConfig, ShiftReducer
from .sit import SiTConfig, SiTReducer
from .tome import ToMeConfig, ToMeReducer
from .topk import TopKConfig, TopKReducer


class MethodClasses(NamedTuple):
    """The classes of a method: `config`, its settings, and `reducer`, which runs it in a layer."""

    config: type[ReductionConfig]
    reducer: type[Reducer]


# The key is the name of the method.
METHOD_CLASSES: dict[str, MethodClasses] = {
    str(classes.config.method): classes
    for classes in (
        MethodClasses(ToMeConfig, ToMeReducer),
        MethodClasses(EViTConfig, EViTReducer),
        MethodClasses(TopKConfig, TopKReducer),
        MethodClasses(BATConfig, BATReducer),
        MethodClasses(ATSConfig, ATSReducer),
        MethodClasses(LTMPConfig, LTMPReducer),
        MethodClasses(SiTConfig, SiTReducer),
        MethodClasses(DLViTConfig, DLViTReducer),
        MethodClasses(PiToMeConfig, PiToMeReducer),
        MethodClasses(DiffRateConfig, DiffRateReducer),
        MethodClasses(PPTConfig, PPTReducer),
        MethodClasses(MCTFConfig, MCTFReducer),
        MethodClasses(DTEMConfig, DTEMReducer),
        MethodClasses(ShiftConfig, ShiftReducer),
        MethodClasses(ProtectedConfig, ProtectedReducer),
        *(MethodClasses(*classes) for classes in EXTRA_METHODS),
    )
}


def write_extra_method(folder: str | Path, reduction: ReductionConfig | None) -> None:
    """Copy the file of a method from outside the package into a saved folder, so that the folder can run it."""
    if reduction is None:
        return
    config, reducer = METHOD_CLASSES[str(reduction.method)]
    module = sys.modules[config.__module__]
    file = Path(str(module.__file__))
    if file.parent == Path(__file__).parent:
        return  # a method of this package, or one from the folder that this model was loaded from
    code = file.read_text(encoding="utf-8")
    code = re.sub(r"^(\s*)from hf_tokenreduce\.modeling\.(\w+) import", r"\1from .\2 import", code, flags=re.M)
    (Path(folder) / file.name).write_text(code, encoding="utf-8")
    (Path(folder) / "extra_methods.py").write_text(
        f'"""The method that this model runs. It is not part of hf_tokenreduce."""\n\n'
        f"from .{file.stem} import {config.__name__}, {reducer.__name__}\n\n\n"
        f"EXTRA_METHODS = (({config.__name__}, {reducer.__name__}),)\n"
    )


def build_reducer(facts: EncoderFacts, layer: int) -> Reducer:
    """Build the reducer of one layer for `facts.reduction`."""
    if facts.reduction is None:
        return Reducer(facts, layer)
    facts.reduction.check_fit(facts)
    return METHOD_CLASSES[facts.reduction.method].reducer(facts, layer)


def parse_reduction(value: Any) -> ReductionConfig | None:
    """Make a method configuration of one, of its dictionary form, or of None, which stands for no reduction."""
    if value is None:
        return None
    if is_dataclass(value) and not isinstance(value, type) and hasattr(value, "method"):
        # It is rebuilt, because another copy of this module may have made it, whose classes are not the same.
        value = {"method": value.method, **asdict(value)}
    if not isinstance(value, Mapping):
        raise ValueError(
            f"reduction must be a method configuration such as ToMeConfig(r=13), its dictionary form such as "
            f"{{'method': 'tome', 'r': 13}}, or None for no reduction, got {value!r}."
        )
    arguments = dict(value)
    method = arguments.pop("method", None)
    names = ", ".join(sorted(METHOD_CLASSES))
    if not isinstance(method, str):
        raise ValueError(
            f"Unknown reduction method {method!r}. The methods are: {names}. A setting names its method, such as "
            "{'method': 'tome', 'r': 13}."
        )
    if method not in METHOD_CLASSES:
        raise ValueError(
            f"Unknown reduction method {method!r}. For one in a model's folder, give --trust-remote-code to the "
            f"command. Register your own method first with register_method. The methods are: {names}."
        )
    known = [field.name for field in fields(METHOD_CLASSES[method].config)]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(f"Unknown field {unknown} for the method {method!r}. Its fields are: {', '.join(known)}.")
    return METHOD_CLASSES[method].config(**arguments)
