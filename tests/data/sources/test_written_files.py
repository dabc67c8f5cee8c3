"""Tests that what a program writes is what is read, for many programs and dialects."""

from __future__ import annotations

import csv
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings

from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.data.sources.tabular_raw import RawCsv
from tokenrec.errors import InputError

QUICK = settings(
    derandomize=True,
    deadline=None,
    max_examples=10,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# Letters that mean something in CSV are likely; NUL bytes are refused as no text.
TEXT = st.text(
    st.sampled_from(list("ab1,;|\t\"' \né\u2028😀"))
    | st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\\"),
    max_size=8,
)
NUMBER = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCHEMA = {
    "features": [
        {"name": "item_id", "kind": "categorical", "entity": "item"},
        {"name": "word", "kind": "categorical", "entity": "context"},
        {"name": "size", "kind": "dense", "entity": "context"},
    ],
    "tasks": [{"name": "click"}],
    "key_types": {"item_id": "int64"},
}
TYPES = {
    "user_id": pa.string(),
    "item_id": pa.int64(),
    "time_ms": pa.int64(),
    "click": pa.int8(),
    "word": pa.string(),
    "size": pa.float64(),
    "unread": pa.string(),
}
ROW = st.tuples(
    TEXT.filter(bool),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.integers(0, 1 << 41),
    st.sampled_from([0, 1, None]),
    st.none() | TEXT,
    st.none() | NUMBER,
    st.none() | TEXT,
)
# A row in each split.
FIRST = ("first", 1, 1_640_995_200_000, 1, None, 0.5, None)
LAST = ("last", 2, 1_641_000_000_000, 0, "", None, "x")
TABLES = st.lists(ROW, max_size=6).map(
    lambda rows: pa.table(
        dict(zip(TYPES, zip(FIRST, *rows, LAST, strict=True), strict=True)),
        schema=pa.schema(TYPES),
    )
)
DELIMITERS = [",", "\t", ";", "|"]
LINE_ENDS = ["\n", "\r\n", "\r"]

Writer = Callable[[pa.Table, Path], object]


def write_python(table: pa.Table, path: Path, **dialect: Any) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, **dialect)
        writer.writerow(table.column_names)
        writer.writerows(rows(table))


def rows(table: pa.Table) -> list[list[Any]]:
    return [list(row.values()) for row in table.to_pylist()]


def write_arrow(table: pa.Table, path: Path, **options: Any) -> None:
    pa.csv.write_csv(table, path, pa.csv.WriteOptions(**options))


def write_pandas(table: pa.Table, path: Path, **options: Any) -> None:
    pytest.importorskip("pandas")
    # Its integers with a missing value would be doubles.
    frame = table.to_pandas(integer_object_nulls=True)
    frame.to_csv(path, index=False, **options)


def write_polars(table: pa.Table, path: Path, **options: Any) -> None:
    pytest.importorskip("polars").from_arrow(table).write_csv(path, **options)


def write_duckdb(table: pa.Table, path: Path, options: str = "header") -> None:
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect() as connection:
        connection.register("log", table)
        connection.execute(f"copy log to '{path}' ({options})")


def part(write: Callable[..., None], **options: Any) -> Writer:
    return functools.partial(write, **options)


CSV_WRITERS: dict[str, Writer] = {}
for delimiter in DELIMITERS:
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC):
        CSV_WRITERS[f"python {delimiter!r} {quoting}"] = part(
            write_python, delimiter=delimiter, quoting=quoting
        )
        CSV_WRITERS[f"pandas {delimiter!r} {quoting}"] = part(
            write_pandas, sep=delimiter, quoting=quoting
        )
    for style in ("needed", "all_valid"):
        CSV_WRITERS[f"arrow {delimiter!r} {style}"] = part(
            write_arrow, delimiter=delimiter, quoting_style=style
        )
    for style in ("necessary", "always", "non_numeric"):
        CSV_WRITERS[f"polars {delimiter!r} {style}"] = part(
            write_polars, separator=delimiter, quote_style=style
        )
    CSV_WRITERS[f"duckdb {delimiter!r}"] = part(
        write_duckdb, options=f"header, delimiter '{delimiter}'"
    )
