"""Descriptions of the methods, which the rest of the package reads. `register_method` adds a method of your own."""

from typing import Any

from ..modeling.configuration_base import ReductionConfig
from .ats import ATS
from .bat import BAT
from .diffrate import DIFFRATE
from .dlvit import DLVIT
from .dtem import DTEM
from .evit import EVIT
from .ltmp import LTMP
from .mctf import MCTF
from .method import Method, spread_layers
from .pitome import PITOME
from .ppt import PPT
from .protected import PROTECTED
from .register import register_method
from .shift import SHIFT
from .sit import SIT
from .tome import TOME
from .topk import TOPK


# The methods by name, in the order in which tables and pictures show them.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (TOME, EVIT, TOPK, BAT, SIT, DLVIT, ATS, LTMP, PITOME, DIFFRATE, PPT, MCTF, DTEM, SHIFT, PROTECTED)
}

# The description of a model that reduces nothing.
DENSE = Method(ReductionConfig, "dense", "none", "Nothing is reduced: every token goes through every layer.")


def find_method(name: Any) -> Method:
    """Find the description of a method.

    Args:
        name: Name of the method, such as "tome", or its configuration class, such as `ToMeConfig`. Anything else
            raises a `ValueError` that lists the methods.
    """
    method = name if isinstance(name, str) else getattr(name, "method", None)
    if not isinstance(name, (str, type)) or method not in METHODS:
        raise ValueError(
            f"There is no method {name!r}. The methods are: {', '.join(METHODS)}. Give one of these names. A "
            'setting with values is JSON in a command, such as {"method": "tome", "r": 13}, and in Python '
            "ToMeConfig(r=13)."
        )
    return METHODS[method]


def method_of(reduction: Any) -> Method:
    """Return the description of the method of a setting.

    Args:
        reduction: A method configuration, or None, whose description is `DENSE`. A method that is not registered,
            which a model from the Hub can bring along, has a description with its name only.
    """
    name = getattr(reduction, "method", None)
    if name is None:
        return DENSE
    return METHODS.get(name) or Method(type(reduction), name, "a method from outside this package", "")


__all__ = ["DENSE", "METHODS", "Method", "find_method", "method_of", "register_method", "spread_layers"]
