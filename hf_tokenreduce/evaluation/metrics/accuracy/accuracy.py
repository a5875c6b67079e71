"""Top-1 and top-k accuracy for the `evaluate` library."""

from typing import Any

import datasets
import evaluate
import numpy as np


DESCRIPTION = "The share of the images whose true class is the first prediction, or is among the first k predictions."

INPUTS = """
predictions: the predicted class of each image, or a list of classes for each image, the most probable first.
references: the true class of each image.
top_k: the values of k to use, if predictions are lists. The result for 1 is called `accuracy`, for 5 `top_5_accuracy`.
"""


def top_k_hits(predictions: Any, references: Any, k: int = 1) -> np.ndarray:
    """Return whether the true class is among the first k predictions: (n,) or ranked (n, m) -> bool (n,)."""
    ranked = np.asarray(predictions)
    ranked = ranked[:, None] if ranked.ndim == 1 else ranked
    if not 1 <= k <= ranked.shape[1]:
        raise ValueError(f"k={k} is not possible: there are {ranked.shape[1]} predictions for each image.")
    return (ranked[:, :k] == np.asarray(references)[:, None]).any(axis=1)


class Accuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        references = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=[
                datasets.Features({"predictions": datasets.Value("int64"), "references": references}),
                datasets.Features(
                    {"predictions": datasets.Sequence(datasets.Value("int64")), "references": references}
                ),
            ],
        )

    def _compute(self, predictions: Any, references: Any, top_k: tuple[int, ...] = (1,)) -> dict[str, float]:
        return {
            "accuracy" if k == 1 else f"top_{k}_accuracy": float(top_k_hits(predictions, references, k).mean())
            for k in top_k
        }
