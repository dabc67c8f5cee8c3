"""Tests of rows that repeat one another: one is kept, whatever order they come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.memory_source import MemorySource
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare

ROW = st.tuples(
    st.integers(0, 1),  # user
    st.integers(0, 2),  # item
    st.integers(0, 1),  # time
    st.sampled_from([-1, 0, 1]),  # click
    st.sampled_from([None, 0, 1]),  # like
    st.sampled_from([None, 1.0, 2.0]),  # price
    st.sampled_from([None, 3, 4]),  # tab
    st.booleans(),  # scored
    st.integers(-1, 1),  # request
)


def source(rows: list[tuple[Any, ...]]) -> MemorySource:
    user, item, time, click, like, price, tab, scored, _ = zip(*rows, strict=True)
    return MemorySource(
        {
            "user_id": list(user),
            "item_id": list(item),
            "time_ms": list(time),
            "label_click": pa.array(click, pa.int8()),
            "label_like": pa.array(like, pa.int8()),
            "price": pa.array(price, pa.float32()),
            "tab": pa.array(tab, pa.int64()),
            "scored": list(scored),
            # A request has one time, which is the same for all of its rows.
            "request": [r[8] * 2 + r[2] if r[8] >= 0 else -1 for r in rows],
        },
        # Users are stored in the order of their table.
        {"user_id": [0, 1]},
    )


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@given(rows=st.lists(ROW, min_size=1, max_size=25), data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_order_of_the_log_changes_the_data_set(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("repeats")
    shuffled = data.draw(st.permutations(rows))
    prepare(source(rows), folder / "a")
    prepare(source(shuffled), folder / "b")
    one, other = files(folder / "a"), files(folder / "b")
    assert one.keys() == other.keys()
    for name, content in one.items():
        assert content == other[name], name


@given(rows=st.lists(ROW, min_size=1, max_size=25))
@settings(max_examples=40, deadline=None)
def test_labels_are_known_over_unknown_then_1_over_0(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("repeats")
    metadata = prepare(source(rows), folder / "a")
    expected: dict[tuple[int, ...], list[int]] = {}
    for user, item, time, click, like, _, _, scored, _ in rows:
        labels = expected.setdefault((user, time, item, int(scored)), [-1, -1])
        labels[0] = max(labels[0], click)
        labels[1] = max(labels[1], -1 if like is None else like)
    dataset = open_dataset(folder / "a")
    log = dataset.load("train")
    found = {}
    for chunk in range(log.num_chunks):
        for row in range(log.start[chunk], log.start[chunk + 1]):
            item = int(dataset.catalogue.item_id[log.item[row]])
            key = (int(log.user_id[chunk]), int(log.time[row]), item)
            found[(*key, int(log.flags[row] & 2 > 0))] = log.labels[row].tolist()
    assert found == expected
    assert metadata.counts["repeats_dropped"] == len(rows) - len(expected)


def test_what_disagrees_is_counted(tmp_path: Path) -> None:
    one = (0, 0, 0, 1, None, 1.0, 3, True, -1)
    rows = [one, one, (*one[:3], 0, *one[4:]), (*one[:5], None, *one[6:])]
    counts = prepare(source(rows), tmp_path / "a").counts
    assert counts["repeats_dropped"] == 3
    assert counts["repeats_other_labels"] == 1
    assert counts["repeats_other_features"] == 1
    # The row with fewer missing values is the one that is kept.
    log = open_dataset(tmp_path / "a").load("train")
    assert log.labels.tolist() == [[1, -1]]
    assert np.isfinite(log.action_dense).all()
