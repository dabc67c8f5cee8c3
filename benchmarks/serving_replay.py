"""Replay a day of Complete Journey over HTTP: events, and requests that need them.

    tokenrec prepare complete_journey --weeks 1-47 --statistics complete_journey --out UNTIL
    tokenrec export --workdir RUN --data UNTIL --out ARTIFACT
    tokenrec predict --workdir RUN --data WHOLE --split test --out EXPECTED.parquet
    python -m benchmarks.serving_replay --model ARTIFACT --expected EXPECTED.parquet --work DIR

The artifact ends with week 47. A server of it gets what happens on the day after through
`/v1/events`, and each request of that day through `/v1/score` with `"history": "live"`.
Its scores must be those of `tokenrec predict` on the whole year, which was prepared in
one piece. The rows are those of the source, as a shop would send them.

Orders of arrival, of what docs/guides/live_events.md allows:

    in order     a basket at a time; its request just before it
    out of order up to 30 s late, in pieces, some sent twice; requests as soon as all
                 earlier events came, and some again after later events
    backwards    50 s at a time, the newest event first; then the requests, shuffled
    at once      30 s at a time: their requests, from four connections, while the events
                 of the next 30 s arrive

In the middle of each the server is killed with SIGKILL while it reads events, and
another one goes on from the journal. Orders that are done are kept in `--work`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.report import run_script, write_result
from benchmarks.serving_process import PACKAGES
from benchmarks.serving_replay_client import Replayer
from tokenrec.data.sources.complete_journey import CompleteJourneySource
from tokenrec.errors import InputError

TOLERANCE = 1e-6
DAY_MS = 86_400_000
# What the server's state allows by default (tokenrec/serving/live/state.py).
LATENESS_MS = 60_000
_COMPUTED = ("household_purchases", "product_sales")
_CONTEXT = ("store_id", "week", "hour", "weekday")
_PLACES = ("display_location", "mailer_location")

type Row = dict[str, Any]


class Step(NamedTuple):
    """What is sent at one time.

    Attributes:
      events: bodies of `/v1/events`, one after another.
      requests: numbers of requests.
      together: requests and events are sent at the same time.
    """

    events: list[list[int]]
    requests: list[int]
    together: bool = False


class Day(NamedTuple):
    """A day of a log.

    Attributes:
      events: its rows, in the order of time.
      requests: the scored rows of each user and time, likewise.
    """

    events: list[Row]
    requests: list[list[Row]]

    @property
    def event_times(self) -> np.ndarray:
        """Time of each event."""
        return np.array([row["time_ms"] for row in self.events])

    @property
    def request_times(self) -> np.ndarray:
        """Time of each request."""
        return np.array([rows[0]["time_ms"] for rows in self.requests])


def read_day(start: int, week: int, kept: Path) -> Day:
    """Read the day after a time from the source, or from the file where it is kept."""
    source = CompleteJourneySource(weeks=(1, week))
    if not kept.exists():
        batches = []
        for batch in source.rows():
            time = batch["time_ms"]
            until = start + DAY_MS
            inside = pc.and_(pc.greater(time, start), pc.less_equal(time, until))
            batches.append(batch.filter(inside))
        table = pa.concat_tables(map(pa.table, batches), promote_options="default")
        pq.write_table(table, kept)
    rows = pq.read_table(kept).to_pylist()
    users = {row["user_id"]: row for row in source.users().to_pylist()}
    rows = sorted(_joined(rows), key=lambda row: row["time_ms"])
    for row in rows:
        row["user"] = users[row["user_id"]]
    shown = sorted(
        (row for row in rows if row["scored"]),
        key=lambda row: (row["time_ms"], row["user_id"]),
    )
    groups = itertools.groupby(shown, key=lambda row: (row["time_ms"], row["user_id"]))
    return Day(rows, [list(group) for _, group in groups])


def _joined(rows: list[Row]) -> list[Row]:
    """Join rows of one user, item and time, as `prepare` does before it counts."""
    kept: dict[tuple[Any, ...], Row] = {}
    for row in sorted(rows, key=lambda row: sum(v is None for v in row.values())):
        key = (row["user_id"], row["item_id"], row["time_ms"], row["scored"])
        first = kept.setdefault(key, row)
        if row["label_bought"] is not None:
            first["label_bought"] = max(first["label_bought"], row["label_bought"])
    return list(kept.values())


def in_order(day: Day, draw: np.random.Generator) -> Iterator[Step]:
    """Yield each basket: its requests, then its events."""
    events, requests = day.event_times, day.request_times
    for time in np.unique(events):
        asked = np.flatnonzero(requests == time).tolist()
        yield Step([np.flatnonzero(events == time).tolist()], asked)


def out_of_order(day: Day, draw: np.random.Generator) -> Iterator[Step]:
    """Yield pieces of events that came late, and the requests that can be asked."""
    events, requests = day.event_times, day.request_times
    late = LATENESS_MS // 2
    arrives = events + draw.integers(0, late, len(events))
    order = np.argsort(arrives, kind="stable")
    sent = asked = 0
    while sent < len(order):
        # Before the piece: what needs none of the events that are still on their way.
        ready = int(np.searchsorted(requests, events[order[sent:]].min(), "right"))
        # The newest event may have come after that of the request: ask again.
        again = [n for n in range(max(0, asked - 2), asked) if draw.random() < 0.3]
        most = int(np.searchsorted(arrives[order], arrives[order[sent]] + late))
        count = min(int(draw.integers(1, 65)), most - sent)
        piece = order[sent : sent + count].tolist()
        sent += count
        twice = [piece, piece] if draw.random() < 0.2 else [piece]
        newest = events[order[: sent - count]].max(initial=0)
        open_again = [n for n in again if requests[n] > newest - LATENESS_MS]
        yield Step(twice, [*range(asked, ready), *open_again])
        asked = max(asked, ready)
    yield Step([], list(range(asked, len(requests))))


def backwards(day: Day, draw: np.random.Generator) -> Iterator[Step]:
    """Yield the requests of a stretch, after its events, the newest of which come first."""
    asked: list[int] = []
    for _, own, requests in _stretches(day, 50_000):
        cuts = range(0, len(own), int(draw.integers(1, 40)))
        pieces = [own[::-1][cut : cut + cuts.step] for cut in cuts]
        yield Step(pieces, asked)
        asked = draw.permutation(requests).tolist()
    yield Step([], asked)


def at_once(day: Day, draw: np.random.Generator) -> Iterator[Step]:
    """Yield the requests of a stretch with the events of the next, if it follows at once."""
    asked: list[int] = []
    before = -2
    for stretch, own, requests in _stretches(day, LATENESS_MS // 2):
        pieces = [own[start : start + 20] for start in range(0, len(own), 20)]
        together = stretch == before + 1
        yield Step(pieces, draw.permutation(asked).tolist(), together)
        asked, before = requests, stretch
    yield Step([], asked)


def _stretches(day: Day, length: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Yield the number, the events and the requests of stretches of time that have some."""
    events, requests = day.event_times // length, day.request_times // length
    for stretch in np.unique(np.concatenate([events, requests])):
        yield (
            int(stretch),
            np.flatnonzero(events == stretch).tolist(),
            np.flatnonzero(requests == stretch).tolist(),
        )


