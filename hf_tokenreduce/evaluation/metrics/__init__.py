"""Metrics as modules of the `evaluate` library: `evaluate.load(str(metric_path("accuracy")))`, offline."""

from pathlib import Path


METRICS = ("accuracy", "agreement")


def metric_path(name: str) -> Path:
    """The folder that `evaluate.load` takes."""
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}. The metrics are: {', '.join(METRICS)}.")
    return Path(__file__).resolve().parent / name
