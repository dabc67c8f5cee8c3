"""Frozen statistics: of scored rows, as if the log had ended before their split."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.batches import NIO, UC
from tests.data.past import test_past_statistics as past
from tests.data.past.reference import Reference, Row
from tests.data.past.test_with_statistics import with_statistics
from tests.data.preparation.test_like import END, ITEMS, part, random_log
from tokenrec.config import DataConfig
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.frozen_rows import FROZEN, check_frozen_time
from tokenrec.data.interaction_log import SCORED
from tokenrec.data.past import PastStatistics, WithStatistics, features
from tokenrec.data.past.declaration import Unscored
from tokenrec.data.pipeline import eval_batches
from tokenrec.data.preparation import intake
from tokenrec.data.preparation.frozen import FrozenValues, FrozenWriter
from tokenrec.data.preparation.partition import ChunkRun
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import columns
from tokenrec.data.source import FROZEN_COLUMN, SPLITS
from tokenrec.errors import InputError

MINUTE = 60_000


def in_splits(rows: list[Row], interleaved: bool) -> list[Row]:
    """Rows of train, then valid, then test; or each of any split."""
    rng = np.random.default_rng(9)
    for number, row in enumerate(rows):
        # Within 90 half-lives of a minute: about 100 of them later nothing is left.
        row["time_ms"] //= 2
        split = 2 * number // len(rows) + (10 * number >= 7 * len(rows))
        row["split"] = int(rng.integers(3)) if interleaved else min(split, 2)
    # Rows of one time are of one split unless splits are interleaved.
    for one, other in itertools.pairwise(rows):
        if not interleaved and one["time_ms"] == other["time_ms"]:
            other["split"] = one["split"]
    return rows


def computed(
    rows: Sequence[Row], declared: PastStatistics
) -> tuple[list[dict[str, Any]], WithStatistics]:
    source = past.source(rows)
    source.row_columns["split"] = pa.array([r["split"] for r in rows], pa.int8())
    found = WithStatistics(source, declared)
    return pa.Table.from_batches(found.rows()).to_pylist(), found


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("unscored", ["count", "skip", "full"])
@pytest.mark.parametrize("block", [3, 65_536])
def test_frozen_statistics_equal_their_definitions(
    interleaved: bool,
    unscored: Unscored,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(features, "_BLOCK_ROWS", block)
    rows = in_splits(past.random_rows(90, 10), interleaved)
    declared = past.statistics(unscored=unscored)
    found, source = computed(rows, declared)
    of_user = {u["user_id"]: u for u in pa.table(past.USERS).to_pylist()}
    of_item = {i["item_id"]: i for i in pa.table(past.ITEMS).to_pylist()}
    joined = [
        {**of_user.get(r["user_id"], {}), **of_item.get(r["item_id"], {}), **r}
        for r in rows
    ]
    for r in joined:
        r["tags"] = (r.get("tags") or [])[:2]
    reference = Reference(joined, declared.of_tasks(past.SCHEMA), ("click", "like"))
    starts = {
        split: min(r["time_ms"] for r in rows if r["split"] == split and r["scored"])
        for split in (1, 2)
    }
    described = source.frozen()
    assert list(described.features) == past.names()
    assert {SPLITS.index(n): t[1] for n, t in described.times.items()} == starts
    compared = differ = 0
    for row, got in zip(joined, found, strict=True):
        if row["split"] == 0 or not row["scored"]:
            assert got[FROZEN_COLUMN] is None
            continue
        want = reference.features(row, starts[row["split"]])
        # Rounded as the live ones are.
        np.testing.assert_allclose(
            got[FROZEN_COLUMN], list(want.values()), rtol=2e-6, atol=2e-6
        )
        live = [np.nan if got[n] is None else got[n] for n in past.names()]
        differ += not np.array_equal(live, got[FROZEN_COLUMN], equal_nan=True)
        compared += 1
    assert compared > 30
    assert differ > compared // 2


def assert_same_frozen(one: Dataset, other: Dataset) -> None:
    a, b = (each.load("test", frozen=True) for each in (one, other))
    np.testing.assert_array_equal(a.row_dense, b.row_dense)
    assert (
        one.metadata.options[FROZEN]["times"]["test"]
        == (other.metadata.options[FROZEN]["times"]["test"])
    )


@pytest.fixture(scope="module")
def log() -> dict[str, Any]:
    log = random_log(3)
    log["time_ms"] = np.asarray(log["time_ms"]) * MINUTE
    # Streams (UC) need it.
    log["event"] |= log["scored"]
    return log


@pytest.fixture(scope="module")
def whole(log: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("frozen") / "whole"
    prepare(with_statistics(log, ITEMS), out, chunk_events=9, overlap=40)
    return out


def test_prepared_rows_have_them_and_live_ones_stay(
    whole: Path, log: dict[str, Any]
) -> None:
    dataset = open_dataset(whole)
    table = pa.Table.from_batches(with_statistics(log, ITEMS).rows()).to_pylist()
    # Rows that repeat one another are joined, and one of them is kept.
    by_key: dict[tuple[Any, ...], list[list[float]]] = {}
    for r in table:
        if r["scored"]:
            key = r["user_id"], r["item_id"], r["time_ms"]
            by_key.setdefault(key, []).append(r[FROZEN_COLUMN])
    names = dataset.metadata.options[FROZEN]["features"]
    place = columns(dataset.schema.group("row")).dense
    at = [place[name][0] for name in names]
    for split in ("valid", "test"):
        live, frozen = dataset.load(split), dataset.load(split, frozen=True)
        users = np.repeat(live.user_id, np.diff(live.start))
        items = dataset.catalogue.item_id[live.item]
        scored = (live.flags & SCORED) != 0
        np.testing.assert_array_equal(
            live.row_dense[~scored], frozen.row_dense[~scored]
        )
        others = np.setdiff1d(np.arange(live.row_dense.shape[1]), at)
        np.testing.assert_array_equal(
            live.row_dense[:, others], frozen.row_dense[:, others]
        )
        assert scored.sum() > 30
        for row in np.flatnonzero(scored):
            got = frozen.row_dense[row, at]
            wanted = by_key[users[row], items[row], live.time[row]]
            assert any(np.array_equal(got, want, equal_nan=True) for want in wanted)
        # Some chunks alone have what they have in the split.
        half = live.num_chunks // 2
        np.testing.assert_array_equal(
            dataset.load(split, half, frozen=True).row_dense,
            frozen.row_dense[live.start[half] :],
        )
        # A run may exclude some of the features.
        excluded = [names[0], names[5], "price"]
        fewer = open_dataset(whole, excluded).load(split, frozen=True)
        kept = np.setdiff1d(np.arange(live.row_dense.shape[1]), [at[0], at[5]])
        np.testing.assert_array_equal(fewer.row_dense, frozen.row_dense[:, kept])


@pytest.mark.parametrize("config", [NIO, UC], ids=["nio", "uc"])
def test_batches_of_a_frozen_evaluation_have_them(
    config: DataConfig, whole: Path
) -> None:
    dataset = open_dataset(whole)
    log = dataset.load("valid", frozen=True)
    time = int(log.time[(log.flags & SCORED) != 0].min())
    name = "count_item_id"
    of_row = log.row_dense[:, columns(dataset.schema.group("row")).dense[name][0]]
    column = columns(dataset.schema.state).dense[name][0]
    read = []
    data = dataclasses.replace(config, events=4, overlap=0, tasks=("click",))
    for host, _ in eval_batches(dataset, data, "valid", freeze_at=time):
        signals = host.batch.state if host.batch.target is None else host.batch.target
        is_read = host.rows >= 0
        got = signals.dense[..., column][is_read]
        np.testing.assert_array_equal(got, of_row[host.rows[is_read]])
        read += got.tolist()
    live = dataset.load("valid").row_dense
    assert len(read) > 30
    assert np.nansum(read) != np.nansum(live[(log.flags & SCORED) != 0][:, column])


def test_rows_on_disk_and_like_change_nothing(
    whole: Path,
    log: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_later = log["time_ms"] >= END * MINUTE
    prepare(with_statistics(part(log, ~is_later), 12), tmp_path / "first")
    prepare(
        with_statistics(part(log, is_later), ITEMS),
        tmp_path / "later",
        like=tmp_path / "first",
    )
    prepare(with_statistics(log, ITEMS), tmp_path / "one")
    assert_same_frozen(open_dataset(tmp_path / "one"), open_dataset(tmp_path / "later"))
    monkeypatch.setattr(intake, "PARTITION_ROWS", 40)
    prepare(
        with_statistics(log, ITEMS),
        tmp_path / "small",
        chunk_events=9,
        overlap=40,
    )
    assert_same_frozen(open_dataset(whole), open_dataset(tmp_path / "small"))


def test_a_split_in_which_some_rows_alone_have_them_is_refused(
    tmp_path: Path,
) -> None:
    rows = np.zeros(2, [("flags", "u1")])
    rows["flags"] = SCORED
    run = ChunkRun("valid", rows, np.array([0, 2]), np.array([0]), np.array([1, 0]))
    writer = FrozenWriter(tmp_path, FrozenValues(tmp_path / "values"))
    with pytest.raises(InputError, match="null in a scored row of valid"):
        writer.add(run)


def test_another_time_than_the_start_of_a_split_is_refused(whole: Path) -> None:
    dataset = open_dataset(whole)

    def check(split: str, time: int, exclude: Sequence[str] = ()) -> None:
        schema = dataset.metadata.schema.without(exclude)
        check_frozen_time(dataset.metadata, schema, split, time, "then")

    earliest, latest = dataset.metadata.options[FROZEN]["times"]["valid"]
    log = dataset.load("valid")
    assert latest == log.time[(log.flags & SCORED) != 0].min()
    assert latest - MINUTE < earliest <= latest
    check("valid", latest)
    check("valid", earliest)
    for time in (earliest - 1, latest + 1):
        with pytest.raises(InputError, match=r"--freeze-at=then is .*--valid-from"):
            check("valid", time)
    with pytest.raises(InputError, match="valid and test, and not of 'train'"):
        check("train", latest)
    # Without the features there is nothing to freeze.
    check("valid", 0, dataset.metadata.options[FROZEN]["features"])
    del dataset.metadata.options[FROZEN]
    with pytest.raises(InputError, match="prepare it again, without --beam"):
        check("valid", latest)