ORDERS: dict[str, Callable[[Day, np.random.Generator], Iterator[Step]]] = {
    "in order": in_order,
    "out of order": out_of_order,
    "backwards": backwards,
    "at once": at_once,
}


def request_body(rows: Sequence[Row]) -> dict[str, Any]:
    """Make the request of a basket: what was shown, without its past."""
    return {
        "user": rows[0]["user"],
        "time_ms": rows[0]["time_ms"],
        "history": "live",
        "context": {name: rows[0][name] for name in _CONTEXT},
        "candidates": {
            name: [row[name] for row in rows] for name in ("item_id", *_PLACES)
        },
    }


def events_body(day: Day, numbers: Sequence[int]) -> dict[str, Any]:
    """Make the events of some rows; their ids are their places in the log."""
    rows = [day.events[number] for number in numbers]
    left_out = ("split", "user", *_COMPUTED)
    names = [name for name in rows[0] if name not in left_out]
    columns = {name: [row[name] for row in rows] for name in names}
    return {"events": columns | {"event_id": list(numbers)}}


def replay(
    day: Day,
    order: str,
    model: Path,
    expected: dict[tuple[int, int, int], float],
    work: Path,
) -> dict[str, Any]:
    """Replay a day in one order, with a kill in the middle; return the table row."""
    steps = list(ORDERS[order](day, np.random.default_rng(0)))
    journals = work / "journals"
    shutil.rmtree(journals, ignore_errors=True)
    longest = max(map(len, day.requests))
    flags = ("--max-batch", "2", "--max-candidates", str(longest))
    flags += ("--events-dir", str(journals), "--compile-cache", str(work / "compiled"))
    differences: list[float] = []
    with Replayer(model, flags) as server:
        for number, step in enumerate(steps):
            events = [events_body(day, piece) for piece in step.events if piece]
            bodies = [request_body(day.requests[n]) for n in step.requests]
            # The first step of the second half that has events.
            kill = not server.kills and number >= len(steps) // 2 and bool(events)
            answers = server.send(events, bodies, step.together, kill)
            for n, answer in zip(step.requests, answers, strict=True):
                rows = day.requests[n]
                wanted = [
                    expected[row["user_id"], row["item_id"], row["time_ms"]]
                    for row in rows
                ]
                found = np.asarray(answer["scores"]["bought"])
                differences += np.abs(found - wanted).tolist()
        return {
            "order": order,
            "events": len(day.events),
            "bodies of events": server.bodies,
            **server.counts,
            "kills": server.kills,
            "requests": server.requests,
            "scores": len(differences),
            "cache hits": server.hits,
            "largest difference": max(differences),
            "beyond 1e-6": sum(not d <= TOLERANCE for d in differences),
        }


