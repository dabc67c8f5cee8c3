"""CSV and Parquet files as streams of typed record batches, with errors that name the file, the line and the value."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from tokenrec.errors import InputError, suggest

LIST_SEPARATOR = "|"
PARQUET_BATCH_ROWS = 1 << 16
_LONGEST_LINE = 64 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_csv(
    path: Path, types: Mapping[str, pa.DataType], *, block_bytes: int = 16 << 20
) -> Iterator[pa.RecordBatch]:
    """Streams the named columns of a CSV file, in the order of `types`.

    The file is UTF-8, separated by commas, with a header; a name that ends in `.gz` is decompressed. An empty field is
    null. A field of a list column holds its values separated by `|`. One block of `block_bytes` is in memory at a time.

    Raises:
      InputError: the file cannot be read, a column is missing, or a row is malformed; names the line (the header is 1).
    """
    first_line = 2
    names: list[str] = []
    for block in _blocks(Path(path), block_bytes):
        if not names:
            header, _, block = block.removeprefix(_BYTE_ORDER_MARK).partition(b"\n")
            names = _header(Path(path), header)
            _require(Path(path), types, names)
        table = _parse_located(block, names, types, Path(path), first_line)
        first_line += block.count(b"\n")
        for batch in table.to_batches():
            if batch.num_rows:
                yield batch
    if not names:
        raise InputError(
            f"{path}: the file is empty; line 1 must be a header with {', '.join(types)}"
        )


def read_parquet(
    path: Path, types: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    """Streams the named columns of a Parquet file, in the order of `types`, cast without loss.

    Raises:
      InputError: the file cannot be read, a column is missing, or a value does not fit its type; names the row, from 1.
    """
    schema = pa.schema(types)
    first_row = 1
    try:
        with pa.parquet.ParquetFile(path) as file:
            _require(Path(path), types, file.schema_arrow.names)
            for field in schema:
                _refuse_time_as_number(
                    Path(path), field, file.schema_arrow.field(field.name).type
                )
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=schema.names):
                batch.validate(
                    full=True
                )  # Arrow reads strings as they stand, UTF-8 or not
                columns = [
                    _cast_located(batch.column(f.name), f, Path(path), first_row)
                    for f in schema
                ]
                yield pa.RecordBatch.from_arrays(columns, schema=schema)
                first_row += batch.num_rows
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read as Parquet: {_first_sentence(error)}; {_FILE_REMEDY}"
        ) from error


def read_batches(
    path: Path, types: Mapping[str, pa.DataType]
) -> Iterator[pa.RecordBatch]:
    """`read_csv` or `read_parquet`, by the suffix of `path`: .csv, .csv.gz or .parquet."""
    name = Path(path).name.lower()
    if name.endswith(".parquet"):
        return read_parquet(path, types)
    if name.endswith((".csv", ".csv.gz")):
        return read_csv(path, types)
    raise InputError(
        f"{path}: the suffix says neither CSV nor Parquet; name the file .csv, .csv.gz or .parquet"
    )


def read_table(path: Path, types: Mapping[str, pa.DataType]) -> pa.Table:
    """The whole of a small file (users, items) in memory; errors as in `read_batches`."""
    return pa.Table.from_batches(
        list(read_batches(path, types)), schema=pa.schema(types)
    )


_FILE_REMEDY = "check the path and that the file is whole"


def _blocks(path: Path, block_bytes: int) -> Iterator[bytes]:
    """Runs of whole lines; each but the last ends in a line feed."""
    rest: list[bytes] = []  # the head of a line that the blocks so far did not end
    held = 0
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            while block := stream.read(block_bytes):
                cut = block.rfind(b"\n") + 1
                if cut:
                    yield b"".join([*rest, block[:cut]])
                    rest, held = [], 0
                rest.append(block[cut:])
                held += len(block) - cut
                if held > max(_LONGEST_LINE, block_bytes):
                    raise InputError(
                        f"{path}: a line is longer than {_LONGEST_LINE >> 20} MiB; is this a CSV file?"
                    )
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: cannot be read: {_first_sentence(error)}; {_FILE_REMEDY}"
        ) from error
    if last := b"".join(rest):
        yield last


def _lines(block: bytes) -> list[bytes]:
    """Lines with their line feeds; `splitlines` would also cut at a lone carriage return."""
    *whole, last = block.split(b"\n")
    return [line + b"\n" for line in whole] + ([last] if last else [])


def _header(path: Path, line: bytes) -> list[str]:
    try:
        return next(csv.reader([line.decode()]), [])
    except UnicodeDecodeError as error:
        raise InputError(_encoding_problem(path, 1, error)) from error
    except (
        csv.Error
    ) as error:  # a carriage return inside the line, or a value of 128 KiB
        raise InputError(
            f"{path}, line 1: is no header: {error}; is this a CSV file?"
        ) from error


def _require(path: Path, types: Mapping[str, pa.DataType], names: list[str]) -> None:
    for name in types:
        if name not in names:
            raise InputError(f"{path}: has no column '{name}'{suggest(name, names)}")
        if names.count(name) > 1:
            raise InputError(
                f"{path}: has {names.count(name)} columns '{name}'; rename all but one"
            )


def _parse(
    block: bytes, names: list[str], types: Mapping[str, pa.DataType]
) -> pa.Table:
    """Raises pa.ArrowException, or ValueError where a value spans lines."""
    if not block.strip(b"\r\n"):
        return pa.schema(types).empty_table()
    table = pa.csv.read_csv(
        pa.BufferReader(block),
        read_options=pa.csv.ReadOptions(column_names=names, block_size=len(block) + 1),
        convert_options=pa.csv.ConvertOptions(
            include_columns=list(types),
            column_types={
                name: pa.string() if pa.types.is_list(t) else t
                for name, t in types.items()
            },
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    if table.num_rows != lines and table.num_rows != sum(
        1 for line in _lines(block) if line.strip(b"\r\n")
    ):
        raise ValueError("a value spans lines")
    for position, (name, wanted) in enumerate(types.items()):
        if pa.types.is_list(wanted):
            values = pc.split_pattern(table.column(name), LIST_SEPARATOR).cast(wanted)
            table = table.set_column(position, pa.field(name, wanted), values)
    return table


def _parse_located(
    block: bytes,
    names: list[str],
    types: Mapping[str, pa.DataType],
    path: Path,
    first_line: int,
) -> pa.Table:
    try:
        return _parse(block, names, types)
    except (pa.ArrowException, ValueError) as error:
        lines = _lines(block)
        bad = _first_bad(
            len(lines), lambda lo, hi: _parse(b"".join(lines[lo:hi]), names, types)
        )
        raise InputError(
            _line_problem(lines[bad], names, types, path, first_line + bad)
        ) from error


def _line_problem(
    line: bytes,
    names: list[str],
    types: Mapping[str, pa.DataType],
    path: Path,
    number: int,
) -> str:
    """What is wrong with the one line that does not parse."""
    try:
        fields = next(csv.reader([line.decode()]), [])
    except UnicodeDecodeError as error:
        return _encoding_problem(path, number, error)
    except csv.Error as error:
        return f"{path}, line {number}: cannot be split into fields: {error}; remove line breaks from values"
    if len(fields) != len(names):
        missing = f" (no '{names[len(fields)]}')" if len(fields) < len(names) else ""
        return (
            f"{path}, line {number}: {len(fields)} fields{missing}, but the header has {len(names)}; "
            "complete or remove the line, and quote values that hold a comma"
        )
    for name, wanted in types.items():
        try:
            _parse(line, names, {name: wanted})
        except (pa.ArrowException, ValueError):
            value = fields[names.index(name)]
            return _value_problem(f"{path}, line {number}", name, value, wanted)
    return f"{path}, line {number}: continues a quoted value of an earlier line; remove line breaks from values"


def _cast_located(
    values: pa.Array, field: pa.Field, path: Path, first_row: int
) -> pa.Array:
    try:
        return values.cast(field.type)
    except pa.ArrowException as error:
        bad = _first_bad(len(values), lambda lo, hi: values[lo:hi].cast(field.type))
        problem = _value_problem(
            f"{path}, row {first_row + bad}",
            field.name,
            values[bad].as_py(),
            field.type,
        )
        raise InputError(problem) from error


def _first_bad(count: int, convert: Callable[[int, int], object]) -> int:
    """Index of the first of `count` rows on which `convert(start, stop)` fails, by bisection."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        try:
            convert(low, middle)
        except (pa.ArrowException, ValueError):
            high = middle
        else:
            low = middle
    return low


def _refuse_time_as_number(path: Path, field: pa.Field, stored: pa.DataType) -> None:
    # Arrow would cast the stored count of seconds, micro- or nanoseconds as it stands: a thousand times off, silently.
    if pa.types.is_temporal(stored) and not pa.types.is_temporal(field.type):
        raise InputError(
            f"{path}: column '{field.name}' is {stored}, but {field.type} is expected; "
            "write it as integer milliseconds since 1970 UTC"
        )


def _value_problem(place: str, column: str, value: object, wanted: pa.DataType) -> str:
    remedy = (
        f"separate its values with '{LIST_SEPARATOR}'"
        if pa.types.is_list(wanted)
        else "correct the value"
    )
    return f"{place}: column '{column}': {value!r} is not {_type_name(wanted)}; {remedy}, or leave it empty if unknown"


def _type_name(wanted: pa.DataType) -> str:
    return f"a list of {wanted.value_type}" if pa.types.is_list(wanted) else str(wanted)


def _encoding_problem(path: Path, line: int, error: UnicodeDecodeError) -> str:
    value = error.object[max(0, error.start - 10) : error.end + 10]
    return f"{path}, line {line}: {value!r} is not UTF-8; save the file with UTF-8 encoding"


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
