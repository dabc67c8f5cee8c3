"""Orders of arrival are those that a live state accepts, and none asks too early."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.serving_replay import LATENESS_MS, ORDERS, Day, events_body


@pytest.fixture(scope="module")
def day() -> Day:
    rng = np.random.default_rng(0)
    times = np.sort(rng.integers(1, 400, 300)) * 5_000
    rows = [
        {"user_id": n % 7, "item_id": n, "time_ms": int(t), "scored": n % 3 == 0}
        for n, t in enumerate(times)
    ]
    shown = [row for row in rows if row["scored"]]
    return Day(rows, [[row] for row in shown])


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_is_allowed(day: Day, order: str) -> None:
    events, requests = day.event_times, day.request_times
    steps = list(ORDERS[order](day, np.random.default_rng(1)))
    sent, asked, newest = set[int](), set[int](), 0
    for step in steps:
        before = newest
        for n in step.requests:
            # All earlier events were sent, in an earlier step.
            assert set(np.flatnonzero(events < requests[n])) <= sent
        for piece in step.events:
            assert all(events[piece] > newest - LATENESS_MS)
            sent.update(piece)
            newest = max(newest, *events[piece].tolist(), 0)
        # The events of the step may come first, if both are sent at the same time.
        watermark = (newest if step.together else before) - LATENESS_MS
        assert all(requests[step.requests] > watermark)
        asked.update(step.requests)
    assert len(sent) == len(events)
    assert len(asked) == len(requests)
    assert any(step.together for step in steps) is (order == "at once")


def test_orders_differ_from_that_of_time(day: Day) -> None:
    for order in ("out of order", "backwards"):
        steps = ORDERS[order](day, np.random.default_rng(1))
        pieces = [piece for step in steps for piece in step.events]
        times = day.event_times[[n for piece in pieces for n in piece]]
        assert (np.diff(times) < 0).any()


def test_events_have_the_ids_of_their_rows(day: Day) -> None:
    columns = events_body(day, [3, 5])["events"]
    assert columns["event_id"] == [3, 5]
    assert columns["item_id"] == [3, 5]
