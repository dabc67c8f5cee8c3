"""Check the values of an opened data set that a compiled program could not refuse.

A program on an accelerator clips an id beyond its table and spreads a NaN, without a
word. `prepare` writes no such values; they come from files that were edited, or that
something else wrote. So every log that is read, and the catalogue, is checked once on
the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenrec.data.interaction_log import (
    EVENT,
    LEARNED,
    SCORED,
    Catalogue,
    InteractionLog,
)
from tokenrec.data.schema import Feature, Group, Schema, columns
from tokenrec.errors import InputError

_REMEDY = "it was changed, or belongs to another schema; prepare the data set again"
_LOG_GROUPS: tuple[Group, ...] = ("user", "row", "action")


def check_log(log: InteractionLog, schema: Schema, items: int, where: str) -> None:
    """Check the values of a log.

    Args:
      log: whole chunks.
      schema: the schema of the log's columns.
      items: rows of the catalogue.
      where: what messages begin with: the data set, the split and the chunks.

    Raises:
      InputError: names the first wrong value.
    """
    _check_range(
        log.item,
        (0, items - 1),
        f"{where}: the item",
        "the catalogue has this many rows",
    )
    _check_labels(log, schema, where)
    _check_range(
        log.flags,
        (0, EVENT | SCORED | LEARNED),
        f"{where}: flags",
        "no other flag is known",
    )
    if len(log.request):
        _check_range(
            log.request,
            (-1, np.iinfo(np.int64).max),
            f"{where}: request",
            "-1 is a request of one row",
        )
    for group in _LOG_GROUPS:
        ids = getattr(log, f"{group}_ids")
        dense = getattr(log, f"{group}_dense")
        _check_features(ids, dense, schema.group(group), schema, where)
    _check_times(log, where)


def _check_labels(log: InteractionLog, schema: Schema, where: str) -> None:
    """Check labels, and the weights of the rows."""
    kinds = {task.kind for task in schema.tasks}
    if kinds <= {"binary"}:
        _check_range(
            log.labels,
            (-1, 1),
            f"{where}: a label",
            "a label is 1, 0, or -1 where it is unknown",
        )
    else:
        for k, task in enumerate(schema.tasks):
            most = {"binary": 1, "real": 0}.get(task.kind, task.width - 1)
            _check_range(
                log.labels[:, k],
                (-1, most),
                f"{where}: a label of '{task.name}'",
                f"{most} is the greatest, and -1 is unknown",
            )
    numbers = {"a target": log.targets, "a weight": log.weight}
    for name, values in numbers.items():
        if values is not None and np.isinf(values).any():
            raise InputError(f"{where}: {name} is infinite; {_REMEDY}")
    if log.targets is not None:
        real = [k for k, task in enumerate(schema.tasks) if task.kind == "real"]
        if ((log.labels[:, real] < 0) != np.isnan(log.targets)).any():
            raise InputError(f"{where}: a label and its target disagree; {_REMEDY}")
    # Also refuses NaN.
    if log.weight is not None and not (log.weight >= 0).all():
        raise InputError(f"{where}: a weight is negative or none; {_REMEDY}")


def _check_times(log: InteractionLog, where: str) -> None:
    """Check that the times of a chunk ascend."""
    ascends = log.time[1:] >= log.time[:-1]
    # Not from one chunk to the next: `start - 1` is the last log row of a chunk.
    ascends[log.start[(log.start > 0) & (log.start < log.num_rows)] - 1] = True
    if not ascends.all():
        row = int(ascends.argmin()) + 1
        raise InputError(
            f"{where}: row {row} of those read has the time {log.time[row]}, before "
            f"{log.time[row - 1]} of the row before it; {_REMEDY}"
        )


def check_catalogue(catalogue: Catalogue, schema: Schema, where: str) -> None:
    """Check that the catalogue has a row per item, with values that fit the schema.

    Args:
      catalogue: all columns of the schema, nothing excluded.
      schema: schema of the data set.
      where: what messages begin with: the data set and its folder of items.

    Raises:
      InputError: names the first wrong array or value.
    """
    features = schema.group("catalogue")
    width = columns(features)
    for name, array, types, shape in (
        ("item_id", catalogue.item_id, ("int64", "str"), (schema.items,)),
        ("ids", catalogue.ids, ("int32",), (schema.items, width.ids_width)),
        ("dense", catalogue.dense, ("float32",), (schema.items, width.dense_width)),
    ):
        # The name of a NumPy string type holds its length, which may be any.
        type_name = "str" if array.dtype.kind == "U" else array.dtype.name
        if array.shape != shape or type_name not in types:
            raise InputError(
                f"{where}: {name} has the shape {array.shape} of {array.dtype}, not "
                f"{shape}; {_REMEDY}"
            )
    _check_features(catalogue.ids, catalogue.dense, features, schema, where)


def _check_features(
    ids: np.ndarray,
    dense: np.ndarray,
    features: Sequence[Feature],
    schema: Schema,
    where: str,
) -> None:
    """Check that ids lie in their tables and that numbers are finite or missing.

    Args:
      ids: `[n, I] int32`.
      dense: `[n, D] float32`.
      features: the features of the columns.
      schema: gives the sizes of the tables.
      where: what messages begin with.
    """
    if ids.size:
        _check_ids(ids, features, schema, where)
    infinite = np.isinf(dense)
    if infinite.any():
        column = int(infinite.any(axis=0).argmax())
        places = columns(features).dense.items()
        name = next(n for n, (start, stop) in places if start <= column < stop)
        row = int(infinite[:, column].argmax())
        raise InputError(
            f"{where}: feature '{name}' is {dense[row, column]} in row {row} of those "
            f"read; a missing value is NaN, any other is finite; {_REMEDY}"
        )


def _check_ids(
    ids: np.ndarray, features: Sequence[Feature], schema: Schema, where: str
) -> None:
    # The feature of each column, and the rows of its table.
    owners = [f for f in features if f.is_integer for _ in range(f.length)]
    table_rows = [schema.tables[f.table_name] for f in owners]
    # One pass over the matrix instead of one per column and bound: as an unsigned
    # number a negative id is a large one.
    wrong = ids.view(np.uint32).max(axis=0) >= np.array(table_rows, np.uint32)
    if not wrong.any():
        return
    column = int(wrong.argmax())
    feature = owners[column]
    start, stop = columns(features).ids[feature.name]
    _check_range(
        ids[:, start:stop],
        (0, table_rows[column] - 1),
        f"{where}: an id of the feature '{feature.name}'",
        f"its table '{feature.table_name}' has this many rows",
    )


def _check_range(
    values: np.ndarray, bounds: tuple[int, int], what: str, reason: str
) -> None:
    """Check `bounds[0] <= values <= bounds[1]`, and name the first value outside."""
    low, high = bounds
    if not values.size or (values.min() >= low and values.max() <= high):
        return
    outside = (values < low) | (values > high)
    place = np.unravel_index(int(outside.argmax()), values.shape)
    raise InputError(
        f"{what} is {values[place]} in row {place[0]} of those read, which is not "
        f"{low} to {high} ({reason}); {_REMEDY}"
    )
