"""Shipped configs, shrunk through their fields, and batches for them without any data."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.step_cases import random_signals
from tokenrec.config import Config, MeshConfig
from tokenrec.config.load import load_config, shipped_folder
from tokenrec.config.validate import validate
from tokenrec.data.batch import Batch
from tokenrec.data.batch_shapes import batch_shapes, task_names
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.planner.planned_schema import read_planned
from tokenrec.state import ModelSpec, build_model

EVENTS, BATCH, WIDTH, HEAD_DIM, LAYERS = 48, 8, 128, 64, 4
TABLE_ROWS = 1_000
LEVELS = (16, 16, 4)
# Features of every kind, for configs whose data set has no planned schema.
FEATURES = (
    Feature("city", "categorical", "user"),
    Feature("age", "dense", "user", mean=30.0, deviation=10.0),
    Feature("item", "categorical", "item"),
    Feature("tags", "multi_valued", "item", length=3),
    Feature("picture", "embedding", "item", length=5),
    Feature("rate", "dense", "item", per_row=True),
    Feature("tab", "categorical", "context"),
    Feature("clicked", "categorical", "action"),
    Feature("watched", "dense", "action", transform="log1p"),
)
SEMANTIC_ID = Feature(
    "semantic_id", "semantic_id", "item", length=len(LEVELS), codes=max(LEVELS)
)


def small_schema(config: Config) -> Schema:
    """The planned schema of a config with short tables, or one of all kinds."""
    if config.data.schema:
        schema = read_planned(shipped_folder() / "schemas" / config.data.schema)
        tables = {name: min(rows, TABLE_ROWS) for name, rows in schema.tables.items()}
        return dataclasses.replace(schema, tables=tables, items=TABLE_ROWS - 2)
    features, levels = FEATURES, ()
    if config.data.semantic_ids:
        features, levels = (*FEATURES, SEMANTIC_ID), LEVELS
    tables = {
        feature.table_name: TABLE_ROWS for feature in features if feature.is_integer
    }
    if levels:
        tables[SEMANTIC_ID.table_name] = 2 + len(LEVELS) * max(LEVELS)
    tasks = tuple(Task(name) for name in config.data.tasks) or (Task("click"),)
    return Schema(features, tasks, tables, items=TABLE_ROWS - 2, levels=levels)


def small_config(name: str, **model: Any) -> Config:
    """A shipped config of few events, layers and samples, without dropout.

    Args:
      name: name of the config.
      **model: fields of `config.model` to change besides.
    """
    config = load_config(name)
    width = min(config.model.width, WIDTH)
    layers = min(config.model.layers, LAYERS)
    windows = config.model.windows
    # As many sliding layers below a full one as there is room for.
    windows = tuple(min(w, EVENTS // 2) for w in windows[-(layers - 1) :])
    changed = {
        "width": width,
        "heads": max(2, width // HEAD_DIM),
        "layers": layers,
        "windows": windows if layers > 1 else (),
        "ffn_width": min(config.model.ffn_width, 2 * width),
        "dropout": 0.0,
    }
    events = min(config.data.events, EVENTS)
    return validate(
        dataclasses.replace(
            config,
            data=dataclasses.replace(
                config.data,
                path="-",
                # A schema of all kinds has no such features.
                exclude=config.data.exclude if config.data.schema else (),
                events=events,
                overlap=min(config.data.overlap, events // 2),
                candidates=min(config.data.candidates, 4),
                buckets=(),
                batch_size=BATCH,
                eval_batch_size=BATCH,
            ),
            model=dataclasses.replace(config.model, **(changed | model)),
            head=dataclasses.replace(
                config.head, negatives=min(config.head.negatives, 8 * BATCH)
            ),
            optim=dataclasses.replace(config.optim, warmup_steps=0),
            mesh=MeshConfig(1, 1, 1),
        )
    )


def small_model(config: Config) -> ModelSpec:
    """The model of a small config on its small schema."""
    schema = small_schema(config).without(config.data.exclude)
    return build_model(config, schema, task_names(schema, config.data))


def small_batch(model: ModelSpec, seed: int) -> Batch:
    """Draw a batch with histories of random lengths, in NumPy."""
    config, schema = model.config, model.schema
    random = np.random.default_rng(seed)
    shapes = batch_shapes(schema, config.data, batch_size=config.data.batch_size)[
        config.data.events
    ]
    size, events = shapes.valid.shape
    lengths = random.integers(events // 2, events + 1, size)
    valid = np.arange(events) >= events - lengths[:, None]

    def integers(shape: Any, high: int) -> np.ndarray | None:
        if shape is None:
            return None
        return random.integers(0, high, shape.shape, dtype=np.int32)

    def signals(features: tuple[Feature, ...], shape: Any) -> Any:
        lead = shape.ids.shape[:-1]
        return random_signals(features, schema.tables, lead, random)

    reads_events = shapes.weight.shape == valid.shape
    items = integers(shapes.items, schema.items)
    codes = None
    if shapes.codes is not None:
        codes = random.integers(0, schema.levels, shapes.codes.shape, dtype=np.int32)
    labels = None
    if shapes.labels is not None:
        labels = random.integers(-1, 2, shapes.labels.shape, dtype=np.int8)
    return Batch(
        user=signals(schema.group("user"), shapes.user),
        state=signals(schema.state, shapes.state),
        action=signals(schema.group("action"), shapes.action),
        valid=valid,
        target=(
            None if shapes.target is None else signals(schema.state, shapes.target)
        ),
        labels=labels,
        weight=(
            valid.astype(np.float32)
            if reads_events
            else np.ones(shapes.weight.shape, np.float32)
        ),
        items=None if items is None else np.where(valid, items, -1),
        goals=integers(shapes.goals, schema.items),
        codes=codes,
    )
