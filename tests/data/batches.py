"""Shared by tests of the pipeline: small logs in memory, two configs, and batches."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import numpy as np
import pytest

from tests.data.logs import MemoryData, random_log
from tokenrec.config import DataConfig
from tokenrec.data.batch import HostBatch
from tokenrec.data.interaction_log import SCORED, InteractionLog
from tokenrec.data.pipeline import eval_batches, train_batches

NIO = DataConfig(
    events=8, buckets=(2, 5), candidates=3, batch_size=4, eval_batch_size=8
)
UC = DataConfig(
    paradigm="uc", events=8, overlap=3, buckets=(2, 5), batch_size=4, eval_batch_size=8
)
CONFIGS = pytest.mark.parametrize("config", [NIO, UC], ids=["nio", "uc"])


def memory_data(seed: int = 0, chunks: int = 40, **options: int) -> MemoryData:
    logs = {
        name: random_log(seed + i, chunks=chunks, all_events=True)
        for i, name in enumerate(("train", "valid"))
    }
    return MemoryData(logs, options)


def replaced(config: DataConfig, **values: object) -> DataConfig:
    return DataConfig(**(vars(config) | values))  # type: ignore[arg-type]


def take(
    data: MemoryData,
    config: DataConfig,
    steps: int,
    *,
    seed: int = 5,
    start: int = 0,
    own: np.ndarray | None = None,
) -> list:
    iterator = train_batches(data, config, steps=steps, seed=seed, start=start, own=own)
    try:
        return list(iterator)
    finally:
        iterator.close()


def evaluated(
    data: MemoryData, config: DataConfig, split: str, *, limit: int = 0
) -> Iterator[HostBatch]:
    for host_batch, _ in eval_batches(data, config, split, limit=limit):
        yield host_batch


def assert_equal(a: object, b: object) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def read_rows(batches: list[HostBatch]) -> list[int]:
    rows = np.concatenate([host_batch.rows.ravel() for host_batch in batches])
    return rows[rows >= 0].tolist()


def scored(log: InteractionLog) -> list[int]:
    return np.flatnonzero(log.flags & SCORED).tolist()
