"""Data sets with statistics of the past: `prepare`, `prepare --like`, `delimited`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.memory_source import SCHEMA, MemorySource
from tests.data.past.declared import DECLARED
from tests.data.preparation.test_like import (
    END,
    ITEMS,
    assert_same_test_rows,
    part,
    random_log,
    tables,
)
from tokenrec.cli.main import main
from tokenrec.config import DataConfig
from tokenrec.data.dataset import open_dataset
from tokenrec.data.past import WithStatistics, runs
from tokenrec.data.past.declaration_json import parse_statistics
from tokenrec.data.pipeline import eval_batches
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import columns
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.errors import InputError


def with_statistics(rows: dict[str, Any], items: int) -> WithStatistics:
    statistics = parse_statistics(DECLARED, SCHEMA, "here")
    return WithStatistics(MemorySource(rows, **tables(items)), statistics)


def test_later_rows_have_the_bits_of_one_log(tmp_path: Path) -> None:
    log = random_log(3)
    # Minutes instead of milliseconds, so that the half-lives matter.
    log["time_ms"] = np.asarray(log["time_ms"]) * 60_000
    is_later = log["time_ms"] >= END * 60_000
    prepare(with_statistics(log, ITEMS), tmp_path / "whole")
    prepare(with_statistics(part(log, ~is_later), 12), tmp_path / "first")
    prepare(
        with_statistics(part(log, is_later), ITEMS),
        tmp_path / "later",
        like=tmp_path / "first",
    )
    one, other = open_dataset(tmp_path / "whole"), open_dataset(tmp_path / "later")
    assert_same_test_rows(one, other)
    test = other.load("test")
    places = columns(other.schema.group("row")).dense
    for name in ("count_item_id", "rate_user_id_click_2h", "matches_item_id"):
        values = test.row_dense[:, places[name][0]]
        assert len(np.unique(values[~np.isnan(values)])) > 5, name


def test_a_retrieval_request_sees_no_statistic_of_its_goal(tmp_path: Path) -> None:
    prepare(with_statistics(random_log(3), ITEMS), tmp_path / "set")
    dataset = open_dataset(tmp_path / "set")
    config = DataConfig(path="-", objective="retrieval", paradigm="nio", events=8)
    batch = next(eval_batches(dataset, config, "train"))[0].batch
    assert batch.target is not None
    places = columns(dataset.schema.state).dense
    seen = {
        name: not np.isnan(batch.target.dense[..., slice(*place)]).all()
        for name, place in places.items()
    }
    # A key of the user alone is known before the item is; one with the item is not.
    assert seen["count_user_id_2h"]
    assert seen["past_gap"]
    of_item = ("item_id", "author", "tags", "topic")
    hidden = [n for n in seen if any(column in n for column in of_item)]
    assert "count_user_id_author_2h" in hidden
    assert any(n.startswith("matches") for n in hidden)
    assert not any(seen[name] for name in hidden)


def test_totals_of_another_declaration_are_refused(tmp_path: Path) -> None:
    log = random_log(3)
    prepare(with_statistics(log, ITEMS), tmp_path / "first")
    other = dict(DECLARED, times={"gap": True, "idle_after": "price", "session": "9m"})
    source = WithStatistics(
        MemorySource(log, **tables(ITEMS)), parse_statistics(other, SCHEMA, "here")
    )
    with pytest.raises(InputError, match=r"declared otherwise .* same declaration"):
        prepare(source, tmp_path / "later", like=tmp_path / "first")


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ([], r"here: is \[\], not a JSON object"),
        ({"key": []}, "here: has no field 'key'; did you mean 'keys'"),
        ({}, "here: declares nothing; add an entry"),
        ({"keys": "item_id"}, "'keys' is 'item_id', not a JSON array"),
        ({"keys": [{}]}, r"here.keys\[0\]: 'key' is missing"),
        ({"keys": ["user_id", []]}, r"here.keys\[1\]: key is empty; name a column"),
        ({"keys": ["usr_id"]}, "key: has no 'usr_id'; did you mean 'user_id'"),
        ({"keys": ["price"]}, "'price' is known only after the row was shown"),
        ({"keys": ["click"]}, "'click' is known only after the row was shown"),
        ({"keys": ["age"]}, "key: has no 'age'"),
        ({"keys": [["tab", "tab"]]}, "names 'tab' twice"),
        ({"keys": [{"key": "tab", "tasks": ["klick"]}]}, "tasks: has no 'klick'"),
        ({"keys": [{"key": "tab", "means": "age"}]}, "means: has no 'age'"),
        ({"keys": [{"key": "tab", "parent": "tap"}]}, "parent: has no 'tap'"),
        ({"keys": [{"key": "tab", "horizons": "last 9"}]}, "'last 9' are events of"),
        ({"keys": [{"key": "user_id", "horizons": "last 900"}]}, "at most 200 events"),
        ({"keys": [{"key": "tab", "horizons": "9 days"}]}, "horizons='9 days' is not"),
        ({"keys": [{"key": "tab", "horizons": "5ms"}]}, "must be 1 second to"),
        ({"keys": [{"key": "tab", "horizons": []}]}, "horizons is empty"),
        ({"keys": [{"key": "tab", "strength": 0}]}, "strength=0 must be above 0"),
        ({"keys": [{"key": "tab", "strength": "a"}]}, "strength='a' is not a finite"),
        ({"keys": ["tab", "tab"]}, "two features would be named 'rate_tab_click'"),
        ({"matches": ["user_id"]}, r"here.matches\[0\]: of: has no 'user_id'"),
        ({"times": {"session": "soon"}}, "times: session='soon' is not a duration"),
        ({"times": {"idle_after": "age"}}, "times: idle_after: has no 'age'"),
        ({"times": {"gap": 1}}, "times: gap=1 is not true or false"),
        ({"keys": ["tab"], "unscored": "drop"}, "unscored='drop' is no choice"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused_with_the_reason(
    declared: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        parse_statistics(declared, SCHEMA, "here")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("time_ms", [None] * 400, r"'time_ms' .*null"),
        ("time_ms", ["a"] * 400, "'time_ms' has the type string"),
        ("label_click", [5] * 400, "'label_click' is 5 in row 0"),
        ("tab", [0.5] * 400, "feature 'tab' has the type double, but a key"),
    ],
)
def test_a_wrong_column_is_refused_before_it_is_counted(
    name: str, values: list[Any], message: str
) -> None:
    log = random_log(3)
    log[name] = values
    with pytest.raises(InputError, match=message):
        list(with_statistics(log, ITEMS).rows())


def test_a_value_too_large_for_exact_sums_is_refused() -> None:
    log = random_log(3)
    log["price"] = np.full(len(log["user_id"]), 2e6, np.float32)
    with pytest.raises(
        InputError, match=r"'price' is 2e\+06 .* \"transform\": \"log1p"
    ):
        list(with_statistics(log, ITEMS).rows())


def test_a_sum_too_large_for_its_integers_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "_MOST_SUM", 1 << 26)
    message = "statistics of .*: the sum of '.*' is too large for exact sums"
    with pytest.raises(InputError, match=message):
        list(with_statistics(random_log(3), ITEMS).rows())


SCHEMA_FILE = {
    "features": [
        {"name": "brand", "kind": "categorical", "entity": "item"},
        {"name": "slot", "kind": "categorical", "entity": "context"},
        {"name": "seconds", "kind": "dense", "entity": "action"},
    ],
    "tasks": [{"name": "click"}],
    "columns": {"user_id": "uid", "item_id": "sku", "time_ms": "ts"},
    "key_types": {"user_id": "int64"},
    "statistics": {
        "keys": ["item_id", {"key": ["user_id", "brand"], "means": "seconds"}],
        "matches": ["brand"],
        "times": {"gap": True, "idle_after": "seconds"},
    },
}
LOG = """uid,sku,ts,slot,seconds,click
7,tea,1000,1,0.5,1
8,tea,2000,1,,0
7,cup,3000,2,1.5,0
7,tea,5000,1,,
8,cup,6000,2,2,1
"""
ITEM_FILE = "sku,brand\ntea,acme\ncup,acme\n"


class Folder:
    """Files of `prepare delimited` with statistics."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write("schema.json", json.dumps(SCHEMA_FILE))
        self.write("log.csv", LOG)
        self.write("items.csv", ITEM_FILE)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def prepare(self, out: str, *flags: str, log: str = "log.csv") -> int:
        paths = {"schema": "schema.json", "log": log, "items": "items.csv", "out": out}
        options = [f"--{name}={self.folder / path}" for name, path in paths.items()]
        return main(["prepare", "delimited", *options, *flags])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_a_schema_file_declares_statistics(folder: Folder) -> None:
    splits = ("--valid-from=5000", "--test-from=6000")
    assert folder.prepare("all", *splits) == 0
    data = open_dataset(folder.folder / "all")
    table = data.to_arrow("test").read_all().to_pylist()
    (row,) = table
    # Of the cup: one row without a click, of four with two... of which one is unknown.
    share, overall = (0 + 20 * 2 / 5) / (1 + 20), 2 / 5
    logit = np.log(share / (1 - share)) - np.log(overall / (1 - overall))
    assert row["rate_item_id_click"] == pytest.approx(logit, rel=1e-5)
    assert (row["count_item_id"], row["count_user_id_brand"]) == (1.0, 1.0)
    assert (row["matches_brand"], row["matches_brand_click"]) == (1.0, 0.0)
    assert row["mean_user_id_brand_seconds"] is None
    assert (row["past_gap"], row["past_idle"]) == (4.0, None)
    (row,) = data.to_arrow("valid").read_all().to_pylist()
    assert (row["past_gap"], row["past_idle"]) == (2.0, 0.5)

    # The same from two logs.
    lines = LOG.splitlines(keepends=True)
    folder.write("first.csv", "".join(lines[:-1]))
    folder.write("later.csv", lines[0] + lines[-1])
    assert folder.prepare("first", splits[0], log="first.csv") == 0
    like = f"--like={folder.folder / 'first'}"
    assert folder.prepare("later", like, log="later.csv") == 0
    later = open_dataset(folder.folder / "later").to_arrow("test").read_all()
    assert later.to_pylist() == table

    # To rank what was not shown yet, with the columns of a candidate.
    folder.write("candidates.csv", "sku,uid,slot,ts\ncup,8,2,6000\ntea,8,1,6000\n")
    path = folder.folder / "candidates.csv"
    assert folder.prepare("rank", like, f"--candidates={path}", log="first.csv") == 0
    ranked = open_dataset(folder.folder / "rank").to_arrow("test").read_all()
    cup, tea = sorted(ranked.to_pylist(), key=lambda r: r["item_id"])
    names = [f.name for f in data.schema.features if f.name.startswith("rate_")]
    assert [cup[n] for n in names] == [table[0][n] for n in names]
    assert tea["count_item_id"] == 3.0


