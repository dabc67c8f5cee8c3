"""Read columns of the user's own files for `delimited.py`, and check every value.

`tabular.py` refuses what does not parse. Here the rules of a log are checked: keys are
there, labels are 1, 0 or unknown, numbers are finite, lists have their length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import Feature
from tokenrec.data.sources.tabular import read_batches
from tokenrec.errors import InputError

_NOT_FINITE = (
    "is not a finite float32; correct it, or leave the field empty where it is missing"
)


@dataclasses.dataclass(frozen=True)
class ColumnSpec:
    """One column that the source yields.

    Attributes:
      name: name of the column that is yielded.
      column: column of the file.
      type: type of the column that is yielded.
      feature: its feature; None for a key or a label.
    """

    name: str
    column: str
    type: pa.DataType
    feature: Feature | None = None

    @property
    def is_label(self) -> bool:
        return self.feature is None and self.name.startswith("label_")


def read_columns(path: Path, specs: Sequence[ColumnSpec]) -> Iterator[pa.RecordBatch]:
    """Yield columns of a file, checked.

    Several specs may name one column of the file: it is read with the type of the first
    one and cast for the others.

    Args:
      path: .csv, .csv.gz or .parquet file.
      specs: the columns to yield, in order.

    Raises:
      InputError: a value is wrong; names file, row, column, value, reason and remedy.
    """
    types: dict[str, pa.DataType] = {}
    for spec in specs:
        types.setdefault(spec.column, spec.type)
    label_columns = {spec.column for spec in specs if spec.is_label}
    schema = pa.schema([(spec.name, spec.type) for spec in specs])
    # Messages count rows from 1.
    first_row = 1
    for batch in read_batches(path, types):
        if not batch.num_rows:
            continue
        arrays = []
        for spec in specs:
            values = batch.column(spec.column)
            if spec.feature is not None and spec.column in label_columns:
                # As a feature, a label that is unknown (-1) is a missing value.
                missing = pa.scalar(None, values.type)
                values = pc.if_else(pc.equal(values, -1), missing, values)
            try:
                values = values.cast(spec.type)
            except pa.ArrowException as error:
                raise InputError(
                    f"{path}: column '{spec.column}' as {spec.name}: {error}; "
                    "correct the values, or the type of the name in the schema"
                ) from error
            if spec.name == "request":
                values = values.fill_null(-1)
            # Rules are checked in order, and the first row that breaks one is named.
            for wrong_rows, reason in _problems(spec, values):
                if len(wrong_rows):
                    row = int(wrong_rows[0])
                    raise InputError(
                        f"{path}, row {first_row + row} (the header not counted): "
                        f"column '{spec.column}': {values[row].as_py()!r} {reason}"
                    )
            arrays.append(values)
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        first_row += batch.num_rows


def _problems(spec: ColumnSpec, values: pa.Array) -> Iterator[tuple[np.ndarray, str]]:
    """Yield each rule that a column must follow.

    Yields:
      Indices of the rows that break the rule, and the reason and the remedy.
    """
    feature = spec.feature
    if spec.is_label:
        known = pc.is_in(values, value_set=pa.array([1, 0, -1, None], pa.int8()))
        yield (
            _true_rows(pc.invert(known)),
            "is not a label; use 1, 0, or nothing where it is unknown",
        )
    elif feature is None:
        yield (
            _true_rows(pc.is_null(values)),
            f"is not a {spec.name}; every row needs one; fill it in or remove the row",
        )
        if spec.name == "request":
            yield (
                _true_rows(pc.less(values, -1)),
                "is negative; use an integer from 0, or nothing for a row on its own",
            )
    elif feature.kind == "dense":
        yield _true_rows(_beyond_float32(values)), _NOT_FINITE
    elif feature.kind in ("embedding", "semantic_id"):
        yield from _list_problems(feature, values)


def _list_problems(
    feature: Feature, values: pa.ListArray
) -> Iterator[tuple[np.ndarray, str]]:
    """Yield the rules of an embedding or a semantic id, as `_problems` does."""
    wrong_length = pc.not_equal(pc.list_value_length(values), feature.length)
    yield (
        _true_rows(wrong_length),
        f"has not length={feature.length} values, which the schema says; correct one "
        "of them",
    )
    numbers = pc.list_flatten(values)
    row_of_number = pc.list_parent_indices(values)
    wrong = pc.is_null(numbers)
    reason = "a value is missing"
    if feature.kind == "embedding":
        too_large = _beyond_float32(numbers).fill_null(False)
        yield row_of_number.filter(too_large).to_numpy(), _NOT_FINITE
    else:
        outside = pc.or_(pc.less(numbers, 0), pc.greater_equal(numbers, feature.codes))
        wrong = pc.or_(wrong, outside.fill_null(False))
        reason = f"codes must lie in 0 .. {feature.codes - 1}"
    yield (
        row_of_number.filter(wrong).to_numpy(),
        f"is not a whole {feature.kind}: {reason}; correct it or leave the field empty",
    )


def _beyond_float32(values: pa.Array) -> pa.Array:
    """Find numbers that are infinite, or would be once they are stored as float32."""
    return pc.greater(pc.abs(values), float(np.finfo(np.float32).max))


def _true_rows(mask: pa.Array) -> np.ndarray:
    return np.flatnonzero(mask.fill_null(False).to_numpy(zero_copy_only=False))


def refuse_repeats(path: Path, column: str, keys: pa.ChunkedArray) -> None:
    """Refuse an id that has several rows in the table of users or items.

    Args:
      path: file of the table, for messages.
      column: column of the ids, for messages.
      keys: `[n]`, original ids.

    Raises:
      InputError: an id occurs twice.
    """
    counts = pc.value_counts(keys)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        key, times = repeated[0]["values"].as_py(), repeated[0]["counts"].as_py()
        raise InputError(
            f"{path}: column '{column}': {key!r} has {times} rows; keep one row for "
            "each id"
        )
