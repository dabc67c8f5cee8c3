"""The order of batches: every row once, epochs, processes, resuming, windows."""

from __future__ import annotations

import weakref

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
from tests.data.logs import random_log, shown
from tokenrec.config import DataConfig
from tokenrec.data.batch import HostBatch
from tokenrec.data.interaction_log import InteractionLog
from tokenrec.data.pipeline import eval_batches, steps_per_epoch, train_batches
from tokenrec.data.samples import cut_samples
from tokenrec.errors import InputError


def test_a_limit_takes_whole_requests() -> None:
    data = memory_data()
    config = replaced(NIO, candidates=2)
    log = data.logs["valid"]
    limited = read_rows(list(evaluated(data, config, "valid", limit=30)))

    def request(row: int) -> tuple[int, ...]:
        chunk = int(np.searchsorted(log.start, row, side="right"))
        return (
            (chunk, log.time[row], log.request[row])
            if log.request[row] >= 0
            else (-1, row, row)
        )

    taken = {request(row) for row in limited}
    assert len(taken) == 30
    assert sorted(row for row in scored(log) if request(row) in taken) == sorted(
        limited
    )
    assert len(limited) > 30


@CONFIGS
@pytest.mark.parametrize("window_rows", [10_000, 150])
def test_evaluation_yields_every_scored_row_once(
    config: DataConfig, window_rows: int
) -> None:
    data = memory_data()
    batches = list(evaluated(data, replaced(config, window_rows=window_rows), "valid"))
    assert sorted(read_rows(batches)) == scored(data.logs["valid"])


def test_evaluation_goes_by_bucket_then_position_and_pads_the_last_batch_of_a_bucket() -> (
    None
):
    data = memory_data()
    by_length: dict[int, list[HostBatch]] = {}
    for host_batch in evaluated(data, replaced(NIO, candidates=1), "valid"):
        by_length.setdefault(host_batch.batch.valid.shape[1], []).append(host_batch)
    assert list(by_length) == [2, 5, 8]
    for batches in by_length.values():
        time = data.logs["valid"].time[read_rows(batches)]
        chunk = np.searchsorted(
            data.logs["valid"].start, read_rows(batches), side="right"
        )
        assert (np.diff(chunk * 10_000 + time) >= 0).all()
        full, last = batches[:-1], batches[-1]
        assert all((host_batch.rows >= 0).any(axis=1).all() for host_batch in full)
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
    assert limited == sorted(
        read_rows(
            list(evaluated(data, replaced(config, window_rows=150), "valid", limit=20))
        )
    )
    assert (
        sorted(read_rows(list(evaluated(data, config, "valid", limit=len(rows) + 1))))
        == rows
    )


@CONFIGS
@pytest.mark.parametrize("window_rows", [10_000, 150])
def test_an_epoch_reads_nothing_twice_and_leaves_out_less_than_a_batch_a_window(
    config: DataConfig, window_rows: int
) -> None:
    data = memory_data()
    config = replaced(config, window_rows=window_rows)
    steps = steps_per_epoch(data, config)
    everything = sum(
        len(reads)
        for _, reads in shown(cut_samples(data.logs["train"], config, train=True))
    )
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
    longer = [
        host_batch
        for host_batch in take(data, config, steps)
        if host_batch.batch.valid.shape[1] > 2
    ]
    assert (
        sum(
            int((host_batch.batch.valid.sum(axis=1) <= 2).sum())
            for host_batch in longer
        )
        >= short % 64 - len(samples.length) % 64
    )


@CONFIGS
def test_the_order_is_a_function_of_the_seed(config: DataConfig) -> None:
    data = memory_data()
    assert_equal(take(data, config, 9), take(data, config, 9))
    assert read_rows(take(data, config, 9)) != read_rows(take(data, config, 9, seed=6))


