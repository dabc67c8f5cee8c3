"""Tests of which files are read, and of what the schema says about them."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from tokenrec.cli.main import main
from tokenrec.data.metadata import Metadata
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.data.sources.delimited_files import expand
from tokenrec.data.sources.delimited_schema import SchemaFile
from tokenrec.errors import InputError

SCHEMA: dict[str, Any] = {
    "features": [
        {"name": "item_id", "kind": "categorical", "entity": "item"},
        {"name": "tags", "kind": "multi_valued", "entity": "item", "length": 2},
    ],
    "tasks": [{"name": "click"}],
}
HEADER = "user_id,item_id,time_ms,click\n"
ITEMS = "item_id,tags\na,x|y\nb,z\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "items.csv").write_text(ITEMS)
    (tmp_path / "log.csv").write_text(HEADER + "u,a,1,1\nv,b,5,0\n")
    return tmp_path


def source(folder: Path, log: str = "log.csv", **options: Any) -> DelimitedSource:
    options = {"valid_from": "3", "items": folder / "items.csv", **options}
    return DelimitedSource(folder / "schema.json", [folder / log], **options)


def users(log: DelimitedSource) -> list[str]:
    return [user for batch in log.rows() for user in batch["user_id"].to_pylist()]


def read_all(*args: Any, **kwargs: Any) -> None:
    log = source(*args, **kwargs)
    log.items()
    users(log)


def problem(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_all(*args, **kwargs)
    return str(caught.value)


def write_parts(folder: Path) -> None:
    """Write a folder of parts as Spark does, with markers and a folder of a day."""
    (folder / "parts" / "day=2").mkdir(parents=True)
    for name, user, time in (("b.csv", "q", 5), ("a.csv", "p", 1), ("day=2/c", "r", 6)):
        (folder / "parts" / name).write_text(HEADER + f"{user},a,{time},1\n")
    for name in ("_SUCCESS", ".b.csv.crc", "_metadata"):
        (folder / "parts" / name).write_bytes(b"\0")


def test_a_folder_is_read_in_sorted_order_without_markers(folder):
    write_parts(folder)
    log = source(folder, "parts")
    assert users(log) == ["p", "q", "r"]
    names = [path.name for path in log.provenance.files]
    assert names == ["schema.json", "a.csv", "b.csv", "c", "items.csv"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("parts/*.csv", "pq"), ("parts/**", "pqr"), ("parts/*/c", "r"), ("p*", "pqr")],
)
def test_a_glob_is_read_in_sorted_order(folder, pattern, expected):
    write_parts(folder)
    assert sorted(path.name for path in expand([folder / pattern])) == sorted(
        {"p": "a.csv", "q": "b.csv", "r": "c"}[user] for user in expected
    )


def test_a_part_per_file_gives_the_rows_and_survives_pickling(folder):
    write_parts(folder)
    log = source(folder, "parts")
    parts = pickle.loads(pickle.dumps(log.row_parts()))
    assert [Path(part.name).name for part in parts] == ["a.csv", "b.csv", "c"]
    in_parts = [row for part in parts for b in part.read() for row in b.to_pylist()]
    assert in_parts == [row for batch in log.rows() for row in batch.to_pylist()]


def test_users_and_items_may_be_folders(folder):
    (folder / "goods").mkdir()
    (folder / "goods" / "1.csv").write_text("item_id,tags\na,x\n")
    (folder / "goods" / "2.csv").write_text("item_id,tags\nb,\n")
    log = source(folder, items=folder / "goods")
    assert log.items()["item_id"].to_pylist() == ["a", "b"]
    (folder / "goods" / "3.csv").write_text("item_id,tags\na,\n")
    assert "'a' has 2 rows" in problem(folder, items=folder / "goods")
    # Users have no feature here, but a file of them may be given.
    (folder / "who").mkdir()
    (folder / "who" / "1.csv").write_text("user_id\nu\n")
    (folder / "who" / "2.csv").write_text("user_id\nv\n")
    parts = source(folder, users=folder / "who").user_parts()
    got = [row for part in parts for batch in part.read() for row in batch.to_pylist()]
    assert got == [{"user_id": "u"}, {"user_id": "v"}]


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("absent.csv", "no such file; check the path"),
        ("absent*.csv", "matches no file; check the pattern"),
        ("empty", "a folder without files to read"),
        ("pipe", "not a regular file"),
    ],
)
def test_a_path_without_files_is_named(folder, log, words):
    (folder / "empty").mkdir()
    (folder / "empty" / "_SUCCESS").touch()
    os.mkfifo(folder / "pipe")
    message = problem(folder, log)
    assert log in message
    assert words in message


def test_a_name_with_brackets_is_a_file_first(folder):
    (folder / "log[1].csv").write_text(HEADER + "u,a,1,1\nw,b,5,0\n")
    assert users(source(folder, "log[1].csv")) == ["u", "w"]


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".inter", ""])
def test_the_delimiter_is_found_in_the_header_and_said(
    folder, capsys, delimiter, suffix
):
    text = HEADER + 'u,a,1,1\n"v",b,5,0\n'
    (folder / f"x{suffix}").write_text(text.replace(",", delimiter))
    for given in (None, delimiter):
        assert users(source(folder, f"x{suffix}", delimiter=given)) == ["u", "v"]
    said = capsys.readouterr().err
    assert said.count("is separated by") == (delimiter != ",")
    assert "commas" not in said


def test_a_delimiter_that_is_not_found_is_given(folder):
    (folder / "x.txt").write_text((HEADER + "u,a,1,1\nv,b,5,0\n").replace(",", "~"))
    assert users(source(folder, "x.txt", delimiter="~")) == ["u", "v"]
    assert "has no column 'user_id'" in problem(folder, "x.txt")
    assert "one character" in problem(folder, "x.txt", delimiter="::")


def test_columns_decide_between_separators(folder):
    text = "user_id;item_id;time_ms;click;a,b,c,d,e,f\nu;a;1;1;,,,,,\nv;b;5;0;,,,,,\n"
    (folder / "log.csv").write_text(text)
    assert users(source(folder)) == ["u", "v"]


def test_names_with_types_are_those_of_recbole(folder):
    header = "user_id:token\titem_id:token\ttime_ms:float\tclick:float\n"
    (folder / "x.inter").write_text(header + "u\ta\t1\t1\nv\tb\t5\t0\n")
    items = "item_id:token\ttags:token_seq\na\tx y\nb\t\n"
    (folder / "x.item").write_text(items)
    schema = SCHEMA | {"separators": {"tags": " "}}
    (folder / "schema.json").write_text(json.dumps(schema))
    log = source(folder, "x.inter", items=folder / "x.item")
    assert users(log) == ["u", "v"]
    assert log.items()["tags"].to_pylist() == [["x", "y"], None]
    # An exact name wins.
    header = "user_id:token\tuser_id\titem_id\ttime_ms\tclick\n"
    (folder / "x.inter").write_text(header + "t\tu\ta\t1\t1\nt\tv\tb\t5\t0\n")
    assert users(source(folder, "x.inter")) == ["u", "v"]


def test_a_name_with_two_types_is_ambiguous(folder):
    header = "user_id:token,user_id:float,item_id,time_ms,click\n"
    (folder / "log.csv").write_text(header)
    message = problem(folder)
    for word in ("2 columns 'user_id'", "'user_id:token'", "rename all but one"):
        assert word in message


def test_what_a_file_is_is_told_by_its_contents_and_said(folder, capsys):
    text = (folder / "log.csv").read_bytes()
    expected = users(source(folder))
    (folder / "log.csv").write_bytes(gzip.compress(text))
    assert users(source(folder)) == expected
    assert "is gzip, though its name" in capsys.readouterr().err
    (folder / "log.csv").write_bytes(text.decode().encode("utf-16"))
    assert users(source(folder)) == expected
    assert "is read as utf-16-le" in capsys.readouterr().err
    (folder / "log.csv").write_bytes(text)
    table = pa.csv.read_csv(folder / "log.csv")
    pa.parquet.write_table(table, folder / "log.csv")
    assert users(source(folder)) == expected
    assert "is Parquet" in capsys.readouterr().err
    with pa.output_stream(folder / "log.csv.zst", compression="zstd") as file:
        file.write(text)
    assert users(source(folder, "log.csv.zst")) == expected
    assert capsys.readouterr().err == ""


def test_the_schema_names_the_files_and_flags_win(folder, capsys):
    files = {
        "log": ["lo*.csv"],
        "items": "items.csv",
        "valid_from": 3,
        "test_from": "1970-01-01T00:00:00.005",
    }
    (folder / "schema.json").write_text(json.dumps(SCHEMA | {"files": files}))
    log = DelimitedSource(folder / "schema.json")
    assert [row["split"] for b in log.rows() for row in b.to_pylist()] == [0, 2]
    log = DelimitedSource(folder / "schema.json", test_from="9")
    assert [row["split"] for b in log.rows() for row in b.to_pylist()] == [0, 1]
    arguments = ["prepare", "delimited", "--schema", str(folder / "schema.json")]
    assert main([*arguments, "--out", str(folder / "set")]) == 0
    assert Metadata.load(folder / "set").counts["users"] == 2


def test_a_schema_may_be_built_in_memory(folder):
    value = SCHEMA | {"files": {"log": ["log.csv"], "items": "items.csv"}}
    schema = SchemaFile.from_json(value, "ratings", folder)
    log = DelimitedSource(schema, valid_from="3")
    assert users(log) == ["u", "v"]
    assert [path.name for path in log.provenance.files] == ["log.csv", "items.csv"]
    with pytest.raises(InputError, match="ratings: schema has no 'feature'"):
        SchemaFile.from_json({"feature": []}, "ratings", folder)


def test_the_counts_of_reading_join_those_of_prepare(folder, capsys):
    (folder / "items.csv").write_text(ITEMS.replace("x|y", "x| y"))
    arguments = ["--items", str(folder / "items.csv"), "--log", str(folder / "log.csv")]
    arguments += ["--schema", str(folder / "schema.json"), "--valid-from", "3"]
    out = folder / "set"
    assert main(["prepare", "delimited", *arguments, "--out", str(out)]) == 0
    assert Metadata.load(out).counts["cleaned_lists_tags"] == 1
    captured = capsys.readouterr()
    assert "cleaned_lists_tags" in captured.out
    assert "1 lists such as 'x| y'" in captured.err


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"separators": {"tag": ";"}}, ["separators has no 'tag'", "'tags'"]),
        ({"separators": {"tags": ""}}, ["separators['tags']=''", "between two values"]),
        ({"separators": {"tags": 1}}, ["separators['tags']=1"]),
        ({"labels": {"clik": "r >= 4"}}, ["labels has no 'clik'", "'click'"]),
        ({"labels": {"click": "r >= four"}}, ["'r >= four'", "COLUMN OP NUMBER"]),
        ({"labels": {"click": "r => 4"}}, ["'r => 4'", "COLUMN OP NUMBER"]),
        ({"labels": {"click": 4}}, ["labels['click']=4", '"rating >= 4"']),
        (
            {"labels": {"click": "r >= 4"}, "columns": {"click": "c"}},
            ["columns['click']='c'", "remove one of them"],
        ),
        ({"time": {"units": "s"}}, ["time has no 'units'", "'unit'"]),
        ({"time": {"unit": "sec"}}, ["time['unit']='sec'", "s, ms, us, ns"]),
        ({"time": {"unit": ["s"]}}, ["time['unit']=['s']"]),
        ({"time": {"zone": "Mars/Base"}}, ["time['zone']='Mars/Base'", "Europe/Oslo"]),
        ({"time": {"zone": 8}}, ["time['zone']=8"]),
        ({"time": []}, ["'time' must be a JSON object"]),
        ({"files": {"logs": ["a"]}}, ["files has no 'logs'", "'log'"]),
        ({"files": {"log": "a.csv"}}, ["files['log']='a.csv'", "list of paths"]),
        ({"files": {"log": [1]}}, ["files['log']=[1]"]),
        ({"files": {"items": 3}}, ["files['items']=3", "a path"]),
        ({"files": {"valid_from": 3.5}}, ["files['valid_from']=3.5", "a time"]),
    ],
)
def test_a_slip_in_the_schema_is_named(folder, part, words):
    (folder / "schema.json").write_text(json.dumps(SCHEMA | part))
    message = problem(folder)
    for word in ["schema.json", *words]:
        assert word in message


def test_no_files_and_no_split_are_named(folder):
    with pytest.raises(InputError, match=r"log is empty.*--log"):
        DelimitedSource(folder / "schema.json")
    assert "--valid-from" in problem(folder, valid_from=None)
