"""How often a key occurred before a time: counts that cannot see the present, nor anything after it."""

from __future__ import annotations

import numpy as np


class PastCounts:
    """Counts, for any (key, time), the given pairs that have this key and a time strictly earlier.

    `key, time: [N]` integers. Building sorts once, a query is two binary searches.

    >>> counts = PastCounts(np.array([7, 7, 9]), np.array([10, 20, 10]))
    >>> counts.before(np.array([7, 7, 7, 9, 8]), np.array([10, 11, 99, 5, 99])).tolist()
    [0, 1, 2, 0, 0]
    """

    def __init__(self, key: np.ndarray, time: np.ndarray) -> None:
        self._first = int(time.min()) if len(time) else 0
        self._span = int(time.max()) - self._first + 1 if len(time) else 1
        self._bits = self._span.bit_length()
        self._key, rank = np.unique(key, return_inverse=True)
        if len(self._key).bit_length() + self._bits > 62:
            raise OverflowError(
                f"{len(self._key)} keys over a span of {self._span} do not pack into 63 bits"
            )
        self._pairs = np.sort(
            rank.astype(np.int64) << self._bits | (time - self._first)
        )

    def before(self, key: np.ndarray, time: np.ndarray) -> np.ndarray:
        """`key, time: [Q] -> [Q] int64`; an unseen key counts 0."""
        if not len(self._key):
            return np.zeros(len(key), np.int64)
        rank = np.searchsorted(self._key, key)
        seen = self._key[np.minimum(rank, len(self._key) - 1)] == key
        pair = rank << self._bits
        low = np.searchsorted(self._pairs, pair)
        high = np.searchsorted(
            self._pairs, pair | np.clip(time - self._first, 0, self._span)
        )
        return np.where(seen, high - low, 0)
