"""Contents of batches, compared with a loop over the rows of the log."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.data.batches import (
    CONFIGS,
    NIO,
    UC,
    assert_equal,
    evaluated,
    memory_data,
    read_rows,
    replaced,
    scored,
    take,
)
from tests.data.logs import SCHEMA, MemoryData, shown
from tokenrec.config import DataConfig
from tokenrec.data.batch import HostBatch
from tokenrec.data.interaction_log import EVENT, SCORED, InteractionLog
from tokenrec.data.pipeline import batch_shapes, eval_batches, task_names, train_batches
from tokenrec.data.samples import cut_samples


def check_sample(
    log: InteractionLog,
    data: MemoryData,
    host_batch: HostBatch,
    b: int,
    history: list[int],
    reads: np.ndarray,
) -> None:
    """Check every leaf of sample b against the log, row by row.

    Args:
      log: the log.
      data: the data set of the log.
      host_batch: the batch.
      b: number of the sample.
      history: log rows of its history or stream.
      reads: `[C or T]` log rows, -1 where nothing is read.
    """
    batch, catalogue = host_batch.batch, data.catalogue
    slots = batch.valid.shape[1]
    assert batch.valid[b].tolist() == [False] * (slots - len(history)) + [True] * len(
        history
    )
    for t, row in enumerate([-1] * (slots - len(history)) + history):
        check_state(log, catalogue, batch.state.ids[b, t], batch.state.dense[b, t], row)
        action = (
            (log.action_ids[row], log.action_dense[row])
            if row >= 0
            else ([0], [np.nan])
        )
        np.testing.assert_array_equal(batch.action.ids[b, t], action[0])
        np.testing.assert_array_equal(batch.action.dense[b, t], action[1])
    np.testing.assert_array_equal(host_batch.rows[b], reads)
    np.testing.assert_array_equal(batch.weight[b], reads >= 0)
    for slot, row in enumerate(reads):
        np.testing.assert_array_equal(
            batch.labels[b, slot], log.labels[row] if row >= 0 else [-1, -1, -1]
        )
        if batch.target is not None:
            check_state(
                log,
                catalogue,
                batch.target.ids[b, slot],
                batch.target.dense[b, slot],
                row,
            )


def check_state(
    log: InteractionLog, catalogue, ids: np.ndarray, dense: np.ndarray, row: int
) -> None:
    if row < 0:
        assert ids.tolist() == [0, 0, 0, 0]
        assert np.isnan(dense).all()
        return
    item = log.item[row]
    np.testing.assert_array_equal(ids, [*catalogue.ids[item], *log.row_ids[row]])
    np.testing.assert_array_equal(dense, [*catalogue.dense[item], *log.row_dense[row]])


@CONFIGS
def test_a_batch_holds_what_the_log_says_row_by_row(config: DataConfig) -> None:
    data = memory_data()
    log = data.logs["valid"]
    samples = cut_samples(log, config, train=False)
    expected = shown(samples)
    first = [reads[0] for _, reads in expected]
    checked = 0
    for host_batch in evaluated(data, config, "valid"):
        for b in np.flatnonzero((host_batch.rows >= 0).any(axis=1)):
            rows = host_batch.rows[b]
            n = first.index(rows[rows >= 0][0])
            run, reads = expected[n]
            assert rows[rows >= 0].tolist() == reads
            np.testing.assert_array_equal(
                host_batch.batch.user.ids[b], log.user_ids[samples.chunk[n]]
            )
            np.testing.assert_array_equal(
                host_batch.batch.user.dense[b], log.user_dense[samples.chunk[n]]
            )
            check_sample(log, data, host_batch, b, run, rows)
            if host_batch.batch.target is None:
                own = [row if row in rows else -1 for row in run]
                assert rows.tolist() == [-1] * (len(rows) - len(own)) + own
            checked += 1
    assert checked == len(samples.length)


@CONFIGS
def test_shapes_and_types_are_those_announced(config: DataConfig) -> None:
    data = memory_data()
    for size, batches in (
        (4, take(data, config, 40)),
        (8, list(evaluated(data, config, "valid"))),
    ):
        shapes = batch_shapes(SCHEMA, config, batch_size=size)
        assert set(shapes) == {2, 5, 8}
        assert len(batches) > 9
        for host_batch in batches:
            announced = shapes[host_batch.batch.valid.shape[1]]
            assert jax.tree.map(
                lambda leaf: (leaf.shape, leaf.dtype), host_batch.batch
            ) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), announced)
            assert host_batch.rows.dtype == np.int64
            assert host_batch.rows.shape == host_batch.batch.weight.shape


@pytest.mark.parametrize("objective", ["ranking", "retrieval"])
@CONFIGS
def test_ages_are_whole_seconds_back_from_the_request_or_the_newest_event(
    config: DataConfig, objective: str
) -> None:
    data, config = memory_data(), replaced(config, objective=objective)
    for name, log in data.logs.items():
        data.logs[name] = InteractionLog(**(vars(log) | {"time": log.time * 700}))
    data.logs["valid"].time[0] -= 3_000 * 2**31
    trained = train_batches(data, config, steps=9, seed=5, ages=True)
    pairs = [("train", host_batch) for host_batch in trained]
    pairs += [
        ("valid", host_batch)
        for host_batch, _ in eval_batches(data, config, "valid", ages=True)
    ]
    trained.close()
    for split, host_batch in pairs:
        batch, log = host_batch.batch, data.logs[split]
        assert (
            batch.ages.dtype
            == batch_shapes(SCHEMA, config, batch_size=4, ages=True)[8].ages.dtype
            == np.int32
        )
        row_of = {
            value: row for row, value in enumerate(log.action_dense[:, 0].tolist())
        }
        for b in np.flatnonzero(
            (host_batch.rows.reshape(len(host_batch.rows), -1) >= 0).any(axis=1)
        ):
            rows = [
                row_of[value]
                for value in batch.action.dense[b, batch.valid[b], 0].tolist()
            ]
            stream = config.paradigm == "uc" and (objective, split) != (
                "retrieval",
                "valid",
            )
            read = host_batch.rows[b].ravel()
            newest = rows[-1] if stream else int(read[read >= 0][0])
            ages = [
                min(int(log.time[newest] // 1000 - log.time[row] // 1000), 2**31 - 1)
                for row in rows
            ]
            assert (
                batch.ages[b].tolist() == [0] * (batch.ages.shape[1] - len(rows)) + ages
            )
        assert not batch.ages[~batch.valid].any()
    assert max(host_batch.batch.ages.max() for _, host_batch in pairs) == 2**31 - 1
    assert next(evaluated(data, config, "valid")).batch.ages is None


@CONFIGS
def test_a_history_lies_in_the_smallest_bucket_that_holds_it(
    config: DataConfig,
) -> None:
    for host_batch in evaluated(memory_data(), config, "valid"):
        lengths = host_batch.batch.valid.sum(axis=1)[(host_batch.rows >= 0).any(axis=1)]
        below = {2: -1, 5: 2, 8: 5}[host_batch.batch.valid.shape[1]]
        assert (lengths > below).all()
        assert (lengths <= host_batch.batch.valid.shape[1]).all()


@CONFIGS
@pytest.mark.parametrize("window_rows", [10_000, 150])
def test_evaluation_names_the_user_item_and_time_of_each_row_read(
    config: DataConfig, window_rows: int
) -> None:
    data = memory_data()
    log = data.logs["valid"]
    users = np.repeat(log.user_id, np.diff(log.start))
    for host_batch, identities in eval_batches(
        data, replaced(config, window_rows=window_rows), "valid"
    ):
        np.testing.assert_array_equal(identities.rows, host_batch.rows)
        rows = host_batch.rows[host_batch.rows >= 0]
        np.testing.assert_array_equal(identities.labels, log.labels[rows])
        np.testing.assert_array_equal(identities.item, log.item[rows])
        np.testing.assert_array_equal(identities.user_id, users[rows])
        np.testing.assert_array_equal(
            identities.item_id, data.catalogue.item_id[log.item[rows]]
        )
        np.testing.assert_array_equal(identities.time, log.time[rows])


def test_labels_follow_the_configured_tasks() -> None:
    data = memory_data()
    config = replaced(NIO, candidates=1, tasks={"like": 1.0, "click": 0.5})
    assert task_names(SCHEMA, config) == ("like", "click")
    assert task_names(SCHEMA, NIO) == ("click", "long", "like")
    train = data.logs["train"]
    for host_batch in take(data, config, 9):
        expected = train.labels[host_batch.rows[:, 0]][:, [2, 0]]
        np.testing.assert_array_equal(host_batch.batch.labels[:, 0], expected)
        assert (expected >= 0).any(axis=1).all()


def test_an_excluded_group_of_features_leaves_an_empty_matrix() -> None:
    data = memory_data()
    log = data.logs["valid"]
    data.logs["valid"] = InteractionLog(
        **(
            vars(log)
            | {"row_dense": log.row_dense[:, :0], "action_ids": log.action_ids[:, :0]}
        )
    )
    data.schema = SCHEMA.without(["rate", "clicked"])
    shapes = batch_shapes(data.schema, NIO, batch_size=8)
    for host_batch in evaluated(data, NIO, "valid"):
        assert jax.tree.map(np.shape, host_batch.batch) == jax.tree.map(
            np.shape, shapes[host_batch.batch.valid.shape[1]]
        )


def test_columns_in_another_memory_order_give_the_same_batches() -> None:
    data, other = memory_data(), memory_data()
    log = data.logs["valid"]
    turned = {
        name: np.asfortranarray(np.repeat(getattr(log, name), 2, axis=1))
        for name in ("row_ids", "action_dense")
    }
    data.logs["valid"] = InteractionLog(
        **(
            vars(log)
            | {name: np.ascontiguousarray(value) for name, value in turned.items()}
        )
    )
    other.logs["valid"] = InteractionLog(**(vars(log) | turned))
    assert_equal(
        list(evaluated(other, NIO, "valid")), list(evaluated(data, NIO, "valid"))
    )


def test_histories_of_a_log_without_events_are_empty() -> None:
    data = memory_data()
    data.logs["valid"].flags[:] &= 255 - EVENT
    batches = list(evaluated(data, NIO, "valid"))
    assert sorted(read_rows(batches)) == scored(data.logs["valid"])
    assert not any(host_batch.batch.valid.any() for host_batch in batches)


def test_unscored_rows_have_their_weight_in_training_and_no_place_in_evaluation() -> (
    None
):
    data = memory_data()
    plain, weighted = (
        take(data, replaced(UC, unscored_weight=weight), 9) for weight in (1.0, 0.25)
    )
    flags, seen = data.logs["train"].flags, set()
    for host_batch, default in zip(weighted, plain, strict=True):
        read = host_batch.rows >= 0
        scored_row = (flags[host_batch.rows] & SCORED) != 0
        expected = np.where(scored_row, 1.0, 0.25) * read
        np.testing.assert_array_equal(host_batch.batch.weight, expected)
        np.testing.assert_array_equal(default.batch.weight, read)
        seen |= set(expected.ravel().tolist())
        assert host_batch.batch.weight.dtype == np.float32
    assert seen == {0.0, 0.25, 1.0}
    for host_batch in evaluated(data, replaced(UC, unscored_weight=0.25), "valid"):
        np.testing.assert_array_equal(host_batch.batch.weight, host_batch.rows >= 0)
