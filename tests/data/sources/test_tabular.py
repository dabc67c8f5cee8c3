"""Tests of reading CSV and Parquet: values, blocks, and errors that name the line."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from tokenrec.data.sources import tabular_errors, tabular_raw
from tokenrec.data.sources.tabular import read_csv, read_parquet, read_table
from tokenrec.errors import InputError

TYPES = {"time": pa.int64(), "user": pa.string(), "score": pa.float32()}
HEADER = "user,other,score,time\n"


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def rows(path: Path, types=TYPES, **options) -> list[dict]:
    return [
        row for batch in read_csv(path, types, **options) for row in batch.to_pylist()
    ]


def problem(path: Path, types=TYPES, **options) -> str:
    with pytest.raises(InputError) as caught:
        rows(path, types, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def many(count: int) -> list[str]:
    return [f"u{i},x,{i}.5,{i}\n" for i in range(count)]


def test_columns_come_in_the_order_asked_with_their_types(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + "ann,x,0.5,3\nbob,y,-1,4\n")
    (batch,) = read_csv(path, TYPES)
    assert batch.schema == pa.schema(TYPES)
    assert batch.to_pylist() == [
        {"time": 3, "user": "ann", "score": 0.5},
        {"time": 4, "user": "bob", "score": -1},
    ]


def test_an_empty_field_is_null_and_the_word_null_is_a_value(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + ",,,\nnull,,,1\nNA,,,2\n")
    assert [(r["user"], r["score"], r["time"]) for r in rows(path)] == [
        (None, None, None),
        ("null", None, 1),
        ("NA", None, 2),
    ]


def test_quotes_carriage_returns_a_byte_order_mark_and_blank_lines_are_read(tmp_path):
    text = '\ufeff"user",other,score,time\r\n"a,""b""",x,1,1\r\n\r\nc,y,2,2'
    assert [r["user"] for r in rows(write(tmp_path / "a.csv", text))] == ['a,"b"', "c"]


@pytest.mark.parametrize("block_bytes", [7, 100, 1 << 20])
def test_rows_do_not_depend_on_the_block_size(tmp_path, block_bytes):
    path = write(tmp_path / "a.csv", HEADER + "".join(many(200)))
    assert [r["time"] for r in rows(path, block_bytes=block_bytes)] == list(range(200))


def test_a_block_is_yielded_before_the_next_is_read(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + "".join(many(1000)) + "broken\n")
    stream = read_csv(path, TYPES, block_bytes=500)
    assert next(stream).num_rows < 50


def test_lists_are_separated_by_bars(tmp_path):
    path = write(tmp_path / "a.csv", "v,w\n1|2|3,a|b\n4,\n,c\n")
    got = rows(path, {"v": pa.list_(pa.int64()), "w": pa.list_(pa.string())})
    assert got == [
        {"v": [1, 2, 3], "w": ["a", "b"]},
        {"v": [4], "w": None},
        {"v": None, "w": ["c"]},
    ]


def test_a_compressed_file_reads_as_the_plain_one(tmp_path):
    text = HEADER + "".join(many(50))
    plain = write(tmp_path / "a.csv", text)
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_table(packed, TYPES) == read_table(plain, TYPES)


def test_a_missing_column_names_the_near_one(tmp_path):
    path = write(tmp_path / "a.csv", HEADER)
    assert "no column 'scor'; did you mean 'score'?" in problem(
        path, {"scor": pa.float32()}
    )


def test_a_repeated_column_is_refused(tmp_path):
    assert "2 columns 'user'" in problem(
        write(tmp_path / "a.csv", "user,user\n1,2\n"), {"user": pa.string()}
    )


def test_an_empty_file_asks_for_a_header_and_a_header_alone_has_no_rows(tmp_path):
    assert "line 1 must be a header" in problem(write(tmp_path / "a.csv", ""))
    assert rows(write(tmp_path / "b.csv", HEADER)) == []
    assert read_table(tmp_path / "b.csv", TYPES).schema == pa.schema(TYPES)


@pytest.mark.parametrize("block_bytes", [64, 1000, 1 << 20])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("u,x,1,abc\n", ["column 'time'", "'abc'", "int64", "correct"]),
        ("u,x,1.x,1\n", ["column 'score'", "'1.x'", "float"]),
        ("u,x\n", ["2 fields (no 'score')", "header has 4", "complete or remove"]),
        ("u,x,1,1,9\n", ["5 fields", "header has 4"]),
    ],
)
def test_a_malformed_row_deep_in_the_file_is_named_by_its_line(
    tmp_path, bad, words, block_bytes
):
    lines = many(500)
    lines[400:400] = ["\n", bad]  # a blank line counts as a line too
    message = problem(
        write(tmp_path / "a.csv", HEADER + "".join(lines)), block_bytes=block_bytes
    )
    for word in ["line 403:", *words]:
        assert word in message


