"""The methods, described: what every room of this package reads. A method that is not listed here is added by
`register_method`."""

from ..modeling.configuration_base import ReductionConfig
from .ats import ATS
from .bat import BAT
from .dlvit import DLVIT
from .evit import EVIT
from .ltmp import LTMP
from .method import Method, spread_layers
from .register import register_method
from .sit import SIT
from .tome import TOME
from .topk import TOPK


# By name, in the order in which tables and pictures show them.
METHODS: dict[str, Method] = {method.name: method for method in (TOME, EVIT, TOPK, BAT, SIT, DLVIT, ATS, LTMP)}

# What a model does that reduces nothing.
DENSE = Method(ReductionConfig, "dense", "none", "Nothing is reduced: every token goes through every layer.")

__all__ = ["DENSE", "METHODS", "Method", "register_method", "spread_layers"]
