"""A new run that begins with weights of another: rows of tables by the value they stand for, dense weights by name.

Rows move between devices in pieces, by a sum in which all but their owner say 0: no table is ever whole on a host, nor
on a device that held only its share. Every process does the same, with the vocabularies of both data sets.

The optimizer starts afresh at step 0, the AdaGrad sums of all rows with it: its memory is of other gradients under
another schedule, and sums only grow, so that carried ones would hold known rows still while new ones learn.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.checkpoint.checkpointer import CheckpointReader
from tokenrec.checkpoint.run_folder import SCHEMA_FILE, load_run_config
from tokenrec.checkpoint.weight_matching import (
    MatchedRows,
    RunWeights,
    describe_run_weights,
    match_table,
    match_weight,
    other_window,
    stack_of,
)
from tokenrec.config import Config, data_directory
from tokenrec.data.metadata import Metadata
from tokenrec.data.pipeline import task_names
from tokenrec.data.schema import Schema
from tokenrec.data.semantic import SEMANTIC_ID
from tokenrec.errors import InputError
from tokenrec.ops.tables.lookup import Stack
from tokenrec.ops.tables.storage import stored_rows, to_storage_index
from tokenrec.runtime import distributed
from tokenrec.runtime.files import write_json
from tokenrec.sharding import AXES, RULES
from tokenrec.state import ModelSpec, TrainState, build_model, init_state

REPORT_FILE = "warm_start.json"
PIECE_ROWS = 1 << 18  # moved at once: 64 MiB at 64 numbers a row
_SHOWN = 8


class Plan(NamedTuple):
    """What is carried.

    Attributes:
      tables: rows of each table here, or why none is.
      weights: entries of each dense weight here, None for all of it, or why none is.
    """

    tables: dict[str, MatchedRows | str]
    weights: dict[str, MatchedRows | str | None]


def first_state(model: ModelSpec, workdir: Path) -> TrainState:
    """The state that a new run starts from, under the mesh in use: drawn from the seed and, with `train.warm_start`,
    taken from that run as far as it goes. The listing of that goes to stderr and to `warm_start.json`.

    Raises:
      InputError: as `warm_state`, or the run named is that of `workdir`.
    """
    source = model.config.train.warm_start
    if not source:
        return init_state(model, model.config.seed)
    if Path(source).resolve() == Path(workdir).resolve():
        raise InputError(
            f"train.warm_start='{source}' is the --workdir itself, which goes on from its own checkpoints; name "
            "another run, or leave the field empty"
        )
    state, listing = warm_state(model)
    if distributed.is_first_process():
        write_json(Path(workdir) / REPORT_FILE, listing)
        print(to_text(listing), file=sys.stderr)
    return state


def warm_state(model: ModelSpec) -> tuple[TrainState, dict[str, Any]]:
    """A state at step 0 with the weights of the run `train.warm_start`, and the listing of them; writes nothing.

    Raises:
      InputError: no such run or checkpoint, its data set is not there or another, or nothing of the run fits.
    """
    train = model.config.train
    with distributed.raise_on_all_processes():
        there = _open_source(train.warm_start, train.warm_start_data)
        here = describe_run_weights(model, data_directory(model.config))
        plan = _plan(there, here)
    state = init_state(model, model.config.seed)
    with CheckpointReader(Path(train.warm_start)) as checkpoints:
        arrays = {
            there.places[name].array
            for name, found in plan.weights.items()
            if not isinstance(found, str)
        }
        step, loaded = _load(
            checkpoints, train.warm_start_checkpoint, there, params=arrays
        )
        listing = _listing(there, here, plan, step)
        distributed.assert_same_on_all_processes(
            {"train.warm_start": listing["step"], "rows carried": listing["tables"]}
        )
        params = _carry_weights(state.params, loaded.params, there, here, plan)
        tables = dict(state.tables)
        for source in there.model.embedder.stacks.values():
            moves = _moves(source, here, there, plan)
            if moves:
                held = _load(checkpoints, str(step), there, tables={source.name})[
                    1
                ].tables[source.name]
                for target, rows in moves:
                    tables[target.name] = _move(
                        tables[target.name], held, target, source, rows
                    )
    return dataclasses.replace(state, params=params, tables=tables), listing


def _open_source(workdir: str, moved: str) -> RunWeights:
    try:
        config = load_run_config(Path(workdir), Path(moved) if moved else None)
        path = Path(workdir) / SCHEMA_FILE
        if not path.is_file():
            raise InputError(
                f"it has no {SCHEMA_FILE}; give the folder that `tokenrec train` wrote"
            )
        schema = Schema.from_json(json.loads(path.read_text()))
        data = data_directory(config)
        _check_data(data, schema, config)
        return describe_run_weights(
            build_model(config, schema, task_names(schema, config.data)), data
        )
    except InputError as error:
        raise InputError(f"train.warm_start='{workdir}': {error}") from error


def _check_data(data: Path, schema: Schema, config: Config) -> None:
    """A folder that was prepared again has other vocabularies than those that the rows were learned under."""
    try:
        known = Metadata.load(data).schema
    except InputError as error:
        raise InputError(
            f"{error}; if it lies elsewhere now, say where in train.warm_start_data"
        ) from error
    added = {SEMANTIC_ID} if config.data.semantic_ids else set()
    features = [f for f in schema.features if f.name not in added]
    tables = {f.table_name for f in features if f.is_integer}
    same = all(f in known.features for f in features) and known.items == schema.items
    if not same or any(
        known.tables.get(name) != schema.tables[name] for name in tables
    ):
        raise InputError(
            f"'{data}' is not the data set that it was trained on (the run's {SCHEMA_FILE} has other features, table "
            "sizes or normalisation), and no other names the rows of its tables; say in train.warm_start_data where "
            "that one lies"
        )


def _plan(there: RunWeights, here: RunWeights) -> Plan:
    plan = Plan(
        {name: match_table(name, there, here) for name in here.model.embedder.tables},
        {name: match_weight(name, there, here) for name in here.places},
    )
    rows = any(
        isinstance(found, MatchedRows) and found.known for found in plan.tables.values()
    )
    if not rows and all(isinstance(found, str) for found in plan.weights.values()):
        raise InputError(
            f"train.warm_start='{here.model.config.train.warm_start}': nothing of that run fits this one: "
            f"{_first((plan.tables | plan.weights).items())}; name another run, or leave the field empty"
        )
    return plan


def _load(
    checkpoints: CheckpointReader,
    which: str,
    there: RunWeights,
    *,
    params: Iterable[str] = (),
    tables: Iterable[str] = (),
) -> tuple[int, TrainState]:
    """The named arrays of a checkpoint, laid out over the mesh in use; `...` stands for the others."""
    mesh = jax.sharding.get_mesh()

    def placed(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, leaf.sharding.spec)
        )

    left: TrainState = jax.tree.map(lambda _: ..., there.abstract)
    wanted = dataclasses.replace(
        left,
        params=left.params
        | {name: placed(there.abstract.params[name]) for name in params},
        tables=left.tables
        | {name: placed(there.abstract.tables[name]) for name in tables},
    )
    return checkpoints.load_state(which, wanted)


def _carry_weights(
    fresh: dict[str, jax.Array],
    loaded: dict[str, jax.Array],
    there: RunWeights,
    here: RunWeights,
    plan: Plan,
) -> dict[str, jax.Array]:
    params, layers = dict(fresh), dict[str, dict[int, jax.Array]]()
    for name, found in plan.weights.items():
        if isinstance(found, str):
            continue
        source, target = there.places[name], here.places[name]
        weight = (
            loaded[source.array]
            if source.layer is None
            else loaded[source.array][source.layer]
        )
        if found is not None:
            weight = _carry_entries(
                fresh[target.array], weight, found, here.keys[name].axis
            )
        if target.layer is None:
            params[target.array] = weight
        else:
            layers.setdefault(target.array, {})[target.layer] = weight
    for name, some in layers.items():
        params[name] = jnp.stack(
            [some.get(layer, fresh[name][layer]) for layer in range(len(fresh[name]))]
        )
    return params


def _carry_entries(
    fresh: jax.Array, loaded: jax.Array, found: MatchedRows, axis: int
) -> jax.Array:
    """No mesh axis splits `axis`."""
    source = np.full(fresh.shape[axis], -1)
    source[found.target] = found.source
    at = (slice(None),) * axis + (np.maximum(source, 0),)
    taken = loaded.at[at].get(out_sharding=jax.typeof(fresh).sharding.spec)
    return jnp.where(
        (source >= 0).reshape((-1,) + (1,) * (fresh.ndim - axis - 1)), taken, fresh
    )


def _moves(
    source: Stack, here: RunWeights, there: RunWeights, plan: Plan
) -> list[tuple[Stack, MatchedRows]]:
    """Stacks here that take rows of the stack `source`, and which; numbers are those of rows of the stacks."""
    moves = []
    for name, found in plan.tables.items():
        if isinstance(found, MatchedRows) and stack_of(there.model, name) is source:
            target = stack_of(here.model, name)
            rows = MatchedRows(
                source.offsets[name] + found.source,
                target.offsets[name] + found.target,
                found.known,
            )
            moves.append((target, rows))
    return moves


def _move(
    table: jax.Array, held: jax.Array, target: Stack, source: Stack, rows: MatchedRows
) -> jax.Array:
    """`table`, the array of the stack `target`, with rows of `held`, that of `source`; it is donated."""
    to, of = _stored(target, rows.target), _stored(source, rows.source)
    size = min(PIECE_ROWS, len(to))
    for start in range(0, len(to), size):
        part = slice(start, start + size)
        filled = [
            np.pad(at[part], (0, size - len(at[part])), constant_values=-1)
            for at in (to, of)
        ]
        table = _move_piece(table, held, *filled, target.spread, source.spread)
    return table


def _stored(stack: Stack, rows: np.ndarray) -> np.ndarray:
    """`[n] int32`: where rows of a stack lie in its array."""
    at = to_storage_index(rows, stored_rows(stack.rows)) if stack.spread else rows
    return np.asarray(at, np.int32)


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=0)
def _move_piece(
    table: jax.Array,
    held: jax.Array,
    to: jax.Array,
    of: jax.Array,
    to_spread: bool,
    of_spread: bool,
) -> jax.Array:
    """Row `of[i]` of `held` becomes row `to[i]` of `table`; nothing where -1."""

    def own(array: jax.Array, at: jax.Array, spread: bool) -> jax.Array:
        at = at - jax.lax.axis_index(AXES) * array.shape[0] if spread else at
        return jnp.where((at >= 0) & (at < array.shape[0]), at, array.shape[0])

    def local(
        table: jax.Array, held: jax.Array, to: jax.Array, of: jax.Array
    ) -> jax.Array:
        rows = held.at[own(held, of, of_spread)].get(mode="fill", fill_value=0)
        if of_spread:
            rows = jax.lax.psum(rows, AXES)
        return table.at[own(table, to, to_spread)].set(rows, mode="drop")

    lies = [
        RULES("rows" if spread else None, None) for spread in (to_spread, of_spread)
    ]
    made = jax.shard_map(
        local,
        in_specs=(*lies, RULES(None), RULES(None)),
        out_specs=lies[0],
        check_vma=False,
    )
    return made(table, held, to, of)


def _listing(
    there: RunWeights, here: RunWeights, plan: Plan, step: int
) -> dict[str, Any]:
    tables: dict[str, dict[str, Any]] = {}
    for name, found in plan.tables.items():
        rows, before = (
            here.model.embedder.tables[name],
            there.model.embedder.tables.get(name, 0),
        )
        carried = len(found.target) if isinstance(found, MatchedRows) else 0
        tables[name] = {
            "carried": carried,
            "new": rows - carried,
            "dropped": before - carried,
        }
        if isinstance(found, str):
            tables[name]["reason"] = found
    weights: dict[str, dict[str, Any]] = {}
    for name, same in plan.weights.items():
        if isinstance(same, str):
            weights[name] = {"carried": False, "reason": same}
            continue
        weights[name] = {"carried": True}
        if same is not None:
            count = len(same.target)
            sizes = [
                side.shape(name)[here.keys[name].axis] - count for side in (here, there)
            ]
            weights[name] |= {
                "entries": {"carried": count, "new": sizes[0], "dropped": sizes[1]}
            }
        window = other_window(name, there, here)
        if window:
            weights[name]["window"] = window
    train = here.model.config.train
    return {
        "run": train.warm_start,
        "checkpoint": train.warm_start_checkpoint,
        "step": step,
        "data": str(there.data),
        "tables": tables,
        "tables_left": sorted(
            there.model.embedder.tables.keys() - here.model.embedder.tables.keys()
        ),
        "weights": weights,
        "weights_left": sorted(there.places.keys() - here.places.keys()),
    }


def to_text(listing: dict[str, Any]) -> str:
    """The listing for a reader: every table, and dense weights by reason."""
    lines = [
        f"warm start from {listing['run']} at step {listing['step']:,} ({listing['checkpoint']})"
    ]
    lines.append(f"  {'table':24} {'carried':>12} {'new':>12} {'dropped':>12}")
    for name, rows in listing["tables"].items():
        counts = " ".join(f"{rows[key]:12,}" for key in ("carried", "new", "dropped"))
        lines.append(
            f"  {name:24} {counts}"
            + (f"  ({rows['reason']})" if "reason" in rows else "")
        )
    weights = listing["weights"]
    fresh = {name: of["reason"] for name, of in weights.items() if not of["carried"]}
    lines.append(
        f"  dense weights: {len(weights) - len(fresh)} carried, {len(fresh)} fresh"
    )
    for name, of in weights.items():
        if "entries" in of:
            lines.append(
                f"    {name}: "
                + ", ".join(
                    f"{count:,} entries {key}" for key, count in of["entries"].items()
                )
            )
    if fresh:
        lines.append(f"    fresh: {_first(fresh.items())}")
    windows = {name: of["window"] for name, of in weights.items() if "window" in of}
    if windows:
        lines.append(f"    of layers with another window: {_first(windows.items())}")
    for kind in ("tables", "weights"):
        left = listing[f"{kind}_left"]
        if left:
            lines.append(
                f"  {kind} of that run that have no place here: {_first((name, '') for name in left)}"
            )
    return "\n".join(lines)


def _first(reasons: Iterable[tuple[str, Any]]) -> str:
    said = [f"{name}: {reason}" if reason else name for name, reason in reasons]
    return "; ".join(said[:_SHOWN]) + (
        f"; and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    )
