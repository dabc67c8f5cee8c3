"""Labels that are numbers or classes, and weights of rows, in the user's own files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tokenrec.cli.main import main
from tokenrec.data.dataset import open_dataset
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.errors import InputError

SCHEMA = {
    "features": [
        {"name": "item_id", "kind": "categorical", "entity": "item"},
        {"name": "played", "kind": "dense", "entity": "action"},
    ],
    "tasks": [
        {"name": "watched", "kind": "real"},
        {"name": "stars", "kind": "classes", "classes": ["1", "2", "5"]},
    ],
    "columns": {
        "user_id": "u",
        "item_id": "i",
        "time_ms": "t",
        "watched": "secs",
        "played": "secs",
        "row_weight": "w",
    },
}
LOG = "u,i,t,secs,stars,w\na,x,1,2.5,5,2\na,y,2,,2.0,\nb,x,3,0, 1,0.25\nb,y,4,7,,1\n"


def write(folder, log=LOG, **changes):
    (folder / "log.csv").write_text(log)
    (folder / "schema.json").write_text(json.dumps(SCHEMA | changes))
    return folder / "schema.json"


def rows_of(schema, log) -> dict:
    source = DelimitedSource(schema, [log], valid_from="4")
    return pa.Table.from_batches(source.rows()).to_pydict()


def test_csv_and_parquet_give_the_same_labels(tmp_path):
    schema = write(tmp_path)
    rows = rows_of(schema, tmp_path / "log.csv")
    assert rows["label_watched"] == rows["played"] == [2.5, None, 0.0, 7.0]
    assert rows["label_stars"] == [2, 1, 0, None]
    assert rows["row_weight"] == [2.0, None, 0.25, 1.0]
    columns = {
        "u": ["a", "a", "b", "b"],
        "i": ["x", "y", "x", "y"],
        "t": [1, 2, 3, 4],
        "secs": pa.array([2.5, None, 0, 7], pa.float32()),
        "stars": pa.array([5.0, 2.0, 1.0, None]),
        "w": pa.array([2, None, 0.25, 1]),
    }
    pq.write_table(pa.table(columns), tmp_path / "log.parquet")
    assert rows_of(schema, tmp_path / "log.parquet") == rows


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,x,1,fast,5,1", r"log.csv, line 2: column 'secs': 'fast' is not a number"),
        ("a,x,1,1e99,5,1", r"column 'secs': '1e99' is not a finite float32"),
        ("a,x,1,1,4,1", r"column 'stars': '4' is no class; the schema has 1, 2, 5"),
        ("a,x,1,1,5,-1", r"column 'w': '-1' is negative; a weight is 0 or more"),
        ("a,x,1,1,5,inf", r"column 'w': 'inf' is not a finite float32"),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path, line, message):
    schema = write(tmp_path, f"u,i,t,secs,stars,w\n{line}\n")
    with pytest.raises(InputError, match=message):
        rows_of(schema, tmp_path / "log.csv")


def test_a_comparison_is_a_binary_label(tmp_path):
    columns = {k: v for k, v in SCHEMA["columns"].items() if k != "watched"}
    schema = write(tmp_path, labels={"watched": "secs >= 2"}, columns=columns)
    with pytest.raises(InputError, match=r"labels\['watched'\].*the kind 'real'"):
        DelimitedSource(schema, [tmp_path / "log.csv"], valid_from="4")


def test_init_proposes_the_kinds_that_it_is_told_and_prepare_takes_them(
    tmp_path, capsys
):
    lines = [
        f"u{n % 9},i{n % 7},{1_640_995_200_000 + 7_200_000 * n},{n % 5 + 0.5},{n % 3 + 1},x{n % 4}"
        for n in range(300)
    ]
    log = tmp_path / "log.csv"
    log.write_text("\n".join(["user_id,item_id,time,seconds,stars,tab", *lines]) + "\n")
    labels = ["--label", "seconds: real", "--label", "stars: classes"]
    out = tmp_path / "mine"
    assert main(["init", "--log", str(log), *labels, "--out", str(out)]) == 0
    schema = json.loads((out / "schema.json").read_text())
    assert schema["tasks"] == [
        {"name": "seconds", "kind": "real"},
        {"name": "stars", "kind": "classes", "classes": ["1", "2", "3"]},
    ]
    command = ["prepare", "delimited", "--schema", str(out / "schema.json")]
    assert main([*command, "--out", str(tmp_path / "set")]) == 0
    tasks = open_dataset(tmp_path / "set").schema.tasks
    assert tasks[0].most == 4.5
    assert tasks[1].classes == ("1", "2", "3")
    capsys.readouterr()
    wrong = ["--label", "tab: real", "--out", str(tmp_path / "x")]
    assert main(["init", "--log", str(log), *wrong]) == 2
    assert "holds string values" in capsys.readouterr().err
