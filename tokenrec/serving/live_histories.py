"""The last events of each user, until the watermark: those of the log, and newer ones."""

from __future__ import annotations

from collections import deque

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.serving.live_schema import Row

type UserId = int | str
# An event that has left the window: its log row, and the values of computed features.
type Event = tuple[Row, tuple[float, ...]]


class Histories:
    """The last events of each user.

    Those of the snapshot stay a table, in which the events of a user are together and
    in the order of time; newer ones are kept as they came.

    Args:
      table: events of all users, with `user_id`.
      events: the most events of a history.
    """

    def __init__(self, table: pa.Table, events: int) -> None:
        self._table = table.combine_chunks()
        self._events = events
        self._newer: dict[UserId, deque[Event]] = {}
        # Where the events of each user begin and end.
        user = self._table["user_id"].combine_chunks().dictionary_encode()
        codes = user.indices.to_numpy()
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        ends = np.append(starts[1:], len(codes))[: len(starts)]
        ids = user.dictionary.take(pa.array(codes[starts])).to_pylist()
        places = zip(starts.tolist(), ends.tolist(), strict=True)
        self._places: dict[UserId, tuple[int, int]] = dict(
            zip(ids, places, strict=True)
        )

    def add(self, user: UserId, event: Event) -> None:
        """Append an event, later than those that are kept, or in its order among them."""
        if user not in self._newer:
            self._newer[user] = deque(maxlen=self._events)
        self._newer[user].append(event)

    def of(self, user: UserId, most: int) -> tuple[pa.Table, list[Event]]:
        """The last `most` events of a user: those of the snapshot, and newer ones."""
        newer = list(self._newer.get(user, ()))
        newer = newer[max(len(newer) - most, 0) :]
        begin, end = self._places.get(user, (0, 0))
        begin = max(begin, end - (most - len(newer)))
        return self._table.slice(begin, end - begin), newer

    def joined(self, newer: pa.Table) -> pa.Table:
        """All events as a table, those of each user together.

        Args:
          newer: `newer_events` as a table with the columns of the snapshot.
        """
        table = pa.concat_tables([self._table, newer.cast(self._table.schema)])
        # Stably: the events of a user keep their order, newer ones are later.
        order = pc.sort_indices(table, sort_keys=[("user_id", "ascending")])
        table = table.take(order)
        user = table["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()
        starts = np.flatnonzero(np.diff(user, prepend=-1))
        lengths = np.diff(starts, append=len(user))
        from_end = np.repeat(starts + lengths, lengths) - np.arange(len(user))
        return table.filter(pa.array(from_end <= self._events))

    def newer_events(self) -> list[Event]:
        """All events that are not in the snapshot, user after user."""
        return [event for events in self._newer.values() for event in events]
