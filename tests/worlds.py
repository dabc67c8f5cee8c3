"""A small schema with all five feature kinds, and random batches of it."""

import jax
import numpy as np

from tokenrec.config import Config, DataConfig, ModelConfig, OptimConfig, TokensConfig
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch, Signals
from tokenrec.data.schema import Feature, Schema, Task, columns
from tokenrec.sharding import RULES, make_mesh

FEATURES = (
    Feature("gender", "categorical", "user"),
    Feature("age", "dense", "user", mean=30.0, deviation=10.0),
    Feature("video", "categorical", "item"),
    Feature("tags", "multi_valued", "item", length=3),
    Feature("picture", "embedding", "item", length=5),
    Feature("code", "semantic_id", "item", length=2, codes=6),
    Feature("rate", "dense", "item", per_row=True),
    Feature("tab", "categorical", "context"),
    Feature("clicked", "categorical", "action"),
    Feature("watched", "dense", "action", transform="log1p"),
)
TABLES = {"gender": 5, "video": 40, "tags": 9, "code": 14, "tab": 6, "clicked": 4}
TEXT_ROWS = 20  # of the table of a text feature, which a test may add
SCHEMA = Schema(FEATURES, (Task("click"), Task("like", 0.5)), TABLES)
TASKS = ("click", "like")


def schema_of(*names: str) -> Schema:
    """The schema of these features alone, which compile in less time than all of them."""
    return Schema(
        tuple(feature for feature in FEATURES if feature.name in names),
        SCHEMA.tasks,
        {table: rows for table, rows in TABLES.items() if table in names},
    )


# For tests of what is not a matter of features.
FEW_FEATURES = schema_of("gender", "video", "picture", "clicked")


def tiny(
    *,
    paradigm="nio",
    events=12,
    candidates=1,
    fused=False,
    tokens=None,
    model=None,
    optim=None,
    batch_size=8,
) -> Config:
    """A config whose windows are shorter than its streams."""
    return Config(
        data=DataConfig(
            path="-",
            paradigm=paradigm,
            events=events,
            candidates=candidates,
            batch_size=batch_size,
        ),
        tokens=TokensConfig(embedding_dim=8, fused=fused, **(tokens or {})),
        model=ModelConfig(
            **{"width": 16, "heads": 2, "layers": 4, "windows": (6, 4)} | (model or {})
        ),
        optim=OptimConfig(**{"steps": 10, "warmup_steps": 2} | (optim or {})),
    )


def signals(features, lead: tuple[int, ...], random: np.random.Generator) -> Signals:
    place = columns(features)
    ids = np.zeros((*lead, place.ids_width), np.int32)
    for f in features:
        if f.is_integer:
            rows = TABLES.get(f.table_name, TEXT_ROWS)
            ids[..., slice(*place.ids[f.name])] = random.integers(
                0, rows, (*lead, f.length)
            )
    dense = random.normal(size=(*lead, place.dense_width)).astype(np.float32)
    dense[random.random(dense.shape) < 0.1] = np.nan
    return Signals(ids, dense)


def random_batch(
    config: Config, batch: int = 8, seed: int = 0, lengths=None, schema: Schema = SCHEMA
) -> Batch:
    """Right-aligned histories of random length, empty ones included, unless `lengths: [batch]` says otherwise."""
    random = np.random.default_rng(seed)
    events, uc = config.data.events, config.data.paradigm == "uc"
    lengths = (
        random.integers(0, events + 1, batch)
        if lengths is None
        else np.asarray(lengths)
    )
    valid = np.arange(events)[None] >= events - lengths[:, None]
    read = events if uc else config.data.candidates
    return Batch(
        user=signals(schema.group("user"), (batch,), random),
        state=signals(schema.state, (batch, events), random),
        action=signals(schema.group("action"), (batch, events), random),
        valid=valid,
        target=None if uc else signals(schema.state, (batch, read), random),
        labels=random.integers(-1, 2, (batch, read, 2)).astype(np.int8),
        weight=(valid if uc else np.ones((batch, read))).astype(np.float32),
        ages=random_ages(valid, random) if reads_event_ages(config.model) else None,
    )


def random_ages(valid: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """`[B, T] int32`, from seconds to years, falling to the newest event; some events share their second."""
    apart = np.floor(10 ** random.uniform(0, 7, valid.shape)) * random.integers(
        0, 2, valid.shape
    )
    return np.where(valid, np.cumsum(apart[:, ::-1], axis=1)[:, ::-1], 0).astype(
        np.int32
    )


def one_device():
    """A mesh of a single device."""
    return mesh_of(1, 1, 1)


def mesh_of(data: int, fsdp: int, tensor: int, context: int = 1):
    from tokenrec.config import MeshConfig

    count = data * fsdp * tensor * context
    return make_mesh(MeshConfig(data, fsdp, tensor, context), jax.devices()[:count])


def place(batch: Batch, mesh) -> Batch:
    return jax.tree.map(
        lambda x: jax.device_put(
            x, jax.NamedSharding(mesh, RULES("batch", *[None] * (x.ndim - 1)))
        ),
        batch,
    )
