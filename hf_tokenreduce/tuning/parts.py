"""Which images a search looks at, and which its report is measured on: no image is in both."""

import random
from collections.abc import Sequence
from typing import NamedTuple


LEAST_IMAGES = 20
MOST_SEARCHED = 500


class Parts(NamedTuple):
    """Rows of a data set. search: in the order in which growing subsets take them; report: ascending."""

    search: list[int]
    report: list[int]


def split_rows(labels: Sequence[int] | None, count: int, seed: int) -> Parts:
    """Split rows into a part to search on and a part to report on, each class in halves.

    Args:
        labels: The class of each row. None: the rows have none.
        count (`int`): How many rows there are.
        seed (`int`): Another one gives another split.

    Returns:
        `Parts`: At most 500 rows are searched on; all others are reported on.

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
    """Say how many images each round of a search looks at: about four times as many each time, all at the end."""
    sizes = [count]
    while sizes[0] >= 64:
        sizes.insert(0, max(sizes[0] // 4, 32))
    return sizes