@CONFIGS
@pytest.mark.parametrize("objective", ["ranking", "retrieval"])
def test_processes_share_the_batches_of_one_process(
    config: DataConfig, objective: str
) -> None:
    data = memory_data()
    config = replaced(config, window_rows=150, objective=objective)
    # Devices of one process need not lie side by side.
    for shares in ([[0, 3], [1, 2]], [[0], [1], [2], [3]]):
        parts = [take(data, config, 12, own=np.array(own)) for own in shares]
        for whole, *made in zip(take(data, config, 12), *parts, strict=True):
            for own, part in zip(shares, made, strict=True):
                assert_equal(part, rows_of(whole, own))
    pairs = (
        list(eval_batches(data, config, "valid", own=own))
        for own in (None, np.array([0, 1, 6, 7]))
    )
    for (whole, identities), (part, other) in zip(*pairs, strict=True):
        assert_equal(part, rows_of(whole, [0, 1, 6, 7]))
        assert_equal(other, identities)  # every process knows the whole batch


def rows_of(host_batch: HostBatch, own: list[int]) -> HostBatch:
    return jax.tree.map(lambda leaf: leaf[own], host_batch)


@CONFIGS
def test_an_iterator_that_starts_late_goes_on_as_if_never_stopped(
    config: DataConfig,
) -> None:
    data = memory_data()
    config = replaced(config, window_rows=150)
    straight = take(data, config, 30)
    for start in (11, 30):
        assert_equal(take(data, config, 30, start=start), straight[start:])


def test_windows_cover_the_split_and_two_at_most_are_in_memory() -> None:
    alive: list[weakref.ref] = []
    held: list[int] = []

    def on_load(log: InteractionLog) -> None:
        held.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(log.time))

    data = memory_data()
    data.on_load = on_load
    config = replaced(NIO, window_rows=150)
    assert sorted(read_rows(list(evaluated(data, config, "valid")))) == scored(
        data.logs["valid"]
    )
    assert len(held) == 2 * 4  # four windows: counted once, read once
    assert max(held) == 1


def test_a_split_of_one_window_is_loaded_once_for_all_epochs() -> None:
    loads: list[int] = []
    data = memory_data(chunks=200)
    data.on_load = lambda log: loads.append(log.num_chunks)
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
        for name, array in vars(small).items()
        if name not in ("start", "user_id") and array is not None
    }
    start = np.concatenate([small.start, large.start[1:] + small.num_rows])
    data.logs["valid"] = InteractionLog(start=start, user_id=np.arange(110), **joined)
    data.on_load = lambda log: sizes.append(log.num_rows)
    config = replaced(NIO, window_rows=200)
    assert sorted(read_rows(list(evaluated(data, config, "valid")))) == scored(
        data.logs["valid"]
    )
    assert len(sizes) > 4
    assert max(sizes) <= 200 + 60


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"batch_size": 5000},
            r"data\.batch_size=5000 is more than the \d+ training samples.*smaller batch_size",
        ),
        ({"tasks": {"clik": 1.0}}, r"no task 'clik'; did you mean 'click'\?"),
        (
            {"events": 65, "buckets": ()},
            r"data\.events=65 exceeds the 64 earlier events.*overlap of at least 65",
        ),
    ],
)
def test_wrong_input_is_named_with_its_remedy(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_batches(memory_data(overlap=64), replaced(NIO, **values), steps=3, seed=0)


def test_a_missing_split_and_short_heads_of_chunks_are_errors() -> None:
    with pytest.raises(InputError, match="no rows in split 'test'"):
        eval_batches(memory_data(), NIO, "test")
    uc = replaced(UC, overlap=7)
    with pytest.raises(
        InputError, match=r"data\.overlap=7 exceeds the 4 earlier events"
    ):
        eval_batches(memory_data(overlap=4), uc, "valid")
    # What retrieves is evaluated request by request, each with a whole history.
    with pytest.raises(
        InputError, match=r"data\.events=8 exceeds the 4 earlier events"
    ):
        eval_batches(
            memory_data(overlap=4), replaced(UC, objective="retrieval"), "valid"
        )
