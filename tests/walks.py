"""Users who walk around a circle of items: what comes next is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.data.memory_source import MemorySource
from tokenrec.config import (
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
)
from tokenrec.data.dataset import open_dataset
from tokenrec.data.pipeline import train_batches
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema
from tokenrec.data.semantic_id_file import SemanticIds, save_semantic_ids
from tokenrec.state import bind_params, build_model

ITEMS, USERS, STEPS = 12, 96, 14
SCHEMA = Schema(
    (Feature("item", "categorical", "item"), Feature("hour", "categorical", "context")),
    (),
)


def prepare_walks(out: Path) -> Path:
    """Steps of 1, or of 2 for every third user, from anywhere. The last two items are valid and test.

    Item ids begin at 100, so that they are not rows of the catalogue.
    """
    user, step = np.divmod(np.arange(USERS * STEPS), STEPS)
    item = 100 + walk(user, step)
    split = np.maximum(step - (STEPS - 3), 0)
    rows = {
        "user_id": pa.array(user),
        "item_id": pa.array(item),
        "time_ms": pa.array(step * 1000),
        "split": pa.array(split.astype(np.int8)),
        "hour": pa.array((user * 7 + step * 5) % 24),
    }
    items = 100 + np.arange(ITEMS)
    prepare(
        MemorySource(
            rows,
            {},
            {"item_id": pa.array(items), "item": pa.array(items)},
            schema=SCHEMA,
        ),
        out,
    )
    return out


def walk(user: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Where a user is after so many steps, from 0."""
    start = np.random.default_rng(0).integers(0, ITEMS, USERS)
    return (start[user] + step * (1 + (user % 3 == 0))) % ITEMS


def save_codes(out: Path) -> Path:
    """Two levels, and a third that tells two of the items apart."""
    row = np.arange(ITEMS)
    codes = np.stack([row % 3, row // 3 % 2, row // 6], axis=1).astype(np.int32)
    save_semantic_ids(SemanticIds(100 + row, codes), out)
    return out


def walking(
    data: Path,
    *,
    steps: int = 60,
    head: dict | None = None,
    data_options: dict | None = None,
) -> Config:
    given = {"paradigm": "uc", "overlap": 7} | (data_options or {})
    return Config(
        data=DataConfig(
            path=str(data),
            objective="retrieval",
            events=8,
            batch_size=16,
            eval_batch_size=16,
            **given,
        ),
        # It compiles in less time than the default.
        tokens=TokensConfig(embedding_dim=8, fused=True, maker="linear"),
        model=ModelConfig(width=16, heads=2, layers=2, windows=()),
        head=HeadConfig(**{"top_k": 5, "beams": 6} | (head or {})),
        optim=OptimConfig(steps=steps, warmup_steps=5, learning_rate=1e-2),
        train=TrainConfig(log_every=20),
    )


def opened(config):
    dataset = open_dataset(
        config.data.path, config.data.exclude, config.data.semantic_ids
    )
    return dataset, build_model(config, dataset.schema, (), catalogue=dataset.catalogue)


def first_batch(dataset, config):
    batches = train_batches(dataset, config.data, steps=1, seed=0)
    try:
        return next(batches)
    finally:
        batches.close()


def read_outs(model, state, batch):
    """What the head reads, outside of a step."""
    entities = model.embedder.look_up(state.tables, batch)
    return bind_params(model, state.params)(entities, batch, None)


def code_config(data, codes, **options):
    return walking(
        data,
        head={"retrieval": "semantic_id", "beams": ITEMS, "top_k": 10},
        data_options={"semantic_ids": str(codes)} | options,
    )
