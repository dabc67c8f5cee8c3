"""Tables of events: those of the journal, and those of histories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.serving.live.histories import Event, Past
from tokenrec.serving.live.schema import LiveSchema, Row
from tokenrec.serving.live.window import EventId
from tokenrec.serving.request import Column

_IDS = {"event_id_int": int, "event_id_text": str}


def events_table(
    schema: LiveSchema, events: Sequence[tuple[EventId, Row]]
) -> pa.Table | None:
    """Make a table of events with their ids; None of no events."""
    if not events:
        return None
    table = schema.table([row for _, row in events])
    for name, kind in _IDS.items():
        ids = [i if type(i) is kind else None for i, _ in events]
        arrow = pa.int64() if kind is int else pa.string()
        table = table.append_column(name, pa.array(ids, arrow))
    return table


def read_events_table(schema: LiveSchema, table: pa.Table) -> list[tuple[EventId, Row]]:
    """Read a table of events, the inverse of `events_table`."""
    ids = [
        text if number is None else number
        for number, text in zip(*(table[n].to_pylist() for n in _IDS), strict=True)
    ]
    columns = [table[name].to_pylist() for name in schema.row_columns]
    return list(zip(ids, zip(*columns, strict=True), strict=True))


def history_types(schema: LiveSchema) -> pa.Schema:
    """Columns of a table of histories."""
    given = schema.arrow_schema(
        ["user_id", "item_id", "time_ms", *(f.name for f in schema.given)]
    )
    for name in schema.computed:
        given = given.append(pa.field(name, pa.float32()))
    return given


def newer_table(schema: LiveSchema, events: Sequence[Event]) -> pa.Table:
    """Make a table of histories from events that have left the window."""
    types = history_types(schema)
    given = [n for n in types.names if n not in schema.computed]
    table = schema.table([row for row, _ in events], given)
    for i, name in enumerate(schema.computed):
        values = np.array([computed[i] for _, computed in events], np.float32)
        table = table.append_column(name, pa.array(values, from_pandas=True))
    return table.cast(types)


def history_columns(
    schema: LiveSchema, past: Past, window: Sequence[Event], most: int
) -> dict[str, Column]:
    """Join the events of a user to the history of a request.

    Args:
      schema: columns of events.
      past: the events until the watermark.
      window: those since then.
      most: the most events of the history.

    Returns:
      The columns of the last events, oldest first; none if the user has no event.
    """
    newer = [*past.newer, *window]
    newer = newer[max(len(newer) - most, 0) :]
    old = min(most - len(newer), len(past.computed))
    given, matrix = past.given.slice(past.given.num_rows - old), past.computed[-old:]
    if not old:
        matrix = matrix[:0]
        if not newer:
            return {}
    columns: dict[str, Column] = {}
    for name in ("time_ms", "item_id", *(f.name for f in schema.given)):
        if name in schema.exclude:
            continue
        values: list[Any] = given[name].to_pylist()
        at = schema.place[name]
        values.extend(row[at] for row, _ in newer)
        columns[name] = values
    if newer:
        matrix = np.concatenate([matrix, np.stack([computed for _, computed in newer])])
    for i, name in enumerate(schema.computed):
        if name not in schema.exclude:
            columns[name] = matrix[:, i]
    return columns
