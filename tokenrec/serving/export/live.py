"""Make a live state of a prepared data set, for `tokenrec export`.

It goes on from `state/`, as `prepare --like` does, and takes the last events of each user
from the shards. It needs the packages of preparation; what it writes does not.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data import records
from tokenrec.data.arrow_rows import RowDecoder
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import EVENT, REPEATED, SCORED, InteractionLog
from tokenrec.data.metadata import STATE
from tokenrec.data.past.declaration import PastStatistics
from tokenrec.data.preparation.like import open_like
from tokenrec.data.preparation.state import read_events
from tokenrec.data.schema import Feature, Schema
from tokenrec.data.vocabulary import Vocabulary
from tokenrec.errors import InputError
from tokenrec.serving.live.features import LiveFeatures
from tokenrec.serving.live.files import SavedState, write_state
from tokenrec.serving.live.schema import LiveSchema
from tokenrec.serving.live.sums import sum_features
from tokenrec.serving.live.table import history_types

# Values that stand for one that training had not; the first that no row has is taken.
_TEXTS = [f"<unknown{'_' * i}>" for i in range(8)]
_INTEGERS = [i - (1 << 63) for i in range(8)]


def write_live_state(
    data: Path, out: Path, *, events: int, exclude: Sequence[str] = ()
) -> None:
    """Write what `LiveState.open` goes on from.

    Args:
      data: a prepared data set.
      out: folder to make.
      events: the most events of a history, `data.events` of the run.
      exclude: features that the run leaves out, `data.exclude`.

    Raises:
      InputError: the data set cannot be gone on from, or its source counts the past in
        a way that events cannot go on with.
    """
    if events < 1:
        raise InputError(f"events={events} must be at least 1; raise it")
    open_like(data)  # for its errors
    dataset = open_dataset(data)
    arrays = {
        name: dataset.read_array(f"{STATE}/{name}.npy")
        for name in dataset.metadata.state["source"]
    }
    statistics = _statistics(arrays)
    schema = _live_schema(dataset, statistics, exclude)
    watermark = int(dataset.metadata.state["last_time_ms"])
    source = dataset.metadata.source
    # For its errors: totals that do not fit are better found here than by a server.
    LiveFeatures(schema, source, statistics, arrays, watermark)
    write_state(
        out,
        SavedState(
            schema,
            source,
            statistics,
            events,
            watermark,
            watermark,
            0,
            arrays,
            dataset.catalogue.item_id,
            _histories(dataset, schema, events),
            None,
        ),
    )


def _statistics(arrays: dict[str, np.ndarray]) -> dict[str, Any] | None:
    """The declaration of statistics that a state has."""
    for name in ("past_declaration", "declaration"):
        if name in arrays:
            value: dict[str, Any] = json.loads(arrays[name].tobytes())
            return value
    return None


def _live_schema(
    dataset: Dataset, statistics: dict[str, Any] | None, exclude: Sequence[str]
) -> LiveSchema:
    schema = dataset.schema
    computed = list(sum_features(dataset.metadata.source))
    if statistics is not None:
        declared = PastStatistics.from_json(statistics)
        computed += [f.name for f in declared.features(schema)]
    names = {f.name for f in schema.features}
    of_rows = [*schema.group("row"), *schema.group("action")]
    return LiveSchema(
        schema,
        tuple(name for name in computed if name in names),
        dataset.metadata.key_types,
        {
            f.name: Vocabulary(dataset.directory, f.table_name).type
            for f in of_rows
            if f.has_vocabulary
        },
        _scored(dataset),
        tuple(exclude),
    )


def _scored(dataset: Dataset) -> bool | None:
    """Whether the events of the log are impressions; None where some are."""
    scored = other = False
    for block in dataset.records(dataset.splits[0]):
        for record in block:
            rows = np.frombuffer(
                records.decode(record).rows, records.row_dtype(dataset.metadata.schema)
            )
            own = rows["flags"][(rows["flags"] & (EVENT | REPEATED)) == EVENT]
            scored |= bool((own & SCORED).any())
            other |= bool((~own & np.uint8(SCORED)).any())
    return None if scored and other else scored


def _histories(dataset: Dataset, schema: LiveSchema, events: int) -> pa.Table:
    """The last events of each user, with the values of the log."""
    of_rows = [f.name for f in (*schema.given, *_features(schema, schema.computed))]
    other = [f.name for f in dataset.schema.features if f.name not in of_rows]
    decoder = RowDecoder(open_dataset(dataset.directory, exclude=other))
    users, rows, start = _last_events(dataset, events)
    types = history_types(schema)
    if not len(rows):
        return types.empty_table()
    log = _as_log(dataset.metadata.schema, users, rows, start)
    batch = decoder.decode(log, np.arange(len(rows)))
    table = pa.Table.from_batches([batch])
    for feature in schema.given:
        if feature.has_vocabulary:
            stand_in = _stand_in(dataset.directory, feature)
            at = table.schema.get_field_index(feature.name)
            column = _named_unknown(table, feature, stand_in)
            table = table.set_column(at, feature.name, column)
    return table.select(types.names).cast(types)


def _features(schema: LiveSchema, names: Sequence[str]) -> list[Feature]:
    return [schema.schema.feature(name) for name in names]


def _last_events(
    dataset: Dataset, events: int
) -> tuple[list[int | str], np.ndarray, np.ndarray]:
    """Users, `[R]` of `row_dtype`, and `[U + 1]` where the events of each begin."""
    dtype = records.row_dtype(dataset.metadata.schema)
    of_user: dict[int | str, np.ndarray] = {}
    for block in _event_records(dataset):
        for record in block:
            chunk = records.decode(record)
            rows = np.frombuffer(chunk.rows, dtype)
            rows = rows[(rows["flags"] & (EVENT | REPEATED)) == EVENT]
            if chunk.user_id in of_user:
                rows = np.concatenate([of_user[chunk.user_id], rows])
            # As `prepare` sorts them; an event comes before an impression.
            order = np.lexsort(
                (rows["flags"] & SCORED, rows["item"], rows["request"], rows["time"])
            )
            of_user[chunk.user_id] = rows[order][-events:]
    users = [user for user, rows in of_user.items() if len(rows)]
    parts = [of_user[user] for user in users]
    start = np.concatenate([[0], np.cumsum([len(p) for p in parts], dtype=np.int64)])
    return users, np.concatenate([np.zeros(0, dtype), *parts]), start


def _event_records(dataset: Dataset) -> Iterator[list[bytes]]:
    for split in dataset.splits:
        yield from dataset.records(split)
    yield from read_events(dataset.directory, dataset.metadata.state["events"])


def _as_log(
    schema: Schema, users: list[int | str], rows: np.ndarray, start: np.ndarray
) -> InteractionLog:
    user = np.zeros(len(users), records.user_dtype(schema))
    names = (f.name for f in dataclasses.fields(InteractionLog))
    return InteractionLog(
        start=start,
        user_id=np.array(users, object if isinstance(users[0], str) else np.int64),
        user_ids=user["user_ids"],
        user_dense=user["user_dense"],
        **{name: rows[name] for name in names if name in (rows.dtype.names or ())},
    )


def _stand_in(directory: Path, feature: Feature) -> int | str:
    """A value that no training row has, which a request's encoder does not know."""
    vocabulary = Vocabulary(directory, feature.table_name)
    tried: list[Any] = _INTEGERS if vocabulary.type == "int64" else _TEXTS
    free = dict.fromkeys(tried)
    for part in vocabulary.parts():
        values = pa.array(tried, part.type)
        for value in values.filter(pc.is_in(values, value_set=part)).to_pylist():
            free.pop(value, None)
    if not free:
        raise InputError(
            f"feature '{feature.name}' has all of {tried} as values; one of them has to "
            "be free"
        )
    return next(iter(free))


def _named_unknown(
    table: pa.Table, feature: Feature, stand_in: int | str
) -> pa.ChunkedArray:
    """Put a stand-in where the value of a feature is one that training had not."""
    column = table[feature.name].combine_chunks()
    value = pa.scalar(stand_in, column.type if feature.kind == "categorical" else None)
    if feature.kind == "categorical":
        names = table["unknown"].combine_chunks()
        unknown = np.zeros(len(names), bool)
        has_name = pc.equal(names.flatten(), feature.name).to_numpy(False)
        unknown[pc.list_parent_indices(names).to_numpy()[has_name]] = True
        return pc.if_else(pa.array(unknown), value, column)
    # An unknown value of a list is a null element.
    values = [
        None if v is None else [stand_in if x is None else x for x in v]
        for v in column.to_pylist()
    ]
    return pa.array(values, column.type)
