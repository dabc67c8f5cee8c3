"""A live state completes requests with the bits of `prepare`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.live.replay import END, MINUTE, Replay, make_replay, replay
from tokenrec.data.dataset import open_dataset
from tokenrec.errors import InputError
from tokenrec.serving.export.live import write_live_state
from tokenrec.serving.live.state import LiveState
from tokenrec.serving.live.window import Received
from tokenrec.serving.request import BadRequest, Request

LATENESS = 5 * MINUTE


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return make_replay(tmp_path_factory.mktemp("live"), seed=3)


def open_state(given: Replay, journal: Path | None = None, **options: Any) -> LiveState:
    options = {"lateness_ms": LATENESS, "clock": None} | options
    return LiveState.open(given.folder / "counters", journal, **options)


def event(event_id: int | str, time: int, **values: Any) -> dict[str, list[Any]]:
    """Columns of one event."""
    columns = {
        "event_id": event_id,
        "user_id": 1,
        "item_id": 2,
        "time_ms": time,
        "tab": 1,
        "place": 2,
        "price": 0.5,
        "reaction": 3,
        "label_click": 1,
        "event": True,
        "scored": True,
    }
    return {name: [value] for name, value in (columns | values).items()}


def request(time: int, **values: Any) -> Request:
    return dataclasses.replace(
        Request(
            user={"user_id": 1},
            time_ms=time,
            history={},
            context={"tab": 1},
            candidates={"item_id": [2, 3], "place": [2, 2]},
        ),
        **values,
    )


def seen(state: LiveState, time: int) -> tuple[int, float]:
    """Events of the history after the log, and the count of item 2."""
    completed = state.complete(request(time))
    times = np.asarray(completed.history["time_ms"])
    count = np.asarray(completed.candidates["count_item_id"])[0]
    return int((times >= END).sum()), float(count)


def test_a_replay_has_the_values_of_one_log(given: Replay, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    restarts = 0

    def reopen(state: LiveState) -> LiveState:
        # Now and then a saved state; otherwise the process ends, and the journal is all
        # that there is.
        nonlocal restarts
        restarts += 1
        folder = tmp_path / "saved"
        if restarts % 2:
            state.save(folder)
        state.close()
        start = folder if folder.exists() else given.folder / "counters"
        return LiveState.open(start, journal, lateness_ms=LATENESS, clock=None)

    state = open_state(given, journal)
    assert replay(given, state, lateness=LATENESS, seed=0, reopen=reopen) > 50
    assert restarts > 2


def test_a_long_window_is_folded_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenrec.serving.live.counts._LEAST_WINDOW", 1)
    given = make_replay(tmp_path, seed=4, strings=True)
    state = open_state(given)
    assert replay(given, state, lateness=LATENESS, seed=1) > 50
    # The history of later requests came through the window.
    assert state._counts.folded_ms > END


def test_a_request_sees_strictly_earlier_events_alone(given: Replay) -> None:
    state = open_state(given)
    time = END + 10 * MINUTE
    before = seen(state, time)
    # Of the same moment, and later.
    assert state.add_events(event("a", time)) == 1
    assert state.add_events(event("b", time + 1, item_id=2)) == 1
    assert seen(state, time) == before
    assert seen(state, time + 1) == (before[0] + 1, before[1] + 1)
    assert seen(state, time + 2) == (before[0] + 2, before[1] + 2)
    # A late event, but not too late, is seen from its time on.
    assert state.add_events(event("c", time - LATENESS + 2)) == 1
    assert seen(state, time) == (before[0] + 1, before[1] + 1)


def test_a_late_event_changes_the_statistics_of_later_events(given: Replay) -> None:
    state, in_order = open_state(given), open_state(given)
    time = END + 10 * MINUTE
    early, event_, late = (
        event("a", time - 2, item_id=3),
        event("b", time),
        event("c", time - 1, user_id=2),
    )

    def history(state: LiveState) -> dict[str, Any]:
        return dict(state.complete(request(time + 1)).history)

    for columns in (early, event_):
        state.add_events(columns)
    before = history(state)
    state.add_events(late)
    after = history(state)
    for columns in (early, late, event_):
        in_order.add_events(columns)
    wanted = history(in_order)
    for name, column in wanted.items():
        np.testing.assert_array_equal(after[name], column, err_msg=name)
    # Of item 2 there was one more before the event of the user.
    counts = (list(h["count_item_id"][-2:]) for h in (before, after))
    assert [b - a for a, b in zip(*counts, strict=True)] == [0, 1]


def test_an_event_counts_once(given: Replay) -> None:
    state = open_state(given)
    time = END + 10 * MINUTE
    before = seen(state, time + 1)
    first = event("a", time)
    assert state.receive(first) == Received(applied=1)
    assert state.receive(first) == Received(repeated=1)
    # The same event with another id; and an id that stands for another event.
    assert state.receive(event("b", time)) == Received(repeated=1)
    assert state.receive(event("a", time, item_id=3)) == Received(conflicting=1)
    assert state.receive(event("c", time, label_click=0)) == Received(conflicting=1)
    assert seen(state, time + 1) == (before[0] + 1, before[1] + 1)


def test_requests_change_nothing(given: Replay) -> None:
    state, other = open_state(given), open_state(given)
    # Far ahead: totals with a half-life must not be carried there for later events.
    for user in (1, 77):
        state.complete(request(END + 1000 * MINUTE, user={"user_id": user}))
    for each in (state, other):
        each.add_events(event("a", END + MINUTE))
    one, two = (s.complete(request(END + 2 * MINUTE)) for s in (state, other))
    for name, column in two.candidates.items():
        np.testing.assert_array_equal(one.candidates[name], column, err_msg=name)
    assert one.context == two.context


def test_late_events_and_those_ahead_of_the_clock_are_not_counted(
    given: Replay,
) -> None:
    now = END + 10 * MINUTE
    state = open_state(given, clock=lambda: now, ahead_ms=MINUTE)
    assert state.receive(event("a", now + MINUTE)) == Received(applied=1)
    assert state.watermark_ms == now + MINUTE - LATENESS
    assert state.receive(event("b", now + MINUTE + 1)) == Received(ahead=1)
    assert state.receive(event("c", state.watermark_ms)) == Received(late=1)
    assert state.receive(event("d", state.watermark_ms + 1)) == Received(applied=1)
    with pytest.raises(BadRequest, match=r"is not later than .* greater lateness_ms"):
        state.complete(request(state.watermark_ms))
    # The log has its own events already.
    fresh = open_state(given)
    assert fresh.receive(event("e", fresh.watermark_ms)) == Received(late=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event_id": None}, "'event_id' is missing or no list"),
        ({"event_id": [1.5]}, "'event_id' has '1.5'; an id is an integer of 64 bits"),
        ({"event_id": ["\ud800"]}, "an id is an integer of 64 bits, or a text"),
        ({"user_id": [1.5]}, "column 'user_id' must hold int64: .* truncated"),
        ({"user_id": [True]}, "column 'user_id' must hold int64: a value is a bool"),
        ({"reacton": [1]}, "unknown column 'reacton'; did you mean 'reaction'"),
        ({"count_item_id": [1]}, "'count_item_id' is computed from earlier events"),
        ({"place": None}, "column 'place' is missing; send it, with null"),
        ({"tab": ["1"]}, "column 'tab' must hold int64"),
        ({"tab": [1, 2]}, "column 'tab' has 2 values for 1 events"),
        ({"price": [float("inf")]}, "'price' is no finite float32"),
        ({"price": [1e300]}, "'price' is no finite float32"),
        ({"price": [2e6]}, "'price' is 2e.06 in a row, beyond"),
        ({"user_id": [None]}, "'user_id' is null in event 0"),
        ({"label_click": [2]}, "'label_click' is 2; a label is 1, 0 or null"),
        ({"scored": None}, "'scored' is missing"),
        ({"item_id": "abc"}, "'item_id' is no list"),
    ],
)
def test_a_wrong_event_is_refused_by_name(
    given: Replay, change: dict[str, Any], message: str
) -> None:
    state = open_state(given)
    columns = event("a", END + MINUTE) | change
    columns = {name: v for name, v in columns.items() if v is not None}
    with pytest.raises(InputError, match=message):
        state.add_events(columns)
    assert state.last_time_ms < END


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"history": {"time_ms": [1], "item_id": [1]}},
            "history: the state fills it in",
        ),
        ({"user": {}}, "'user_id' is missing"),
        ({"user": {"user_id": "x"}}, "user.user_id must hold int64"),
        ({"context": {}}, "context.tab: is missing, and statistics"),
        ({"context": {"tab": 1, "past_gap": 2}}, "context.past_gap: is computed"),
        ({"candidates": {"item_id": [None]}}, "candidates.item_id: is null"),
    ],
)
def test_a_wrong_request_is_refused_by_name(
    given: Replay, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        open_state(given).complete(request(END + MINUTE, **change))


def test_a_user_without_a_past(given: Replay) -> None:
    completed = open_state(given).complete(request(END, user={"user_id": 12345}))
    assert completed.history == {}
    assert completed.context["past_gap"] is None
    counts = completed.candidates["matches_item_id"]
    assert np.asarray(counts).tolist() == [0, 0]


def test_a_request_for_items_has_the_past_and_context_of_one_with_candidates(
    given: Replay,
) -> None:
    state = open_state(given)
    state.add_events(event("a", END + MINUTE))
    scored = state.complete(request(END + 2 * MINUTE))
    found = state.complete(request(END + 2 * MINUTE, candidates={}))
    assert found.candidates == {}
    assert found.context == scored.context
    assert found.context["past_gap"] is not None
    assert list(found.history) == list(scored.history)
    for name, values in scored.history.items():
        np.testing.assert_array_equal(found.history[name], values)


def test_excluded_features_are_used_and_left_out(given: Replay, tmp_path: Path) -> None:
    excluded = ("tab", "count_item_id", "price")
    write_live_state(
        given.folder / "first", tmp_path / "counters", events=4, exclude=excluded
    )
    state = LiveState.open(tmp_path / "counters", clock=None)
    one = state.complete(request(END))
    two = open_state(given).complete(request(END))
    assert set(two.candidates) - set(one.candidates) == {"count_item_id"}
    assert set(two.history) - set(one.history) == set(excluded)
    assert "tab" not in one.context
    name = "count_topic"  # by tab
    np.testing.assert_array_equal(one.candidates[name], two.candidates[name])


def test_acknowledged_events_survive(given: Replay, tmp_path: Path) -> None:
    journal, saved = tmp_path / "journal", tmp_path / "saved"
    state = open_state(given, journal)
    time = END + 20 * MINUTE
    for number in range(3):
        state.add_events(event(number, time + number, item_id=number))
    want, watermark = seen(state, time + 9), state.watermark_ms
    # Killed while it wrote: the last frame is cut off, which nobody was told of.
    whole = journal.read_bytes()
    size = len(whole)
    state.add_events(event(9, time + 5))
    state.close()
    journal.write_bytes(journal.read_bytes()[:-1])
    state = open_state(given, journal)
    assert seen(state, time + 9) == want
    assert journal.stat().st_size == size
    assert state.watermark_ms == watermark > open_state(given).watermark_ms
    assert state.receive(event(2, time + 2, item_id=2)) == Received(repeated=1)
    # Killed after the state was saved, before the journal began anew.
    state.save(saved)
    assert journal.stat().st_size < size
    state.close()
    journal.write_bytes(whole)
    state = LiveState.open(saved, journal, lateness_ms=LATENESS, clock=None)
    assert seen(state, time + 9) == want
    state.add_events(event("x", time + 8))
    state.close()
    # An older state lacks the events that the newer one has.
    state = LiveState.open(saved, journal, lateness_ms=LATENESS, clock=None)
    assert seen(state, time + 9) == (want[0] + 1, want[1] + 1)
    state.save(saved)
    state.add_events(event("y", time + 8, item_id=1))
    state.close()
    with pytest.raises(InputError, match="open the state that was saved last"):
        open_state(given, journal)


def test_a_journal_has_one_process(given: Replay, tmp_path: Path) -> None:
    state = open_state(given, tmp_path / "journal")
    with pytest.raises(InputError, match=r"is open already .* a journal of its own"):
        open_state(given, tmp_path / "journal")
    state.close()
    open_state(given, tmp_path / "journal").close()


def test_events_that_a_newer_log_has_count_once(given: Replay, tmp_path: Path) -> None:
    # A state until END goes on with a journal that began before it.
    journal = tmp_path / "journal"
    state = open_state(given, journal)
    state.add_events(event("a", END + MINUTE))
    state.add_events(event("b", END + 9 * MINUTE, item_id=3))
    state.save(tmp_path / "saved")
    frames = state.complete(request(END + 10 * MINUTE))
    state.close()
    journal.unlink()
    # The watermark lies between the two events, of which the first is in the totals.
    manifest = tmp_path / "saved" / "live_state.json"
    value = json.loads(manifest.read_text())
    assert value["watermark_ms"] == END + 4 * MINUTE
    state = open_state(given, journal)
    state.add_events(event("a", END + MINUTE))
    state.add_events(event("b", END + 9 * MINUTE, item_id=3))
    state.close()
    manifest.write_text(json.dumps(value | {"frame": 0}))
    state = LiveState.open(
        tmp_path / "saved", journal, lateness_ms=LATENESS, clock=None
    )
    again = state.complete(request(END + 10 * MINUTE))
    assert again.context == frames.context
    for name, column in frames.candidates.items():
        np.testing.assert_array_equal(again.candidates[name], column, err_msg=name)
    state.close()


def test_a_damaged_file_is_named(given: Replay, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    state = open_state(given, journal)
    for number in range(2):
        state.add_events(event(number, END + MINUTE + number))
    state.save(tmp_path / "saved")
    for number in range(2):
        state.add_events(event(10 + number, END + 2 * MINUTE + number))
    state.close()
    bytes_ = bytearray(journal.read_bytes())
    for place in (20, 30, 60):
        damaged = bytearray(bytes_)
        damaged[place] ^= 1
        journal.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged at byte 18"):
            LiveState.open(tmp_path / "saved", journal, clock=None)
    journal.write_bytes(b"something else, long enough")
    with pytest.raises(InputError, match="is no journal of events"):
        LiveState.open(tmp_path / "saved", journal, clock=None)
    names = sorted(p for p in (tmp_path / "saved").rglob("*.*") if p.is_file())
    assert len(names) > 20
    for path in names[::7]:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(InputError, match=path.name):
            LiveState.open(tmp_path / "saved", clock=None)
        path.write_bytes(whole)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="not overwritten"):
        LiveState.open(tmp_path / "saved", clock=None).save(tmp_path / "other")


def test_serving_needs_no_library_of_training(given: Replay) -> None:
    blocked = ("jax", "flax", "optax", "orbax", "grain", "tensorflow_datasets", "etils")
    program = f"""
import sys
for name in {blocked!r} + ("array_record",):
    sys.modules[name] = None
from pathlib import Path
from tokenrec.serving.live.state import LiveState
from tokenrec.serving.request import Request
state = LiveState.open(Path({str(given.folder / "counters")!r}), clock=None)
state.add_events({event("a", END + MINUTE)!r})
request = Request({{"user_id": 1}}, {END + 2 * MINUTE}, {{}}, {{"tab": 1}},
                  {{"item_id": [2], "place": [2]}})
print(list(map(float, state.complete(request).candidates["count_item_id"])))
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    state = open_state(given)
    state.add_events(event("a", END + MINUTE))
    assert json.loads(run.stdout) == [seen(state, END + 2 * MINUTE)[1]]


def test_a_data_set_that_cannot_be_gone_on_from(given: Replay, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="events=0 must be at least 1"):
        write_live_state(given.folder / "first", tmp_path / "out", events=0)
    assert not (tmp_path / "out").exists()
    assert open_dataset(given.folder / "first").metadata.state
