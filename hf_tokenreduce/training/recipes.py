"""Training recipes of each method: "paper", after its authors, and "quick", a short training for small data sets.

A recipe is a dictionary of arguments of `TokenReduceTrainingArguments`. Arguments that a recipe does not contain keep
their defaults. `Method.paper_recipe` says which values come from the authors and which are our own decisions.
`AUGMENTATION` has arguments of `TrainTransform` and `Collator`; the authors fine-tune with the strong one.
"""

from typing import Any

from ..methods import METHODS


AUGMENTATION: dict[str, dict[str, Any]] = {
    "none": {"scale": (1.0, 1.0), "ratio": (1e-3, 1e3), "flip": 0.0},
    "light": {"scale": (0.5, 1.0)},
    "strong": {"scale": (0.08, 1.0), "color_jitter": 0.4, "erasing": 0.25, "mixup": 0.8, "cutmix": 1.0},
}


def recipe(method: str, variant: str = "quick") -> dict[str, Any]:
    """Return the training arguments of a method's recipe.

    Args:
        method: Name of the method, such as "tome".
        variant: "paper" follows the authors as far as they published their training, and
            `METHODS[method].paper_recipe` says which values are our own decisions. "quick" is for small data sets.

    Returns:
        `dict`: Arguments of `TokenReduceTrainingArguments`.

    Example:
        >>> arguments = TokenReduceTrainingArguments("out", **{**recipe("bat"), "num_train_epochs": 5})
    """
    if method not in METHODS:
        raise ValueError(f"There is no recipe for {method!r}. The methods are: {', '.join(METHODS)}.")
    recipes = METHODS[method].recipes
    if variant not in recipes:
        raise ValueError(f"The variant of a recipe must be {' or '.join(recipes)}, got {variant!r}.")
    return dict(recipes[variant])
