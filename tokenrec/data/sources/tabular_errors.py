"""Find the malformed record of a CSV file, or the value that does not convert.

Arrow parses fast but does not say on which line an error is. Only when something is
wrong, or quoting is unusual, is the file read again here with Python's csv.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from tokenrec.data.sources.csv_text import CsvHeader, open_text
from tokenrec.errors import InputError

# Python's csv refuses longer values; its own limit, 128 KiB, is too low for texts.
_LONGEST_VALUE = 64 << 20


class _Record(NamedTuple):
    """A record of a CSV file: line on which it begins, its lines, and its fields."""

    line: int
    lines: list[str]
    fields: list[str]


def first_failure(count: int, convert: Callable[[int, int], object]) -> int:
    """Find the first row that fails to convert, by bisection.

    Args:
      count: number of rows, at least one of which fails.
      convert: converts rows [start, stop), and raises if one of them fails.

    Returns:
      Index of the row.
    """
    # Rows before `low` convert, and one of [low, high) does not.
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


def line_of_row(path: Path, header: CsvHeader, row: int) -> int:
    """Return the line on which a row begins; the first row is 0, the first line 1."""
    for number, record in enumerate(_records(path, header)):
        if number == row:
            return record.line
    raise AssertionError(f"{path} has no row {row}")


def record_problem(
    path: Path, header: CsvHeader, positions: Sequence[int]
) -> str | None:
    """Describe the first record that is not as CSV is.

    A record is looked at closely where it has another number of fields than the
    header, spans lines, or has a backslash before a quote, and where it is the last.

    Args:
      path: the file.
      header: its header.
      positions: columns that are read, which must be UTF-8.

    Returns:
      A message that names file, line, reason and remedy; None if all are well.
    """
    last: _Record | None = None
    for record in _records(path, header):
        last = record
        wrong_length = len(record.fields) != len(header.fields)
        if wrong_length or len(record.lines) > 1 or '\\"' in record.lines[0]:
            problem = _quoting_problem(path, header, record)
            if problem is not None:
                return problem
        if wrong_length:
            return _length_problem(path, header, record)
        for position in positions:
            problem = _encoding_problem(path, record, record.fields[position])
            if problem is not None:
                return problem
    return None if last is None else _quoting_problem(path, header, last)


def _records(path: Path, header: CsvHeader) -> Iterator[_Record]:
    """Yield the records after the header; blank lines are none."""
    first_line = header.lines + 1
    usual_limit = csv.field_size_limit(_LONGEST_VALUE)
    try:
        with open_text(path) as text:
            text.skip(header.length)
            lines = io.TextIOWrapper(
                io.BufferedReader(_Raw(text.read), 1 << 20),
                encoding="utf-8",
                errors="surrogateescape",
                newline="",
            )
            taken: list[str] = []

            def take() -> Iterator[str]:
                for line in lines:
                    taken.append(line)
                    yield line

            for fields in csv.reader(take(), delimiter=header.delimiter):
                if fields:
                    yield _Record(first_line, taken.copy(), fields)
                first_line += len(taken)
                taken.clear()
    except csv.Error as error:
        raise InputError(
            f"{path}, line {first_line}: a value is longer than "
            f"{_LONGEST_VALUE / (1 << 20):g} MiB, as behind a quote that never closes; "
            'close it, or write a quote inside a value as ""'
        ) from error
    finally:
        csv.field_size_limit(usual_limit)


class _Raw(io.RawIOBase):
    """Read bytes from a function, as Python's own files do."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        super().__init__()
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        block = self._read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _quoting_problem(path: Path, header: CsvHeader, record: _Record) -> str | None:
    try:
        list(csv.reader(record.lines, delimiter=header.delimiter, strict=True))
    except csv.Error as error:
        place = f"{path}, line {record.line}"
        if "unexpected end" in str(error):
            return (
                f"{place}: a quote opens a value and never closes; close it, or write "
                'a quote inside a value as ""'
            )
        return (
            f"{place}: text follows the closing quote of a value ({error}); write a "
            'quote inside a quoted value as ""'
        )
    return None


def _length_problem(path: Path, header: CsvHeader, record: _Record) -> str:
    names, count = header.fields, len(record.fields)
    missing = f" (no '{names[count]}')" if count < len(names) else ""
    delimiter = {",": "a comma", "\t": "a tab"}.get(
        header.delimiter, f"'{header.delimiter}'"
    )
    return (
        f"{path}, line {record.line}: {count} fields{missing}, but the header has "
        f"{len(names)}; complete or remove the line, and quote values that hold "
        f"{delimiter}"
    )


def _encoding_problem(path: Path, record: _Record, value: str) -> str | None:
    data = value.encode("utf-8", "surrogateescape")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        near = data[max(0, error.start - 10) : error.end + 10]
        return (
            f"{path}, line {record.line}: {near!r} is not UTF-8; save the file with "
            "UTF-8 encoding"
        )
    return None


def value_problem(place: str, column: str, value: object, kind: pa.DataType) -> str:
    """Describe a value that does not fit its type.

    Args:
      place: file and line or row.
      column: name of the column.
      value: the value.
      kind: type that it should have.
    """
    if pa.types.is_list(kind):
        wanted = f"a list of {kind.value_type}"
        remedy = "separate its values with '|'"
    else:
        wanted = str(kind)
        remedy = "correct the value"
    return (
        f"{place}: column '{column}': {value!r} is not {wanted}; {remedy}, or leave it "
        "empty if unknown"
    )
