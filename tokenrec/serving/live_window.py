"""Events since the watermark: whole, by user, each once."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tokenrec.serving.live_schema import (
    IS_SCORED,
    ITEM,
    REQUEST,
    TIME,
    USER,
    Row,
)

type EventId = int | str


class Received(NamedTuple):
    """What became of events.

    Attributes:
      applied: counted, and part of histories from now on.
      repeated: known already: the id, or all columns of an event without a new value.
      late: not later than the watermark; not counted.
      ahead: later than the clock allows; not counted.
      conflicting: another event of the same user, item and time (or the same id) has
        other values; not counted.
    """

    applied: int = 0
    repeated: int = 0
    late: int = 0
    ahead: int = 0
    conflicting: int = 0


class EventWindow:
    """Events that are later than the watermark.

    Args:
      items: `[N]`, ids of the catalogue, ascending. Events of one user, time and request
        are in the order of the catalogue, new items at the end, as in a prepared log.
    """

    def __init__(self, items: np.ndarray) -> None:
        self._items = items
        self._by_id: dict[EventId, Row] = {}
        self._by_key: dict[tuple[Any, ...], Row] = {}
        # User -> rows in order, each after what it is sorted by.
        self._by_user: dict[Any, list[tuple[tuple[Any, ...], Row]]] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, event_id: EventId, row: Row) -> str:
        """Add an event, unless it repeats another one.

        Returns:
          Field of `Received` in which it counts.
        """
        key = (row[USER], row[ITEM], row[TIME], row[IS_SCORED])
        known = self._by_id.get(event_id)
        same = self._by_key.get(key)
        for other in (known, same):
            if other is not None and other != row:
                return "conflicting"
        if known is not None:
            return "repeated"
        self._by_id[event_id] = row
        if same is not None:
            return "repeated"
        self._by_key[key] = row
        place = (self._order(row), row)
        bisect.insort(self._by_user.setdefault(row[USER], []), place, key=_by_order)
        return "applied"

    def of(self, user: Any, before: int) -> list[Row]:
        """The events of a user before a time, in order."""
        rows = self._by_user.get(user, [])
        end = bisect.bisect_left(rows, (before,), key=_by_order)
        return [row for _, row in rows[:end]]

    def until(self, watermark: int) -> list[Row]:
        """All events until a time, in the order of time, those of a user in order."""
        old = [
            place
            for rows in self._by_user.values()
            for place in rows
            if place[0][0] <= watermark
        ]
        old.sort(key=lambda place: place[0][0])
        return [row for _, row in old]

    def forget(self, watermark: int) -> None:
        """Remove the events until a time."""
        self._by_id = {k: r for k, r in self._by_id.items() if r[TIME] > watermark}
        self._by_key = {k: r for k, r in self._by_key.items() if r[TIME] > watermark}
        kept = {
            user: rows[bisect.bisect_right(rows, watermark, key=_time_of) :]
            for user, rows in self._by_user.items()
        }
        self._by_user = {user: rows for user, rows in kept.items() if rows}

    def events(self) -> Iterator[tuple[EventId, Row]]:
        """All events with their ids; one that came with two ids comes twice."""
        return iter(self._by_id.items())

    def _order(self, row: Row) -> tuple[Any, ...]:
        """What the events of a user are sorted by, as `prepare` sorts log rows."""
        item = row[ITEM]
        place = int(np.searchsorted(self._items, item))
        known = place < len(self._items) and self._items[place] == item
        return row[TIME], row[REQUEST], not known, item, row[IS_SCORED]


def _by_order(place: tuple[tuple[Any, ...], Row]) -> tuple[Any, ...]:
    return place[0]


def _time_of(place: tuple[tuple[Any, ...], Row]) -> int:
    time: int = place[0][0]
    return time
