"""Processor time of a live state: completing requests, and counting events.

    tokenrec prepare complete_journey --weeks 1-47 --statistics complete_journey --out DIR
    python -m benchmarks.live_state DIR --number week=48

Requests are of random users and items of the data set, with the row features of a random
event of the log; events are such events at new times. Time is that of the process, so
that load on the machine matters little.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import run_script, write_result
from tokenrec.serving.export.live import write_live_state
from tokenrec.serving.live.files import SavedState, read_state
from tokenrec.serving.live.state import LiveState
from tokenrec.serving.request import Request


class Traffic:
    """Requests and events like those of a log.

    Args:
      saved: the state after the log.
      numbers: features that have one value.
      seed: of all draws.
    """

    def __init__(self, saved: SavedState, numbers: dict[str, float], seed: int) -> None:
        self._schema = saved.schema
        self._events = saved.histories
        self._items = saved.items
        self._random = np.random.default_rng(seed)
        self._numbers = numbers
        self._next = 0

    def request(self, time: int, candidates: int) -> Request:
        """A request of a random user."""
        event = self._draw(1)
        items = self._random.choice(self._items, candidates).tolist()
        context, columns = {}, {"item_id": items}
        for feature in self._schema.given:
            value = event[feature.name][0]
            if feature.entity == "context":
                context[feature.name] = value
            elif feature.entity == "item":
                columns[feature.name] = [value] * candidates
        return Request({"user_id": event["user_id"][0]}, time, {}, context, columns)

    def events(self, count: int, time: int) -> dict[str, list[Any]]:
        """New events, a millisecond apart."""
        columns = self._draw(count)
        names = ["user_id", "item_id", *(f.name for f in self._schema.given)]
        columns = {name: columns[name] for name in names}
        columns["item_id"] = self._random.choice(self._items, count).tolist()
        columns["time_ms"] = [time + i for i in range(count)]
        columns["event_id"] = [self._next + i for i in range(count)]
        # As most events of the log are.
        columns["scored"] = [self._schema.scored is not False] * count
        for label in self._schema.labels:
            columns[label] = self._random.integers(0, 2, count).tolist()
        self._next += count
        return columns

    def _draw(self, count: int) -> dict[str, list[Any]]:
        rows = self._random.integers(0, self._events.num_rows, count)
        values: dict[str, list[Any]] = self._events.take(rows).to_pydict()
        return values | {name: [x] * count for name, x in self._numbers.items()}


def processor_ms() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return 1e3 * (usage.ru_utime + usage.ru_stime)


def bench(
    folder: Path, numbers: dict[str, float], window: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure all situations, one after another.

    Args:
      folder: a saved state.
      numbers: as for `Traffic`.
      window: events that lie in the window in the end.
      repeats: requests, or calls, of each situation.

    Yields:
      A line of the result table.
    """
    traffic = Traffic(read_state(folder), numbers, 0)
    state = LiveState.open(folder, clock=None, lateness_ms=10**9)
    start = state.last_time_ms

    def requests(situation: str, time: int) -> Iterator[dict[str, Any]]:
        for candidates in (20, 100, 500):
            made = [traffic.request(time, candidates) for _ in range(repeats)]
            spent = []
            for request in made:
                before = processor_ms()
                state.complete(request)
                spent.append(processor_ms() - before)
            yield line(f"request, {situation}", candidates, spent)

    def line(
        situation: str, candidates: int | None, spent: list[float]
    ) -> dict[str, Any]:
        return {
            "situation": situation,
            "candidates": candidates,
            "mean, ms": statistics.mean(spent),
            "median, ms": statistics.median(spent),
        }

    yield from requests("no event yet", start + 1)
    for size in (1, 16, 256):
        spent = []
        for _ in range(max(window // 3 // size, 1)):
            events = traffic.events(size, state.last_time_ms + 1)
            before = processor_ms()
            state.add_events(events)
            spent.append((processor_ms() - before) / size)
        yield line(f"an event, {size} sent together", None, spent)
    state.complete(traffic.request(state.last_time_ms + 1, 1))
    yield from requests("after the newest event", state.last_time_ms + 1)
    yield from requests("among the events", (start + state.last_time_ms) // 2)
    spent = []
    for _ in range(repeats):
        events = traffic.events(1, state.last_time_ms + 1)
        request = traffic.request(state.last_time_ms + 1, 20)
        before = processor_ms()
        state.add_events(events)
        state.complete(request)
        spent.append(processor_ms() - before)
    yield line("an event and a request, in turns", 20, spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="a prepared data set")
    parser.add_argument("--events", type=int, default=64, help="of a history")
    parser.add_argument("--window", type=int, default=3000, help="events in the window")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--number", action="append", default=[], help="FEATURE=VALUE")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/live_state")
    )
    options = parser.parse_args()
    pairs = (text.partition("=") for text in options.number)
    numbers = {name: float(value) for name, _, value in pairs}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "counters"
        write_live_state(options.data, folder, events=options.events)
        saved = read_state(folder)
        rows = list(bench(folder, numbers, options.window, options.repeats))
    write_result(
        options.out,
        rows,
        {
            "source": saved.source,
            "computed columns": len(saved.schema.computed),
            "events of a history": options.events,
            "events in the window": options.window,
            "repeats": options.repeats,
        },
        f"python -m benchmarks.live_state DATA --events {options.events} --window "
        f"{options.window} --repeats {options.repeats}"
        + "".join(f" --number {text}" for text in options.number),
        title="Live state: processor time of requests and events",
    )
    print(options.out.with_name(options.out.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)
