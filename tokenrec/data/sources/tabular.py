"""Read CSV and Parquet files as streams of typed record batches.

Arrow parses a block of lines at a time, which is fast but does not say where an error
is. When a block fails, it is parsed again in halves until the malformed line is found,
so that every message names the file, the line and the value (`tabular_errors.py`).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from tokenrec.data.sources.tabular_errors import (
    FILE_REMEDY,
    LIST_SEPARATOR,
    encoding_problem,
    first_failure,
    line_problem,
    value_problem,
)
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import RetryingFile, reading_error

PARQUET_BATCH_ROWS = 1 << 16
_LONGEST_LINE = 64 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_csv(
    path: Path, types: Mapping[str, pa.DataType], *, block_bytes: int = 16 << 20
) -> Iterator[pa.RecordBatch]:
    """Stream the named columns of a CSV file, in the order of `types`.

    The file is UTF-8, separated by commas, with a header; a name that ends in `.gz` is
    decompressed. An empty field is null. A field of a list column holds its values
    separated by `|`. One block is in memory at a time.

    Args:
      path: the file.
      types: columns to read, and the type of each; the others are not parsed.
      block_bytes: size of a block.

    Raises:
      InputError: the file cannot be read, a column is missing, or a row is malformed;
        names the line, of which the header is the first.
    """
    path = Path(path)
    # Line 1 is the header.
    first_line = 2
    names: list[str] = []
    for block in _line_blocks(path, block_bytes):
        # The first line of the first block is the header.
        if not names:
            header, _, block = block.removeprefix(_BYTE_ORDER_MARK).partition(b"\n")
            names = _parse_header(path, header)
            _require_columns(path, types, names)
        table = _parse_or_locate(block, names, types, path, first_line)
        first_line += block.count(b"\n")
        for batch in table.to_batches():
            if batch.num_rows:
                yield batch
    if not names:
        raise InputError(
            f"{path}: the file is empty; line 1 must be a header with "
            f"{', '.join(types)}; {FILE_REMEDY}"
        )


def read_parquet(
    path: Path, types: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    """Stream the named columns of a Parquet file, in the order of `types`.

    Values are cast without loss.

    Raises:
      InputError: the file cannot be read, a column is missing, or a value does not fit
        its type; names the row, of which the first is 1.
    """
    path = Path(path)
    schema = pa.schema(types)
    first_row = 1
    try:
        with RetryingFile(path) as source, pa.parquet.ParquetFile(source) as file:
            _require_columns(path, types, file.schema_arrow.names)
            for field in schema:
                stored = file.schema_arrow.field(field.name).type
                _refuse_time_as_number(path, field, stored)
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=schema.names):
                # Arrow does not check on its own that strings are UTF-8.
                batch.validate(full=True)
                columns = [
                    _cast_or_locate(batch.column(f.name), f, path, first_row)
                    for f in schema
                ]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)
                first_row += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise reading_error(error, path, "Parquet file", FILE_REMEDY) from error


def read_batches(
    path: Path, types: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    """Call `read_csv` or `read_parquet`, by the suffix of `path`.

    Raises:
      InputError: as these two; or the suffix is not .csv, .csv.gz or .parquet.
    """
    name = Path(path).name.lower()
    if name.endswith(".parquet"):
        return read_parquet(path, types)
    if name.endswith((".csv", ".csv.gz")):
        return read_csv(path, types)
    raise InputError(
        f"{path}: the suffix says neither CSV nor Parquet; name the file .csv, .csv.gz "
        "or .parquet"
    )


def read_table(path: Path, types: Mapping[str, pa.DataType]) -> pa.Table:
    """Read a small file, such as users or items, into memory.

    Raises:
      InputError: as `read_batches`.
    """
    return pa.Table.from_batches(
        list(read_batches(path, types)), schema=pa.schema(types)
    )


def _line_blocks(path: Path, block_bytes: int) -> Iterator[bytes]:
    """Yield blocks of whole lines; each but the last ends in a line feed."""
    # Start of a line that the blocks so far did not end.
    pending: list[bytes] = []
    pending_bytes = 0
    try:
        with (
            RetryingFile(path) as source,
            pa.input_stream(
                source, compression="gzip" if path.suffix.lower() == ".gz" else None
            ) as stream,
        ):
            while block := stream.read(block_bytes):
                line_end = block.rfind(b"\n") + 1
                if line_end:
                    yield b"".join([*pending, block[:line_end]])
                    pending = []
                    pending_bytes = 0
                pending.append(block[line_end:])
                pending_bytes += len(block) - line_end
                # A binary file may have no line feed at all; it must not fill memory.
                if pending_bytes > max(_LONGEST_LINE, block_bytes):
                    raise InputError(
                        f"{path}: a line is longer than {_LONGEST_LINE >> 20} MiB; is "
                        f"this a CSV file? {FILE_REMEDY}"
                    )
    except (OSError, pa.ArrowException) as error:
        raise reading_error(error, path, "CSV file", FILE_REMEDY) from error
    if last := b"".join(pending):
        yield last


def _split_lines(block: bytes) -> list[bytes]:
    """Split into lines, with their line feeds."""
    # `splitlines` would also split at a lone carriage return.
    *whole, last = block.split(b"\n")
    lines = [line + b"\n" for line in whole]
    if last:
        lines.append(last)
    return lines


def _parse_header(path: Path, line: bytes) -> list[str]:
    try:
        return next(csv.reader([line.decode()]), [])
    except UnicodeDecodeError as error:
        raise InputError(encoding_problem(path, 1, error)) from error
    # A carriage return inside the line, or a value of 128 KiB.
    except csv.Error as error:
        raise InputError(
            f"{path}, line 1: is not a header: {error}; is this a CSV file? "
            f"{FILE_REMEDY}"
        ) from error


def _require_columns(
    path: Path, types: Mapping[str, pa.DataType], names: list[str]
) -> None:
    for name in types:
        if name not in names:
            raise InputError(f"{path}: has no column '{name}'{suggest(name, names)}")
        if names.count(name) > 1:
            raise InputError(
                f"{path}: has {names.count(name)} columns '{name}'; rename all but one"
            )


def _parse_block(
    block: bytes, names: list[str], types: Mapping[str, pa.DataType]
) -> pa.Table:
    """Parse whole lines without a header.

    Raises:
      pa.ArrowException: a line or a value is malformed.
      ValueError: a value spans lines.
    """
    if not block.strip(b"\r\n"):
        return pa.schema(types).empty_table()
    # Arrow has no lists in CSV: they are read as strings and split below.
    column_types = {
        name: pa.string() if pa.types.is_list(kind) else kind
        for name, kind in types.items()
    }
    table = pa.csv.read_csv(
        pa.BufferReader(block),
        read_options=pa.csv.ReadOptions(column_names=names, block_size=len(block) + 1),
        convert_options=pa.csv.ConvertOptions(
            include_columns=list(types),
            column_types=column_types,
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    # A quoted line break would be cut at the end of a block. It is refused everywhere,
    # so that the result does not depend on the size of blocks. Blank lines are no rows.
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    if table.num_rows != lines:
        rows = sum(1 for line in _split_lines(block) if line.strip(b"\r\n"))
        if table.num_rows != rows:
            raise ValueError("a value spans lines")
    for position, (name, kind) in enumerate(types.items()):
        if pa.types.is_list(kind):
            values = pc.split_pattern(table.column(name), LIST_SEPARATOR).cast(kind)
            table = table.set_column(position, pa.field(name, kind), values)
    return table


def _parse_or_locate(
    block: bytes,
    names: list[str],
    types: Mapping[str, pa.DataType],
    path: Path,
    first_line: int,
) -> pa.Table:
    """Parse a block, or raise an InputError that names its first malformed line."""
    try:
        return _parse_block(block, names, types)
    except (pa.ArrowException, ValueError) as error:
        lines = _split_lines(block)
        wrong = first_failure(
            len(lines),
            lambda start, stop: _parse_block(b"".join(lines[start:stop]), names, types),
        )
        raise InputError(
            line_problem(
                lines[wrong], names, types, path, first_line + wrong, _parse_block
            )
        ) from error


def _cast_or_locate(
    values: pa.Array, field: pa.Field, path: Path, first_row: int
) -> pa.Array:
    """Cast a column, or raise an InputError that names the first value that fails."""
    try:
        return values.cast(field.type)
    except pa.ArrowException as error:
        wrong = first_failure(
            len(values), lambda start, stop: values[start:stop].cast(field.type)
        )
        place = f"{path}, row {first_row + wrong}"
        value = values[wrong].as_py()
        raise InputError(value_problem(place, field.name, value, field.type)) from error


def _refuse_time_as_number(path: Path, field: pa.Field, stored: pa.DataType) -> None:
    # Arrow would cast the stored count of seconds, micro- or nanoseconds as it is: a
    # thousand times off, without an error.
    if pa.types.is_temporal(stored) and not pa.types.is_temporal(field.type):
        raise InputError(
            f"{path}: column '{field.name}' is {stored}, but {field.type} is expected; "
            "write it as integer milliseconds since 1970 UTC"
        )
