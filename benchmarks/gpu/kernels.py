"""The costliest kernels of a step, from a trace of `jax.profiler`, as rows of text.

On a GPU a kernel is an event on a stream of the device; on a CPU, where this is
rehearsed, an operation that the runtime executes. An operation that holds others, such
as a loop, counts with the time outside of them only.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

# Stats of an event that say which operation of the program it belongs to, best first.
OPERATION_STATS = ("tf_op", "hlo_op")
CHARACTERS = 120


class Event(NamedTuple):
    """A kernel or an operation.

    Attributes:
      name: its name.
      operation: the operation of the program that it belongs to, or "".
      start: nanoseconds.
      end: nanoseconds.
    """

    name: str
    operation: str
    start: float
    end: float


def profile(run: Callable[[], Any], steps: int) -> list[dict[str, Any]]:
    """Trace some steps, and list their ten costliest kernels.

    Args:
      run: a step that has run before, so that it does not compile.
      steps: number of steps.

    Returns:
      Rows of `costliest`.
    """
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(steps):
                result = run()
            jax.block_until_ready(result)
        (path,) = Path(folder).rglob("*.xplane.pb")
        lines = read_lines(path)
    return costliest(lines, steps)


def read_lines(path: Path) -> list[list[Event]]:
    """Read the events of each stream or thread that executed the program."""
    planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    if devices:
        # Other lines of a device plane, if any, repeat the streams' time.
        streams = [
            line
            for plane in devices
            for line in plane.lines
            if line.name.startswith("Stream")
        ]
        return [list(_events(line.events)) for line in streams]
    threads = [line for plane in planes for line in plane.lines]
    lines = [[e for e in _events(line.events) if e.operation] for line in threads]
    return [events for events in lines if events]


def _events(events: Iterable[Any]) -> Iterator[Event]:
    for event in events:
        stats = {str(name): value for name, value in event.stats}
        operation = next((stats[s] for s in OPERATION_STATS if stats.get(s)), "")
        end = event.start_ns + event.duration_ns
        yield Event(event.name, str(operation), event.start_ns, end)


def own_times(events: list[Event]) -> Iterator[tuple[Event, float]]:
    """Yield events with their nanoseconds less those of the events inside them."""
    open_events: list[tuple[Event, float]] = []
    # An event that begins with another and lasts longer holds it.
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        while open_events and open_events[-1][0].end <= event.start:
            yield open_events.pop()
        if open_events:
            holder, own = open_events.pop()
            open_events.append((holder, own - (event.end - event.start)))
        open_events.append((event, event.end - event.start))
    yield from reversed(open_events)


def costliest(
    lines: list[list[Event]], steps: int, count: int = 10
) -> list[dict[str, Any]]:
    """List the kernels that take most time, by name, and all of them together.

    Args:
      lines: events of each stream or thread.
      steps: steps that were traced; milliseconds and calls are those of one.
      count: kernels to list.

    Returns:
      `count` rows at most, and a last one for all kernels.
    """
    total: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    operation: dict[str, str] = {}
    for events in lines:
        for event, own in own_times(events):
            total[event.name] += own
            calls[event.name] += 1
            operation.setdefault(event.name, event.operation)
    whole = sum(total.values())
    names = sorted(total, key=lambda name: -total[name])
    rows = [
        {
            "kernel": name[:CHARACTERS],
            "ms": total[name] / 1e6 / steps,
            "share": total[name] / whole,
            "calls": calls[name] / steps,
            "operation": operation[name][-CHARACTERS:],
        }
        for name in names[:count]
    ]
    if whole:
        rows.append(
            {
                "kernel": f"all {len(names)}",
                "ms": whole / 1e6 / steps,
                "share": 1.0,
                "calls": sum(calls.values()) / steps,
                "operation": "",
            }
        )
    return rows
