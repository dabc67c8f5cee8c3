"""Events since the watermark: whole, by user, each once."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tokenrec.serving.live.schema import (
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


@dataclasses.dataclass(slots=True)
class KeptEvent:
    """An event of the window.

    Attributes:
      order: what the events of a user are sorted by; its first part is the time.
      row: the log row.
      features: `[F] float32`, its computed features, None before they were asked for.
      stamp: events that had come when they were computed.
    """

    order: tuple[Any, ...]
    row: Row
    features: np.ndarray | None = None
    stamp: int = 0


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
        self._by_user: dict[Any, list[KeptEvent]] = {}
        # Events that have come so far, and of some of these their number and time, both
        # ascending: all events since then are not earlier than that.
        self._stamp = 0
        self._earliest: list[tuple[int, int]] = []

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
        kept = KeptEvent(self._order(row), row)
        bisect.insort(self._by_user.setdefault(row[USER], []), kept, key=_order_of)
        self._stamp += 1
        while self._earliest and self._earliest[-1][1] >= row[TIME]:
            self._earliest.pop()
        self._earliest.append((self._stamp, row[TIME]))
        return "applied"

    def of(self, user: Any, before: int) -> list[KeptEvent]:
        """The events of a user before a time, in order."""
        kept = self._by_user.get(user, [])
        return kept[: bisect.bisect_left(kept, (before,), key=_order_of)]

    def is_current(self, event: KeptEvent) -> bool:
        """Whether no event has come that changes the computed features of this one."""
        if event.features is None:
            return False
        since = bisect.bisect_right(self._earliest, event.stamp, key=lambda e: e[0])
        return since == len(self._earliest) or (
            self._earliest[since][1] >= event.row[TIME]
        )

    def keep(self, event: KeptEvent, features: np.ndarray) -> None:
        """Keep the computed features of an event, as of now."""
        event.features, event.stamp = features, self._stamp

    def until(self, watermark: int) -> list[Row]:
        """All events until a time, in the order of time, those of a user in order."""
        old = [
            event
            for kept in self._by_user.values()
            for event in kept[: bisect.bisect_right(kept, watermark, key=_time_of)]
        ]
        old.sort(key=_time_of)
        return [event.row for event in old]

    def forget(self, watermark: int) -> None:
        """Remove the events until a time."""
        self._by_id = {k: r for k, r in self._by_id.items() if r[TIME] > watermark}
        self._by_key = {k: r for k, r in self._by_key.items() if r[TIME] > watermark}
        rest = {
            user: kept[bisect.bisect_right(kept, watermark, key=_time_of) :]
            for user, kept in self._by_user.items()
        }
        self._by_user = {user: kept for user, kept in rest.items() if kept}
        # Of those until the watermark the last one says as much as all of them.
        old = bisect.bisect_right(self._earliest, watermark, key=lambda e: e[1])
        del self._earliest[: max(old - 1, 0)]

    def events(self) -> Iterator[tuple[EventId, Row]]:
        """All events with their ids; one that came with two ids comes twice."""
        return iter(self._by_id.items())

    def _order(self, row: Row) -> tuple[Any, ...]:
        """What the events of a user are sorted by, as `prepare` sorts log rows."""
        item = row[ITEM]
        place = int(np.searchsorted(self._items, item))
        known = place < len(self._items) and self._items[place] == item
        return row[TIME], row[REQUEST], not known, item, row[IS_SCORED]


def _order_of(event: KeptEvent) -> tuple[Any, ...]:
    return event.order


def _time_of(event: KeptEvent) -> int:
    time: int = event.order[0]
    return time
