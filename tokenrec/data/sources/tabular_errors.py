"""Find the malformed row of a CSV or Parquet file, and describe it for `tabular.py`."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa

LIST_SEPARATOR = "|"
FILE_REMEDY = "check the path and that the file is whole"


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


def line_problem(
    line: bytes,
    names: list[str],
    types: Mapping[str, pa.DataType],
    path: Path,
    number: int,
    parse: Callable[[bytes, list[str], Mapping[str, pa.DataType]], object],
) -> str:
    """Describe why one line of a CSV file does not parse.

    Args:
      line: the line.
      names: columns of the file.
      types: columns that are read, and the type of each.
      path: the file.
      number: number of the line; the header is 1.
      parse: parses lines, and raises if one is malformed.

    Returns:
      A message that names file, line, reason and remedy.
    """
    place = f"{path}, line {number}"
    try:
        fields = next(csv.reader([line.decode()]), [])
    except UnicodeDecodeError as error:
        return encoding_problem(path, number, error)
    except csv.Error as error:
        return (
            f"{place}: cannot be split into fields: {error}; remove line breaks from "
            "values"
        )
    if len(fields) != len(names):
        missing = f" (no '{names[len(fields)]}')" if len(fields) < len(names) else ""
        return (
            f"{place}: {len(fields)} fields{missing}, but the header has {len(names)}; "
            "complete or remove the line, and quote values that hold a comma"
        )
    # The line has all its fields: find the one that does not parse alone.
    for name, kind in types.items():
        try:
            parse(line, names, {name: kind})
        except (pa.ArrowException, ValueError):
            value = fields[names.index(name)]
            return value_problem(place, name, value, kind)
    return (
        f"{place}: continues a quoted value of an earlier line; remove line breaks "
        "from values"
    )


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
        remedy = f"separate its values with '{LIST_SEPARATOR}'"
    else:
        wanted = str(kind)
        remedy = "correct the value"
    return (
        f"{place}: column '{column}': {value!r} is not {wanted}; {remedy}, or leave it "
        "empty if unknown"
    )


def encoding_problem(path: Path, line: int, error: UnicodeDecodeError) -> str:
    """Describe bytes that are not UTF-8, with those around them.

    Args:
      path: the file.
      line: number of the line.
      error: error of decoding it.
    """
    value = error.object[max(0, error.start - 10) : error.end + 10]
    return (
        f"{path}, line {line}: {value!r} is not UTF-8; save the file with UTF-8 "
        "encoding"
    )
