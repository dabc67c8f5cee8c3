"""Number keys that come block by block, in memory of 16 bytes a key."""

from __future__ import annotations

import numpy as np

# New keys that are not merged with the others yet.
_MOST_RECENT = 1 << 16


class KeyIndex:
    """Numbers of keys, 0, 1, ... in the order in which they came.

    New keys go to a small sorted array, which is merged into the large one now and then,
    so that a key is not moved with every block of a long log.

    Args:
      ids: `[N] uint64`, ascending: the keys 0 to N - 1.
    """

    def __init__(self, ids: np.ndarray | None = None) -> None:
        ids = np.zeros(0, np.uint64) if ids is None else ids
        # Ascending ids, and the number of each.
        self._merged = ids, np.arange(len(ids))
        self._recent = ids[:0], np.arange(0)

    def __len__(self) -> int:
        return len(self._merged[0]) + len(self._recent[0])

    def add(self, ids: np.ndarray) -> np.ndarray:
        """Return the numbers of ascending, distinct `ids: [n]`, new ones included."""
        place = self.find(ids)
        new = np.flatnonzero(place < 0)
        if not len(new):
            return place
        place[new] = len(self) + np.arange(len(new))
        self._recent = _insert(self._recent, ids[new], place[new])
        if len(self._recent[0]) > _MOST_RECENT + len(self._merged[0]) // 4:
            self._merge()
        return place

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the numbers of distinct `ids: [n]`, -1 of those that did not come."""
        place = _find(self._merged, ids)
        if len(self._recent[0]):
            rest = np.flatnonzero(place < 0)
            place[rest] = _find(self._recent, ids[rest])
        return place

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Return all ids in ascending order, `[N] uint64`, and their numbers."""
        self._merge()
        return self._merged

    def add_from(
        self, other: KeyIndex, ids: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Add those of `ids: [n]` that did not come yet.

        Returns:
          Of the added ids that another index has: their numbers here, and there.
        """
        ids = np.unique(ids)
        ids = ids[self.find(ids) < 0]
        here, there = self.add(ids), other.find(ids)
        return here[there >= 0], there[there >= 0]

    def _merge(self) -> None:
        if not len(self._recent[0]):
            return
        self._merged = _insert(self._merged, *self._recent)
        self._recent = self._recent[0][:0], self._recent[1][:0]


def _find(table: tuple[np.ndarray, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """Numbers of `ids: [n]` in a table of ascending ids, -1 where they are not."""
    known_ids, places = table
    if not len(known_ids):
        return np.full(len(ids), -1)
    # An id after the last one is compared with the last one, and differs.
    at = np.minimum(known_ids.searchsorted(ids), len(known_ids) - 1)
    return np.where(known_ids[at] == ids, places[at], -1)


def _insert(
    table: tuple[np.ndarray, np.ndarray], ids: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Add ascending ids that a table lacks."""
    at = np.searchsorted(table[0], ids)
    return np.insert(table[0], at, ids), np.insert(table[1], at, places)
