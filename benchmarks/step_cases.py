"""Configs, schemas and generated batches of the step benchmark."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.timing import Run
from tokenrec.config import Config, DataConfig, ModelConfig, TokensConfig
from tokenrec.config.validate import validate
from tokenrec.data.batch import Batch, Signals
from tokenrec.data.schema import Feature, Schema, Task, columns
from tokenrec.evaluation.evaluate import jit_eval_step
from tokenrec.sharding import to_devices
from tokenrec.state import build_model, init_state
from tokenrec.step import train_step

TABLE_WIDTH = 16
# Batches, or lists of ids, that a variant goes through in turn: rows of a batch seen
# just before would wait in the processor's caches.
POOL = 8


def random_signals(
    features: Sequence[Feature],
    tables: dict[str, int],
    lead: tuple[int, ...],
    random: np.random.Generator,
) -> Signals:
    """Draw uniform ids and normal dense values.

    Args:
      features: features of one part of a batch.
      tables: table -> rows.
      lead: leading dimensions, such as `(B, T)`.
      random: source of random numbers.

    Returns:
      Ids `[*lead, columns] int32` and dense values `[*lead, columns] float32`.
    """
    layout = columns(features)
    ids = np.zeros((*lead, layout.ids_width), np.int32)
    for feature in features:
        if feature.is_integer:
            ids[..., slice(*layout.ids[feature.name])] = random.integers(
                0, tables[feature.table_name], (*lead, feature.length)
            )
    dense = random.normal(size=(*lead, layout.dense_width)).astype(np.float32)
    return Signals(ids, dense)


def random_batch(config: Config, schema: Schema, random: np.random.Generator) -> Batch:
    """Draw a batch with full histories, in which every label is known."""
    size, events = config.data.batch_size, config.data.events
    user_centric = config.data.paradigm == "uc"
    scored = events if user_centric else config.data.candidates
    draw = functools.partial(random_signals, tables=schema.tables, random=random)
    return Batch(
        user=draw(schema.group("user"), lead=(size,)),
        state=draw(schema.state, lead=(size, events)),
        action=draw(schema.group("action"), lead=(size, events)),
        valid=np.ones((size, events), bool),
        target=None if user_centric else draw(schema.state, lead=(size, scored)),
        labels=random.integers(0, 2, (size, scored, len(schema.tasks))).astype(np.int8),
        weight=np.ones((size, scored), np.float32),
    )


def step_runs(config: Config, schema: Schema) -> tuple[Run, Run]:
    """Compile a train step and an eval step, as `train` does.

    Both share one state, which training changes.
    """
    model = build_model(
        validate(config), schema, tuple(task.name for task in schema.tasks)
    )
    train_fn = jax.jit(train_step, static_argnums=0, donate_argnums=1)
    eval_fn = jit_eval_step(model)
    random = np.random.default_rng(0)
    mesh = jax.sharding.get_mesh()
    batches = itertools.cycle(
        [to_devices(random_batch(config, schema, random), mesh) for _ in range(POOL)]
    )
    state = init_state(model, 0)

    def train_run() -> Any:
        nonlocal state
        state, metrics = train_fn(model, state, next(batches))
        return state, metrics

    return train_run, lambda: eval_fn(state, next(batches))


def table_case(rows: int, width: int = TABLE_WIDTH) -> tuple[Config, Schema]:
    """A small model that looks up 20,736 items a step in a table.

    Args:
      rows: rows of the table.
      width: their width.
    """
    features = (
        Feature("item", "categorical", "item"),
        Feature("watched", "dense", "action"),
    )
    config = Config(
        data=DataConfig(path="-", events=80, batch_size=256),
        tokens=TokensConfig(embedding_dim=width, fused=True),
        model=ModelConfig(width=32, heads=2, layers=2, windows=(16, 8)),
    )
    return config, Schema(features, (Task("click"),), {"item": rows})


def stream_schema() -> Schema:
    """26 user fields, 10 of item and context and 3 of the action, all categorical.

    Tables have the sizes of KuaiRand-Pure's.
    """
    # Video, author and music; the others are small.
    sizes = {"item_0": 7_583, "item_1": 6_500, "item_2": 4_000}
    named = [
        (f"{entity}_{i}", entity)
        for entity, n in (("user", 26), ("item", 8), ("context", 2), ("action", 3))
        for i in range(n)
    ]
    features = tuple(Feature(name, "categorical", entity) for name, entity in named)  # type: ignore[arg-type]
    return Schema(
        features,
        (Task("click"), Task("long_view")),
        {name: sizes.get(name, 50) for name, _ in named},
    )


def with_model(config: Config, **model: Any) -> Config:
    """Change fields of `config.model`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def stream_cases() -> dict[str, Config]:
    """NIO and UC at the sizes of the peers' benchmark, 2 full and 2 sliding layers."""
    nio = Config(
        data=DataConfig(path="-", events=50, batch_size=256),
        tokens=TokensConfig(fused=True),
        model=ModelConfig(width=64, layers=4, windows=(32, 16)),
    )
    uc = Config(
        data=DataConfig(path="-", paradigm="uc", events=64, overlap=32, batch_size=64),
        tokens=TokensConfig(user_tokens=4),
        model=nio.model,
    )
    return {
        "NIO, 2 full + 2 sliding": nio,
        "NIO, 2 full + 2 sliding, every row": with_model(nio, needed_rows=False),
        "NIO, 4 full": with_model(nio, windows=()),
        "NIO, 4 full, every row": with_model(nio, windows=(), needed_rows=False),
        "UC, 2 full + 2 sliding": uc,
        "UC, 4 full": with_model(uc, windows=()),
    }


def long_cases() -> dict[str, Config]:
    """30 user tokens and 500 events of two tokens each, 2 full and 2 sliding layers."""
    nio = Config(
        data=DataConfig(path="-", events=500, batch_size=8),
        tokens=TokensConfig(user_tokens=30),
        model=ModelConfig(width=64, layers=4, windows=(32, 16)),
    )
    uc = dataclasses.replace(
        nio,
        data=DataConfig(path="-", paradigm="uc", events=500, overlap=250, batch_size=8),
    )
    dense = {"attention": "dense"}
    every_token = {"needed_rows": False}
    return {
        "NIO, dense masks, every row": with_model(nio, **dense, **every_token),
        "NIO, dense masks, needed rows": with_model(nio, **dense),
        "NIO, tiles, every row": with_model(nio, **every_token),
        "NIO, tiles, needed rows": nio,
        "NIO, tiles, needed rows, 4 full": with_model(nio, windows=()),
        "UC, dense masks, every row": with_model(uc, **dense, **every_token),
        "UC, tiles, needed rows": uc,
    }
