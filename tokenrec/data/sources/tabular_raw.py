"""Stream the columns of CSV and Parquet files as they are stored.

Arrow parses CSV in blocks, without saying where an error is. When something fails,
`tabular_errors.py` finds the line.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from tokenrec.data.sources.csv_text import (
    ATOMIC_SUFFIXES,
    FILE_REMEDY,
    CsvText,
    is_parquet,
    matching,
    nearest_column,
    open_text,
    read_header,
)
from tokenrec.data.sources.tabular_errors import line_of_row, record_problem
from tokenrec.errors import InputError
from tokenrec.runtime.files import RetryingFile, reading_error

PARQUET_BATCH_ROWS = 1 << 16
BLOCK_BYTES = 4 << 20
_LONGEST_ROW = 64 << 20


class RawFile(Protocol):
    """Columns of a file as they are stored.

    Attributes:
      notes: what is unusual about the file, for the user.
    """

    notes: Sequence[str]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the columns in the order in which they were named."""
        ...

    def place(self, row: int) -> str:
        """Return the file and the line or row of a row, of which the first is 0."""
        ...


def open_raw(
    path: Path, names: Sequence[str], *, delimiter: str | None = None
) -> RawFile:
    """Open a file, by what its first bytes and its name say.

    Args:
      path: the file.
      names: columns to read.
      delimiter: what separates the fields of a CSV file; None to find out.

    Raises:
      InputError: the file cannot be read, or a column is missing.
    """
    path = Path(path)
    # Their headers hold types, which a schema for plain text would read as names.
    if delimiter is None and path.suffix.lower() in ATOMIC_SUFFIXES:
        raise InputError(
            f"{path}: is named as an atomic file of RecBole; `tokenrec prepare recbole "
            f"--root '{path.parent}'` reads such files by the types in their headers; to "
            "read it as text with a schema of your own, give --delimiter tab"
        )
    named_parquet = path.name.lower().endswith(".parquet")
    try:
        parquet = named_parquet or is_parquet(path)
    except OSError as error:
        raise reading_error(error, path, "file", FILE_REMEDY) from error
    if not parquet:
        return RawCsv(path, names, delimiter=delimiter)
    return RawParquet(path, names, notes=() if named_parquet else ("is Parquet",))


