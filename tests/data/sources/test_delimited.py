"""Tests of the source delimited: schema file to columns, and messages for mistakes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from tokenrec.cli.main import main
from tokenrec.data.metadata import Metadata
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.errors import InputError

SCHEMA: dict[str, Any] = {
    "features": [
        {"name": "plan", "kind": "categorical", "entity": "user"},
        {"name": "device", "kind": "categorical", "entity": "context"},
        {"name": "sku", "kind": "categorical", "entity": "item"},
        {"name": "tags", "kind": "multi_valued", "entity": "item", "length": 3},
        {"name": "vector", "kind": "embedding", "entity": "item", "length": 2},
        {
            "name": "code",
            "kind": "semantic_id",
            "entity": "item",
            "length": 2,
            "codes": 4,
        },
        {"name": "place", "kind": "dense", "entity": "item", "per_row": True},
        {"name": "seconds", "kind": "dense", "entity": "action", "transform": "log1p"},
        {"name": "clicked", "kind": "categorical", "entity": "action"},
    ],
    "tasks": [{"name": "click"}, {"name": "buy", "weight": 0.5}],
    "columns": {
        "user_id": "uid",
        "item_id": "sku",
        "time_ms": "at",
        "clicked": "click",
    },
    "key_types": {"user_id": "int64"},
}
LOG = """uid,sku,at,device,place,seconds,click,buy,secret
1,a,1000,phone,1,2.5,1,0,x
2,b,2000,,,,,1,x
1,b,3000,desk,2,0,0,-1,x
1,c,4000,desk,2,0,0,,x
"""
USERS = "uid,plan\n1,gold\n2,\n"
ITEMS = "sku,tags,vector,code\na,red|new,0.5|-1,0|3\nb,,,\n"


class Files:
    """A schema, a log, users and items in a folder; a test breaks one of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.schema = json.loads(json.dumps(SCHEMA))
        self.users: Path | None = self.write("users.csv", USERS)
        self.items: Path | None = self.write("items.csv", ITEMS)
        self.logs = [self.write("log.csv", LOG)]

    def write(self, name: str, text: str) -> Path:
        (self.folder / name).write_text(text)
        return self.folder / name

    def source(
        self, valid_from: str = "3000", test_from: str | None = "4000"
    ) -> DelimitedSource:
        schema = self.write("schema.json", json.dumps(self.schema))
        return DelimitedSource(
            schema, self.logs, self.users, self.items, valid_from, test_from
        )

    def rows(self, **splits: Any) -> list[dict[str, Any]]:
        return [
            row for batch in self.source(**splits).rows() for row in batch.to_pylist()
        ]

    def problem(self, **splits: Any) -> str:
        with pytest.raises(InputError) as caught:
            self.read_all(**splits)
        return str(caught.value)

    def read_all(self, **splits: Any) -> None:
        source = self.source(**splits)
        source.users()
        source.items()
        list(source.rows())


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def test_rows_hold_keys_splits_labels_and_features(files):
    rows = files.rows()
    assert rows[0] == {
        "user_id": 1,
        "item_id": "a",
        "time_ms": 1000,
        "label_click": 1,
        "label_buy": 0,
        "device": "phone",
        "place": 1.0,
        "seconds": 2.5,
        "clicked": 1,
        "request": -1,
        "event": True,
        "scored": True,
        "split": 0,
    }
    assert [row["split"] for row in rows] == [0, 0, 1, 2]


def test_missing_values_and_unknown_labels_are_null_or_minus_one(files):
    rows = files.rows()
    assert [
        rows[1][name]
        for name in ("device", "place", "seconds", "label_click", "clicked")
    ] == [None] * 5
    assert [row["label_buy"] for row in rows] == [0, 1, -1, None]


def test_a_label_that_is_also_an_action_is_missing_where_it_is_unknown(files):
    files.schema["columns"]["clicked"] = "buy"
    assert [row["clicked"] for row in files.rows()] == [0, 1, None, None]


def test_users_and_items_are_read_with_lists_and_a_copy_of_the_id(files):
    source = files.source()
    assert source.users().to_pylist() == [
        {"user_id": 1, "plan": "gold"},
        {"user_id": 2, "plan": None},
    ]
    assert source.items().to_pylist() == [
        {
            "item_id": "a",
            "sku": "a",
            "tags": ["red", "new"],
            "vector": [0.5, -1.0],
            "code": [0, 3],
        },
        {"item_id": "b", "sku": "b", "tags": None, "vector": None, "code": None},
    ]


def test_without_an_item_file_the_id_is_the_one_feature_of_an_item(files):
    files.items = None
    files.schema["features"] = [
        f
        for f in files.schema["features"]
        if f["name"] not in ("tags", "vector", "code")
    ]
    files.schema["features"][2]["name"] = "item_id"
    assert files.source().items() == pa.table({"item_id": pa.array([], pa.string())})


