"""Complete requests with what earlier events say: histories and statistics.

    state = LiveState.open(artifact / "counters", journal=Path("events.journal"))
    state.add_events({"event_id": [...], "user_id": [...], "item_id": [...], ...})
    request = state.complete(request)      # as `prepare` would have computed it

The state goes on from the end of a prepared log. A completed request has the values that
`prepare` would give to log rows with its user, items and time, if the log held the
events that were accepted (docs/guides/live_events.md).

Files: schema.py (columns), window.py (events since the watermark), histories.py (events
before it), features.py (statistics and sums), counts.py (the three of them together),
files.py (saved states), journal.py (acknowledged events on disk).
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenrec.errors import InputError
from tokenrec.serving.live.counts import EventCounts
from tokenrec.serving.live.files import SavedState, read_state, write_state
from tokenrec.serving.live.journal import Journal
from tokenrec.serving.live.request import candidate_rows, computed_columns
from tokenrec.serving.live.schema import TIME, USER, Row
from tokenrec.serving.live.table import (
    events_table,
    history_columns,
    newer_table,
    read_events_table,
)
from tokenrec.serving.live.window import EventId, Received
from tokenrec.serving.request import BadRequest, Request

MINUTE_MS = 60_000


def system_clock() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class LiveState:
    """Histories and statistics that events keep up to date; made by `open`.

    All methods may be called from any thread.

    Attributes:
      computed: features that `complete` fills in.
    """

    def __init__(
        self,
        saved: SavedState,
        *,
        lateness_ms: int,
        ahead_ms: int,
        clock: Callable[[], int] | None,
    ) -> None:
        for name, value in (("lateness_ms", lateness_ms), ("ahead_ms", ahead_ms)):
            if value < 0:
                raise InputError(f"{name}={value} must be at least 0; raise it")
        self._saved = saved
        self._schema = saved.schema
        self._lateness, self._ahead, self._clock = lateness_ms, ahead_ms, clock
        self._counts = EventCounts(saved, lateness_ms)
        self.computed = self._counts.features.computed
        self._any_item = saved.items[:1].tolist()[0] if len(saved.items) else None
        self._journal: Journal | None = None
        self._failed: Exception | None = None
        self._lock = threading.Lock()
        self._frame = saved.frame
        # The arrays are copied, and their files may be closed.
        self._saved = dataclasses.replace(saved, arrays={}, window=None)

    @property
    def watermark_ms(self) -> int:
        """Events and requests are later than it."""
        return self._counts.watermark_ms

    @property
    def last_time_ms(self) -> int:
        """Time of the newest event."""
        return self._counts.last_time_ms

    @classmethod
    def open(
        cls,
        folder: Path,
        journal: Path | None = None,
        *,
        lateness_ms: int = MINUTE_MS,
        ahead_ms: int = MINUTE_MS,
        clock: Callable[[], int] | None = system_clock,
    ) -> LiveState:
        """Open a saved state: `counters/` of an artifact, or a folder of `save`.

        Args:
          folder: the folder, which is only read.
          journal: file of events, written before `add_events` returns. Its events that
            the folder does not have are counted again. None: events are lost with the
            process.
          lateness_ms: how much earlier than the newest event an event, or a request,
            may be. Events of that long are kept whole.
          ahead_ms: how much later than the clock an event may be. A wrong clock of one
            sender would otherwise make the events of all others late.
          clock: returns milliseconds; None: events may have any time.

        Raises:
          InputError: the folder or the journal is missing, damaged, or of another kind.
        """
        state = cls(
            read_state(folder), lateness_ms=lateness_ms, ahead_ms=ahead_ms, clock=clock
        )
        if journal is not None:
            state._journal = Journal(journal)
            try:
                for table in state._journal.read(state._frame):
                    # They were accepted once, whatever the lateness is now.
                    state._counts.accept_again(read_events_table(state._schema, table))
            except BaseException:
                state._journal.close()
                raise
        state._counts.advance()
        return state

    def add_events(self, columns: Any) -> int:
        """Count events, as `receive`.

        Returns:
          Number of events that were applied.
        """
        return self.receive(columns).applied

    def receive(self, columns: Any) -> Received:
        """Count events: histories and statistics of later requests have them.

        An event is counted once, whatever how often it is sent. Events may come out of
        order by `lateness_ms`.

        Args:
          columns: lists or arrays of equal length: `event_id` (an integer or a text
            that no other event has), `user_id`, `item_id`, `time_ms`, the features of
            rows and actions that are not computed; and if wanted `label_TASK`, `event`,
            `scored` and `request`, as in a log.

        Returns:
          What became of the events. They are on disk if there is a journal.

        Raises:
          InputError: a column or a value is wrong; no event was counted.
        """
        ids, rows = self._schema.parse_events(columns)
        with self._lock:
            self._check_alive()
            self._counts.features.check(rows)
            latest = None if self._clock is None else self._clock() + self._ahead
            counts: Counter[str] = Counter()
            accepted: list[tuple[EventId, Row]] = []
            for event_id, row in zip(ids, rows, strict=True):
                if row[TIME] <= self.watermark_ms:
                    counts["late"] += 1
                elif latest is not None and row[TIME] > latest:
                    counts["ahead"] += 1
                else:
                    became = self._counts.window.add(event_id, row)
                    counts[became] += 1
                    if became == "applied":
                        accepted.append((event_id, row))
            if accepted:
                self._guard(lambda: self._apply(accepted))
            return Received(**counts)

    def complete(self, request: Request) -> Request:
        """Fill in the history, and the features that earlier events tell.

        Args:
          request: a request without a history, with `user.user_id`, and with the
            features that statistics count by, in its context and its candidates. One
            for items has no candidates.

        Returns:
          The request with columns as `prepare` would have computed them at its time.

        Raises:
          BadRequest: the request has a history or a computed column already, lacks a
            column, or is not later than `watermark_ms`.
        """
        rows = candidate_rows(
            request, self._schema, self._counts.features.needed, self._any_item
        )
        user = rows[0][USER]
        with self._lock:
            self._check_alive()
            if request.time_ms <= self.watermark_ms:
                raise BadRequest(
                    f"time_ms={request.time_ms} is not later than "
                    f"{self.watermark_ms}, until when events may be forgotten "
                    f"(lateness_ms={self._lateness} before the newest event); send the "
                    "time of now, or open the state with a greater lateness_ms"
                )
            self._guard(self._counts.count_all)
            try:
                window, features = self._counts.compute(user, request.time_ms, rows)
            except InputError as error:
                raise BadRequest(str(error)) from error
            past = self._counts.histories.of(user, self._saved.events)
        history = history_columns(self._schema, past, window, self._saved.events)
        context, candidates = computed_columns(request, self._schema, features)
        return dataclasses.replace(
            request, history=history, context=context, candidates=candidates
        )

    def save(self, folder: Path) -> None:
        """Write the state to a folder, whole or not at all; the journal begins anew.

        Raises:
          InputError: the folder holds something else, or the disk is full.
        """
        with self._lock:
            self._check_alive()
            counts = self._counts
            self._guard(counts.fold)
            frame = self._frame if self._journal is None else self._journal.number
            newer = newer_table(self._schema, counts.histories.newer_events())
            state = dataclasses.replace(
                self._saved,
                watermark_ms=counts.folded_ms,
                newest_ms=counts.last_time_ms,
                frame=frame,
                arrays=counts.features.state(),
                histories=counts.histories.joined(newer),
                window=events_table(self._schema, list(counts.window.events())),
            )
            write_state(folder, state)
            self._frame = frame
            if self._journal is not None:
                self._journal.begin_anew()

    def close(self) -> None:
        """Close the journal."""
        with self._lock:
            if self._journal is not None:
                self._journal.close()

    def _apply(self, events: Sequence[tuple[EventId, Row]]) -> None:
        """Write events of the window to the journal, and count them."""
        if self._journal is not None:
            table = events_table(self._schema, events)
            assert table is not None
            self._journal.append(table)
        self._counts.count([row for _, row in events])
        self._counts.advance()

    def _guard(self, change: Callable[[], None]) -> None:
        """Make a change; if it fails half-way, refuse to go on with wrong values."""
        try:
            change()
        except Exception as error:
            self._failed = error
            raise

    def _check_alive(self) -> None:
        if self._failed is not None:
            raise InputError(
                f"the live state failed earlier ({self._failed}); open it again"
            )
