"""Read columns of the user's own files for `delimited.py`, and check every value.

The converters of `delimited_values.py` and its neighbours refuse what cannot be read.
Here the rules of a log are checked: keys are there, numbers are finite, lists have
their length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import Feature, Task
from tokenrec.data.sources.delimited_labels import (
    compare,
    read_classes,
    read_flags,
    read_labels,
    read_requests,
    read_targets,
    read_weights,
)
from tokenrec.data.sources.delimited_lists import read_lists
from tokenrec.data.sources.delimited_notes import ColumnNotes, Notes
from tokenrec.data.sources.delimited_schema import KEYS, OPTIONAL, SchemaFile
from tokenrec.data.sources.delimited_times import read_times
from tokenrec.data.sources.delimited_values import (
    WrongValue,
    beyond_float32,
    plain,
    read_ids,
    read_numbers,
    read_texts,
    true_rows,
)
from tokenrec.data.sources.tabular_raw import RawFile, open_raw
from tokenrec.errors import InputError

_NOT_FINITE = (
    "is not a finite float32; correct it, or leave the field empty where it is missing"
)

_COUNTED_IDS = 1_000_000

Convert = Callable[[pa.Array, ColumnNotes], pa.Array]


@dataclasses.dataclass(frozen=True)
class ColumnSpec:
    """One column that the source yields.

    Attributes:
      name: name of the column that is yielded.
      column: column of the file.
      type: type of the column that is yielded.
      convert: converts the column of the file to that type.
      feature: its feature; None for a key or a label.
    """

    name: str
    column: str
    type: pa.DataType
    convert: Convert
    feature: Feature | None = None

    @property
    def is_label(self) -> bool:
        return self.feature is None and self.name.startswith("label_")


def log_specs(schema_file: SchemaFile) -> list[ColumnSpec]:
    """Return the columns of the log."""
    specs = [_key_spec(schema_file, name) for name in KEYS]
    kinds: dict[str, tuple[pa.DataType, Convert]] = {
        "request": (pa.int64(), read_requests),
        "event": (pa.bool_(), read_flags),
        "scored": (pa.bool_(), read_flags),
        "row_weight": (pa.float64(), read_weights),
    }
    specs += [
        ColumnSpec(name, schema_file.column(name), *kinds[name])
        for name in OPTIONAL
        if name in schema_file.columns
    ]
    specs += [_label_spec(schema_file, task) for task in schema_file.schema.tasks]
    schema = schema_file.schema
    labels = schema_file.label_columns()
    for feature in (*schema.group("row"), *schema.group("action")):
        spec = _feature_spec(schema_file, feature)
        if spec.column in labels and feature.kind in ("categorical", "dense"):
            read = functools.partial(_label_as_feature, kind=spec.type)
            spec = dataclasses.replace(spec, convert=read)
        specs.append(spec)
    return specs


def candidate_specs(schema_file: SchemaFile) -> list[ColumnSpec]:
    """Return the columns of rows that are to be ranked: without labels and outcomes."""
    outcomes = {f.name for f in schema_file.schema.group("action")}
    return [
        spec
        for spec in log_specs(schema_file)
        if not spec.name.startswith("label_")
        and spec.name not in {"event", "scored", *outcomes}
    ]


def table_specs(
    schema_file: SchemaFile, key: str, features: Sequence[Feature]
) -> list[ColumnSpec]:
    """Return the columns of the table of users or items, of which `key` is the id."""
    # The id may be a feature as well; it is yielded once.
    return [
        _key_spec(schema_file, key),
        *(_feature_spec(schema_file, f) for f in features if f.name != key),
    ]


def _label_spec(schema_file: SchemaFile, task: Task) -> ColumnSpec:
    name, column = f"label_{task.name}", schema_file.column(task.name)
    rule = schema_file.labels.get(task.name)
    convert: Convert = read_labels
    if task.kind == "real":
        return ColumnSpec(name, column, pa.float64(), read_targets)
    if task.kind == "classes":
        convert = functools.partial(read_classes, classes=task.classes)
    elif rule is not None:
        convert = functools.partial(compare, rule=rule)
    return ColumnSpec(name, column, pa.int8(), convert)


def _key_spec(schema_file: SchemaFile, name: str) -> ColumnSpec:
    column = schema_file.column(name)
    if name == "time_ms":
        convert = functools.partial(read_times, form=schema_file.time)
        return ColumnSpec(name, column, pa.int64(), convert)
    kind = schema_file.value_type(name)
    return ColumnSpec(
        name, column, kind, functools.partial(read_ids, kind=kind, is_key=True)
    )


def _feature_spec(schema_file: SchemaFile, feature: Feature) -> ColumnSpec:
    column = schema_file.column(feature.name)
    kind = schema_file.value_type(feature.name)
    convert: Convert
    if feature.kind == "dense":
        # Read as float64, so that a number beyond float32 is refused and not inf.
        kind, convert = pa.float64(), read_numbers
    elif feature.kind == "text":
        kind, convert = pa.string(), read_texts
    elif feature.kind == "categorical":
        keys = (schema_file.column("user_id"), schema_file.column("item_id"))
        # A copy of an id is read as the id.
        convert = functools.partial(read_ids, kind=kind, is_key=column in keys)
    else:
        parts = {"embedding": pa.float32(), "semantic_id": pa.int64()}
        kind = pa.list_(parts.get(feature.kind, kind))
        convert = functools.partial(
            read_lists,
            kind=kind,
            separator=schema_file.separator(feature.name),
            is_vector=feature.kind in parts,
        )
    return ColumnSpec(feature.name, column, kind, convert, feature)


def _label_as_feature(
    values: pa.Array, notes: ColumnNotes, *, kind: pa.DataType
) -> pa.Array:
    """Convert a label that is a feature as well: unknown is a missing value."""
    labels = read_labels(values, notes)
    labels = pc.if_else(pc.equal(labels, -1), pa.scalar(None, pa.int8()), labels)
    return labels.cast(kind)


def read_columns(
    path: Path,
    specs: Sequence[ColumnSpec],
    notes: Notes,
    *,
    delimiter: str | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield columns of a file, checked.

    Args:
      path: CSV or Parquet file.
      specs: the columns to yield, in order; several may read one column of the file.
      notes: gets what was changed and what is odd.
      delimiter: what separates the fields of a CSV file; None to find out.

    Raises:
      InputError: a value is wrong; names file, line or row, column, value, reason and
        remedy.
    """
    raw = open_raw(
        path, list(dict.fromkeys(spec.column for spec in specs)), delimiter=delimiter
    )
    for note in raw.notes:
        notes.add_file(path, note)
    schema = pa.schema([(spec.name, spec.type) for spec in specs])
    of_columns = [notes.column(path, spec.column, spec.name) for spec in specs]
    first_row = 0
    for batch in raw.batches():
        if not batch.num_rows:
            continue
        arrays = []
        for spec, of_column in zip(specs, of_columns, strict=True):
            stored = batch.column(spec.column)
            try:
                values = spec.convert(plain(stored), of_column)
                # Rules are checked in order; the first row that breaks one is named.
                for wrong_rows, reason in _problems(spec, values):
                    if len(wrong_rows):
                        raise WrongValue(int(wrong_rows[0]), reason)
            except WrongValue as error:
                raise InputError(
                    _message(path, raw, first_row, spec, stored, error)
                ) from error
            except pa.ArrowException as error:
                raise InputError(
                    f"{path}: column '{spec.column}' ({stored.type}) cannot be read "
                    f"as {spec.name}: {error}; correct its values or its type"
                ) from error
            arrays.append(values)
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        first_row += batch.num_rows


