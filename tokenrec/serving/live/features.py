"""Features that are computed from earlier events: statistics, and sums of the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenrec.data.past.declaration import PastStatistics
from tokenrec.data.past.live import LivePast
from tokenrec.serving.live.schema import LiveSchema, Row
from tokenrec.serving.live.sums import live_sums

# What the names of arrays begin with in `state/`, with declared statistics.
_PAST, _SOURCE = "past_", "source_"


class LiveFeatures:
    """Statistics of the past and the source's own sums, as of any recent time.

    Args:
      schema: columns of events.
      source: name of the source.
      statistics: the declaration as JSON; None if there is none.
      arrays: totals, by the names of `prepare`'s `state/`.
      watermark_ms: time until which they count events.

    Raises:
      InputError: the totals do not fit, or the sums of the source cannot go on.
    """

    def __init__(
        self,
        schema: LiveSchema,
        source: str,
        statistics: dict[str, Any] | None,
        arrays: Mapping[str, np.ndarray],
        watermark_ms: int,
    ) -> None:
        self._schema = schema
        self._past: LivePast | None = None
        self._head = ""
        if statistics is not None:
            declared = PastStatistics.from_json(statistics)
            own_features = [f.name for f in declared.features(schema.schema)]
            plain = schema.schema.without(own_features)
            # Sources that declare statistics themselves have no `past_` (delimited).
            self._head = _PAST if f"{_PAST}declaration" in arrays else ""
            own = _those(arrays, self._head)
            self._past = LivePast(declared, plain, own, watermark_ms)
            arrays = _those(arrays, _SOURCE) if self._head else {}
        self._sums = live_sums(source, arrays)
        needed = self._past.key_columns() if self._past else set()
        needed |= set(self._sums.columns) if self._sums else set()
        # Features that a request has to give so that others can be computed.
        self.needed = [f for f in schema.schema.group("row") if f.name in needed]
        means = self._past.mean_columns() if self._past else set()
        self._columns = [
            name
            for name in schema.row_columns
            if name in needed | means or name in _ALWAYS or name in schema.labels
        ]
        self.computed = schema.computed

    def check(self, rows: Sequence[Row]) -> None:
        """Check that log rows can be counted; change nothing.

        Raises:
          InputError: a value is too large, or out of range.
        """
        table = self._schema.table(rows, self._columns)
        if self._past is not None:
            self._past.check(table)
        if self._sums is not None:
            self._sums.check(table)

    def count(self, rows: Sequence[Row]) -> None:
        """Count events that were checked, later than the watermark, in any order."""
        ordered = sorted(rows, key=lambda row: row[2])
        table = self._schema.table(ordered, self._columns)
        if self._past is not None:
            self._past.count(table)
        if self._sums is not None:
            self._sums.count(table)

    def of_rows(self, rows: Sequence[Row], first: int = 0) -> np.ndarray:
        """Compute the features of log rows; count nothing.

        Args:
          rows: as the table of `LivePast.of_rows`.
          first: the first row whose features are wanted.

        Returns:
          `[R - first, F] float32` in the order of `computed`, NaN where missing.
        """
        table = self._schema.table(rows, self._columns)
        out: dict[str, np.ndarray] = {}
        if self._past is not None:
            past = self._past.of_rows(table, first)
            out |= {name: values[first:] for name, values in past.items()}
        if self._sums is not None:
            out |= self._sums.of_rows(table.slice(first))
        features = np.empty((len(rows) - first, len(self.computed)), np.float32)
        for i, name in enumerate(self.computed):
            features[:, i] = out[name]
        return features

    def forget(self, rows: Sequence[Row], watermark_ms: int) -> None:
        """Move the watermark.

        Args:
          rows: all events until then, in the order of time.
          watermark_ms: milliseconds.
        """
        if self._past is not None:
            self._past.forget(self._schema.table(rows, self._columns), watermark_ms)
        if self._sums is not None:
            self._sums.forget(watermark_ms)

    def state(self) -> dict[str, np.ndarray]:
        """Return the totals at the watermark, by the names of `prepare`'s `state/`."""
        arrays: dict[str, np.ndarray] = {}
        if self._past is not None:
            arrays |= {self._head + n: a for n, a in self._past.state().items()}
        if self._sums is not None:
            head = _SOURCE if self._past is not None else ""
            arrays |= {head + n: a for n, a in self._sums.state().items()}
        return arrays


_ALWAYS = ("user_id", "item_id", "time_ms", "event", "scored")


def _those(arrays: Mapping[str, np.ndarray], head: str) -> dict[str, np.ndarray]:
    """The arrays whose name begins with `head`, without it."""
    return {n.removeprefix(head): a for n, a in arrays.items() if n.startswith(head)}
