"""Batches against a loop over rows, and what an order must keep: epochs, processes, resuming, windows."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from tests.data.logs import SCHEMA, MemoryData, random_log, shown
from tokenrec.config import DataConfig
from tokenrec.data.batch import HostBatch
from tokenrec.data.log import EVENT, SCORED, Log
from tokenrec.data.pipeline import batch_shapes, eval_batches, steps_per_epoch, task_names, train_batches
from tokenrec.data.samples import cut_samples
from tokenrec.errors import InputError

NIO = DataConfig(events=8, buckets=(2, 5), candidates=3, batch_size=4, eval_batch_size=8)
UC = DataConfig(paradigm="uc", events=8, overlap=3, buckets=(2, 5), batch_size=4, eval_batch_size=8)
CONFIGS = pytest.mark.parametrize("config", [NIO, UC], ids=["nio", "uc"])


def memory_data(seed: int = 0, chunks: int = 40, **options: int) -> MemoryData:
    logs = {name: random_log(seed + i, chunks=chunks, all_events=True) for i, name in enumerate(("train", "valid"))}
    return MemoryData(logs, options)


def replaced(config: DataConfig, **values: object) -> DataConfig:
    return DataConfig(**(vars(config) | values))  # type: ignore[arg-type]


def take(
    data: MemoryData, config: DataConfig, steps: int, *, seed: int = 5, start: int = 0, own: np.ndarray | None = None
) -> list:
    iterator = train_batches(data, config, steps=steps, seed=seed, start=start, own=own)
    try:
        return list(iterator)
    finally:
        iterator.close()


def evaluated(data: MemoryData, config: DataConfig, split: str, *, limit: int = 0) -> Iterator[HostBatch]:
    for host, _ in eval_batches(data, config, split, limit=limit):
        yield host


def assert_equal(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def read_rows(batches: list[HostBatch]) -> list[int]:
    rows = np.concatenate([host.rows.ravel() for host in batches])
    return rows[rows >= 0].tolist()


def scored(log: Log) -> list[int]:
    return np.flatnonzero(log.flags & SCORED).tolist()


def check_sample(log: Log, data: MemoryData, host: HostBatch, b: int, history: list[int], reads: np.ndarray) -> None:
    """Every leaf of sample b against the log, row by row. `reads: [C or T]` rows, -1 where nothing is read."""
    batch, catalogue = host.batch, data.catalogue
    slots = batch.valid.shape[1]
    assert batch.valid[b].tolist() == [False] * (slots - len(history)) + [True] * len(history)
    for t, row in enumerate([-1] * (slots - len(history)) + history):
        check_state(log, catalogue, batch.state.ids[b, t], batch.state.dense[b, t], row)
        action = (log.action_ids[row], log.action_dense[row]) if row >= 0 else ([0], [np.nan])
        np.testing.assert_array_equal(batch.action.ids[b, t], action[0])
        np.testing.assert_array_equal(batch.action.dense[b, t], action[1])
    np.testing.assert_array_equal(host.rows[b], reads)
    np.testing.assert_array_equal(batch.weight[b], reads >= 0)
    for slot, row in enumerate(reads):
        np.testing.assert_array_equal(batch.labels[b, slot], log.labels[row] if row >= 0 else [-1, -1, -1])
        if batch.target is not None:
            check_state(log, catalogue, batch.target.ids[b, slot], batch.target.dense[b, slot], row)


def check_state(log: Log, catalogue, ids: np.ndarray, dense: np.ndarray, row: int) -> None:
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
    for host in evaluated(data, config, "valid"):
        for b in np.flatnonzero((host.rows >= 0).any(axis=1)):
            rows = host.rows[b]
            n = first.index(rows[rows >= 0][0])
            run, reads = expected[n]
            assert rows[rows >= 0].tolist() == reads
            np.testing.assert_array_equal(host.batch.user.ids[b], log.user_ids[samples.chunk[n]])
            np.testing.assert_array_equal(host.batch.user.dense[b], log.user_dense[samples.chunk[n]])
            check_sample(log, data, host, b, run, rows)
            if host.batch.target is None:
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
        for host in batches:
            announced = shapes[host.batch.valid.shape[1]]
            assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), host.batch) == jax.tree.map(
                lambda leaf: (leaf.shape, leaf.dtype), announced
            )
            assert host.rows.dtype == np.int64
            assert host.rows.shape == host.batch.weight.shape


@pytest.mark.parametrize("objective", ["ranking", "retrieval"])
@CONFIGS
def test_ages_are_whole_seconds_back_from_the_request_or_the_newest_event(config: DataConfig, objective: str) -> None:
    data, config = memory_data(), replaced(config, objective=objective)
    for name, log in data.logs.items():
        data.logs[name] = Log(**(vars(log) | {"time": log.time * 700}))
    data.logs["valid"].time[0] -= 3_000 * 2**31
    trained = train_batches(data, config, steps=9, seed=5, ages=True)
    found = [("train", host) for host in trained]
    found += [("valid", host) for host, _ in eval_batches(data, config, "valid", ages=True)]
    trained.close()
    for split, host in found:
        batch, log = host.batch, data.logs[split]
        assert batch.ages.dtype == batch_shapes(SCHEMA, config, batch_size=4, ages=True)[8].ages.dtype == np.int32
        row_of = {value: row for row, value in enumerate(log.action_dense[:, 0].tolist())}
        for b in np.flatnonzero((host.rows.reshape(len(host.rows), -1) >= 0).any(axis=1)):
            rows = [row_of[value] for value in batch.action.dense[b, batch.valid[b], 0].tolist()]
            stream = config.paradigm == "uc" and (objective, split) != ("retrieval", "valid")
            read = host.rows[b].ravel()
            newest = rows[-1] if stream else int(read[read >= 0][0])
            ages = [min(int(log.time[newest] // 1000 - log.time[row] // 1000), 2**31 - 1) for row in rows]
            assert batch.ages[b].tolist() == [0] * (batch.ages.shape[1] - len(rows)) + ages
        assert not batch.ages[~batch.valid].any()
    assert max(host.batch.ages.max() for _, host in found) == 2**31 - 1
    assert next(evaluated(data, config, "valid")).batch.ages is None


@CONFIGS
def test_a_history_lies_in_the_smallest_bucket_that_holds_it(config: DataConfig) -> None:
    for host in evaluated(memory_data(), config, "valid"):
        lengths = host.batch.valid.sum(axis=1)[(host.rows >= 0).any(axis=1)]
        below = {2: -1, 5: 2, 8: 5}[host.batch.valid.shape[1]]
        assert (lengths > below).all()
        assert (lengths <= host.batch.valid.shape[1]).all()


def test_a_limit_takes_whole_requests() -> None:
    data = memory_data()
    config = replaced(NIO, candidates=2)
    log = data.logs["valid"]
    limited = read_rows(list(evaluated(data, config, "valid", limit=30)))

    def request(row: int) -> tuple[int, ...]:
        chunk = int(np.searchsorted(log.start, row, side="right"))
        return (chunk, log.time[row], log.request[row]) if log.request[row] >= 0 else (-1, row, row)

    taken = {request(row) for row in limited}
    assert len(taken) == 30
    assert sorted(row for row in scored(log) if request(row) in taken) == sorted(limited)
    assert len(limited) > 30


@CONFIGS
@pytest.mark.parametrize("window_rows", [10_000, 150])
def test_evaluation_yields_every_scored_row_once(config: DataConfig, window_rows: int) -> None:
    data = memory_data()
    batches = list(evaluated(data, replaced(config, window_rows=window_rows), "valid"))
    assert sorted(read_rows(batches)) == scored(data.logs["valid"])


def test_evaluation_goes_by_bucket_then_position_and_pads_the_last_batch_of_a_bucket() -> None:
    data = memory_data()
    by_length: dict[int, list[HostBatch]] = {}
    for host in evaluated(data, replaced(NIO, candidates=1), "valid"):
        by_length.setdefault(host.batch.valid.shape[1], []).append(host)
    assert list(by_length) == [2, 5, 8]
    for batches in by_length.values():
        time = data.logs["valid"].time[read_rows(batches)]
        chunk = np.searchsorted(data.logs["valid"].start, read_rows(batches), side="right")
        assert (np.diff(chunk * 10_000 + time) >= 0).all()
        full, last = batches[:-1], batches[-1]
        assert all((host.rows >= 0).any(axis=1).all() for host in full)
        padded = (last.rows < 0).all(axis=1)
        assert not last.batch.valid[padded].any()
        assert not last.batch.weight[padded].any()
        assert (last.batch.labels[padded] == -1).all()
        assert (last.batch.user.ids[padded] == 0).all()
        assert np.isnan(last.batch.user.dense[padded]).all()


def test_a_limit_takes_the_same_samples_spread_over_the_split() -> None:
    data = memory_data()
    config = replaced(NIO, candidates=1)
    rows = scored(data.logs["valid"])
    limited = sorted(read_rows(list(evaluated(data, config, "valid", limit=20))))
    assert len(set(limited)) == 20
    assert np.diff(limited).max() < 3 * len(data.logs["valid"].time) / 20
    assert limited == sorted(read_rows(list(evaluated(data, replaced(config, window_rows=150), "valid", limit=20))))
    assert sorted(read_rows(list(evaluated(data, config, "valid", limit=len(rows) + 1)))) == rows


@CONFIGS
@pytest.mark.parametrize("window_rows", [10_000, 150])
def test_an_epoch_reads_nothing_twice_and_leaves_out_less_than_a_batch_a_window(
    config: DataConfig, window_rows: int
) -> None:
    data = memory_data()
    config = replaced(config, window_rows=window_rows)
    steps = steps_per_epoch(data, config)
    everything = sum(len(reads) for _, reads in shown(cut_samples(data.logs["train"], config, train=True)))
    windows = 1 if window_rows == 10_000 else 6
    most = config.candidates if config.paradigm == "nio" else config.events
    epochs = take(data, config, 2 * steps)
    for epoch in (epochs[:steps], epochs[steps:]):
        rows = read_rows(epoch)
        assert len(set(rows)) == len(rows)
        assert 0 <= everything - len(rows) < windows * config.batch_size * most
    assert read_rows(epochs[:steps]) != read_rows(epochs[steps:])


def test_samples_that_fill_no_batch_of_their_bucket_join_the_next_longer_one() -> None:
    data = memory_data()
    config = replaced(NIO, batch_size=64)
    samples = cut_samples(data.logs["train"], config, train=True)
    short = int((samples.length <= 2).sum())
    assert short % 64
    steps = steps_per_epoch(data, config)
    assert steps == len(samples.length) // 64
    longer = [host for host in take(data, config, steps) if host.batch.valid.shape[1] > 2]
    assert (
        sum(int((host.batch.valid.sum(axis=1) <= 2).sum()) for host in longer) >= short % 64 - len(samples.length) % 64
    )


@CONFIGS
def test_the_order_is_a_function_of_the_seed(config: DataConfig) -> None:
    data = memory_data()
    assert_equal(take(data, config, 9), take(data, config, 9))
    assert read_rows(take(data, config, 9)) != read_rows(take(data, config, 9, seed=6))


@CONFIGS
@pytest.mark.parametrize("objective", ["ranking", "retrieval"])
def test_processes_share_the_batches_of_one_process(config: DataConfig, objective: str) -> None:
    data = memory_data()
    config = replaced(config, window_rows=150, objective=objective)
    # Devices of one process need not lie side by side.
    for shares in ([[0, 3], [1, 2]], [[0], [1], [2], [3]]):
        parts = [take(data, config, 12, own=np.array(own)) for own in shares]
        for whole, *made in zip(take(data, config, 12), *parts, strict=True):
            for own, part in zip(shares, made, strict=True):
                assert_equal(part, rows_of(whole, own))
    pairs = (list(eval_batches(data, config, "valid", own=own)) for own in (None, np.array([0, 1, 6, 7])))
    for (whole, who), (part, other) in zip(*pairs, strict=True):
        assert_equal(part, rows_of(whole, [0, 1, 6, 7]))
        assert_equal(other, who)  # who is read is known to all


def rows_of(host: HostBatch, own: list[int]) -> HostBatch:
    return jax.tree.map(lambda leaf: leaf[own], host)


@CONFIGS
def test_an_iterator_that_starts_late_goes_on_as_if_never_stopped(config: DataConfig) -> None:
    data = memory_data()
    config = replaced(config, window_rows=150)
    straight = take(data, config, 30)
    for start in (11, 30):
        assert_equal(take(data, config, 30, start=start), straight[start:])


def test_windows_cover_the_split_and_two_at_most_are_in_memory() -> None:
    alive: list[weakref.ref] = []
    held: list[int] = []

    def on_load(log: Log) -> None:
        held.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(log.time))

    data = memory_data()
    data.on_load = on_load
    config = replaced(NIO, window_rows=150)
    assert sorted(read_rows(list(evaluated(data, config, "valid")))) == scored(data.logs["valid"])
    assert len(held) == 2 * 4  # four windows: counted once, read once
    assert max(held) == 1


def test_a_split_of_one_window_is_loaded_once_for_all_epochs() -> None:
    loads: list[int] = []
    data = memory_data(chunks=200)
    data.on_load = lambda log: loads.append(log.chunks)
    steps = steps_per_epoch(data, NIO)
    loads.clear()
    take(data, NIO, 3 * steps)
    assert sum(size == 200 for size in loads) == 1


def test_chunks_of_very_unequal_size_do_not_make_a_window_too_large() -> None:
    sizes: list[int] = []
    data = memory_data()
    small, large = random_log(1, chunks=80, rows=2), random_log(2, chunks=30, rows=60)
    joined = {
        name: np.concatenate([getattr(small, name), getattr(large, name)])
        for name in vars(small)
        if name not in ("start", "user_id")
    }
    start = np.concatenate([small.start, large.start[1:] + small.rows])
    data.logs["valid"] = Log(start=start, user_id=np.arange(110), **joined)
    data.on_load = lambda log: sizes.append(log.rows)
    config = replaced(NIO, window_rows=200)
    assert sorted(read_rows(list(evaluated(data, config, "valid")))) == scored(data.logs["valid"])
    assert len(sizes) > 4
    assert max(sizes) <= 200 + 60


@CONFIGS
@pytest.mark.parametrize("window_rows", [10_000, 150])
def test_evaluation_names_the_user_item_and_time_of_each_row_read(config: DataConfig, window_rows: int) -> None:
    data = memory_data()
    log = data.logs["valid"]
    users = np.repeat(log.user_id, np.diff(log.start))
    for host, who in eval_batches(data, replaced(config, window_rows=window_rows), "valid"):
        np.testing.assert_array_equal(who.rows, host.rows)
        rows = host.rows[host.rows >= 0]
        np.testing.assert_array_equal(who.labels, log.labels[rows])
        np.testing.assert_array_equal(who.item, log.item[rows])
        np.testing.assert_array_equal(who.user_id, users[rows])
        np.testing.assert_array_equal(who.item_id, data.catalogue.item_id[log.item[rows]])
        np.testing.assert_array_equal(who.time, log.time[rows])


def test_labels_follow_the_configured_tasks() -> None:
    data = memory_data()
    config = replaced(NIO, candidates=1, tasks={"like": 1.0, "click": 0.5})
    assert task_names(SCHEMA, config) == ("like", "click")
    assert task_names(SCHEMA, NIO) == ("click", "long", "like")
    train = data.logs["train"]
    for host in take(data, config, 9):
        expected = train.labels[host.rows[:, 0]][:, [2, 0]]
        np.testing.assert_array_equal(host.batch.labels[:, 0], expected)
        assert (expected >= 0).any(axis=1).all()


def test_an_excluded_group_of_features_leaves_an_empty_matrix() -> None:
    data = memory_data()
    log = data.logs["valid"]
    data.logs["valid"] = Log(**(vars(log) | {"row_dense": log.row_dense[:, :0], "action_ids": log.action_ids[:, :0]}))
    data.schema = SCHEMA.without(["rate", "clicked"])
    shapes = batch_shapes(data.schema, NIO, batch_size=8)
    for host in evaluated(data, NIO, "valid"):
        assert jax.tree.map(np.shape, host.batch) == jax.tree.map(np.shape, shapes[host.batch.valid.shape[1]])


def test_columns_in_another_memory_order_give_the_same_batches() -> None:
    data, other = memory_data(), memory_data()
    log = data.logs["valid"]
    turned = {name: np.asfortranarray(np.repeat(getattr(log, name), 2, axis=1)) for name in ("row_ids", "action_dense")}
    data.logs["valid"] = Log(**(vars(log) | {name: np.ascontiguousarray(value) for name, value in turned.items()}))
    other.logs["valid"] = Log(**(vars(log) | turned))
    assert_equal(list(evaluated(other, NIO, "valid")), list(evaluated(data, NIO, "valid")))


def test_histories_of_a_log_without_events_are_empty() -> None:
    data = memory_data()
    data.logs["valid"].flags[:] &= 255 - EVENT
    batches = list(evaluated(data, NIO, "valid"))
    assert sorted(read_rows(batches)) == scored(data.logs["valid"])
    assert not any(host.batch.valid.any() for host in batches)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 5000}, r"data\.batch_size=5000 is more than the \d+ training samples.*smaller batch_size"),
        ({"tasks": {"clik": 1.0}}, r"no task 'clik'; did you mean 'click'\?"),
        ({"events": 65, "buckets": ()}, r"data\.events=65 exceeds the 64 earlier events.*overlap of at least 65"),
    ],
)
def test_wrong_input_is_named_with_its_remedy(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        train_batches(memory_data(overlap=64), replaced(NIO, **values), steps=3, seed=0)


def test_a_missing_split_and_short_heads_of_chunks_are_errors() -> None:
    with pytest.raises(InputError, match="no rows in split 'test'"):
        eval_batches(memory_data(), NIO, "test")
    uc = replaced(UC, overlap=7)
    with pytest.raises(InputError, match=r"data\.overlap=7 exceeds the 4 earlier events"):
        eval_batches(memory_data(overlap=4), uc, "valid")
    # What retrieves is evaluated request by request, each with a whole history.
    with pytest.raises(InputError, match=r"data\.events=8 exceeds the 4 earlier events"):
        eval_batches(memory_data(overlap=4), replaced(UC, objective="retrieval"), "valid")
