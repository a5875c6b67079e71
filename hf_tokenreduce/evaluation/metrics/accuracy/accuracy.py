"""Top-1 and top-k accuracy as a module of the `evaluate` library."""

from typing import Any

import datasets
import evaluate
import numpy as np


DESCRIPTION = "The share of the images whose true class is the predicted one, or among the first k predictions."

INPUTS = """
predictions: the class predicted for each image, or for each a list of classes, the most probable first.
references: the true class of each image.
top_k: with lists, the ks to count. The key of the first prediction is `accuracy`, that of k `top_k_accuracy`.
"""


def top_k_hits(predictions: Any, references: Any, k: int = 1) -> np.ndarray:
    """bool (n,): whether the true class is among the first k predictions, which are (n,) or ranked (n, m)."""
    ranked = np.asarray(predictions)
    ranked = ranked[:, None] if ranked.ndim == 1 else ranked
    if not 1 <= k <= ranked.shape[1]:
        raise ValueError(f"k={k} predictions are to be counted, and {ranked.shape[1]} are given for each image.")
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
