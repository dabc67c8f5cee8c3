"""Compare two answers of items, whose scores may differ by rounding.

Where two scores are equal within rounding, their items may stand in either order, and at
the end of an answer one of them may be cut off. Anything else is a difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.serving.retriever import Retrieved


def find_difference(
    wanted: tuple[Sequence[Any], Sequence[float] | np.ndarray],
    found: Retrieved,
    tolerance: float,
) -> str | None:
    """Describe what differs between two answers; None if nothing does.

    Args:
      wanted: items and scores, best first.
      found: the answer to compare; it may be longer.
      tolerance: largest difference of a score; of one that is larger than 1, relative.
    """
    items, scores = wanted[0], np.asarray(wanted[1], np.float64)
    if len(found.items) < len(items):
        return f"{len(found.items)} items, not {len(items)}"
    place_of = {item: place for place, item in enumerate(found.items)}
    for place, (item, score) in enumerate(zip(items, scores, strict=True)):
        bound = tolerance * max(1.0, abs(score))
        at_place = float(found.scores[place])
        # Written so that NaN fails.
        if not abs(at_place - score) <= bound:
            return f"the score at rank {place + 1} is {at_place:.8g}, not {score:.8g}"
        if found.items[place] == item:
            continue
        other = place_of.get(item)
        # An item that was cut off has at most the last score.
        own = float(found.scores[-1 if other is None else other])
        if not abs(own - score) <= bound:
            where = "missing" if other is None else f"at rank {other + 1}"
            return f"item {item!r} of rank {place + 1} is {where}"
    return None


def count_swaps(items: Sequence[Any], found: Retrieved) -> int:
    """Number of ranks that hold another item."""
    return sum(a != b for a, b in zip(items, found.items, strict=False))