def _expected_scores(path: Path) -> dict[tuple[int, int, int], float]:
    table = pq.read_table(
        path, columns=["user_id", "item_id", "time_ms", "score_bought"]
    )
    keys = zip(
        *(table[name].to_pylist() for name in table.column_names[:3]), strict=True
    )
    return dict(zip(keys, table["score_bought"].to_pylist(), strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument(
        "--expected", type=Path, required=True, help="what `tokenrec predict` wrote"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder to work in")
    parser.add_argument("--week", type=int, default=48, help="of the day")
    parser.add_argument("--orders", nargs="+", default=list(ORDERS), choices=ORDERS)
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    state = json.loads((args.model / "counters" / "live_state.json").read_text())
    day = read_day(state["watermark_ms"], args.week, args.work / "day.parquet")
    if not day.requests:
        raise InputError(
            f"--week {args.week}: has no request on the day after the artifact's data; "
            "name the week after its last one"
        )
    expected = _expected_scores(args.expected)
    digest = json.loads((args.model / "manifest.json").read_text())["digest"]
    rows = []
    for order in args.orders:
        done = args.work / f"{order.replace(' ', '_')}_{digest[:12]}.json"
        if not done.exists():
            row = replay(day, order, args.model, expected, args.work)
            done.write_text(json.dumps(row))
        rows.append(json.loads(done.read_text()))
        print(json.dumps(rows[-1]), flush=True)
    if args.out is not None:
        write_result(
            args.out,
            rows,
            {
                "day": f"the first of week {args.week}",
                "candidates": sum(map(len, day.requests)),
            },
            "python -m benchmarks.serving_replay --model ARTIFACT --expected "
            f"EXPECTED.parquet --work DIR --out {args.out}",
            title="A day of Complete Journey over HTTP, with live events",
            packages=PACKAGES,
        )
    if any(row["beyond 1e-6"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
