"""Metrics as modules of the `evaluate` library: `evaluate.load(str(metric_path("accuracy")))`, offline."""

from pathlib import Path


METRICS = ("accuracy", "agreement")


def metric_path(name: str) -> Path:
    """Return the folder of a metric, for `evaluate.load`.

    Args:
        name: "accuracy" or "agreement".

    Returns:
        The folder.

    Example:
        >>> evaluate.load(str(metric_path("accuracy"))).compute(predictions=[1, 0], references=[1, 1])
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}. The metrics are: {', '.join(METRICS)}.")
    return Path(__file__).resolve().parent / name