def test_a_declaration_in_a_file_is_added_to_any_source(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    schema = dict(SCHEMA_FILE)
    statistics = schema.pop("statistics")
    splits = ("--valid-from=5000", "--test-from=6000")
    assert folder.prepare("one", *splits) == 0
    folder.write("schema.json", json.dumps(schema))
    folder.write("statistics.json", json.dumps(statistics))
    flag = f"--statistics={folder.folder / 'statistics.json'}"
    assert folder.prepare("other", *splits, flag) == 0
    one, other = (open_dataset(folder.folder / n) for n in ("one", "other"))
    assert one.schema == other.schema
    assert one.metadata.row_digests == other.metadata.row_digests
    # One declaration a data set.
    folder.write("schema.json", json.dumps(SCHEMA_FILE))
    assert folder.prepare("two", *splits, flag) == 2
    assert "declares statistics too; leave one of them out" in capsys.readouterr().err
    folder.write("schema.json", json.dumps(schema))
    assert folder.prepare("none", *splits, "--statistics=kuairnd") == 2
    assert "kuairnd" in (said := capsys.readouterr().err)
    assert "did you mean 'kuairand'" in said


def test_a_mistake_in_the_schema_file_names_the_field(folder: Folder) -> None:
    schema = {**SCHEMA_FILE, "statistics": {"keys": ["brnd"]}}
    folder.write("schema.json", json.dumps(schema))
    message = r"schema.json: statistics.keys\[0\]: key: has no 'brnd'; did you mean"
    with pytest.raises(InputError, match=message):
        DelimitedSource(folder.folder / "schema.json", folder.folder / "log.csv")
