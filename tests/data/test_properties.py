"""Properties of any log, from raw rows through `prepare` to batches (derandomized)."""

from __future__ import annotations

import collections
import dataclasses
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.batches import assert_equal, take
from tests.data.memory_source import MemorySource
from tokenrec.config import DataConfig
from tokenrec.data.batch import HostBatch, ReadRows
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.pipeline import batch_shapes, eval_batches, steps_per_epoch
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, columns
from tokenrec.data.source import SPLITS

EVENTS, VALID_FROM, TEST_FROM = 4, 6, 9
NIO = DataConfig(
    events=EVENTS,
    candidates=2,
    batch_size=2,
    eval_batch_size=3,
    buckets=(2,),
    window_rows=9,
)
UC = DataConfig(
    paradigm="uc",
    events=EVENTS,
    overlap=2,
    batch_size=2,
    eval_batch_size=3,
    window_rows=9,
)
CONFIGS = pytest.mark.parametrize("config", [NIO, UC], ids=["nio", "uc"])
QUICK = settings(
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class Row(NamedTuple):
    user: int
    time: int
    item: int
    event: bool
    label: int | None
    together: bool  # with the user's other rows of that time


@st.composite
def logs(draw: st.DrawFn) -> list[Row]:
    """Draw rows of a few users in any order, some of them twice.

    At least one can be learned from, and one is in valid.
    """
    rows = draw(
        st.lists(
            st.builds(
                Row,
                user=st.integers(0, 3),
                time=st.integers(0, 11),
                item=st.integers(0, 4),
                event=st.booleans(),
                label=st.sampled_from([None, 0, 1]),
                together=st.booleans(),
            ),
            max_size=40,
            unique_by=lambda row: row[:3],
        )
    )
    rows += [
        Row(9, 0, 0, True, 1, False),
        Row(9, 1, 1, True, 0, False),
        Row(9, VALID_FROM, 0, True, 1, False),
    ]
    return draw(
        st.permutations([*rows, *draw(st.lists(st.sampled_from(rows), max_size=4))])
    )


def prepared(rows: list[Row], folder: str, config: DataConfig) -> Dataset:
    """Prepare the data set of a log.

    The action `price` of an event is its time and `reaction` its user, so that batches
    show which events they hold.
    """
    user, time, item, event, label, together = zip(*rows, strict=True)
    source = MemorySource(
        {
            "user_id": user,
            "time_ms": time,
            "item_id": item,
            "event": event if config.paradigm == "nio" else [True] * len(rows),
            "split": pa.array(
                [(t >= VALID_FROM) + (t >= TEST_FROM) for t in time], pa.int8()
            ),
            "request": [
                t if shown else -1 for t, shown in zip(time, together, strict=True)
            ],
            "label_click": pa.array(label, pa.int8()),
            "price": np.array(time, np.float64),
            "reaction": user,
        }
    )
    prepare(source, Path(folder, "set"), chunk_events=3, overlap=EVENTS)
    return open_dataset(Path(folder, "set"))


def reads(
    host_batch: HostBatch, identities: ReadRows
) -> list[tuple[int, int, int, int, int]]:
    """List sample, position, user, item and time of each row that a batch reads."""
    b, slot = np.nonzero(host_batch.rows >= 0)
    return list(
        zip(
            *(
                x.tolist()
                for x in (
                    b,
                    slot,
                    identities.user_id,
                    identities.item_id,
                    identities.time,
                )
            ),
            strict=True,
        )
    )


@CONFIGS
@QUICK
@given(rows=logs())
def test_each_scored_row_is_read_once_with_its_own_past_and_nothing_else(
    config: DataConfig, rows: list[Row]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = prepared(rows, folder, config)
        place = columns(data.schema.group("action"))
        price, reaction = place.dense["price"][0], place.ids["reaction"][0]
        users = sorted({row.user for row in rows if row.time < VALID_FROM})
        past = collections.defaultdict(set)
        for row in rows:
            if row.event or config.paradigm == "uc":
                past[row.user].add((row.time, row.item))
        for number, split in enumerate(SPLITS):
            wanted = {
                row[:3]
                for row in rows
                if (row.time >= VALID_FROM) + (row.time >= TEST_FROM) == number
            }
            read_rows: list[tuple[int, int, int]] = []
            for host_batch, identities in (
                eval_batches(data, config, split) if split in data.splits else ()
            ):
                for b, slot, user, item, time in reads(host_batch, identities):
                    read_rows.append((user, time, item))
                    seen = host_batch.batch.valid[b].copy()
                    if config.paradigm == "uc":
                        seen[slot:] = (
                            False  # a row is read before its own action, and causally
                        )
                    times = host_batch.batch.action.dense[b, seen, price].tolist()
                    ids = host_batch.batch.action.ids[b, seen, reaction].tolist()
                    earlier = sorted(t for t, _ in past[user] if t < time)
                    assert times == earlier[len(earlier) - len(times) :]
                    assert set(ids) <= {users.index(user) + 2 if user in users else 1}
                    if config.paradigm == "nio":
                        assert len(times) == min(EVENTS, len(earlier))
            assert sorted(read_rows) == sorted(wanted)


def assert_in_range(
    ids: np.ndarray, features: tuple[Feature, ...], data: Dataset
) -> None:
    for name, place in columns(features).ids.items():
        part = ids[..., slice(*place)]
        assert part.min(initial=0) >= 0
        assert (
            part.max(initial=0)
            < data.schema.tables[data.schema.feature(name).table_name]
        )


@CONFIGS
@QUICK
@given(rows=logs(), start=st.integers(1, 5), seed=st.integers(0, 9))
def test_batches_have_the_declared_shapes_and_ids_and_go_on_as_if_never_stopped(
    config: DataConfig, rows: list[Row], start: int, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data: Any = prepared(
            rows + [Row(8, t, 0, True, 1, False) for t in range(6)], folder, config
        )
        shapes = batch_shapes(data.schema, config, batch_size=config.batch_size)
        batches = take(data, config, 6, seed=seed)
        assert len(batches) == 6
        for host_batch in batches:
            batch = host_batch.batch
            wanted = shapes[batch.valid.shape[1]]
            assert_equal(_shapes(batch), _shapes(wanted))
            for signals, features in (
                (batch.user, data.schema.group("user")),
                (batch.state, data.schema.state),
                (batch.action, data.schema.group("action")),
            ):
                assert_in_range(signals.ids, features, data)
            assert set(np.unique(batch.labels)) <= {-1, 0, 1}
        epoch = steps_per_epoch(data, config)
        first = [
            row
            for host_batch in batches[:epoch]
            for row in host_batch.rows[host_batch.rows >= 0].tolist()
        ]
        assert len(first) == len(set(first)), "an epoch reads a row once"
        assert_equal(take(data, config, 6, seed=seed, start=start), batches[start:])


@CONFIGS
def test_a_user_of_100_000_events_is_read_like_any_other(
    config: DataConfig, tmp_path: Path
) -> None:
    time = np.random.default_rng(0).permutation(100_000)
    split = (time >= 80_000).astype(np.int8) + (time >= 99_000)
    source = MemorySource(
        {
            **{
                "user_id": ["one"] * len(time),
                "time_ms": time,
                "item_id": time % 7,
                "event": [True] * len(time),
            },
            **{"split": pa.array(split, pa.int8()), "request": [-1] * len(time)},
            **{
                "label_click": pa.array(time % 2, pa.int8()),
                "price": time.astype(np.float64),
                "reaction": time % 3,
            },
        }
    )
    prepare(source, tmp_path / "set")
    data = open_dataset(tmp_path / "set")
    wide = dataclasses.replace(
        config, events=64, overlap=16, buckets=(), window_rows=4_096, eval_batch_size=32
    )
    read = [
        read[4]
        for host_batch, identities in eval_batches(data, wide, "test")
        for read in reads(host_batch, identities)
    ]
    assert sorted(read) == list(range(99_000, 100_000))


def _shapes(batch: Any) -> list[Any]:
    leaves = [
        *batch.user,
        *batch.state,
        *batch.action,
        batch.valid,
        batch.labels,
        batch.weight,
        *(batch.target or ()),
    ]
    return [(*leaf.shape, np.dtype(leaf.dtype).num) for leaf in leaves]
