"""Tuning: the search for the reduction that costs a model least on given images."""

from .report import TuningReport, read_tuned
from .space import Variant, even_setting, searched_methods, variants_of
from .tuner import tune


__all__ = [
    "TuningReport",
    "Variant",
    "even_setting",
    "read_tuned",
    "searched_methods",
    "tune",
    "variants_of",
]
