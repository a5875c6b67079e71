"""Evaluation: measure what a reduction costs in accuracy, and what it saves in multiply-adds and in time."""

from .accuracy import AccuracyReport, evaluate_model
from .compare import compare, facts_for
from .comparison import Comparison
from .compute import dense_multiply_adds, describe_compute, measured_multiply_adds, total_multiply_adds
from .features import FeatureReport, evaluate_features, nearest_neighbour_classes, patch_features, pooled_features
from .metrics import metric_path
from .pareto import pareto_plot
from .settings import default_reductions
from .speed import benchmark
from .speed_report import BenchmarkReport, combine
from .zero_shot import ZeroShotClassifier, class_names_of, zero_shot_classifier


__all__ = [
    "AccuracyReport",
    "BenchmarkReport",
    "Comparison",
    "FeatureReport",
    "ZeroShotClassifier",
    "benchmark",
    "class_names_of",
    "combine",
    "compare",
    "default_reductions",
    "dense_multiply_adds",
    "describe_compute",
    "evaluate_features",
    "evaluate_model",
    "facts_for",
    "measured_multiply_adds",
    "metric_path",
    "nearest_neighbour_classes",
    "pareto_plot",
    "patch_features",
    "pooled_features",
    "total_multiply_adds",
    "zero_shot_classifier",
]
