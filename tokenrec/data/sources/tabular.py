"""Read CSV and Parquet files as streams of typed record batches.

Every message names the file, the line and the value. `tabular_raw.py` reads the columns
as they are stored, and here they are cast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.sources.tabular_errors import first_failure, value_problem
from tokenrec.data.sources.tabular_raw import (
    BLOCK_BYTES,
    RawCsv,
    RawFile,
    RawParquet,
)
from tokenrec.errors import InputError

_LIST_SEPARATOR = "|"


def read_csv(
    path: Path, types: Mapping[str, pa.DataType], *, block_bytes: int = BLOCK_BYTES
) -> Iterator[pa.RecordBatch]:
    """Stream the named columns of a CSV file, in the order of `types`.

    The file is UTF-8, separated by commas, with a header, and may be compressed. An
    empty field is null. A field of a list column holds its values separated by `|`. A
    few blocks are in memory at a time.

    Args:
      path: the file.
      types: columns to read, and the type of each; the others are not parsed.
      block_bytes: size of a block.

    Raises:
      InputError: the file cannot be read, a column is missing, or a row is malformed;
        names the line, of which the header is the first.
    """
    raw = RawCsv(path, list(types), delimiter=",", block_bytes=block_bytes)
    return _cast_batches(raw, types)


def read_parquet(
    path: Path, types: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    """Stream the named columns of a Parquet file, in the order of `types`.

    Values are cast without loss.

    Raises:
      InputError: the file cannot be read, a column is missing, or a value does not fit
        its type; names the row, of which the first is 1.
    """
    raw = RawParquet(path, list(types))
    for name, kind in types.items():
        stored = raw.stored_types[name]
        # Arrow would cast the stored count of seconds, micro- or nanoseconds as it is:
        # a thousand times off, without an error.
        if pa.types.is_temporal(stored) and not pa.types.is_temporal(kind):
            raise InputError(
                f"{path}: column '{name}' is {stored}, but {kind} is expected; write "
                "it as integer milliseconds since 1970 UTC"
            )
    return _cast_batches(raw, types)


def read_batches(
    path: Path, types: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    """Call `read_parquet` where the name ends in .parquet, otherwise `read_csv`.

    Raises:
      InputError: as these two.
    """
    if Path(path).name.lower().endswith(".parquet"):
        return read_parquet(path, types)
    return read_csv(path, types)


def read_table(path: Path, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Read a small file, such as users or items, into memory.

    Raises:
      InputError: as `read_batches`.
    """
    return pa.Table.from_batches(
        list(read_batches(path, types)), schema=pa.schema(types)
    )


def _cast_batches(
    raw: RawFile, types: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    schema = pa.schema(types)
    first_row = 0
    for batch in raw.batches():
        columns = [
            _cast_or_locate(batch.column(f.name), f, raw, first_row) for f in schema
        ]
        yield pa.RecordBatch.from_arrays(columns, schema=schema)
        first_row += batch.num_rows


def _cast_or_locate(
    values: pa.Array, field: pa.Field, raw: RawFile, first_row: int
) -> pa.Array:
    """Cast a column, or raise an InputError that names the first value that fails."""
    try:
        return cast_values(values, field.type)
    except pa.ArrowException as error:
        wrong = first_failure(
            len(values),
            lambda start, stop: cast_values(values[start:stop], field.type),
        )
        place = raw.place(first_row + wrong)
        value = values[wrong].as_py()
        raise InputError(value_problem(place, field.name, value, field.type)) from error


def cast_values(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast a column without loss; text may have spaces around numbers.

    Raises:
      pa.ArrowException: a value does not fit.
    """
    if not pa.types.is_string(values.type) or pa.types.is_string(kind):
        return values.cast(kind)
    if pa.types.is_list(kind):
        return pc.split_pattern(values, _LIST_SEPARATOR).cast(kind)
    try:
        return values.cast(kind)
    except pa.ArrowException:
        return pc.utf8_trim_whitespace(values).cast(kind)
