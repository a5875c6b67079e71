"""Split images into those that a search uses and those that its report is measured on. No image is in both parts."""

import random
from collections.abc import Sequence
from typing import NamedTuple


LEAST_IMAGES = 20
MOST_SEARCHED = 500


class Parts(NamedTuple):
    """Rows of a data set in two parts.

    Attributes:
        search: Rows to search on. Growing subsets take them in this order.
        report: Rows to report on, ascending.
    """

    search: list[int]
    report: list[int]


def split_rows(labels: Sequence[int] | None, count: int, seed: int) -> Parts:
    """Split rows into a part to search on and a part to report on, half of each class in each part.

    Args:
        labels: Class of each row. None: the rows have no labels.
        count (`int`): Number of rows.
        seed (`int`): Seed of the split.

    Returns:
        `Parts`: At most 500 rows to search on. All others are for the report.

    Example:
        >>> split_rows([0, 0, 1, 1], 4, seed=0)
    """
    shuffled = list(range(count))
    random.Random(seed).shuffle(shuffled)
    if labels is not None:
        shuffled.sort(key=lambda row: str(labels[row]))  # keeps the order within a class
    search = shuffled[::2]
    if len(search) > MOST_SEARCHED:
        search = [search[place * len(search) // MOST_SEARCHED] for place in range(MOST_SEARCHED)]
    random.Random(seed + 1).shuffle(search)
    return Parts(search, sorted(set(range(count)) - set(search)))


def subset_sizes(count: int) -> list[int]:
    """Return how many images each round of a search uses: about four times as many in each, all in the last."""
    sizes = [count]
    while sizes[0] >= 64:
        sizes.insert(0, max(sizes[0] // 4, 32))
    return sizes
