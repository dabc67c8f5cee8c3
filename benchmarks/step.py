"""Time of the compiled train and eval steps on generated batches.

python -m benchmarks.step --tables     # the same step over tables of 10 thousand to 10 million rows
python -m benchmarks.step              # samples a second of streams like KuaiRand's
python -m benchmarks.step --long       # streams of 500 events: attention in tiles against dense masks

All variants take turns within one run, so that load on the machine falls on each alike and their ratios hold. Every
turn trains on another batch: the rows of a batch seen before would wait in the processor's caches. Ids are uniform over
their table, which is harder on the caches than any log. `--tables` needs 5 GB of memory. Two or three minutes each.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.report import write_result
from benchmarks.timing import Run, paired_ratio, take_turns
from tokenrec.config import Config, DataConfig, MeshConfig, ModelConfig, TokensConfig
from tokenrec.config.validate import validate
from tokenrec.data.batch import Batch, Signals
from tokenrec.data.schema import Feature, Schema, Task, columns
from tokenrec.evaluation.evaluate import jit_eval_step
from tokenrec.ops.tables.lookup import (
    RowsState,
    expand_rows,
    gather_rows,
    unique_ids,
    update_rows,
)
from tokenrec.sharding import make_mesh, to_devices
from tokenrec.state import build_model, init_state
from tokenrec.step import train_step

TABLE_ROWS = (10_000, 100_000, 1_000_000, 10_000_000)
TABLE_WIDTH = 16
POOL = 8  # batches or lists of ids that a variant goes through


def random_signals(
    features: Sequence[Feature],
    tables: dict[str, int],
    lead: tuple[int, ...],
    random: np.random.Generator,
) -> Signals:
    """Uniform ids and normal dense values, in the columns that the features have."""
    place = columns(features)
    ids = np.zeros((*lead, place.ids_width), np.int32)
    for feature in features:
        if feature.is_integer:
            at = slice(*place.ids[feature.name])
            ids[..., at] = random.integers(
                0, tables[feature.table_name], (*lead, feature.length)
            )
    return Signals(
        ids, random.normal(size=(*lead, place.dense_width)).astype(np.float32)
    )


def random_batch(config: Config, schema: Schema, random: np.random.Generator) -> Batch:
    """Full histories; every label is known."""
    size, events = config.data.batch_size, config.data.events
    read = events if config.data.paradigm == "uc" else config.data.candidates
    draw = functools.partial(random_signals, tables=schema.tables, random=random)
    return Batch(
        user=draw(schema.group("user"), lead=(size,)),
        state=draw(schema.state, lead=(size, events)),
        action=draw(schema.group("action"), lead=(size, events)),
        valid=np.ones((size, events), bool),
        target=None
        if config.data.paradigm == "uc"
        else draw(schema.state, lead=(size, read)),
        labels=random.integers(0, 2, (size, read, len(schema.tasks))).astype(np.int8),
        weight=np.ones((size, read), np.float32),
    )


def step_runs(config: Config, schema: Schema) -> tuple[Run, Run]:
    """A train step and an eval step, compiled as `train` compiles them; both own one state, which training changes."""
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


def table_case(rows: int) -> tuple[Config, Schema]:
    """A small model that looks up 20,736 items a step in a table of so many rows."""
    features = (
        Feature("item", "categorical", "item"),
        Feature("watched", "dense", "action"),
    )
    config = Config(
        data=DataConfig(path="-", events=80, batch_size=256),
        tokens=TokensConfig(embedding_dim=TABLE_WIDTH, fused=True),
        model=ModelConfig(width=32, heads=2, layers=2, windows=(16, 8)),
    )
    return config, Schema(features, (Task("click"),), {"item": rows})


def lookup_runs(rows: int, ids: int, *, dense: bool) -> Run:
    """The part of a step that touches the table: look up `ids` uniform ids, differentiate, update.

    Row-wise AdaGrad of the rows looked up, or (`dense`) the same equation on the gradient of the whole table.
    """

    def loss(values: jax.Array, target: jax.Array) -> jax.Array:
        return jnp.sum(values * target)

    def by_row(
        table: jax.Array, total: jax.Array, wanted: jax.Array, target: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        unique = unique_ids(wanted, rows)
        gradient = jax.grad(
            lambda some: loss(expand_rows(some, unique.inverse), target)
        )
        found = gradient(gather_rows(table, unique.ids))
        rate, finite = jnp.float32(0.05), jnp.bool_(True)
        table, state = update_rows(
            table,
            RowsState(total),
            unique.ids,
            found,
            rate=rate,
            decay=0.0,
            apply=finite,
        )
        return table, state.sum

    def whole(
        table: jax.Array, total: jax.Array, wanted: jax.Array, target: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        gradient = jax.grad(lambda every: loss(expand_rows(every, wanted), target))(
            table
        )
        total = total + jnp.mean(jnp.square(gradient), axis=-1)
        return table - 0.05 * gradient / (jnp.sqrt(total)[:, None] + 1e-8), total

    step = jax.jit(whole if dense else by_row, donate_argnums=(0, 1))
    random = np.random.default_rng(0)
    wanted = itertools.cycle(
        [
            jnp.asarray(random.integers(0, rows, ids, dtype=np.int32))
            for _ in range(POOL)
        ]
    )
    target = jnp.asarray(random.normal(size=(ids, TABLE_WIDTH)).astype(np.float32))
    held = jax.random.normal(jax.random.key(0), (rows, TABLE_WIDTH)), jnp.zeros((rows,))

    def run() -> Any:
        nonlocal held
        held = step(*held, next(wanted), target)
        return held

    return run


def bench_tables(repeats: int) -> Iterator[dict[str, Any]]:
    """Whole step and its table part by rows of the table, and the dense gradient at most rows."""
    config, _ = table_case(TABLE_ROWS[0])
    ids = config.data.batch_size * (config.data.events + config.data.candidates)
    runs: dict[str, Run] = {}
    for rows in TABLE_ROWS:
        runs[f"step {rows}"] = step_runs(*table_case(rows))[0]
        runs[f"rows {rows}"] = lookup_runs(rows, ids, dense=False)
    runs["dense"] = lookup_runs(TABLE_ROWS[-1], ids, dense=True)
    seconds = take_turns(runs, repeats)
    for rows in TABLE_ROWS:
        step, part = seconds[f"step {rows}"], seconds[f"rows {rows}"]
        dense = seconds["dense"] if rows == TABLE_ROWS[-1] else None
        yield {
            "rows": rows,
            "ids a step": ids,
            "step, ms": 1e3 * statistics.median(step),
            "least, ms": 1e3 * min(step),
            "step / step of 100k": paired_ratio(step, seconds["step 100000"]),
            "table part, ms": 1e3 * statistics.median(part),
            "its least, ms": 1e3 * min(part),
            "part / part of 100k": paired_ratio(part, seconds["rows 100000"]),
            "dense gradient, ms": dense and 1e3 * statistics.median(dense),
            "dense / table part": dense and paired_ratio(dense, part),
        }


def stream_schema() -> Schema:
    """26 user fields, 10 of item and context and 3 of the action, all categorical, with tables as KuaiRand-Pure's."""
    sizes = {
        "item_0": 7_583,
        "item_1": 6_500,
        "item_2": 4_000,
    }  # video, author, music; the others are small
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


