"""How often two models predict the same class, and what became right or wrong, for the `evaluate` library."""

from typing import Any

import datasets
import evaluate
import numpy as np


DESCRIPTION = "The share of the images for which a model predicts the class that another model predicts."

INPUTS = """
predictions: the class that the model predicts for each image.
references: the class that the other model, such as the model before token reduction, predicts for each image.
labels: the true class of each image, optional. With it the metric also counts the images that became right or wrong.
"""


def flips(predictions: Any, references: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the images that only the model gets right, and of those that only the other gets right."""
    predictions, references, labels = (np.asarray(values) for values in (predictions, references, labels))
    right, was_right = predictions == labels, references == labels
    return np.flatnonzero(right & ~was_right), np.flatnonzero(~right & was_right)


def agreement(predictions: Any, references: Any) -> float:
    """Return the share of the images for which both are the same."""
    return float((np.asarray(predictions) == np.asarray(references)).mean())


class Agreement(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        values = {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation="", inputs_description=INPUTS, features=datasets.Features(values)
        )

    def _compute(self, predictions: Any, references: Any, labels: Any = None) -> dict[str, float]:
        found: dict[str, float] = {"agreement": agreement(predictions, references)}
        if labels is not None:
            gained, lost = flips(predictions, references, labels)
            found |= {"became_right": len(gained), "became_wrong": len(lost)}
        return found
