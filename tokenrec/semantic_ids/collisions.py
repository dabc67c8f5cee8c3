"""Make the codes of different items distinct."""

from __future__ import annotations

import numpy as np

from tokenrec.data.semantic_id_file import collision_groups


def disambiguate(codes: np.ndarray, popularity: np.ndarray) -> np.ndarray:
    """Adds a last level that numbers the items whose codes are equal, from 0; adds none if all differ.

    `codes: [N, L] int32` in the order of the item ids, `popularity: [N]` -> `[N, L]` or `[N, L + 1]`. Within a
    collision the most popular item comes first, and equally popular ones come in the order of their ids.

    >>> disambiguate(np.array([[3, 1], [3, 1], [0, 1]]), np.array([5, 9, 1])).tolist()
    [[3, 1, 1], [3, 1, 0], [0, 1, 0]]
    """
    group = collision_groups(codes)
    if not len(group) or np.bincount(group).max() == 1:
        return codes
    order = np.lexsort((np.arange(len(codes)), -np.asarray(popularity), group))
    opens = np.flatnonzero(np.diff(group[order], prepend=-1))
    position = np.arange(len(codes)) - np.repeat(
        opens, np.diff(opens, append=len(codes))
    )
    last = np.empty(len(codes), codes.dtype)
    last[order] = position
    return np.concatenate([codes, last[:, None]], axis=1)