def test_an_id_may_be_a_feature_of_its_entity(files):
    files.schema["features"].append(
        {"name": "user_id", "kind": "categorical", "entity": "user"}
    )
    assert files.source().users().column_names == ["user_id", "plan"]


def test_an_item_feature_without_an_item_file_is_refused(files):
    files.items = None
    assert (
        "items is not given, but the schema has sku, tags, vector, code of them; add --items"
        in files.problem()
    )


def test_parquet_and_csv_give_the_same_rows(files):
    expected = files.rows()
    log = pa.csv.read_csv(
        files.logs[0], convert_options=pa.csv.ConvertOptions(strings_can_be_null=True)
    )
    files.logs = [files.folder / "log.parquet"]
    pa.parquet.write_table(log, files.logs[0])
    assert files.rows() == expected


def test_several_logs_are_read_in_order(files):
    files.logs.append(
        files.write(
            "more.csv", "\n".join([LOG.splitlines()[0], "9,a,5000,phone,1,1,1,1,x"])
        )
    )
    assert [row["user_id"] for row in files.rows()] == [1, 2, 1, 1, 9]


def test_requests_and_flags_are_read_when_they_are_named(files):
    files.schema["columns"] |= {
        "request": "basket",
        "event": "bought",
        "scored": "shown",
    }
    lines = LOG.splitlines()
    extra = [
        ",basket,bought,shown",
        ",7,true,0",
        ",,1,false",
        ",7,false,1",
        ",8,0,true",
    ]
    files.logs = [
        files.write(
            "log.csv", "\n".join(a + b for a, b in zip(lines, extra, strict=True))
        )
    ]
    rows = files.rows()
    assert [row["request"] for row in rows] == [7, -1, 7, 8]
    assert [row["event"] for row in rows] == [True, True, False, False]
    assert [row["scored"] for row in rows] == [False, False, True, True]


@pytest.mark.parametrize(
    "valid_from",
    [
        "2022-05-03",
        "2022-05-03T00:00",
        "2022-05-03T02:00+02:00",
        "2022-05-03T00:00:00Z",
        "1651536000000",
    ],
)
def test_days_begin_at_midnight_utc(files, valid_from):
    head = LOG.splitlines()[0]
    times = [1651535999999, 1651536000000, 1651622400000]
    files.logs = [
        files.write("log.csv", head + "\n" + "".join(f"1,a,{t},,,,,,\n" for t in times))
    ]
    assert [
        row["split"]
        for row in files.rows(valid_from=valid_from, test_from="2022-05-04")
    ] == [0, 1, 2]
    assert [
        row["split"] for row in files.rows(valid_from=valid_from, test_from=None)
    ] == [0, 1, 1]


def test_the_files_are_named_for_their_checksums(files):
    names = [path.name for path in files.source().provenance.files]
    assert names == ["schema.json", "log.csv", "users.csv", "items.csv"]


def break_schema(**changes: Any):
    return lambda files: files.schema.update(changes)


