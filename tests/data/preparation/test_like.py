"""Tests of `prepare --like`: later rows are prepared as if both logs were one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.memory_source import SCHEMA, MemorySource
from tokenrec.data import records
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import EVENT, REPEATED
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.preparation.state import read_events
from tokenrec.data.schema import UNKNOWN, Feature, Schema
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError

END = 70  # the earlier log has the rows before this time
USERS, ITEMS, ROWS = 9, 15, 400
TEXTS = Schema(
    (*SCHEMA.features, Feature("title", "text", "item", length=3, codes=260)),
    SCHEMA.tasks,
)


def random_log(seed: int, strings: bool = False) -> dict[str, Any]:
    """A log of 100 instants, with ties; train, valid and, from END, test."""
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, 100, ROWS))
    # Items and values 12 and above occur in later rows alone.
    late = np.where(time < END, 12, ITEMS)
    label = pa.array(rng.integers(0, 2, ROWS), pa.int8())
    item, user = rng.integers(0, late), rng.integers(0, USERS, ROWS)
    columns: dict[str, Any] = {
        "user_id": user,
        "item_id": item,
        "time_ms": time,
        "split": pa.array((time >= 50).astype(np.int8) + (time >= END), pa.int8()),
        "event": rng.random(ROWS) < 0.8,
        # User 0 has no impression before END, only events.
        "scored": (rng.random(ROWS) < 0.6) & ((user != 0) | (time >= END)),
        "label_click": label,
        "tab": rng.integers(0, late),
        "place": rng.integers(0, late),
        "price": rng.random(ROWS).astype(np.float32),
        "reaction": rng.integers(0, 4, ROWS),
    }
    if strings:
        for name in ("user_id", "item_id", "tab"):
            columns[name] = [f"{value:02d}" for value in columns[name]]
    return columns


def part(columns: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    return {
        name: pa.array(values).take(pa.array(np.flatnonzero(rows)))
        for name, values in columns.items()
    }


def tables(items: int, strings: bool = False, text: bool = False) -> dict[str, Any]:
    names: list[Any] = list(range(USERS))
    keys: list[Any] = list(range(items))
    if strings:
        names, keys = [f"{n:02d}" for n in names], [f"{k:02d}" for k in keys]
    item_columns = {
        "item_id": keys,
        "author": [k % 5 for k in range(items)],
        "duration": [float(k) for k in range(items)],
        "tags": [[k % 3, k % 7] for k in range(items)],
    }
    if text:
        item_columns["title"] = [f"title of item {k}" for k in range(items)]
    return {
        "user_columns": {
            "user_id": names,
            "city": [n % 4 for n in range(USERS)],
            "age": [20.0 + n for n in range(USERS)],
        },
        "item_columns": item_columns,
    }


def assert_same_test_rows(one: Dataset, other: Dataset) -> None:
    """Both hold the same chunks of test, whatever rows of the catalogue items have."""
    a, b = one.load("test"), other.load("test")
    assert a.num_rows > 50
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if field.name == "item":
            x, y = one.catalogue.item_id[x], other.catalogue.item_id[y]
        np.testing.assert_array_equal(x, y, err_msg=field.name)
    for name in ("ids", "dense"):
        x = getattr(one.catalogue, name)[a.item]
        y = getattr(other.catalogue, name)[b.item]
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize(("chunk_events", "overlap"), [(4096, 1024), (5, 3)])
def test_later_rows_equal_those_of_one_log(
    tmp_path: Path, strings: bool, chunk_events: int, overlap: int
) -> None:
    columns = random_log(3, strings)
    options = {"chunk_events": chunk_events, "overlap": overlap}
    is_later = np.asarray(columns["time_ms"]) >= END
    whole, first, later = (
        MemorySource(part(columns, rows), **tables(ITEMS, strings))
        for rows in (is_later | True, ~is_later, is_later)
    )
    first.item_columns = tables(12, strings)["item_columns"]
    prepare(whole, tmp_path / "whole", **options)
    prepare(first, tmp_path / "first", **options)
    metadata = prepare(later, tmp_path / "later", like=tmp_path / "first")
    one, other = open_dataset(tmp_path / "whole"), open_dataset(tmp_path / "later")
    assert other.splits == ("test",)
    assert_same_test_rows(one, other)
    # What a model depends on stays.
    schema = open_dataset(tmp_path / "first").schema
    assert other.schema.features == schema.features
    # Nor does the normalisation of training rows depend on the rows after them.
    assert one.schema.features == schema.features
    assert other.schema.tables == schema.tables
    assert other.schema.vocabularies_digest == schema.vocabularies_digest
    assert other.schema.vocabularies_digest == one.schema.vocabularies_digest
    assert metadata.counts["scored_test"] == one.metadata.counts["scored_test"]
    assert metadata.counts["rows_train"] == metadata.counts["rows_valid"] == 0
    # Items keep their rows; new ones follow.
    known = open_dataset(tmp_path / "first").catalogue.item_id
    np.testing.assert_array_equal(other.catalogue.item_id[: len(known)], known)
    assert len(other.catalogue.item_id) == ITEMS
    # An unseen value is id 1.
    row = np.flatnonzero(other.load("test").row_ids[:, 0] == UNKNOWN)
    assert len(row)
    assert max(load_vocabulary(tmp_path / "later", "place")) < 12


def test_a_user_with_events_alone_keeps_them(tmp_path: Path) -> None:
    columns = random_log(3)
    is_later = np.asarray(columns["time_ms"]) >= END
    prepare(MemorySource(part(columns, ~is_later), **tables(ITEMS)), tmp_path / "first")
    state = open_dataset(tmp_path / "first").metadata.state
    # The events of user 0 in valid, which no chunk holds.
    assert sum(state["events"]) == 1
    later = MemorySource(part(columns, is_later), **tables(ITEMS))
    prepare(later, tmp_path / "later", like=tmp_path / "first")
    log = open_dataset(tmp_path / "later").load("test")
    user = np.flatnonzero(log.user_id == 0).item()
    time = log.time[log.start[user] : log.start[user + 1]]
    assert ((time >= 50) & (time < END)).any()


def test_rows_that_the_earlier_data_set_has_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = random_log(3)
    is_later = np.asarray(columns["time_ms"]) >= END
    prepare(MemorySource(part(columns, ~is_later), **tables(ITEMS)), tmp_path / "first")
    for name, rows in (("later", is_later), ("all", is_later | True)):
        source = MemorySource(part(columns, rows), **tables(ITEMS))
        prepare(source, tmp_path / name, like=tmp_path / "first")
    said = capsys.readouterr().err
    assert (
        f"{(~is_later).sum()} rows are not later than 1970-01-01T00:00:00.069Z" in said
    )
    assert said.count("rows are not later") == 1
    a, b = (open_dataset(tmp_path / name).load("test") for name in ("later", "all"))
    for field in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


def test_texts_and_features_of_items_that_the_new_table_lacks_are_kept(
    tmp_path: Path,
) -> None:
    columns = random_log(3)
    is_later = np.asarray(columns["time_ms"]) >= END
    given = tables(12, text=True)
    prepare(
        MemorySource(part(columns, ~is_later), **given, schema=TEXTS),
        tmp_path / "first",
    )
    # The new table has items 10 and above, of which 10 has another title.
    new = tables(ITEMS, text=True)
    new["item_columns"] = {k: v[10:] for k, v in new["item_columns"].items()}
    new["item_columns"]["title"][0] = "another"
    source = MemorySource(part(columns, is_later), **new, schema=TEXTS)
    prepare(source, tmp_path / "later", like=tmp_path / "first")
    before = open_dataset(tmp_path / "first").catalogue
    after = open_dataset(tmp_path / "later").catalogue
    np.testing.assert_array_equal(after.ids[:10], before.ids[:10])
    np.testing.assert_array_equal(after.dense[:10], before.dense[:10])
    assert (after.ids[10] != before.ids[10]).any()
    assert (after.ids[11] == before.ids[11]).all()
    assert (after.ids[12:] > 0).any()
    names = [(tmp_path / n / "tokenizer.json").read_bytes() for n in ("first", "later")]
    assert names[0] == names[1]


def later_source(columns: dict[str, Any], rows: np.ndarray) -> MemorySource:
    return MemorySource(part(columns, rows), **tables(ITEMS))


def without_tab(source: MemorySource) -> None:
    features = tuple(f for f in SCHEMA.features if f.name != "tab")
    source.schema = Schema(features, SCHEMA.tasks)
    del source.row_columns["tab"]


def unscored(source: MemorySource) -> None:
    source.row_columns["scored"] = [False] * len(source.row_columns["user_id"])


def string_users(source: MemorySource) -> None:
    users = source.row_columns["user_id"].to_pylist()
    source.row_columns["user_id"] = list(map(str, users))
    source.user_columns = {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without_tab,
            r"schema of .*first', which --like.*\n  feature 'tab' is missing",
        ),
        (unscored, r"of \d+ rows are later .* none of them is scored"),
        (string_users, "user_id.*string.*int64 values"),
    ],
)
def test_a_log_that_does_not_fit_is_refused_with_the_reason(
    tmp_path: Path, change: Callable[[MemorySource], None], message: str
) -> None:
    columns = random_log(3)
    is_later = np.asarray(columns["time_ms"]) >= END
    prepare(later_source(columns, ~is_later), tmp_path / "first")
    source = later_source(columns, is_later)
    change(source)
    with pytest.raises(InputError, match=message):
        prepare(source, tmp_path / "later", like=tmp_path / "first")
    assert not (tmp_path / "later").exists()


def test_a_data_set_made_like_another_cannot_be_gone_on_from(tmp_path: Path) -> None:
    columns = random_log(3)
    is_later = np.asarray(columns["time_ms"]) >= END
    prepare(later_source(columns, ~is_later), tmp_path / "first")
    later = later_source(columns, is_later)
    prepare(later, tmp_path / "later", like=tmp_path / "first")
    with pytest.raises(InputError, match="itself prepared with --like"):
        prepare(later, tmp_path / "again", like=tmp_path / "later")


def test_each_event_is_in_one_place(tmp_path: Path) -> None:
    columns = random_log(3)
    metadata = prepare(
        MemorySource(columns, **tables(ITEMS)),
        tmp_path / "all",
        chunk_events=4,
        overlap=1024,
    )
    data = open_dataset(tmp_path / "all")
    lengths = records.shard_lengths(tmp_path / "all" / "dataset_info.json")
    stored = [
        record
        for split in data.splits
        for block in records.read_records(
            tmp_path / "all", split, lengths[split], 0, sum(lengths[split])
        )
        for record in block
    ]
    stored += [
        r for b in read_events(tmp_path / "all", metadata.state["events"]) for r in b
    ]
    dtype = records.row_dtype(SCHEMA)
    flags = np.concatenate(
        [np.frombuffer(records.decode(r).rows, dtype)["flags"] for r in stored]
    )
    events = sum(metadata.counts[f"events_{split}"] for split in data.splits)
    assert ((flags & EVENT) > 0).sum() > events
    assert ((flags & (EVENT | REPEATED)) == EVENT).sum() == events
    # What is read has no trace of the mark.
    for split in data.splits:
        assert (data.load(split).flags < REPEATED).all()
