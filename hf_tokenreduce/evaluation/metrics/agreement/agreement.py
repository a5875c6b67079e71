"""How often two models say the same, and what became right or wrong, as a module of the `evaluate` library."""

from typing import Any

import datasets
import evaluate
import numpy as np


DESCRIPTION = "The share of the images for which a model predicts the class that another model predicts."

INPUTS = """
predictions: the class that the model predicts for each image.
references: the class that the other model, such as the one before token reduction, predicts.
labels: the true classes, if they are known: then also how many images flipped either way.
"""


def flips(predictions: Any, references: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """The indices of the images that only the model gets right, and of those that only the other does."""
    predictions, references, labels = (np.asarray(values) for values in (predictions, references, labels))
    right, was_right = predictions == labels, references == labels
    return np.flatnonzero(right & ~was_right), np.flatnonzero(~right & was_right)


def agreement(predictions: Any, references: Any) -> float:
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
