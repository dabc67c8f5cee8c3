"""Runs of entries that share a key, and integer sums over them.

An *entry* is what one log row adds to the totals of one key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# Sums stay below it, so that a block of log rows cannot overflow int64.
_MOST_SUM = 1 << 62


class TotalOverflowError(Exception):
    """A total is too large for int64.

    Attributes:
      column: number of the total's column.
    """

    def __init__(self, column: int) -> None:
        super().__init__(column)
        self.column = column


@dataclasses.dataclass(frozen=True)
class Runs:
    """Sums of the entries of one key, one span of time and one epoch. K runs.

    They let totals be computed for each span on its own: the totals with which a span
    begins follow from the runs of the spans before it, which are few where a key has
    many entries. A log that is read in one piece needs none.

    Attributes:
      span: `[K] int64`, number of the span of time.
      key: `[K] uint64`.
      epoch: `[K] int64`, as in totals.py.
      sums: `[K, width] int64`.
    """

    span: np.ndarray
    key: np.ndarray
    epoch: np.ndarray
    sums: np.ndarray

    @classmethod
    def merge(cls, parts: Sequence[Runs]) -> Runs:
        """Add up the runs of equal span, key and epoch, and sort by these.

        A sum that is too large becomes `_MOST_SUM`, which `check_sums` refuses.
        """
        span, key, epoch, sums = (
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(cls)
        )
        order = np.lexsort((epoch, key, span))
        span, key, epoch, sums = span[order], key[order], epoch[order], sums[order]
        starts = np.flatnonzero(run_starts(span) | run_starts(key) | run_starts(epoch))
        if not len(starts):
            return cls(span, key, epoch, sums)
        added = np.add.reduceat(sums, starts)
        # The integers may wrap around, which floats do not.
        exact = np.add.reduceat(sums.astype(np.float64), starts)
        added[np.abs(exact) >= _MOST_SUM] = _MOST_SUM
        return cls(span[starts], key[starts], epoch[starts], added)

    def select(self, where: np.ndarray | slice) -> Runs:
        """Those runs where `where: [K] bool` is true."""
        return Runs(
            self.span[where], self.key[where], self.epoch[where], self.sums[where]
        )

    def of_span(self, span: int) -> Runs:
        """The runs of a span, of runs that are sorted."""
        return self.select(slice(*np.searchsorted(self.span, [span, span + 1])))


def sum_earlier(
    parts: np.ndarray, run_start: np.ndarray, time: np.ndarray
) -> np.ndarray:
    """Sum over the earlier entries of a run, those of the same time excluded.

    Args:
      parts: `[E, width] int64`.
      run_start: `[E] bool`, True where a run begins.
      time: `[E] int64`, ascending within a run.

    Returns:
      `[E, width] int64`.
    """
    # The cumulative sum runs over all keys and may wrap around, which its differences
    # do not show.
    exclusive = np.cumsum(parts, axis=0) - parts
    index = np.arange(len(time))
    tie_start = run_start | run_starts(time)
    first_of_run = np.maximum.accumulate(np.where(run_start, index, 0))
    first_of_tie = np.maximum.accumulate(np.where(tie_start, index, 0))
    return exclusive[first_of_tie] - exclusive[first_of_run]


def check_sums(sums: np.ndarray) -> None:
    """Check that `sums: [n, width]` are not too large.

    Raises:
      TotalOverflowError: one is.
    """
    too_large = (np.abs(sums) >= _MOST_SUM).any(axis=0)
    if too_large.any():
        raise TotalOverflowError(int(np.argmax(too_large)))


def run_starts(values: np.ndarray) -> np.ndarray:
    """Whether each of `values: [n]` differs from the one before it: `[n] bool`."""
    starts = np.ones(len(values), bool)
    starts[1:] = values[1:] != values[:-1]
    return starts