class RawCsv:
    """Columns of a CSV file, as strings; an empty field is null.

    The file is UTF-8, or UTF-16 with a byte order mark, and may be compressed. Values
    may hold line breaks where they are quoted.

    Args:
      path: the file.
      names: columns to read.
      delimiter: what separates fields; None to find out.
      block_bytes: size of the blocks that are parsed at a time; no result depends on it.

    Raises:
      InputError: the file cannot be read, or a column is missing.
    """

    def __init__(
        self,
        path: Path,
        names: Sequence[str],
        *,
        delimiter: str | None = None,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self._path = Path(path)
        self._names = list(names)
        self._block_bytes = block_bytes
        try:
            with open_text(self._path) as text:
                self._header = read_header(self._path, text, self._names, delimiter)
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        self._positions = self._header.find(self._path, self._names)
        self.notes: Sequence[str] = self._header.notes

    def place(self, row: int) -> str:
        return f"{self._path}, line {line_of_row(self._path, self._header, row)}"

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the columns.

        Raises:
          InputError: a record is malformed; names its line.
        """
        done, block_bytes = 0, self._block_bytes
        while True:
            try:
                for batch in self._parse(block_bytes, done):
                    done += batch.num_rows
                    yield batch
                return
            except (OSError, pa.ArrowException) as error:
                too_long = "straddles two block boundaries" in str(error)
                if not too_long:
                    raise self._malformed(error) from error
                # A row is longer than a block: go on from it with larger ones.
                if block_bytes >= _LONGEST_ROW:
                    raise self._row_too_long() from error
                block_bytes = min(8 * block_bytes, _LONGEST_ROW)

    def _parse(self, block_bytes: int, skip: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows from number `skip`, and check the quoting at the end."""
        rows = 0
        with open_text(self._path) as text:
            text.skip(self._header.length)
            for batch in self._arrow_batches(text, block_bytes):
                rows += batch.num_rows
                fresh = batch.slice(max(0, batch.num_rows - max(0, rows - skip)))
                if fresh.num_rows:
                    yield fresh
        # Arrow takes the rest of a file for the value of a quote that never closes.
        spans_lines = text.line_feeds > rows
        if text.quotes and (text.quotes % 2 or spans_lines or text.has_escapes):
            problem = record_problem(self._path, self._header, self._positions)
            if problem is not None:
                raise InputError(problem)

    def _arrow_batches(
        self, text: CsvText, block_bytes: int
    ) -> Iterator[pa.RecordBatch]:
        # Positions are names that cannot repeat.
        columns = [str(position) for position in range(len(self._header.fields))]
        wanted = [str(position) for position in self._positions]
        try:
            reader = pa.csv.open_csv(
                pa.PythonFile(text, mode="r"),
                read_options=pa.csv.ReadOptions(
                    column_names=columns, block_size=block_bytes
                ),
                parse_options=pa.csv.ParseOptions(
                    delimiter=self._header.delimiter, newlines_in_values=True
                ),
                convert_options=pa.csv.ConvertOptions(
                    include_columns=wanted,
                    column_types=dict.fromkeys(wanted, pa.string()),
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )
        except pa.ArrowInvalid as error:
            # The header is all there is.
            if "Empty CSV file" in str(error):
                return
            raise
        with reader:
            for batch in reader:
                yield batch.rename_columns(self._names)

    def _malformed(self, error: Exception) -> Exception:
        if isinstance(error, pa.ArrowInvalid):
            problem = record_problem(self._path, self._header, self._positions)
            if problem is not None:
                return InputError(problem)
        return self._unreadable(error)

    def _row_too_long(self) -> InputError:
        problem = record_problem(self._path, self._header, self._positions)
        return InputError(
            problem
            or f"{self._path}: a row is longer than {_LONGEST_ROW >> 20} MiB; is this a "
            f"CSV file? {FILE_REMEDY}"
        )

    def _unreadable(self, error: Exception) -> Exception:
        return reading_error(error, self._path, "CSV file", FILE_REMEDY)


class RawParquet:
    """Columns of a Parquet file, in their own types.

    Args:
      path: the file.
      names: columns to read.
      notes: what is unusual about the file, for the user.

    Attributes:
      stored_types: type of each column.

    Raises:
      InputError: the file cannot be read, or a column is missing.
    """

    def __init__(
        self, path: Path, names: Sequence[str], *, notes: Sequence[str] = ()
    ) -> None:
        self._path = Path(path)
        self._names = list(names)
        self.notes = notes
        try:
            with RetryingFile(self._path) as file, pa.parquet.ParquetFile(file) as read:
                schema = read.schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error
        stored = schema.names
        self._stored = []
        for name in self._names:
            found = matching(name, stored)
            if len(found) > 1:
                raise InputError(
                    f"{path}: has {len(found)} columns '{name}'; rename all but one"
                )
            if not found:
                hint = nearest_column(self._path, name, stored)
                raise InputError(f"{path}: has no column '{name}'{hint}")
            self._stored.append(stored[found[0]])
        self.stored_types = {
            name: schema.field(self._stored[i]).type
            for i, name in enumerate(self._names)
        }

    def place(self, row: int) -> str:
        return f"{self._path}, row {row + 1}"

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Yield the columns.

        Raises:
          InputError: the file is damaged.
        """
        try:
            with RetryingFile(self._path) as file, pa.parquet.ParquetFile(file) as read:
                for batch in read.iter_batches(
                    PARQUET_BATCH_ROWS, columns=self._stored
                ):
                    # Arrow does not check on its own that strings are UTF-8.
                    batch.validate(full=True)
                    yield pa.RecordBatch.from_arrays(
                        [batch.column(name) for name in self._stored], self._names
                    )
        except (OSError, pa.ArrowException) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> Exception:
        return reading_error(error, self._path, "Parquet file", FILE_REMEDY)
