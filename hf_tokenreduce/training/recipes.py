"""How each method is trained: after its authors, and a short way for small data sets.

The values are arguments of `TokenReduceTrainingArguments`; what is not named keeps its default. `Method.paper_recipe`
says which values are the authors' and which are ours. `AUGMENTATION` has arguments of `TrainTransform` and `Collator`:
the papers' fine-tunes use the strong one.
"""

from typing import Any

from ..methods import METHODS


AUGMENTATION: dict[str, dict[str, Any]] = {
    "none": {"scale": (1.0, 1.0), "ratio": (1e-3, 1e3), "flip": 0.0},
    "light": {"scale": (0.5, 1.0)},
    "strong": {"scale": (0.08, 1.0), "color_jitter": 0.4, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0},
}


def recipe(method: str, variant: str = "quick") -> dict[str, Any]:
    """Give the arguments of `TokenReduceTrainingArguments` for a method.

    Args:
        method: Its name.
        variant: "paper", after its authors as far as they published it (`METHODS[method].paper_recipe` says what is
            ours), or "quick", for small data sets.

    Returns:
        `dict`: The arguments.

    Example:
        >>> arguments = TokenReduceTrainingArguments("out", **{**recipe("bat"), "num_train_epochs": 5})
    """
    if method not in METHODS:
        raise ValueError(f"There is no recipe for {method!r}. The methods are: {', '.join(METHODS)}.")
    recipes = METHODS[method].recipes
    if variant not in recipes:
        raise ValueError(f"A recipe's variant is {' or '.join(recipes)}, got {variant!r}.")
    return dict(recipes[variant])
