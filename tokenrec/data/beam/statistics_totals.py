"""Steps of the pipeline of statistics that hold some keys, of all partitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from tokenrec.data.beam.engine import tagged_output
from tokenrec.data.beam.shared_files import save_records
from tokenrec.data.beam.statistics_options import (
    StatisticsOptions,
    numbered,
    state_folder,
)
from tokenrec.data.beam.statistics_partition import EntryPiece, TotalPiece
from tokenrec.data.past.partitions import join_states
from tokenrec.data.past.plan import overflow_problem
from tokenrec.data.past.runs import Runs, TotalOverflowError

# Number of a shared key, and that of a span of time or of a shard of its runs.
KeyAndPart = tuple[int, int]
# Entries that are added at once, so that exact sums have the room that they have on one
# machine.
_AT_ONCE = 65_536


def merge_runs(parts: Iterable[list[Runs]]) -> list[Runs]:
    """Add up runs of the same key and shard, of each horizon."""
    # Beam combines in stages; one without input yields an empty list.
    present = [part for part in parts if part]
    return [Runs.merge(of_horizon) for of_horizon in zip(*present, strict=True)]


def start_spans(
    grouped: tuple[KeyAndPart, list[Runs]], options: StatisticsOptions
) -> Iterator[Any]:
    """Add up the spans of some values of a key, one after another.

    Args:
      grouped: the key and the shard, and its runs for each horizon.
      options: options of the pipeline.

    Yields:
      By (key, span), tagged "starts", the totals with which the span begins, of the
      values that it has; a problem of the input tagged "problems".
    """
    tagged = tagged_output()
    (number, shard), runs = grouped
    past = options.features()
    key = past.shared[number]
    totals = past.totals(key)
    for span in np.unique(runs[0].span).tolist():
        of_span = [of_horizon.of_span(span) for of_horizon in runs]
        start = totals.state(np.unique(of_span[0].key))
        if len(start["keys"]):
            yield tagged("starts", ((number, span), start))
        try:
            totals.add(of_span)
        except TotalOverflowError as error:
            problem = overflow_problem(key, past.plan(key), error)
            yield tagged("problems", ((1, number), str(problem)))
            return
    folder = state_folder(past.name_of(key))
    save_records(options.work, numbered(folder, shard), totals.state())


def total_entries(
    grouped: tuple[KeyAndPart, dict[str, Iterable[Any]]], options: StatisticsOptions
) -> Iterator[tuple[int, TotalPiece]]:
    """Compute the totals before each entry of a key in a span of time.

    Args:
      grouped: the key and the span, its `EntryPiece`s, and the totals with which it
        begins.
      options: options of the pipeline.

    Yields:
      `TotalPiece`s, by partition.
    """
    (number, _), group = grouped
    past = options.features()
    key = past.shared[number]
    totals = past.totals(key)
    if starts := list(group["starts"]):
        totals.resume(join_states(starts))
    pieces: list[EntryPiece] = list(group["entries"])
    keys, time, values = map(
        np.concatenate,
        zip(*((p.keys, p.time, p.values) for p in pieces), strict=True),
    )
    order = np.argsort(time, kind="stable")
    before = [np.empty(values.shape) for _ in past.plan(key).running()]
    try:
        for rows in _blocks(time[order], order):
            found = totals.update(keys[rows], time[rows], values[rows])
            for out, of_horizon in zip(before, found, strict=True):
                out[rows] = of_horizon
    except TotalOverflowError:
        # `start_spans` reports it.
        before = []
    first = 0
    for piece in pieces:
        entries = slice(first, first + len(piece.keys))
        first = entries.stop
        own = [of_horizon[entries] for of_horizon in before] if before else None
        yield piece.partition, TotalPiece(key, piece.first, own)


def _blocks(time: np.ndarray, order: np.ndarray) -> Iterator[np.ndarray]:
    """Cut `order: [n]` to about equal parts, those of equal time in one of them.

    Args:
      time: `[n]`, ascending.
      order: `[n]`.
    """
    first = 0
    while first < len(time):
        last = min(first + _AT_ONCE, len(time)) - 1
        end = int(np.searchsorted(time, time[last], side="right"))
        yield order[first:end]
        first = end
