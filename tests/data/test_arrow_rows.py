"""`to_arrow` gives back the log rows that a data set was prepared from."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.memory_source import SCHEMA, MemorySource
from tokenrec.data import arrow_rows
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature
from tokenrec.data.source import SPLITS
from tokenrec.errors import InputError

EXTRA = (
    Feature("vector", "embedding", "item", length=2),
    Feature("codes", "semantic_id", "item", length=3, codes=4),
    Feature("title", "text", "item", length=8, codes=300),
    Feature("labels_seen", "multi_valued", "action", length=3),
)
SCHEMA_WITH_ALL = dataclasses.replace(SCHEMA, features=(*SCHEMA.features, *EXTRA))
ROWS, USERS, ITEMS = 400, 30, 25


def source(scored_share: float = 1.0, event_share: float = 1.0) -> MemorySource:
    """A log of three splits with every kind of feature, and gaps in all of them."""
    random = np.random.default_rng(1)
    time = random.permutation(ROWS)
    split = np.digitize(time, [ROWS * 0.6, ROWS * 0.8])

    def some(values: Any, share: float = 0.2) -> list[Any]:
        return [None if random.random() < share else value for value in values]

    rows = {
        "user_id": [f"u{u}" for u in random.integers(0, USERS, ROWS)],
        "item_id": random.integers(0, ITEMS, ROWS),
        "time_ms": time,
        "split": split.astype(np.int8),
        "request": np.where(random.random(ROWS) < 0.5, -1, np.arange(ROWS)),
        "event": random.random(ROWS) < event_share,
        "scored": random.random(ROWS) < scored_share,
        "label_click": pa.array(some(random.integers(0, 2, ROWS)), pa.int8()),
        "label_like": pa.array(some(random.integers(0, 2, ROWS), 0.6), pa.int8()),
        "tab": some(random.integers(0, 5, ROWS)),
        # A value of its own on every row of the last split: unknown there.
        "place": [
            f"p{t if s == 2 else t % 3}" for t, s in zip(time, split, strict=True)
        ],
        "price": some(random.normal(size=ROWS).astype(np.float32).tolist()),
        "reaction": some(random.integers(0, 3, ROWS)),
        "labels_seen": some([["a"], ["b", "c"], ["c"]][t % 3] for t in time),
    }
    items = {
        "item_id": np.arange(ITEMS),
        "author": some(random.integers(0, 6, ITEMS)),
        "duration": some(random.random(ITEMS).astype(np.float32).tolist()),
        "tags": some([t, t + 1] if t % 2 else [t] for t in range(ITEMS)),
        "vector": some(random.normal(size=(ITEMS, 2)).astype(np.float32).tolist()),
        "codes": some(random.integers(0, 4, (ITEMS, 3)).tolist()),
        "title": some(f"the item {i % 7}" for i in range(ITEMS)),
    }
    users = {
        "user_id": [f"u{u}" for u in range(USERS)],
        "city": some(f"c{u % 4}" for u in range(USERS)),
        "age": some(random.random(USERS).astype(np.float32).tolist()),
    }
    return MemorySource(rows, users, items, SCHEMA_WITH_ALL)


def expected_rows(given: MemorySource, split: int) -> list[dict[str, Any]]:
    """Rows of a split as `to_arrow` should give them, from the source's own tables."""
    users = {row["user_id"]: row for row in given.users().to_pylist()}
    items = {row["item_id"]: row for row in given.items().to_pylist()}
    return [
        users[row["user_id"]] | items[row["item_id"]] | row
        for row in pa.Table.from_batches(list(given.rows())).to_pylist()
        if row.pop("split") == split
    ]


def known_values(given: MemorySource) -> dict[str, set[Any]]:
    """Values of the train split, by vocabulary feature."""
    train = expected_rows(given, 0)
    known: dict[str, set[Any]] = {}
    for feature in given.schema.features:
        if feature.has_vocabulary:
            values = [
                row[feature.name] for row in train if row[feature.name] is not None
            ]
            known[feature.name] = {
                part
                for value in values
                for part in (value if isinstance(value, list) else [value])
            }
    return known


def hide_unknown(row: dict[str, Any], known: dict[str, set[Any]]) -> dict[str, Any]:
    """Replace values that train lacks by null, and name their features."""
    row, unknown = dict(row), []
    for name, values in known.items():
        value = row[name]
        if isinstance(value, list):
            row[name] = [part if part in values else None for part in value]
            if None in row[name]:
                unknown.append(name)
        elif value is not None and value not in values:
            row[name] = None
            unknown.append(name)
    return row | {"unknown": unknown}


def sort_key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["user_id"], row["time_ms"], row["item_id"]


def decoded(directory: Path, split: str) -> list[dict[str, Any]]:
    rows = open_dataset(directory).to_arrow(split).read_all().to_pylist()
    return sorted(rows, key=sort_key)


@pytest.fixture(params=[1, 250_000], ids=["window of a chunk", "window of all"])
def window(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_rows, "WINDOW_ROWS", request.param)


@pytest.mark.usefixtures("window")
def test_rows_of_every_split_are_those_of_the_source(tmp_path: Path) -> None:
    given = source()
    # Short chunks, so that most users have several, each with a head of history.
    prepare(given, tmp_path / "set", chunk_events=3, overlap=2)
    known = known_values(given)
    some_unknown = False
    for number, split in enumerate(SPLITS):
        rows = decoded(tmp_path / "set", split)
        wanted = [hide_unknown(row, known) for row in expected_rows(given, number)]
        assert rows == sorted(wanted, key=sort_key)
        some_unknown |= any(row["unknown"] for row in rows)
    assert some_unknown


@pytest.mark.usefixtures("window")
def test_of_valid_and_test_the_scored_rows_are_given(tmp_path: Path) -> None:
    given = source(scored_share=0.5, event_share=0.7)
    prepare(given, tmp_path / "set", chunk_events=3, overlap=2)
    known = known_values(given)
    for number, split in enumerate(SPLITS):
        wanted = [hide_unknown(row, known) for row in expected_rows(given, number)]
        if split == "train":
            wanted = [row for row in wanted if row["scored"] or row["event"]]
        else:
            wanted = [row for row in wanted if row["scored"]]
        rows = decoded(tmp_path / "set", split)
        rows = [row for row in rows if row["scored"] or row["event"]]
        assert rows == sorted(wanted, key=sort_key)


def test_excluded_features_are_left_out(tmp_path: Path) -> None:
    prepare(source(), tmp_path / "set")
    dataset = open_dataset(tmp_path / "set", exclude=("title", "tab"))
    names = dataset.to_arrow("valid").schema.names
    assert "title" not in names
    assert "tab" not in names
    assert "tags" in names


def test_unknown_split_is_refused_at_once(tmp_path: Path) -> None:
    prepare(source(), tmp_path / "set")
    with pytest.raises(InputError, match=r"'vaild'.*did you mean 'valid'"):
        open_dataset(tmp_path / "set").to_arrow("vaild")
