"""A tiny data set of baskets with features to filter by, and runs of it to export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa

from tests.data.memory_source import MemorySource
from tests.models.backbones.machine import noisy
from tests.worlds import one_device
from tokenrec.checkpoint.run_folder import OpenedRun
from tokenrec.config import Config, DataConfig, HeadConfig, ModelConfig, TokensConfig
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import FIRST_KNOWN, UNKNOWN, Feature, Schema
from tokenrec.data.semantic_id_file import SemanticIds, save_semantic_ids
from tokenrec.serving.export.requests import PredictedItems, predicted_items
from tokenrec.state import build_model, init_state

ITEMS, USERS, STEPS, EVENTS = 18, 12, 9, 6
RARE = 4
SCHEMA = Schema(
    (
        Feature("age", "categorical", "user"),
        Feature("item", "categorical", "item"),
        Feature("brand", "categorical", "item"),
        Feature("tags", "multi_valued", "item", length=2),
        Feature("price", "dense", "item"),
        Feature("hour", "categorical", "context"),
        Feature("amount", "dense", "action"),
    ),
    (),
)


def catalogue() -> dict[str, list]:
    """Ids from 100, so that they are no rows; features of the items."""
    row = range(ITEMS)
    return {
        "item_id": [100 + i for i in row],
        "item": [100 + i for i in row],
        # The brand of the last item is in no training event.
        "brand": ["abc"[i % 3] for i in row[:-1]] + ["new"],
        "tags": [[i % 4, 4 + i % 3] for i in row],
        "price": [None if i % 5 == 4 else 0.1 * i for i in row],
    }


def prepare_baskets(out: Path) -> Path:
    """Users who take random items, some twice; the last step is test."""
    draw = np.random.default_rng(0)
    user, step = np.divmod(np.arange(USERS * STEPS), STEPS)
    item = draw.integers(0, ITEMS - 1, len(user))
    rows = {
        "user_id": pa.array(user),
        "item_id": pa.array(100 + item),
        "time_ms": pa.array(step * 1000),
        "split": pa.array(np.where(step == STEPS - 1, 2, 0).astype(np.int8)),
        "hour": pa.array(draw.integers(0, 24, len(user))),
        "amount": pa.array(draw.normal(size=len(user)).astype(np.float32)),
    }
    users = {
        "user_id": pa.array(np.arange(USERS)),
        "age": pa.array(np.arange(USERS) % 3),
    }
    items = {name: pa.array(values) for name, values in catalogue().items()}
    prepare(MemorySource(rows, users, items, schema=SCHEMA), out)
    row = np.arange(ITEMS)
    codes = np.stack([row % 4, row // 4 % 3, row // 12], axis=1).astype(np.int32)
    save_semantic_ids(SemanticIds(100 + row, codes), out / "semantic_ids.parquet")
    return out


def basket_config(data: Path, head: HeadConfig, **options) -> Config:
    semantic = head.retrieval == "semantic_id"
    return Config(
        data=DataConfig(
            path=str(data),
            objective="retrieval",
            semantic_ids=str(data / "semantic_ids.parquet") if semantic else "",
            exclude=("semantic_id",) if semantic else (),
            **{"events": EVENTS, "batch_size": 8, "eval_batch_size": 8} | options,
        ),
        # It compiles in less time than the default.
        tokens=TokensConfig(embedding_dim=4, fused=True, maker="linear"),
        # The artifact of a ranking run has two layers.
        model=ModelConfig(width=8, heads=1, layers=1, windows=()),
        head=head,
    )


def next_item_config(data: Path) -> Config:
    """Streams, sampled softmax with features of items, cosine, unseen items alone.

    Some ids of items are too rare to have a row.
    """
    head = HeadConfig(
        negatives=8,
        cosine=True,
        temperature=0.1,
        item_features=("tags",),
        drop_seen=True,
        top_k=4,
    )
    config = basket_config(data, head, paradigm="uc", overlap=2)
    config.tokens.min_count = 2
    return config


def codes_config(data: Path) -> Config:
    """Requests with a query, generated with copies of the history."""
    # All nodes above the last level: the search is exact.
    head = HeadConfig(retrieval="semantic_id", copy=True, beams=ITEMS, top_k=4)
    return basket_config(data, head, paradigm="nio", candidates=1)


def opened_run(
    config: Config, answers: int = 8
) -> tuple[OpenedRun, list[PredictedItems]]:
    """A run with random weights, and what `predict` answers to some test requests."""
    dataset = open_dataset(
        Path(config.data.path), config.data.exclude, config.data.semantic_ids
    )
    if config.tokens.min_count:
        # The first items share a row; counts of so few events would not say so.
        rows = np.arange(dataset.schema.tables["item"])
        rows[FIRST_KNOWN : FIRST_KNOWN + RARE] = UNKNOWN
        dataset.rare_ids = {"item": rows.astype(np.int32)}
    mesh = one_device()
    with jax.set_mesh(mesh):
        model = build_model(config, dataset.schema, (), catalogue=dataset.catalogue)
        state = init_state(model, 0)
        params = {
            name: jax.device_put(value, state.params[name].sharding)
            for name, value in noisy(state.params, 0.3).items()
        }
        run = OpenedRun(model, dataset, 0, dataclasses.replace(state, params=params))
        if not answers:
            return run, []
        return run, list(predicted_items(run, "test", mesh, answers))
