"""Values of an opened data set that no compiled program could refuse: it would clip an id, or spread a NaN.

`prepare` writes none of them. They come from files that were edited, or made by something else.
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
from tokenrec.data.schema import Feature, Schema, columns
from tokenrec.errors import InputError

_REMEDY = "it was changed, or belongs to another schema; prepare the data set again"


def check_log(log: InteractionLog, schema: Schema, items: int, where: str) -> None:
    """Raises an InputError that names the first wrong value of a log. `items`: rows of the catalogue."""
    _check_range(
        log.item, 0, items - 1, f"{where}: the item", "the catalogue has this many rows"
    )
    _check_range(
        log.labels,
        -1,
        1,
        f"{where}: a label",
        "a label is 1, 0, or -1 where it is unknown",
    )
    _check_range(
        log.flags,
        0,
        EVENT | SCORED | LEARNED,
        f"{where}: flags",
        "no other flag is known",
    )
    if len(log.request):
        _check_range(
            log.request,
            -1,
            np.iinfo(np.int64).max,
            f"{where}: request",
            "-1 is a request of one row",
        )
    for name, group in (("user", "user"), ("row", "row"), ("action", "action")):
        features = schema.group(group)  # type: ignore[arg-type]
        _check_features(
            getattr(log, f"{name}_ids"),
            getattr(log, f"{name}_dense"),
            features,
            schema,
            where,
        )
    later = log.time[1:] >= log.time[:-1]
    later[log.start[(log.start > 0) & (log.start < log.num_rows)] - 1] = (
        True  # another chunk begins
    )
    if not later.all():
        row = int(later.argmin()) + 1
        raise InputError(
            f"{where}: row {row} of those read has the time {log.time[row]}, before {log.time[row - 1]} of the row "
            f"before it; {_REMEDY}"
        )


def check_catalogue(catalogue: Catalogue, schema: Schema, where: str) -> None:
    """Raises an InputError unless the catalogue has a row per item, with ids and numbers that fit the schema."""
    features = list(schema.group("catalogue"))
    width = columns(features)
    for name, array, kinds, shape in (
        ("item_id", catalogue.item_id, ("int64", "str"), (schema.items,)),
        ("ids", catalogue.ids, ("int32",), (schema.items, width.ids_width)),
        ("dense", catalogue.dense, ("float32",), (schema.items, width.dense_width)),
    ):
        if (
            array.shape != shape
            or (array.dtype.name if array.dtype.kind != "U" else "str") not in kinds
        ):
            raise InputError(
                f"{where}: {name} has the shape {array.shape} of {array.dtype}, not {shape}; {_REMEDY}"
            )
    _check_features(catalogue.ids, catalogue.dense, features, schema, where)


def _check_features(
    ids: np.ndarray,
    dense: np.ndarray,
    features: Sequence[Feature],
    schema: Schema,
    where: str,
) -> None:
    if ids.size:
        tables = [
            (f, schema.tables[f.table_name])
            for f in features
            if f.is_integer
            for _ in range(f.length)
        ]
        # As an unsigned number a negative id is a large one.
        wrong = ids.view(np.uint32).max(axis=0) >= np.array(
            [rows for _, rows in tables], np.uint32
        )
        if wrong.any():
            feature, rows = tables[int(wrong.argmax())]
            start, stop = columns(features).ids[feature.name]
            reason = f"its table '{feature.table_name}' has this many rows"
            _check_range(
                ids[:, start:stop],
                0,
                rows - 1,
                f"{where}: an id of the feature '{feature.name}'",
                reason,
            )
    if np.isinf(dense).any():
        place = int(np.isinf(dense).any(axis=0).argmax())
        name = next(
            name
            for name, (start, stop) in columns(features).dense.items()
            if start <= place < stop
        )
        row = int(np.isinf(dense[:, place]).argmax())
        raise InputError(
            f"{where}: feature '{name}' is {dense[row, place]} in row {row} of those read; a missing value is NaN, any "
            f"other is finite; {_REMEDY}"
        )


def _check_range(
    values: np.ndarray, least: int, most: int, what: str, reason: str
) -> None:
    if not values.size or (values.min() >= least and values.max() <= most):
        return
    at = np.unravel_index(
        int(((values < least) | (values > most)).argmax()), values.shape
    )
    raise InputError(
        f"{what} is {values[at]} in row {at[0]} of those read, which is not {least} to {most} ({reason}); {_REMEDY}"
    )