def _message(
    path: Path,
    raw: RawFile,
    first_row: int,
    spec: ColumnSpec,
    stored: pa.Array,
    error: WrongValue,
) -> str:
    if error.row is None:
        return f"{path}: column '{spec.column}' ({spec.name}) {error.reason}"
    value = stored[error.row].as_py()
    place = raw.place(first_row + error.row)
    return f"{place}: column '{spec.column}': {value!r} {error.reason}"


def _problems(spec: ColumnSpec, values: pa.Array) -> Iterator[tuple[np.ndarray, str]]:
    """Yield each rule that a column must follow.

    Yields:
      Indices of the rows that break the rule, and the reason and the remedy.
    """
    feature = spec.feature
    # Their converters refuse what is wrong, and null is allowed.
    if spec.is_label or spec.name == "row_weight":
        return
    if feature is None:
        yield (
            true_rows(pc.is_null(values)),
            f"is not a {spec.name}; every row needs one; fill it in or remove the row",
        )
        if spec.name == "request":
            yield (
                true_rows(pc.less(values, -1)),
                "is negative; use an integer from 0, or nothing for a row on its own",
            )
    elif feature.kind == "dense":
        yield true_rows(beyond_float32(values)), _NOT_FINITE
    elif feature.kind in ("embedding", "semantic_id"):
        yield from _list_problems(feature, values)


def _list_problems(
    feature: Feature, values: pa.ListArray
) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the rules of an embedding or a semantic id, as `_problems` does."""
    wrong_length = pc.not_equal(pc.list_value_length(values), feature.length)
    yield (
        true_rows(wrong_length),
        f"has not length={feature.length} values, which the schema says; correct one "
        "of them, or name what is between the values under separators",
    )
    numbers = pc.list_flatten(values)
    row_of_number = pc.list_parent_indices(values)
    wrong = beyond_float32(numbers)
    reason = _NOT_FINITE
    if feature.kind == "semantic_id":
        wrong = pc.or_(pc.less(numbers, 0), pc.greater_equal(numbers, feature.codes))
        reason = (
            f"is not a whole semantic_id: codes must lie in 0 .. {feature.codes - 1}; "
            "correct it or leave the field empty"
        )
    yield row_of_number.filter(wrong.fill_null(False)).to_numpy(), reason
    yield (
        row_of_number.filter(pc.is_null(numbers)).to_numpy(),
        f"is not a whole {feature.kind}: a value is missing; correct it or leave the "
        "field empty",
    )


def refuse_repeats(path: Path, column: str, keys: pa.ChunkedArray) -> None:
    """Refuse an id that has several rows in the table of users or items.

    A long table is left to `prepare`, which finds repeats in bounded memory but knows
    neither file nor column.

    Args:
      path: file of the table, for messages.
      column: column of the ids, for messages.
      keys: `[n]`, original ids.

    Raises:
      InputError: an id occurs twice.
    """
    if len(keys) > _COUNTED_IDS:
        return
    counts = pc.value_counts(keys)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        key, times = repeated[0]["values"].as_py(), repeated[0]["counts"].as_py()
        raise InputError(
            f"{path}: column '{column}': {key!r} has {times} rows; keep one row for "
            "each id"
        )
