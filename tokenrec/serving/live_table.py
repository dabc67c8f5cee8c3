"""Tables of events: those of the journal, and those of histories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.serving.live_histories import Event
from tokenrec.serving.live_schema import LiveSchema, Row
from tokenrec.serving.live_window import EventId
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
        # An integer id may be larger than an int64.
        texts = [None if i is None else str(i) for i in ids]
        table = table.append_column(name, pa.array(texts, pa.string()))
    return table


def read_events_table(schema: LiveSchema, table: pa.Table) -> list[tuple[EventId, Row]]:
    """Read a table of events, the inverse of `events_table`."""
    ids = [
        text if number is None else int(number)
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
    schema: LiveSchema, table: pa.Table, events: Sequence[Event], most: int
) -> dict[str, Column]:
    """Join the events of a user to the history of a request.

    Args:
      schema: columns of events.
      table: the events of the snapshot.
      events: those since then.
      most: the most events of the history.

    Returns:
      The columns of the last events, oldest first; none if the user has no event.
    """
    events = events[max(len(events) - most, 0) :]
    old = most - len(events)
    table = table.slice(max(table.num_rows - old, 0))
    if not len(events) and not table.num_rows:
        return {}
    place = {name: i for i, name in enumerate(schema.row_columns)}
    columns: dict[str, Column] = {}
    for name in ("time_ms", "item_id", *(f.name for f in schema.given)):
        values: list[Any] = table[name].to_pylist()
        at = place[name]
        values.extend(row[at] for row, _ in events)
        columns[name] = values
    for i, name in enumerate(schema.computed):
        old_values = table[name].fill_null(np.nan).to_numpy()
        newer = np.array([computed[i] for _, computed in events], np.float32)
        columns[name] = np.concatenate([old_values, newer])
    return {n: values for n, values in columns.items() if n not in schema.exclude}