def test_the_first_of_several_malformed_rows_is_named(tmp_path):
    lines = many(100)
    for i in (30, 31, 77):
        lines[i] = "u,x,1,?\n"
    assert "line 32:" in problem(write(tmp_path / "a.csv", HEADER + "".join(lines)))


def test_a_malformed_row_outside_the_named_columns_does_not_matter(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + "u,x,?,1\n")
    assert rows(path, {"time": pa.int64()}) == [{"time": 1}]


def test_a_malformed_list_is_named_by_its_line(tmp_path):
    message = problem(
        write(tmp_path / "a.csv", "v\n1|2\n3;4\n"), {"v": pa.list_(pa.int64())}
    )
    for word in ("line 3", "'3;4'", "a list of int64", "'|'"):
        assert word in message


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
def test_any_line_end_is_read_also_where_the_last_line_has_none(tmp_path, end, last):
    lines = ["a,b", "1,x", "2,y"]
    path = write(tmp_path / "a.csv", end.join(lines) + (end if last else ""))
    types = {"a": pa.int64(), "b": pa.string()}
    assert rows(path, types) == [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]


def test_another_encoding_is_named_by_its_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(HEADER.encode() + "ann,x,1,1\nJosé,x,1,2\n".encode("latin-1"))
    message = problem(path)
    for word in ("line 3", "not UTF-8", "Jos"):
        assert word in message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf16_is_read_with_a_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "a.csv"
    mark = "" if encoding == "utf-16" else "\ufeff"
    path.write_bytes((mark + HEADER + "José,x,1,2\n😀,y,2,3\n").encode(encoding))
    assert [r["user"] for r in rows(path)] == ["José", "😀"]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_byte_order_mark_is_refused_at_its_header(tmp_path, encoding):
    path = tmp_path / "a.csv"
    path.write_bytes(HEADER.encode(encoding))
    message = problem(path)
    for word in ("line 1", "UTF-16 without a byte order mark", "UTF-8 encoding"):
        assert word in message


def test_utf16_that_ends_within_a_character_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes((HEADER + "ann,x,1,2\n").encode("utf-16") + b"x")
    assert "begins as utf-16-le" in problem(path)


@pytest.mark.parametrize("block_bytes", [1, 16, 1 << 20])
def test_a_quoted_value_may_span_lines_and_later_lines_are_counted(
    tmp_path, block_bytes
):
    text = HEADER + 'ann,"x\r\ny",1,1\n"b\nob",x,1,2\n\ncid,x,1,'
    path = write(tmp_path / "a.csv", text + "3\n")
    assert [r["user"] for r in rows(path, block_bytes=block_bytes)] == [
        "ann",
        "b\nob",
        "cid",
    ]
    write(path, text + "three\n")
    assert "line 7: column 'time': 'three'" in problem(path, block_bytes=block_bytes)


@pytest.mark.parametrize("block_bytes", [1, 50, 1 << 20])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        # The rest of the file would be the value of the last column.
        ('u,x,1,"1\n', ["line 402", "never closes", '""']),
        ('u,"x,1,1\n', ["line 402", "never closes"]),
        # Two quotes that do not belong together, and a whole number of fields.
        ('u,"x\nu,"y,1,1\n', ["line 402", "follows the closing quote"]),
        # Backslashes are no escapes in CSV: this row would have other values.
        ('u,"a \\"b\\" c",1,1\n', ["line 402", "follows the closing quote"]),
    ],
)
def test_quotes_that_do_not_match_are_named_by_their_line(
    tmp_path, bad, words, block_bytes
):
    lines = many(500)
    lines[400] = bad
    path = write(tmp_path / "a.csv", HEADER + "".join(lines))
    message = problem(path, {"user": pa.string()}, block_bytes=block_bytes)
    for word in words:
        assert word in message


def test_a_quote_that_swallows_more_than_a_row_may_have_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tabular_raw, "_LONGEST_ROW", 1000)
    monkeypatch.setattr(tabular_errors, "_LONGEST_VALUE", 1000)
    lines = many(500)
    lines[100] = '"u,x,1,1\n'
    path = write(tmp_path / "a.csv", HEADER + "".join(lines))
    message = problem(path, block_bytes=100)
    for word in ("line 102", "a quote that never closes"):
        assert word in message