for end in LINE_ENDS:
    # Python quotes no line feed where lines end otherwise.
    for name, write in (("python", write_python), ("pandas", write_pandas)):
        CSV_WRITERS[f"{name} {end!r}"] = part(
            write, lineterminator=end, quoting=csv.QUOTE_ALL
        )
    if end != "\r":
        CSV_WRITERS[f"polars {end!r}"] = part(write_polars, line_terminator=end)
CSV_WRITERS["polars with a mark"] = part(write_polars, include_bom=True)
CSV_WRITERS["duckdb quotes all"] = part(write_duckdb, options="header, force_quote *")

PARQUET_WRITERS: dict[str, Writer] = {
    "arrow": pa.parquet.write_table,
    "arrow, plain": part(
        pa.parquet.write_table, use_dictionary=False, compression="none"
    ),
    "arrow, old pages": part(
        pa.parquet.write_table, version="1.0", row_group_size=2, compression="gzip"
    ),
    "arrow, new pages": part(
        pa.parquet.write_table, data_page_version="2.0", compression="zstd"
    ),
    "pandas": lambda table, path: table.to_pandas(
        integer_object_nulls=False
    ).to_parquet(path),
    "polars": lambda table, path: (
        pytest.importorskip("polars").from_arrow(table).write_parquet(path)
    ),
    "duckdb": part(write_duckdb, options="format parquet"),
}


def expected(table: pa.Table) -> list[tuple[Any, ...]]:
    """Return the rows as they should be read: empty text is missing."""
    return [
        (user, item, time, click, word or None, size)
        for user, item, time, click, word, size, _ in rows(table)
    ]


def read(folder: Path, path: Path) -> list[tuple[Any, ...]]:
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    log = DelimitedSource(
        folder / "schema.json", [path], valid_from="2022-01-01T00:00:01"
    )
    names = ("user_id", "item_id", "time_ms", "label_click", "word", "size")
    return [
        tuple(row[name] for name in names)
        for batch in log.rows()
        for row in batch.to_pylist()
    ]


@pytest.mark.parametrize("writer", CSV_WRITERS)
@QUICK
@given(table=TABLES)
def test_a_csv_file_is_read_as_it_was_written(writer: str, table: pa.Table) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log.csv")
        CSV_WRITERS[writer](table, path)
        assert read(Path(folder), path) == expected(table)


@pytest.mark.parametrize("writer", PARQUET_WRITERS)
@QUICK
@given(table=TABLES)
def test_a_parquet_file_is_read_as_it_was_written(writer: str, table: pa.Table) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log.parquet")
        PARQUET_WRITERS[writer](table, path)
        assert read(Path(folder), path) == expected(table)


@QUICK
@given(
    table=TABLES,
    dialect=st.sampled_from(
        [
            {"quoting": csv.QUOTE_MINIMAL, "lineterminator": "\n"},
            {"quoting": csv.QUOTE_MINIMAL, "lineterminator": "\r\n"},
            {"quoting": csv.QUOTE_ALL, "lineterminator": "\r"},
        ]
    ),
    size=st.integers(1, 200),
)
def test_no_row_depends_on_the_size_of_blocks(
    table: pa.Table, dialect: dict[str, Any], size: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log.csv")
        write_python(table, path, **dialect)
        small, large = (
            [row for batch in RawCsv(path, list(TYPES), **options).batches()
             for row in batch.to_pylist()]
            for options in ({"block_bytes": size}, {})
        )  # fmt: skip
        assert small == large
        assert [row["user_id"] for row in large] == table["user_id"].to_pylist()


@QUICK
@given(table=TABLES)
def test_quotes_behind_backslashes_are_refused_or_read(table: pa.Table) -> None:
    """A dialect that is not read gives an error and no other values."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log.csv")
        write_python(
            table, path, doublequote=False, escapechar="\\", quoting=csv.QUOTE_ALL
        )
        try:
            found = read(Path(folder), path)
        except InputError:
            return
        assert found == expected(table)
