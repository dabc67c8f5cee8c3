"""Statistics of the past of a log that still grows, event by event.

`prepare` reads a log once, in the order of time. A server goes on from the totals that
it ended with: events are counted as they arrive, a little out of order, and statistics
are asked for at any time after a *watermark*, before which no event is accepted any
more. They have the bits of a log that has all of these events in order:

- Totals per key are `LiveTotals`.
- Times and last events of users are those at the watermark, and the caller gives the
  user's events since then together with the rows that are asked for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from tokenrec.data.past import measures as m
from tokenrec.data.past.declaration import PastStatistics, time_names
from tokenrec.data.past.features import PastFeatures
from tokenrec.data.past.keys import hash_column
from tokenrec.data.past.live_totals import LiveTotals
from tokenrec.data.past.plan import Key, overflow_problem
from tokenrec.data.past.runs import TotalOverflowError
from tokenrec.data.past.totals import KeyTotals
from tokenrec.data.schema import Schema


class LivePast(PastFeatures):
    """Statistics of the past that go on from the state of a prepared log.

    Args:
      statistics: the declaration, which was checked.
      schema: schema of the source, without the statistics.
      state: what `PastFeatures.state` returned.
      last_time_ms: the watermark: time of the last row of that log.

    Raises:
      InputError: the state is of another declaration.
    """

    def __init__(
        self,
        statistics: PastStatistics,
        schema: Schema,
        state: Mapping[str, np.ndarray],
        last_time_ms: int,
    ) -> None:
        super().__init__(statistics, schema)
        self.resume(state, last_time_ms)
        self._start()
        # The totals are copies of the arrays, which take as much memory.
        self._earlier = None
        self._live = {key: LiveTotals(part) for key, part in self._totals.items()}
        self._totals: dict[Key, KeyTotals] = dict(self._live)

    def key_columns(self) -> set[str]:
        """Names of the columns that keys are made of."""
        return set(self._names)

    def mean_columns(self) -> set[str]:
        """Names of the dense features whose values are counted."""
        means = {name for part in self._declared.keys for name in part.means}
        return means | {self._declared.times.idle_after} - {""}

    def check(self, table: pa.Table) -> None:
        """Check that the values of log rows can be counted.

        Raises:
          InputError: one is too large for exact sums.
        """
        for part in self._declared.keys:
            for name in part.means:
                m.transformed(table, self._schema.feature(name))

    def count(self, table: pa.Table) -> None:
        """Count events, all later than the watermark, in the order of time.

        Args:
          table: log rows; none repeats another, or one that was counted.

        Raises:
          InputError: a total is too large for exact sums; the totals are of no use
            then.
        """
        columns = self._columns.of_rows(table)
        measures = self._measures(table, columns)
        for key, live in self._live.items():
            _, keys, time, values = self._entries(key, table, columns, measures)
            try:
                live.count(keys, time, values)
            except TotalOverflowError as error:
                raise overflow_problem(key, self._plans[key], error) from error

    def of_rows(self, table: pa.Table, first: int = 0) -> dict[str, np.ndarray]:
        """Compute the statistics of log rows; nothing is counted.

        Args:
          table: log rows in the order of time, later than the watermark: of each user
            all events that were counted since then and are not later than the user's
            last row here, and the rows that are asked for, which are no events.
          first: the first row whose statistics are wanted; those before it are there
            for the others.

        Returns:
          Feature -> `[R] float64`, NaN where missing; of no use before `first`.
        """
        view = copy.copy(self)
        view._begin()
        wanted = np.arange(table.num_rows) >= first
        if self._declared.unscored != "full":
            # Others have none.
            wanted &= m.flags(table, "scored")
        time = table["time_ms"].to_numpy()[wanted]
        since = int(time[0]) if len(time) else np.iinfo(np.int64).max
        view._totals = {key: _Since(live, since) for key, live in self._live.items()}
        user = hash_column(table["user_id"], "column 'user_id'").first_of_each()
        view._times.take_over(self._times, user)
        for key, windows in view._windows.items():
            windows.take_over(self._windows[key], user)
        return view._update(table)

    def forget(self, table: pa.Table, watermark: int) -> None:
        """Move the watermark.

        Args:
          table: all events that were counted and are not later than it, in the order of
            time.
          watermark: milliseconds.
        """
        if table.num_rows:
            columns = self._columns.of_rows(table)
            measures = self._measures(table, columns)
            if time_names(self._declared.times):
                self._update_times(table, columns, measures)
            for key in self._windows:
                rows, keys, _, _ = self._entries(key, table, columns, measures)
                self._update_window(key, table, columns, measures, rows, keys)
        for live in self._live.values():
            live.forget(watermark)


class _Since(KeyTotals):
    """Totals that are read from a time on, and 0 before.

    Args:
      live: the totals.
      since: milliseconds.
    """

    def __init__(self, live: LiveTotals, since: int) -> None:
        self._live = live
        self._since = since

    def update(
        self, key: np.ndarray, time: np.ndarray, values: np.ndarray
    ) -> list[np.ndarray]:
        """Sum the strictly earlier entries, as that of `LiveTotals`."""
        first = int(np.searchsorted(time, self._since))
        if first == 0:
            return self._live.update(key, time, values)
        sums = self._live.update(key[first:], time[first:], values[first:])
        return [np.concatenate([np.zeros((first, s.shape[1])), s]) for s in sums]
