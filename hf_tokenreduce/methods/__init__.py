"""The methods, described: what every room of this package reads. A method that is not listed here is added by
`register_method`."""

from typing import Any

from ..modeling.configuration_base import ReductionConfig
from .ats import ATS
from .bat import BAT
from .diffrate import DIFFRATE
from .dlvit import DLVIT
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


# By name, in the order in which tables and pictures show them.
METHODS: dict[str, Method] = {
    method.name: method
    for method in (TOME, EVIT, TOPK, BAT, SIT, DLVIT, ATS, LTMP, PITOME, DIFFRATE, PPT, MCTF, SHIFT, PROTECTED)
}

# What a model does that reduces nothing.
DENSE = Method(ReductionConfig, "dense", "none", "Nothing is reduced: every token goes through every layer.")


def find_method(name: Any) -> Method:
    """Find a method by its name or its configuration class; what is neither raises a ValueError that lists them."""
    found = name if isinstance(name, str) else getattr(name, "method", None)
    if not isinstance(name, (str, type)) or found not in METHODS:
        raise ValueError(
            f"There is no method {name!r}. The methods are: {', '.join(METHODS)}. A configuration class, such as "
            "ToMeConfig, names one too."
        )
    return METHODS[found]


def method_of(reduction: Any) -> Method:
    """Return the description of a setting's method. Where nothing is reduced it is `DENSE`; of a method that is not
    registered here, which a model from the Hub can bring along, one that says no more than its name."""
    name = getattr(reduction, "method", None)
    if name is None:
        return DENSE
    return METHODS.get(name) or Method(type(reduction), name, "a method of others", "")


__all__ = ["DENSE", "METHODS", "Method", "find_method", "method_of", "register_method", "spread_layers"]
