"""Replay a log through a live state, and compare with what `prepare` computed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.memory_source import SCHEMA, MemorySource
from tests.data.past.declared import DECLARED
from tests.data.preparation.test_like import ITEMS, part, random_log, tables
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import EVENT, SCORED
from tokenrec.data.past import WithStatistics
from tokenrec.data.past.declaration_json import parse_statistics
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import FIRST_KNOWN, Feature, columns
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.serving.export.live import write_live_state
from tokenrec.serving.live.state import LiveState
from tokenrec.serving.request import Request

MINUTE = 60_000
END = 70 * MINUTE
EVENTS = 6  # of a history


@dataclasses.dataclass
class Replay:
    """A log, prepared whole and until `END`.

    Attributes:
      folder: holds the data sets `whole` and `first`, and the live state `counters`.
      rows: log rows from `END` on, in the order of time; not those that repeat another.
      whole: the data set of all rows.
    """

    folder: Path
    rows: list[dict[str, Any]]
    whole: Dataset


def make_replay(folder: Path, seed: int, strings: bool = False) -> Replay:
    log = random_log(seed, strings)
    time = np.asarray(log["time_ms"]) * MINUTE
    log["time_ms"] = time
    rng = np.random.default_rng(seed)
    # Half of the rows are shown in one of two pages of their user and time.
    page = time // MINUTE * 2 + rng.integers(0, 2, len(time))
    log["request"] = np.where(rng.random(len(time)) < 0.5, page, -1)
    # Some histories have a place that training had not.
    unseen = (time >= 50 * MINUTE) & (time < END) & (rng.random(len(time)) < 0.3)
    log["place"] = np.where(unseen, 13, log["place"])
    key = [
        (str(log["user_id"][i]), str(log["item_id"][i]), time[i], log["scored"][i])
        for i in range(len(time))
    ]
    first = np.array([key.index(k) == i for i, k in enumerate(key)])
    statistics = parse_statistics(DECLARED, SCHEMA, "here")
    for name, rows in (("whole", first), ("first", first & (time < END))):
        memory = MemorySource(part(log, rows), **tables(ITEMS, strings))
        prepare(WithStatistics(memory, statistics), folder / name)
    write_live_state(folder / "first", folder / "counters", events=EVENTS)
    later = part(log, first & (time >= END))
    values = {name: column.to_pylist() for name, column in later.items()}
    del values["split"]
    rows = [
        dict(zip(values, row, strict=True))
        for row in zip(*values.values(), strict=True)
    ]
    return Replay(folder, rows, open_dataset(folder / "whole"))


def as_columns(rows: list[dict[str, Any]], first_id: int) -> dict[str, list[Any]]:
    """Columns of events; the ids are those of their places in the log."""
    out = {name: [row[name] for row in rows] for name in rows[0]}
    out["event_id"] = [first_id + i for i in range(len(rows))]
    return out


def expected(data: Dataset) -> Iterator[dict[str, Any]]:
    """The scored rows of test, each with its history."""
    log = data.load("test")
    for chunk in range(log.num_chunks):
        rows = np.arange(log.start[chunk], log.start[chunk + 1])
        for row in rows[log.flags[rows] & SCORED > 0]:
            earlier = rows[
                (log.time[rows] < log.time[row]) & (log.flags[rows] & EVENT > 0)
            ]
            yield {
                "user_id": log.user_id[chunk],
                "item_id": data.catalogue.item_id[log.item[row]],
                "time_ms": int(log.time[row]),
                "row": row,
                "history": earlier[-EVENTS:],
                "log": log,
            }


def make_request(row: dict[str, Any]) -> Request:
    """A request for one log row."""
    return Request(
        user={"user_id": row["user_id"]},
        time_ms=row["time_ms"],
        history={},
        context={"tab": row["tab"]},
        candidates={"item_id": [row["item_id"]], "place": [row["place"]]},
    )


def assert_completed(data: Dataset, want: dict[str, Any], request: Request) -> None:
    """A completed request has the values of the data set, bit for bit."""
    log, row, history = want["log"], want["row"], want["history"]
    place = columns(data.schema.group("row")).dense
    statistics = 0
    for feature in data.schema.group("row"):
        if feature.name in ("tab", "place"):
            continue
        statistics += 1
        value = (
            request.context[feature.name]
            if feature.entity == "context"
            else request.candidates[feature.name][0]
        )
        value = np.float32(np.nan if value is None else value)
        stored = log.row_dense[row, place[feature.name][0]]
        np.testing.assert_array_equal(value, stored, err_msg=feature.name)
    assert statistics > 20
    if not len(history):
        assert request.history == {}
        return
    assert list(request.history["time_ms"]) == log.time[history].tolist()
    items = data.catalogue.item_id[log.item[history]]
    assert list(request.history["item_id"]) == items.tolist()
    for group in ("row", "action"):
        layout = columns(data.schema.group(group))
        for feature in data.schema.group(group):
            encoded = encode(data, feature, request.history[feature.name])
            kind = "ids" if feature.is_integer else "dense"
            begin, end = getattr(layout, kind)[feature.name]
            stored = getattr(log, f"{group}_{kind}")[history, begin:end]
            np.testing.assert_array_equal(encoded, stored[:, 0], err_msg=feature.name)


def encode(data: Dataset, feature: Feature, values: Any) -> np.ndarray:
    """Ids or numbers of the values of a feature that has one value."""
    if not feature.is_integer:
        return np.array([np.nan if v is None else v for v in values], np.float32)
    ids = _ids(data.directory, feature.table_name)
    return np.array([ids.get(value, 1) for value in values])


@functools.cache
def _ids(directory: Path, table: str) -> dict[Any, int]:
    known = load_vocabulary(directory, table).tolist()
    return {value: FIRST_KNOWN + i for i, value in enumerate(known)} | {None: 0}


def replay(
    given: Replay,
    state: LiveState,
    *,
    lateness: int,
    seed: int,
    reopen: Callable[[LiveState], LiveState] = lambda state: state,
) -> int:
    """Send the events out of order and in pieces, and ask as soon as can be.

    Returns:
      Number of log rows that were asked for; all have the values of the data set.
    """
    rng = np.random.default_rng(seed)
    time = np.array([row["time_ms"] for row in given.rows])
    # Half of the lateness for each: a late event, and events sent together.
    arrives = time + rng.integers(0, lateness // 2, len(time))
    arrival = np.argsort(arrives, kind="stable")
    by_key = {
        (row["user_id"], row["item_id"], row["time_ms"]): row
        for row in given.rows
        if row["scored"]
    }
    waiting = sorted(expected(given.whole), key=lambda want: want["time_ms"])
    asked = sent = 0
    while sent < len(arrival):
        together = arrives[arrival] < arrives[arrival[sent]] + lateness // 2
        count = min(int(rng.integers(1, 5)), int(together.sum()) - sent)
        pieces = [
            as_columns([given.rows[i]], int(i)) for i in arrival[sent : sent + count]
        ]
        columns = {n: [p[n][0] for p in pieces] for n in pieces[0]}
        assert state.add_events(columns) == len(pieces)
        sent += len(pieces)
        if rng.random() < 0.3:
            # Sent again by a client that missed the answer.
            assert state.add_events(columns) == 0
        if rng.random() < 0.1:
            state = reopen(state)
        open_until = time[arrival[sent:]].min() if sent < len(arrival) else time.max()
        while waiting and waiting[0]["time_ms"] <= open_until:
            want = waiting.pop(0)
            row = by_key[want["user_id"], want["item_id"], want["time_ms"]]
            request = make_request(row)
            assert_completed(given.whole, want, state.complete(request))
            asked += 1
    assert not waiting
    state.close()
    return asked
