"""Make the codes of different items distinct, by a last level that numbers them."""

from __future__ import annotations

import numpy as np

from tokenrec.data.semantic_id_file import collision_groups


def disambiguate(codes: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Add a last level that numbers the items with equal codes; add none if all differ.

    Within a collision the most popular item is number 0, and equally popular items are
    in the order of their ids, so that the result is deterministic.

    >>> codes = np.array([[3, 1], [3, 1], [0, 1]])
    >>> disambiguate(codes, np.array([5, 9, 1])).tolist()
    [[3, 1, 1], [3, 1, 0], [0, 1, 0]]

    Args:
      codes: `[N, L] int32`, in the order of the item ids.
      popularity: `[N]`, events of each item.

    Returns:
      `[N, L]` or `[N, L + 1] int32`.
    """
    group = collision_groups(codes)
    if not len(group) or np.bincount(group).max() == 1:
        return codes
    # Sort by collision, then popularity, then item: a collision is a contiguous run,
    # and the number of an item is its distance from the beginning of the run.
    order = np.lexsort((np.arange(len(codes)), -np.asarray(popularity), group))
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    sizes = np.diff(begins, append=len(codes))
    number = np.arange(len(codes)) - np.repeat(begins, sizes)
    last = np.empty(len(codes), codes.dtype)
    last[order] = number
    return np.concatenate([codes, last[:, None]], axis=1)
