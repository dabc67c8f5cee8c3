"""Statistics of scored rows as they would be if the log had ended before their split.

`tokenrec evaluate --freeze-at` scores a split as if nothing of it was known yet. A row
of valid or test that is scored therefore has its statistics twice: those of its own
time, and the *frozen* ones, which count the log rows earlier than the first scored row
of its split and no others. They are computed at the time of the row all the same: what
has a half-life decays until then, and a gap is the time of the row less that of the
user's last event before the freeze.

The totals are not copied when a split begins, since most of their keys do not come up
again. A split begins with empty totals of its own. Before a block of rows is counted, the
keys of the block that these lack are copied from the totals of the log, which are still
those of the freeze for such keys. Memory grows with the distinct keys of the rows since.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tokenrec.data.past.measures import flags
from tokenrec.data.schema import Feature
from tokenrec.data.source import SPLITS

if TYPE_CHECKING:
    from tokenrec.data.past.features import PastFeatures
_TRAIN, _VALID, _TEST = (SPLITS.index(name) for name in ("train", "valid", "test"))


class FrozenFeatures:
    """Frozen statistics of a log that is read in the order of time.

    Args:
      features: the statistics.
      earlier: time of the last row of the log that this one goes on from, milliseconds;
        all later rows are then of the split test, as `prepare --like` has them.

    Attributes:
      times: split -> from when until when it may be frozen with these statistics,
        milliseconds: no log row lies between.
    """

    def __init__(self, features: Sequence[Feature], earlier: int | None = None) -> None:
        self._features = features
        self._goes_on = earlier is not None
        self._last_time = earlier
        self._totals: dict[int, PastFeatures] = {}
        self.times: dict[str, tuple[int | None, int]] = {}

    def cut(self, table: pa.Table) -> Iterator[pa.Table]:
        """Cut a block where a split begins.

        Args:
          table: log rows in the order of time; those of a time are in one block.

        Yields:
          Parts of it, in which no split begins but at their first row.
        """
        time, split = table["time_ms"].to_numpy(), self._scored_split(table)
        begins = {0, table.num_rows}
        for number, name in enumerate(SPLITS):
            rows = np.flatnonzero(split == number)
            if number == _TRAIN or name in self.times or not len(rows):
                continue
            first = int(time[rows[0]])
            row = int(np.searchsorted(time, first))
            last = self._last_time if row == 0 else int(time[row - 1])
            self.times[name] = None if last is None else last + 1, first
            begins.add(row)
        for begin, end in itertools.pairwise(sorted(begins)):
            yield table.slice(begin, end - begin)
        self._last_time = int(time[-1])

    def of(self, table: pa.Table, live: PastFeatures) -> pa.Array:
        """Compute the frozen statistics of a part, before `live` counts it.

        Args:
          table: a part from `cut`.
          live: the statistics of the log, and its totals before the part.

        Returns:
          `[R]` lists of float32, NaN where missing; null but for scored rows of valid
          and test.
        """
        time, split = table["time_ms"].to_numpy(), self._scored_split(table)
        values = np.zeros((table.num_rows, len(self._features)), np.float32)
        for name, (_, begin) in self.times.items():
            if time[0] < begin:
                continue
            number = SPLITS.index(name)
            if number not in self._totals:
                self._totals[number] = live.without_totals()
            totals = self._totals[number]
            totals.take_over(live, table)
            rows = np.flatnonzero(split == number)
            if len(rows):
                past = totals.without_counting(table.take(pa.array(rows)))
                for column, feature in enumerate(self._features):
                    values[rows, column] = past[feature.name]
        frozen = np.isin(split, (_VALID, _TEST))
        offsets = np.concatenate([[0], np.cumsum(frozen) * len(self._features)])
        return pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()),
            pa.array(values[frozen].ravel()),
            mask=pa.array(~frozen),
        )

    def _scored_split(self, table: pa.Table) -> np.ndarray:
        """Split of each scored row, train for rows that are not: `[R] int64`."""
        split = table["split"].to_numpy().astype(np.int64)
        if self._goes_on:
            split = np.full(len(split), _TEST)
        return np.where(flags(table, "scored"), split, _TRAIN)