def break_log(old: str, new: str):
    return lambda files: files.write("log.csv", LOG.replace(old, new))


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        (break_schema(feature=[]), ["schema.json", "no 'feature'", "'features'"]),
        (break_schema(columns={"user": "uid"}), ["columns has no 'user'", "'user_id'"]),
        (
            break_schema(columns={"user_id": 3}),
            ["columns['user_id']=3", "name of a column"],
        ),
        (
            break_schema(key_types={"plam": "int64"}),
            ["key_types has no 'plam'", "'plan'"],
        ),
        (
            break_schema(key_types={"user_id": "int"}),
            ["key_types['user_id']='int'", "'int64'"],
        ),
        (
            break_schema(
                features=[{"name": "x", "kind": "categorial", "entity": "user"}]
            ),
            ["'categorical'?"],
        ),
        (
            break_schema(
                features=[{"name": "item_id", "kind": "dense", "entity": "item"}]
            ),
            ["'item_id'", "columns"],
        ),
        (break_schema(features={}), ["'features' must be a JSON array"]),
        (
            break_log("device", "devise"),
            ["log.csv", "no column 'device'", "did you mean 'devise'"],
        ),
        (
            break_log("3000", "noon"),
            ["log.csv, line 4", "column 'at'", "'noon' is not a time", "milliseconds"],
        ),
        (
            break_log("1,a,1000", ",a,1000"),
            ["log.csv, line 2", "column 'uid'", "not a user_id"],
        ),
        (
            break_log("1,b,3000", "1,b,"),
            ["log.csv, line 4", "column 'at'", "not a time_ms"],
        ),
        (
            break_log("0,-1,x", "0,5,x"),
            ["log.csv, line 4", "column 'buy'", "'5' is not a label", "1, 0"],
        ),
        (
            break_log("1,2.5,1", "1,-inf,1"),
            [
                "log.csv, line 2",
                "column 'seconds'",
                "'-inf' is not a finite float32",
                "empty",
            ],
        ),
        (
            break_log("1,2.5,1", "1,1e39,1"),
            ["log.csv, line 2", "column 'seconds'", "not a finite float32"],
        ),
        (
            lambda f: f.write("items.csv", ITEMS.replace("0.5|-1", "0.5|inf")),
            ["items.csv, line 2", "'vector'", "finite"],
        ),
        (
            lambda f: f.write("users.csv", USERS + "1,iron\n"),
            ["users.csv", "column 'uid'", "1 has 2 rows"],
        ),
        (
            lambda f: f.write("items.csv", ITEMS.replace("0.5|-1", "0.5")),
            ["items.csv, line 2", "'vector'", "length=2"],
        ),
        (
            lambda f: f.write("items.csv", ITEMS.replace("0|3", "0|4")),
            ["items.csv, line 2", "'code'", "0 .. 3"],
        ),
        (
            lambda f: f.write("items.csv", ITEMS.replace("0|3", "0;3")),
            ["items.csv, line 2", "'code'", "'|'"],
        ),
        (
            lambda f: f.logs.append(f.folder / "absent.csv"),
            ["absent.csv: no such file"],
        ),
        (lambda f: f.logs.clear(), ["log is empty"]),
    ],
)
def test_a_slip_is_named_with_its_place_and_remedy(files, breakage, words):
    breakage(files)
    message = files.problem()
    for word in words:
        assert word in message


def test_a_schema_that_is_not_json_is_refused(files):
    path = files.write("broken.json", "{'features': []}")
    with pytest.raises(InputError, match="is not JSON"):
        DelimitedSource(path, files.logs, None, None, "0", None)


def test_features_of_two_types_cannot_share_a_table(files):
    files.schema["features"][1]["table"] = "sku"
    files.schema["key_types"] |= {"device": "int64"}
    message = files.problem()
    for word in (
        "'device' (int64)",
        "'sku' (string)",
        "share table 'sku'",
        "key_types",
    ):
        assert word in message


@pytest.mark.parametrize(
    ("valid_from", "split"), [("0", "train"), ("2022-05-03", "valid")]
)
def test_a_split_that_leaves_train_or_valid_empty_is_refused(files, valid_from, split):
    message = files.problem(valid_from=valid_from, test_from=None)
    for word in (
        f"leaves {split} empty",
        "1970-01-01T00:00:01Z",
        "milliseconds",
        "move valid_from",
    ):
        assert word in message


def test_a_date_that_is_none_and_splits_in_the_wrong_order_are_refused(files):
    assert "valid_from=yesterday is neither an ISO date" in files.problem(
        valid_from="yesterday"
    )
    assert "test_from=10 must be later than valid_from=10" in files.problem(
        valid_from="10", test_from="10"
    )


DOCUMENT = Path(__file__).parents[3] / "docs" / "guides" / "data.md"


def blocks(language: str) -> list[str]:
    """Fenced blocks of docs/guides/data.md."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL
    )


def test_every_example_of_the_documentation_runs(tmp_path, monkeypatch):
    """Run files, command and Python of docs/guides/data.md in order, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    for name, text in zip(
        ("log.csv", "users.csv", "items.csv"), blocks("csv"), strict=True
    ):
        Path(name).write_text(text)
    for name, text in zip(
        ("schema.json", "statistics.json"), blocks("json"), strict=True
    ):
        Path(name).write_text(text)
    for command in blocks("sh"):
        assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    Path("ratings.tsv").write_text(
        "".join(f"{t % 5}\t{t % 7}\t{1 + t % 5}\t{t}\n" for t in range(1000))
    )
    names = [f.name for f in Metadata.load(Path("data/with_past")).schema.features]
    assert {"rate_item_id_click", "matches_brand_buy", "past_session"} < {*names}
    access, arrow, source = blocks("python")
    opened: dict[str, Any] = {}
    exec(access, opened)
    assert opened["log"].user_id.tolist() == [7, 8]
    assert opened["rows"]["labels"].shape[1] == 2
    exec(arrow, opened)
    assert opened["table"].num_rows == opened["log"].num_rows
    exec(source, {})
    counts = Metadata.load(tmp_path / "data" / "ratings").counts
    assert [counts[f"scored_{split}"] for split in ("train", "valid", "test")] == [
        800,
        100,
        100,
    ]
    assert (counts["users"], counts["items"], counts["positives_valid_liked"]) == (
        5,
        7,
        40,
    )
