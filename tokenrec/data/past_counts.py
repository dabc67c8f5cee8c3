"""Count how often a key occurred before a time, the present and the future excluded."""

from __future__ import annotations

import numpy as np


class PastCounts:
    """Counts of given (key, time) pairs by their key, those of earlier times only.

    Each pair is packed into one int64, the rank of the key in the high bits and the
    time in the low bits, and all are sorted once. A query is then two binary searches.

    >>> counts = PastCounts(np.array([7, 7, 9]), np.array([10, 20, 10]))
    >>> counts.before(np.array([7, 7, 7, 9, 8]), np.array([10, 11, 99, 5, 99])).tolist()
    [0, 1, 2, 0, 0]

    Args:
      key: `[N] int64`.
      time: `[N] int64`, of the same pairs.
      earlier: pairs that are earlier than all of these and all queries, as ascending
        keys `[M] int64` and the count of each `[M] int64`.

    Raises:
      OverflowError: the distinct keys and the span of times do not fit into 63 bits.
    """

    def __init__(
        self,
        key: np.ndarray,
        time: np.ndarray,
        earlier: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        none = np.zeros(0, np.int64)
        self._earlier = (none, none) if earlier is None else earlier
        self._first = int(time.min()) if len(time) else 0
        self._span = int(time.max()) - self._first + 1 if len(time) else 1
        self._bits = self._span.bit_length()
        self._key, rank = np.unique(key, return_inverse=True)
        if len(self._key).bit_length() + self._bits > 62:
            raise OverflowError(
                f"{len(self._key)} keys over a span of {self._span} do not pack into "
                "63 bits; use a coarser unit of time"
            )
        self._pairs = np.sort(
            rank.astype(np.int64) << self._bits | (time - self._first)
        )

    def before(self, key: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Count the pairs of each key before each time; an unknown key counts 0.

        Args:
          key: `[Q] int64`.
          time: `[Q] int64`.

        Returns:
          `[Q] int64`.
        """
        return self._count_earlier(key) + self._count_pairs(key, time)

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """All pairs as `earlier` of counts that go on from here: keys and counts."""
        keys = np.union1d(self._earlier[0], self._key)
        latest = np.full(len(keys), self._first + self._span)
        return keys, self.before(keys, latest)

    def _count_earlier(self, key: np.ndarray) -> np.ndarray:
        keys, counts = self._earlier
        if not len(keys):
            return np.zeros(len(key), np.int64)
        place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        return np.where(keys[place] == key, counts[place], 0)

    def _count_pairs(self, key: np.ndarray, time: np.ndarray) -> np.ndarray:
        if not len(self._key):
            return np.zeros(len(key), np.int64)
        rank = np.searchsorted(self._key, key)
        seen = self._key[np.minimum(rank, len(self._key) - 1)] == key
        pair = rank << self._bits
        low = np.searchsorted(self._pairs, pair)
        # Times outside the span are clipped into it: before the first one counts none,
        # after the last one counts all.
        offset = np.clip(time - self._first, 0, self._span)
        high = np.searchsorted(self._pairs, pair | offset)
        return np.where(seen, high - low, 0)
