"""Tuning: search for the reduction that changes a model least on given images."""

from .found import bring_learned, held_out_from
from .report import TuningReport, read_tuned
from .space import Variant, even_setting, searched_methods, variants_of
from .tuner import tune


__all__ = [
    "TuningReport",
    "Variant",
    "bring_learned",
    "even_setting",
    "held_out_from",
    "read_tuned",
    "searched_methods",
    "tune",
    "variants_of",
]
