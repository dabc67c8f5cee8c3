"""Columns of events and of requests, and their conversion to Arrow.

An event is a log row, with an id of its own. A request's candidates are log rows too,
which were not shown yet: no events, without labels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Feature, Schema
from tokenrec.errors import InputError, suggest

# A log row as a tuple of values, in the order of `LiveSchema.row_columns`.
type Row = tuple[Any, ...]

USER, ITEM, TIME, IS_EVENT, IS_SCORED, REQUEST = range(6)
_FIRST_COLUMNS = ("user_id", "item_id", "time_ms", "event", "scored", "request")
EVENT_ID = "event_id"
_LONGEST_ID = 256
_LARGEST = float(np.finfo(np.float32).max)
_TYPES = {"int64": pa.int64(), "string": pa.string()}


@dataclasses.dataclass(frozen=True)
class LiveSchema:
    """What events look like.

    Attributes:
      schema: schema of the data set, with all features.
      computed: row features that are computed from earlier events.
      key_types: "int64" or "string" for `user_id` and `item_id`.
      value_types: the same for the categorical and multi-valued features of rows and
        actions.
      scored: whether an event is an impression, where it does not say so; None: every
        event has to.
      exclude: features that are left out of completed requests.
    """

    schema: Schema
    computed: tuple[str, ...]
    key_types: dict[str, str]
    value_types: dict[str, str]
    scored: bool | None
    exclude: tuple[str, ...] = ()

    @functools.cached_property
    def given(self) -> list[Feature]:
        """Features of rows and actions that events have to give."""
        features = self.schema.group("row") + self.schema.group("action")
        return [f for f in features if f.name not in self.computed]

    @property
    def labels(self) -> list[str]:
        """Columns of the binary labels, which statistics count."""
        return [f"label_{task.name}" for task in self.schema.binary_tasks]

    @functools.cached_property
    def row_columns(self) -> list[str]:
        """Columns of a log row, in the order of `Row`."""
        return [*_FIRST_COLUMNS, *self.labels, *(f.name for f in self.given)]

    @functools.cached_property
    def place(self) -> dict[str, int]:
        """Place of each column in a `Row`."""
        return {name: i for i, name in enumerate(self.row_columns)}

    def arrow_schema(self, names: Iterable[str] | None = None) -> pa.Schema:
        """Types of some columns of log rows; of all by default."""
        types = self._types
        names = self.row_columns if names is None else names
        return pa.schema([(name, types[name]) for name in names])

    @functools.cached_property
    def _types(self) -> dict[str, pa.DataType]:
        types = {name: _TYPES[kind] for name, kind in self.key_types.items()}
        types |= {"time_ms": pa.int64(), "request": pa.int64()}
        types |= {"event": pa.bool_(), "scored": pa.bool_()}
        types |= dict.fromkeys(self.labels, pa.int8())
        return types | {f.name: self.arrow_type(f) for f in self.given}

    def arrow_type(self, feature: Feature) -> pa.DataType:
        """Type of the values of a feature."""
        one = pa.float64()
        if feature.has_vocabulary:
            one = _TYPES[self.value_types[feature.name]]
        elif feature.is_integer:
            one = pa.int64()
        is_list = feature.kind not in ("categorical", "dense")
        return pa.list_(one) if is_list else one

    def table(
        self, rows: Sequence[Row], names: Iterable[str] | None = None
    ) -> pa.Table:
        """Make a table of log rows, with some of the columns."""
        types = self.arrow_schema(names)
        columns = [
            pa.array([row[self.place[field.name]] for row in rows], field.type)
            for field in types
        ]
        return pa.Table.from_arrays(columns, schema=types)

    def parse_events(self, columns: Any) -> tuple[list[int | str], list[Row]]:
        """Check the columns of events, and return the id and the log row of each.

        Args:
          columns: name -> values, lists or arrays of equal length.

        Raises:
          InputError: a column is unknown or missing, or a value does not fit.
        """
        if not isinstance(columns, Mapping):
            raise InputError("events: not an object of columns; send columns by name")
        given = dict(columns)
        ids = _event_ids(given.pop(EVENT_ID, None))
        count = len(ids)
        tasks = {f"label_{task.name}" for task in self.schema.tasks}
        known = dict.fromkeys((*self.row_columns, *tasks))
        defaults = {"event": True, "request": -1, "scored": self.scored}
        for name in given:
            if name in self.computed:
                raise InputError(
                    f"events: column '{name}' is computed from earlier events; leave it "
                    "out"
                )
            if name not in known:
                raise InputError(
                    f"events: unknown column '{name}'{suggest(name, known)}"
                )
        values = []
        for field in self.arrow_schema():
            if field.name in given:
                values.append(self._column(field, given[field.name], count))
            elif field.name in tasks:
                values.append([None] * count)
            elif defaults.get(field.name) is not None:
                values.append([defaults[field.name]] * count)
            else:
                raise InputError(
                    f"events: column '{field.name}' is missing; send it, with null "
                    "where a value is missing"
                )
        return ids, list(zip(*values, strict=True))

    def convert(self, feature: Feature, values: Any, where: str) -> list[Any]:
        """Convert values of a feature to those of `Row`.

        Raises:
          InputError: a value has another type, or is not finite.
        """
        out: list[Any] = to_arrow(values, self.arrow_type(feature), where).to_pylist()
        if feature.kind == "multi_valued":
            # `prepare` keeps so many.
            return [v if v is None else v[: feature.length] for v in out]
        if feature.kind in ("embedding", "semantic_id"):
            for value in out:
                if value is not None and len(value) != feature.length:
                    raise InputError(
                        f"{where} has {len(value)} values; its length is "
                        f"{feature.length}; send null where it is missing"
                    )
        return out

    def _column(self, field: pa.Field, values: Any, count: int) -> list[Any]:
        where = f"events: column '{field.name}'"
        out: list[Any]
        if field.name in _FIRST_COLUMNS or field.name in self.labels:
            out = to_arrow(values, field.type, where).to_pylist()
        else:
            out = self.convert(self.schema.feature(field.name), values, where)
        if len(out) != count:
            raise InputError(
                f"{where} has {len(out)} values for {count} events; send one for each"
            )
        if field.name in _FIRST_COLUMNS and None in out:
            raise InputError(
                f"{where} is null in event {out.index(None)}; every event needs a value"
            )
        if field.name in self.labels:
            out = [None if label == -1 else label for label in out]
            wrong = [label for label in out if label not in (None, 0, 1)]
            if wrong:
                raise InputError(f"{where} is {wrong[0]}; a label is 1, 0 or null")
        return out


def to_arrow(values: Any, kind: pa.DataType, where: str) -> pa.Array:
    """Convert values, lists or an array, to an Arrow array; NaN becomes null.

    Raises:
      InputError: a value has another type, or is no finite float32.
    """
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        raise InputError(f"{where} is no list; send one value for each row")
    if isinstance(values, np.ndarray) and values.dtype.kind == "U":
        values = values.tolist()
    one = kind.value_type if pa.types.is_list(kind) else kind
    try:
        if pa.types.is_int64(one):
            # With the type given, Arrow would cut 1.5 to 1.
            array = pa.array(values, from_pandas=True)
            inferred = array.type
            inferred = inferred.value_type if pa.types.is_list(inferred) else inferred
            if pa.types.is_boolean(inferred) or pa.types.is_string(inferred):
                raise TypeError(f"a value is a {inferred}")
            array = array.cast(kind)
        else:
            array = pa.array(values, kind, from_pandas=True)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{where} must hold {kind}: {reason}; correct it") from error
    flat = array.flatten() if pa.types.is_list(kind) else array
    if pa.types.is_floating(flat.type) and len(flat):
        numbers = np.abs(flat.to_numpy(zero_copy_only=False))
        if (numbers > _LARGEST).any():
            raise InputError(
                f"{where} is no finite float32; send null where it is missing"
            )
    return array


def _event_ids(values: Any) -> list[int | str]:
    if not isinstance(values, (list, tuple, np.ndarray)):
        raise InputError(
            f"events: column '{EVENT_ID}' is missing or no list; send an id of your own "
            "for each event, by which one that is sent twice is known"
        )
    ids = values.tolist() if isinstance(values, np.ndarray) else list(values)
    for value in ids:
        if not _is_id(value):
            raise InputError(
                f"events: column '{EVENT_ID}' has {str(value)[:60]!r}; an id is an "
                f"integer of 64 bits, or a text of at most {_LONGEST_ID} characters"
            )
    return ids


def _is_id(value: Any) -> bool:
    if type(value) is int:
        return -(1 << 63) <= value < 1 << 63
    # Half a character, which JSON can hold, cannot be written to the journal.
    return type(value) is str and len(value) <= _LONGEST_ID and value.isprintable()
