"""How each method is trained: its authors' way, and a short one for small data sets.

The values are arguments of `TokenReduceTrainingArguments`; what is not named keeps its default. `AUGMENTATION` has
arguments of `TrainTransform` and `Collator`: the papers' fine-tunes use the strong one.
"""

from typing import Any

from ..methods import METHODS


AUGMENTATION: dict[str, dict[str, Any]] = {
    "none": {"scale": (1.0, 1.0), "ratio": (1e-3, 1e3), "flip": 0.0},
    "light": {"scale": (0.5, 1.0)},
    "strong": {"scale": (0.08, 1.0), "color_jitter": 0.4, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0},
}


def recipe(method: str, variant: str = "quick") -> dict[str, Any]:
    """Arguments of `TokenReduceTrainingArguments` for a method: "paper", as its authors trained, or "quick", for small
    data sets. `TokenReduceTrainingArguments("out", **{**recipe("bat"), "num_train_epochs": 5})` changes one.
    """
    if method not in METHODS:
        raise ValueError(f"There is no recipe for {method!r}. The methods are: {', '.join(METHODS)}.")
    recipes = METHODS[method].recipes
    if variant not in recipes:
        raise ValueError(f"A recipe's variant is {' or '.join(recipes)}, got {variant!r}.")
    return dict(recipes[variant])