def variant(config: Config, **model: Any) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def stream_cases() -> dict[str, Config]:
    """NIO and UC at the sizes of the peers' benchmark: 2 full and 2 sliding layers of width 64."""
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
        "NIO, 2 full + 2 sliding, every row": variant(nio, needed_rows=False),
        "NIO, 4 full": variant(nio, windows=()),
        "NIO, 4 full, every row": variant(nio, windows=(), needed_rows=False),
        "UC, 2 full + 2 sliding": uc,
        "UC, 4 full": variant(uc, windows=()),
    }


def long_cases() -> dict[str, Config]:
    """30 user tokens, 500 events of two tokens each, 2 full and 2 sliding layers of width 64."""
    nio = Config(
        data=DataConfig(path="-", events=500, batch_size=8),
        tokens=TokensConfig(user_tokens=30),
        model=ModelConfig(width=64, layers=4, windows=(32, 16)),
    )
    uc = dataclasses.replace(
        nio,
        data=DataConfig(path="-", paradigm="uc", events=500, overlap=250, batch_size=8),
    )
    return {
        "NIO, dense masks, every row": variant(
            nio, attention="dense", needed_rows=False
        ),
        "NIO, dense masks, needed rows": variant(nio, attention="dense"),
        "NIO, tiles, every row": variant(nio, needed_rows=False),
        "NIO, tiles, needed rows": nio,
        "NIO, tiles, needed rows, 4 full": variant(nio, windows=()),
        "UC, dense masks, every row": variant(uc, attention="dense", needed_rows=False),
        "UC, tiles, needed rows": uc,
    }


