"""Evaluation: what a reduction costs in accuracy and what it saves, by arithmetic and by the clock."""

from .accuracy import AccuracyReport, evaluate_model
from .compare import Comparison, compare, default_reductions
from .compute import dense_multiply_adds, describe_compute, measured_multiply_adds, total_multiply_adds
from .metrics import metric_path
from .pareto import pareto_plot
from .speed import benchmark
from .speed_report import BenchmarkReport, combine


__all__ = [
    "AccuracyReport",
    "BenchmarkReport",
    "Comparison",
    "benchmark",
    "combine",
    "compare",
    "default_reductions",
    "dense_multiply_adds",
    "describe_compute",
    "evaluate_model",
    "measured_multiply_adds",
    "metric_path",
    "pareto_plot",
    "total_multiply_adds",
]
