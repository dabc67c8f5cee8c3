"""The last events of each user, until the watermark: those of the log, and newer ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.serving.live.schema import Row

type UserId = int | str
# An event that has left the window: its log row, and `[F] float32`, computed features.
type Event = tuple[Row, np.ndarray]


class Past(NamedTuple):
    """The last events of a user.

    Attributes:
      given: those of the snapshot, without their computed features.
      computed: `[R, F] float32`, computed features of these.
      newer: the events after them.
    """

    given: pa.Table
    computed: np.ndarray
    newer: list[Event]


class Histories:
    """The last events of each user.

    Those of the snapshot stay a table, in which the events of a user are together and
    in the order of time; newer ones are kept as they came.

    Args:
      table: events of all users, with `user_id`.
      computed: the columns of computed features.
      events: the most events of a history.
    """

    def __init__(self, table: pa.Table, computed: Sequence[str], events: int) -> None:
        self._events = events
        self._names = computed
        self._given = table.drop_columns(list(computed)).combine_chunks()
        # Beside each other, so that those of a user are one slice.
        self._computed = np.empty((table.num_rows, len(computed)), np.float32)
        for i, name in enumerate(computed):
            self._computed[:, i] = table[name].fill_null(np.nan).to_numpy()
        self._newer: dict[UserId, deque[Event]] = {}
        # Where the events of each user begin and end.
        ids, starts, lengths = _runs(self._given)
        ends = starts + lengths
        places = zip(starts.tolist(), ends.tolist(), strict=True)
        self._places = dict(zip(ids.to_pylist(), places, strict=True))

    def add(self, user: UserId, event: Event) -> None:
        """Append an event that comes after those that are kept of its user."""
        if user not in self._newer:
            self._newer[user] = deque(maxlen=self._events)
        self._newer[user].append(event)

    def of(self, user: UserId, most: int) -> Past:
        """The last `most` events of a user."""
        newer = list(self._newer.get(user, ()))
        newer = newer[max(len(newer) - most, 0) :]
        begin, end = self._places.get(user, (0, 0))
        begin = max(begin, end - (most - len(newer)))
        given = self._given.slice(begin, end - begin)
        return Past(given, self._computed[begin:end], newer)

    def newer_events(self) -> list[Event]:
        """All events that are not in the snapshot, user after user."""
        return [event for events in self._newer.values() for event in events]

    def joined(self, newer: pa.Table) -> pa.Table:
        """All events as a table, those of each user together.

        Args:
          newer: `newer_events` as a table with the columns of the snapshot.
        """
        table = self._given
        for i, name in enumerate(self._names):
            column = pa.array(self._computed[:, i], from_pandas=True)
            table = table.append_column(name, column)
        table = pa.concat_tables([table, newer.select(table.column_names)])
        # Stably: the events of a user keep their order, newer ones are later.
        order = pc.sort_indices(table, sort_keys=[("user_id", "ascending")])
        table = table.take(order)
        _, starts, lengths = _runs(table)
        row = np.arange(table.num_rows)
        from_end = np.repeat(starts + lengths, lengths) - row
        return table.filter(pa.array(from_end <= self._events))


def _runs(table: pa.Table) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Users of a table, and where the events of each begin, and how many they are."""
    user = table["user_id"].combine_chunks().dictionary_encode()
    codes = user.indices.to_numpy()
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    ids = user.dictionary.take(pa.array(codes[starts], pa.int32()))
    return ids, starts, np.diff(starts, append=len(codes))