def test_quotes_inside_values_without_quotes_are_values(tmp_path):
    path = write(tmp_path / "a.csv", HEADER + '5" disk,x,1,1\n"C:\\",y,1,2\n')
    assert [r["user"] for r in rows(path)] == ['5" disk', "C:\\"]


def test_a_missing_file_a_folder_and_a_truncated_archive_are_input_errors(tmp_path):
    assert "cannot be read" in problem(tmp_path / "absent.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "cannot be read" in problem(tmp_path / "folder.csv")
    packed = tmp_path / "a.csv.gz"
    packed.write_bytes(gzip.compress((HEADER + "".join(many(5000))).encode())[:-2000])
    assert "cannot be read" in problem(packed)


@pytest.mark.parametrize("kind", ["gzip", "zstd", "bz2"])
def test_compression_is_told_by_the_contents(tmp_path, kind):
    path = tmp_path / "a.csv"
    with pa.output_stream(path, compression=kind) as file:
        file.write((HEADER + "".join(many(50))).encode())
    assert [r["time"] for r in rows(path)] == list(range(50))


def test_a_workbook_is_no_csv(tmp_path):
    path = tmp_path / "a.csv"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("sheet.xml", HEADER)
    assert "zip archive or a workbook" in problem(path)


def test_a_file_of_tabs_says_so(tmp_path):
    message = problem(write(tmp_path / "a.csv", HEADER.replace(",", "\t")))
    assert "separated by tabs and not by commas" in message


def test_a_name_that_differs_in_case_or_spaces_is_suggested(tmp_path):
    path = write(tmp_path / "a.csv", "UID,other, at\n")
    assert "did you mean 'UID'?" in problem(path, {"uid": pa.string()})
    assert "did you mean ' at'?" in problem(path, {"at": pa.string()})


def parquet(path: Path, columns: dict, **options) -> Path:
    pa.parquet.write_table(pa.table(columns), path, **options)
    return path


def parquet_problem(path: Path, types) -> str:
    with pytest.raises(InputError) as caught:
        list(read_parquet(path, types))
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_parquet_columns_are_cast_and_ordered(tmp_path):
    path = parquet(
        tmp_path / "a.parquet",
        {
            "label": [True, None, False],
            "user": pa.array([7, 8, 9], pa.int32()),
            "v": [[1, 2], None, []],
        },
    )
    types = {"user": pa.string(), "v": pa.list_(pa.float32()), "label": pa.int8()}
    table = read_table(path, types)
    assert table.schema == pa.schema(types)
    assert table.to_pydict() == {
        "user": ["7", "8", "9"],
        "v": [[1.0, 2.0], None, []],
        "label": [1, None, 0],
    }


def test_parquet_is_streamed_in_batches(tmp_path):
    path = parquet(
        tmp_path / "a.parquet", {"user": list(range(150_000))}, row_group_size=40_000
    )
    batches = list(read_parquet(path, {"user": pa.int64()}))
    assert len(batches) > 1
    assert pa.Table.from_batches(batches).column("user").to_pylist() == list(
        range(150_000)
    )


def test_a_parquet_value_that_does_not_fit_is_named_by_its_row(tmp_path):
    values = [str(i) for i in range(100_000)]
    values[90_000] = "abc"
    message = parquet_problem(
        parquet(tmp_path / "a.parquet", {"user": values}), {"user": pa.int64()}
    )
    for word in ("row 90001", "column 'user'", "'abc'", "int64", "correct"):
        assert word in message


def test_a_parquet_fraction_is_not_rounded_to_an_integer(tmp_path):
    message = parquet_problem(
        parquet(tmp_path / "a.parquet", {"n": [1.0, 2.5]}), {"n": pa.int64()}
    )
    assert "row 2" in message
    assert "2.5" in message


def test_a_parquet_timestamp_is_not_taken_for_a_number(tmp_path):
    path = parquet(tmp_path / "a.parquet", {"time": pa.array([1], pa.timestamp("us"))})
    assert "milliseconds" in parquet_problem(path, {"time": pa.int64()})


def test_a_missing_parquet_column_and_a_file_of_another_format_are_input_errors(
    tmp_path,
):
    path = parquet(tmp_path / "a.parquet", {"user": [1]})
    assert "no column 'usr'; did you mean 'user'?" in parquet_problem(
        path, {"usr": pa.int64()}
    )
    assert "cannot be read: Parquet magic bytes" in parquet_problem(
        write(tmp_path / "b.parquet", HEADER), TYPES
    )
    assert "cannot be read: No such file" in parquet_problem(
        tmp_path / "absent.parquet", TYPES
    )