def bench_streams(cases: dict[str, Config], repeats: int) -> Iterator[dict[str, Any]]:
    """Rows with a label that a second of training and of evaluation takes in; in NIO that is samples."""
    schema = stream_schema()
    runs: dict[str, Run] = {}
    for name, config in cases.items():
        runs[f"train {name}"], runs[f"eval {name}"] = step_runs(config, schema)
    seconds = take_turns(runs, repeats)
    base = next(iter(cases))
    for name, config in cases.items():
        labelled = (
            config.data.events
            if config.data.paradigm == "uc"
            else config.data.candidates
        )
        count = config.data.batch_size * labelled
        same = count / cases[base].data.batch_size
        row: dict[str, Any] = {
            "stream": name,
            "B": config.data.batch_size,
            "T": config.data.events,
        }
        for kind in ("train", "eval"):
            mine, first = seconds[f"{kind} {name}"], seconds[f"{kind} {base}"]
            row[f"{kind}, labelled rows/s"] = count / statistics.median(mine)
            row[f"{kind}, best"] = count / min(mine)
            row[f"{kind} / first line"] = same * paired_ratio(first, mine)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tables", action="store_true", help="time over tables of growing length"
    )
    parser.add_argument("--long", action="store_true", help="streams of 500 events")
    parser.add_argument("--repeats", type=int, default=20, help="turns of each variant")
    parser.add_argument(
        "--out",
        type=Path,
        help="stem of the result files (default: benchmarks/results/step[_tables])",
    )
    flags = parser.parse_args()
    if flags.tables and flags.long:
        parser.error("--tables and --long are two benchmarks; run one at a time")
    kind = "tables" if flags.tables else "long" if flags.long else ""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        if flags.tables:
            rows = list(bench_tables(flags.repeats))
        else:
            rows = list(
                bench_streams(
                    long_cases() if flags.long else stream_cases(), flags.repeats
                )
            )
    params = {
        "turns": flags.repeats,
        "statistic": "median",
        "device": jax.devices()[0].device_kind,
    }
    if flags.tables:
        params |= {
            "table width": TABLE_WIDTH,
            "model": "width 32, 2 layers, 80 fused events",
        }
        title = "Train step by rows of the embedding table"
    elif flags.long:
        params |= {
            "model": "width 64, 4 layers, windows 32 and 16",
            "user tokens": 30,
            "tokens of an event": 2,
        }
        title = "Train and eval steps of long streams"
    else:
        params |= {
            "model": "width 64, 4 layers, windows 32 and 16",
            "user tokens": "26 in NIO, 4 in UC",
        }
        title = "Train and eval steps"
    command = (
        f"python -m benchmarks.step{kind and f' --{kind}'} --repeats {flags.repeats}"
    )
    stem = flags.out or Path(__file__).parent / "results" / (
        f"step_{kind}" if kind else "step"
    )
    write_result(stem, rows, params, command, title=title)
    print(stem.with_name(stem.name + ".md").read_text())


if __name__ == "__main__":
    main()
