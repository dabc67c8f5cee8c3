"""The window, histories and statistics that events change, all as of one watermark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.serving.live.features import LiveFeatures
from tokenrec.serving.live.files import SavedState
from tokenrec.serving.live.histories import Event, Histories
from tokenrec.serving.live.schema import IS_EVENT, TIME, USER, Row
from tokenrec.serving.live.table import read_events_table
from tokenrec.serving.live.window import EventId, EventWindow

# Events of the window before those until the watermark leave it.
_LEAST_WINDOW = 256
# Events that are counted together, at the latest.
_MOST_UNCOUNTED = 1024


class EventCounts:
    """What events have changed, for one thread at a time.

    New events stand whole in the window, because earlier ones may still come. Those
    until the watermark are folded into histories and totals now and then.

    Args:
      saved: the state to go on from.
      lateness_ms: how much earlier than the newest event an event may be.

    Attributes:
      features: statistics and sums.
      histories: the newest events of each user until `folded_ms`.
      window: the events after `folded_ms`.
      folded_ms: the watermark that histories and totals stand at.
      watermark_ms: events and requests are later than it.
      last_time_ms: time of the newest event.
    """

    def __init__(self, saved: SavedState, lateness_ms: int) -> None:
        self.features = LiveFeatures(
            saved.schema,
            saved.source,
            saved.statistics,
            saved.arrays,
            saved.watermark_ms,
        )
        self.histories = Histories(saved.histories, saved.schema.computed, saved.events)
        self.window = EventWindow(saved.items)
        self.folded_ms = saved.watermark_ms
        self.watermark_ms = saved.watermark_ms
        self.last_time_ms = saved.watermark_ms
        self._lateness = lateness_ms
        self._uncounted: list[Row] = []
        if saved.window is not None:
            self.accept_again(read_events_table(saved.schema, saved.window))
        self.last_time_ms = max(self.last_time_ms, saved.newest_ms)

    def accept_again(self, events: Sequence[tuple[EventId, Row]]) -> None:
        """Count events that were accepted before.

        Those until the watermark are part of a log that was prepared since then.
        """
        self.count(
            [
                row
                for event_id, row in events
                if row[TIME] > self.folded_ms
                and self.window.add(event_id, row) == "applied"
            ]
        )

    def count(self, rows: Sequence[Row]) -> None:
        """Count events of the window, at the latest when a request asks for them."""
        # Together they cost a hundredth of what they cost one by one.
        if not rows:
            return
        self._uncounted.extend(rows)
        self.last_time_ms = max(self.last_time_ms, *(row[TIME] for row in rows))
        if len(self._uncounted) >= _MOST_UNCOUNTED:
            self.count_all()

    def count_all(self) -> None:
        """Count the events that wait for it."""
        if self._uncounted:
            rows, self._uncounted = self._uncounted, []
            self.features.count(rows)

    def compute(
        self, user: Any, time: int, rows: Sequence[Row]
    ) -> tuple[list[Event], np.ndarray]:
        """Compute the features of candidates, and of the user's events of the window.

        Returns:
          The events that histories hold, and `[C, F] float32`.
        """
        kept = self.window.of(user, before=time)
        # Those of events are computed once, unless an earlier event comes late.
        first = next(
            (i for i, e in enumerate(kept) if not self.window.is_current(e)), len(kept)
        )
        features = self.features.of_rows([*(e.row for e in kept), *rows], first)
        events = kept[first:]
        for event, values in zip(events, features[: len(events)], strict=True):
            self.window.keep(event, values.copy())
        window = [
            (e.row, e.features)
            for e in kept
            if e.row[IS_EVENT] and e.features is not None
        ]
        return window, features[len(events) :]

    def advance(self) -> None:
        """Move the watermark after the newest event, and let totals follow in time."""
        moved = self.last_time_ms - self._lateness
        self.watermark_ms = max(self.watermark_ms, moved)
        behind = self.watermark_ms - self.folded_ms
        if len(self.window) >= _LEAST_WINDOW and behind > self._lateness:
            self.fold()

    def fold(self) -> None:
        """Move the events until the watermark out of the window."""
        self.count_all()
        watermark = self.watermark_ms
        rows = self.window.until(watermark)
        if rows:
            features = self.features.of_rows(rows)
            for i, row in enumerate(rows):
                if row[IS_EVENT]:
                    self.histories.add(row[USER], (row, features[i]))
        self.features.forget(rows, watermark)
        self.window.forget(watermark)
        self.folded_ms = watermark
