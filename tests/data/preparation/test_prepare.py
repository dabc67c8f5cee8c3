"""Tests of `prepare`: ids, statistics, chunks and counts."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.memory_source import MemorySource
from tokenrec.data import memory_limit, records
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED, InteractionLog
from tokenrec.data.preparation import intake
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import MISSING, UNKNOWN, Feature, Schema, Task, columns
from tokenrec.data.source import SPLITS
from tokenrec.data.vocabulary import load_vocabulary

ONE_ROW = {"user_id": [1]}


def prepared(tmp_path: Path, source: MemorySource, **options: int) -> Dataset:
    prepare(source, tmp_path / "set", **options)
    return open_dataset(tmp_path / "set")


def log_of(
    tmp_path: Path, split: str, source: MemorySource, **options: int
) -> InteractionLog:
    return prepared(tmp_path, source, **options).load(split)


def test_vocabulary_is_sorted_and_holds_values_of_training_rows_only(
    tmp_path: Path,
) -> None:
    data = prepared(
        tmp_path,
        MemorySource(
            {
                "user_id": [1] * 4,
                "time_ms": [1, 2, 3, 4],
                "split": [0, 0, 0, 1],
                "tab": ["feed", "a", None, "later"],
            }
        ),
    )
    assert load_vocabulary(data.directory, "tab").tolist() == ["a", "feed"]
    assert data.schema.tables["tab"] == 4
    tab = columns(data.schema.group("row")).ids["tab"][0]
    assert data.load("train").row_ids[:, tab].tolist() == [3, 2, MISSING]
    assert data.load("valid").row_ids[-1, tab] == UNKNOWN


def test_catalogue_and_user_vocabularies_come_from_entities_of_training_rows(
    tmp_path: Path,
) -> None:
    data = prepared(
        tmp_path,
        MemorySource(
            {
                "user_id": [1, 2],
                "item_id": [10, 20],
                "time_ms": [1, 2],
                "split": [0, 1],
            },
            {"user_id": [1, 2], "city": ["Rome", "Oslo"], "age": [30.0, 90.0]},
            {
                "item_id": [20, 10],
                "author": [5, 4],
                "duration": [9.0, 1.0],
                "tags": [[8], [3, 2, 1]],
            },
        ),
    )
    layout = columns(data.schema.group("catalogue"))
    author = data.catalogue.ids[:, layout.ids["author"][0]]
    assert data.catalogue.item_id.tolist() == [10, 20]
    assert author.tolist() == [2, UNKNOWN]
    assert data.catalogue.ids[:, slice(*layout.ids["tags"])].tolist() == [
        [3, 2],
        [UNKNOWN, MISSING],
    ]
    assert data.load("valid").user_ids.tolist() == [[UNKNOWN]]
    assert data.metadata.schema.feature("age").mean == 30
    assert data.metadata.schema.feature("duration").mean == pytest.approx(np.log(2))


def test_features_that_share_a_table_share_its_ids(tmp_path: Path) -> None:
    schema = Schema(
        (
            Feature("author", "categorical", "item", table="people"),
            Feature("guests", "multi_valued", "context", table="people", length=2),
        ),
        (Task("click"),),
    )
    data = prepared(
        tmp_path,
        MemorySource(
            {"user_id": [1], "guests": [[40, 30]]},
            item_columns={"item_id": [7], "author": [30]},
            schema=schema,
        ),
    )
    assert data.schema.tables == {"people": 4}
    assert data.catalogue.ids.tolist() == [[2]]
    assert data.load("train").row_ids.tolist() == [[3, 2]]


def test_items_and_users_without_features_get_missing_ones_but_keep_their_id(
    tmp_path: Path,
) -> None:
    schema = Schema(
        (
            Feature("user_id", "categorical", "user"),
            Feature("item_id", "categorical", "item"),
            Feature("size", "dense", "item"),
        ),
        (Task("click"),),
    )
    source = MemorySource(
        {"user_id": ["u", "v"], "item_id": [30, 10], "split": [0, 0]},
        {"user_id": ["v"]},
        {"item_id": [20, 30], "size": [1.0, None]},
        schema,
    )
    data = prepared(tmp_path, source)
    assert data.catalogue.item_id.tolist() == [10, 20, 30]
    assert data.catalogue.ids.tolist() == [[2], [UNKNOWN], [3]]
    np.testing.assert_array_equal(data.catalogue.dense, [[np.nan], [1.0], [np.nan]])
    log = data.load("train")
    assert dict(zip(log.user_id, log.user_ids[:, 0].tolist(), strict=True)) == {
        "u": 2,
        "v": 3,
    }
    assert data.metadata.key_types == {"user_id": "string", "item_id": "int64"}


def test_semantic_ids_need_no_vocabulary(tmp_path: Path) -> None:
    schema = Schema(
        (Feature("sid", "semantic_id", "item", length=3, codes=10),), (Task("click"),)
    )
    source = MemorySource(
        ONE_ROW,
        item_columns={"item_id": [7, 8], "sid": [[0, 9, 4], None]},
        schema=schema,
    )
    data = prepared(tmp_path, source)
    assert data.schema.tables == {"sid": 32}
    assert data.catalogue.ids.tolist() == [[2, 2 + 19, 2 + 24], [0, 0, 0]]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.int64(), 3)]
)
def test_lists_of_any_arrow_type_keep_their_rows_across_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: pa.DataType
) -> None:
    monkeypatch.setattr(memory_limit, "BLOCK_ROWS", 7)
    features = (
        Feature("tags", "multi_valued", "context", length=2),
        Feature("vector", "embedding", "action", length=3),
    )
    schema = Schema(features, (Task("click"),))
    lists = [
        None if i % 5 == 0 else [i, None if i % 3 == 0 else 100 + i, 200 + i]
        for i in range(40)
    ]
    array = pa.array(lists, kind)
    source = MemorySource(
        {
            "user_id": [1] * 40,
            "time_ms": list(range(40)),
            "tags": array,
            "vector": array,
        },
        schema=schema,
        batch_rows=11,
    )
    data = prepared(tmp_path, source)
    log, known = (
        data.load("train"),
        [None, "?", *load_vocabulary(tmp_path / "set", "tags").tolist()],
    )
    cut = [[None, None] if values is None else values[:2] for values in lists]
    assert [[known[i] for i in row] for row in log.row_ids.tolist()] == cut
    whole = [
        [np.nan] * 3 if values is None else [np.nan if v is None else v for v in values]
        for values in lists
    ]
    np.testing.assert_array_equal(log.action_dense, np.array(whole, np.float32))


def test_dense_statistics_are_of_transformed_training_values(tmp_path: Path) -> None:
    price = [1.0, 4.0, None, float("nan"), 1000.0]
    data = prepared(
        tmp_path,
        MemorySource(
            {
                "user_id": [1, 1, 2, 2, 2],
                "time_ms": [1, 2, 3, 4, 5],
                "split": [0, 0, 0, 0, 1],
                "price": price,
            },
            {"user_id": [1, 2, 3], "age": [20.0, 40.0, 99.0]},
        ),
    )
    schema = data.metadata.schema
    assert (schema.feature("price").mean, schema.feature("price").deviation) == (
        2.5,
        1.5,
    )
    assert (schema.feature("age").mean, schema.feature("age").deviation) == (
        30.0,
        10.0,
    )  # once a user, not a row
    assert (schema.feature("duration").mean, schema.feature("duration").deviation) == (
        0.0,
        1.0,
    )  # never present
    np.testing.assert_array_equal(
        data.load("valid").action_dense[:, 0],
        np.array([np.nan, np.nan, 1000], np.float32),
    )


def test_repeats_are_joined_and_counted(tmp_path: Path) -> None:
    data = prepared(
        tmp_path,
        MemorySource(
            {
                "user_id": [1, 1, 1, 1, 1],
                "item_id": [5, 6, 5, 5, 5],
                "time_ms": [10, 10, 10, 11, 10],
                "scored": [True, True, True, True, False],
                "label_click": pa.array([1, 0, 0, 0, 0], pa.int8()),
                "label_like": pa.array([None, 1, 1, -1, None], pa.int8()),
            }
        ),
    )
    log = data.load("train")
    assert data.metadata.counts["repeats_dropped"] == 1
    assert data.metadata.counts["rows_train"] == log.num_rows == 4
    kept = [
        i
        for i in range(4)
        if log.item[i] == 0 and log.time[i] == 10 and log.flags[i] & SCORED
    ]
    # Of the two rows one says that the item was clicked, the other that it was liked.
    assert log.labels[kept].tolist() == [[1, 1]]
    assert data.metadata.counts["positives_train_click"] == 1
    assert data.metadata.counts["positives_train_like"] == 2
    assert data.metadata.counts["repeats_other_labels"] == 1


def test_only_scored_rows_and_labelled_events_of_train_are_learned(
    tmp_path: Path,
) -> None:
    data = prepared(
        tmp_path,
        MemorySource(
            {
                "user_id": [1] * 5,
                "time_ms": [1, 2, 3, 4, 5],
                "split": [0, 0, 0, 0, 1],
                "event": [True, True, True, False, True],
                "scored": [True, False, False, True, True],
                "label_click": pa.array([None, 1, None, 0, 1], pa.int8()),
            }
        ),
    )
    train, valid = data.load("train"), data.load("valid")
    flags = [EVENT | SCORED | LEARNED, EVENT | LEARNED, EVENT, SCORED | LEARNED]
    assert train.flags.tolist() == flags
    assert valid.flags.tolist() == [EVENT, EVENT, EVENT, EVENT | SCORED]
    assert valid.time.tolist() == [
        1,
        2,
        3,
        5,
    ]  # the row that is no event is nobody's history
    assert data.metadata.counts["learned_train"] == 3


def test_users_who_matter_to_no_one_have_no_chunk(tmp_path: Path) -> None:
    source = MemorySource(
        {
            "user_id": [1, 2, 3, 3],
            "time_ms": [1, 2, 3, 4],
            "split": [0, 0, 0, 1],
            "event": [True, False, True, True],
            "scored": [True, False, False, False],
        }
    )
    data = prepared(tmp_path, source)
    assert data.load("train").user_id.tolist() == [1, 3]
    assert data.splits == ("train",)  # user 3 has events in valid, but nothing to score


@pytest.mark.parametrize(
    ("chunk_events", "overlap"), [(1, 0), (3, 2), (8, 5), (1000, 4), (5, 1000)]
)
def test_chunks_are_those_of_a_plain_loop(
    tmp_path: Path, chunk_events: int, overlap: int
) -> None:
    random = np.random.default_rng(chunk_events)
    count = 400
    time = random.integers(0, 90, count)
    rows = {
        "user_id": random.integers(0, 7, count),
        "item_id": np.arange(count),  # an item names its row
        "time_ms": time,
        "split": (time // 40).astype(np.int8),
        "event": random.random(count) < 0.7,
        "scored": random.random(count) < 0.5,
    }
    data = prepared(
        tmp_path, MemorySource(rows), chunk_events=chunk_events, overlap=overlap
    )
    for number, split in enumerate(SPLITS):
        log = data.load(split)
        got = {}
        for u in range(log.num_chunks):
            part = slice(log.start[u], log.start[u + 1])
            got.setdefault(int(log.user_id[u]), []).append(
                list(zip(log.item[part], log.flags[part], strict=True))
            )
        assert got == expected_chunks(rows, number, chunk_events, overlap)


def expected_chunks(
    rows: dict[str, Any], split: int, chunk_events: int, overlap: int
) -> dict[int, list[Any]]:
    """Cut chunks by a plain loop, for a log whose splits follow one another in time.

    Returns:
      By user, the chunks, each a list of (row, flags).
    """
    out: dict[int, list[Any]] = {}
    flags = rows["event"] * EVENT + rows["scored"] * (
        SCORED + (LEARNED if split == 0 else 0)
    )
    for user in range(7):
        mine = sorted(
            (rows["time_ms"][i], i) for i in np.flatnonzero(rows["user_id"] == user)
        )
        new = [i for _, i in mine if rows["split"][i] == split]
        if not any(flags[i] if split == 0 else rows["scored"][i] for i in new):
            continue
        past = [i for _, i in mine if rows["split"][i] < split and rows["event"][i]]
        chunk: list[int] = []
        for _, group in itertools.groupby(new, key=lambda i: rows["time_ms"][i]):
            members = list(group)
            if chunk and len(chunk) + len(members) > chunk_events:
                out.setdefault(user, []).append(
                    (past[max(len(past) - overlap, 0) :], chunk)
                )
                past = past + [i for i in chunk if rows["event"][i]]
                chunk = []
            chunk += members
        out.setdefault(user, []).append((past[max(len(past) - overlap, 0) :], chunk))
    return {
        user: [
            [(i, EVENT) for i in head] + [(i, flags[i]) for i in body]
            for head, body in chunks
        ]
        for user, chunks in out.items()
    }


def test_splits_that_interleave_in_time_see_the_training_events_between(
    tmp_path: Path,
) -> None:
    random = np.random.default_rng(0)
    rows = {
        "user_id": np.zeros(200, np.int64),
        "item_id": np.arange(200),
        "time_ms": np.arange(200),
        "split": (random.random(200) < 0.3).astype(np.int8),
    }
    log = prepared(tmp_path, MemorySource(rows), chunk_events=7, overlap=4).load(
        "valid"
    )
    scored = [int(i) for i, f in zip(log.item, log.flags, strict=True) if f & SCORED]
    assert scored == np.flatnonzero(rows["split"] == 1).tolist()
    for u in range(log.num_chunks):
        part = log.item[log.start[u] : log.start[u + 1]]
        assert (
            np.diff(part) == 1
        ).all()  # every row in between is there, as history or as a row of valid
        new = int(((log.flags[log.start[u] : log.start[u + 1]] & SCORED) > 0).sum())
        assert 1 <= new <= 7


def as_set(log: InteractionLog) -> list[tuple[Any, ...]]:
    user = np.repeat(log.user_id, np.diff(log.start))
    return sorted(
        zip(
            user.tolist(), log.time.tolist(), log.item.tolist(), log.flags.tolist(), map(tuple, log.labels.tolist()),
            map(tuple, log.row_ids.tolist()), map(repr, log.action_dense.tolist()), strict=True,
        )
    )  # fmt: skip


def random_rows(count: int = 600) -> dict[str, Any]:
    random = np.random.default_rng(3)
    time = random.integers(0, 1000, count)
    return {
        "user_id": random.integers(-50, 50, count),
        "item_id": random.integers(0, 90, count),
        "time_ms": time,
        "split": (time // 400).astype(np.int8),
        "scored": random.random(count) < 0.6,
        "label_click": pa.array(random.integers(-1, 2, count), pa.int8()),
        "tab": pa.array(random.integers(0, 40, count), mask=random.random(count) < 0.2),
        "price": random.normal(size=count),
    }


def test_a_log_too_large_for_memory_gives_the_same_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = MemorySource(random_rows())
    prepare(small, tmp_path / "small", chunk_events=4, overlap=2)
    monkeypatch.setattr(
        intake, "PARTITION_ROWS", 9
    )  # fewer than the rows of some users
    monkeypatch.setattr(memory_limit, "BLOCK_ROWS", 50)
    monkeypatch.setattr(records, "SHARD_BYTES", 2000)
    large = MemorySource(random_rows(), batch_rows=33)
    prepare(
        large,
        tmp_path / "large",
        chunk_events=4,
        overlap=2,
        scratch=tmp_path / "scratch",
    )
    one, other = open_dataset(tmp_path / "small"), open_dataset(tmp_path / "large")
    assert len(list((tmp_path / "large").glob("*train.array_record*"))) > 3
    assert list((tmp_path / "scratch").iterdir()) == []
    assert one.metadata.counts == other.metadata.counts
    np.testing.assert_allclose(
        [f.deviation for f in one.schema.features],
        [f.deviation for f in other.schema.features],
        rtol=1e-12,
    )
    for split in SPLITS:
        assert one.num_chunks(split) == other.num_chunks(split)
        assert as_set(one.load(split)) == as_set(other.load(split))


def test_order_of_rows_does_not_change_the_data_set(tmp_path: Path) -> None:
    rows = random_rows()
    rows["item_id"] = np.arange(600)  # no repeats, of which the first would be kept
    order = np.random.default_rng(0).permutation(600)
    shuffled = {name: pa.array(values).take(order) for name, values in rows.items()}
    prepare(MemorySource(rows), tmp_path / "a", chunk_events=4)
    prepare(MemorySource(shuffled), tmp_path / "b", chunk_events=4)
    one, other = open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")
    assert one.metadata.counts == other.metadata.counts
    assert as_set(one.load("valid")) == as_set(other.load("valid"))


def test_metadata_says_where_the_data_came_from(tmp_path: Path) -> None:
    raw = tmp_path / "log.csv"
    raw.write_text("user,item\n")
    metadata = prepare(
        MemorySource(ONE_ROW, files=(raw,)), tmp_path / "set", chunk_events=5, overlap=2
    )
    assert metadata == open_dataset(tmp_path / "set").metadata
    assert (metadata.source, metadata.licence) == ("memory", "CC0-1.0")
    assert metadata.checksums == {"log.csv": hashlib.sha256(b"user,item\n").hexdigest()}
    assert metadata.options == {"chunk_events": 5, "overlap": 2}
    assert (
        metadata.counts["users"],
        metadata.counts["items"],
        metadata.counts["scored_train"],
    ) == (1, 1, 1)
