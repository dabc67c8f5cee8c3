"""Warm start: begin a new run with the weights of another.

Rows of tables are carried over by the value that they stand for, dense weights by name.
All processes do the same, with the vocabularies of both data sets.

The optimizer state starts afresh at step 0. Its moments belong to other gradients under
another schedule, and AdaGrad sums only grow: carried ones would keep the known rows from
learning while new rows learn.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from tokenrec.checkpoint.pretrained import start_from_pretrained
from tokenrec.checkpoint.reader import CheckpointReader
from tokenrec.checkpoint.run_weights import RunWeights, describe_run_weights
from tokenrec.checkpoint.warm_start_plan import open_source_run, plan_warm_start
from tokenrec.checkpoint.warm_start_report import to_text, warm_start_report
from tokenrec.checkpoint.weight_transfer import carry_weights, move_rows, stack_matches
from tokenrec.config import data_directory
from tokenrec.errors import InputError
from tokenrec.ops.tables.api import storage_spec
from tokenrec.runtime import distributed
from tokenrec.runtime.files import write_json
from tokenrec.runtime.paths import as_path, is_remote
from tokenrec.state import ModelSpec, TrainState, init_state
from tokenrec.tuning import is_frozen

REPORT_FILE = "warm_start.json"


def initial_state(model: ModelSpec, workdir: Path) -> TrainState:
    """Make the state that a new run starts from; call it under `jax.set_mesh`.

    The state is drawn from the seed. With `model.pretrained` it has the weights of that
    language model. With `train.warm_start`, weights of that run replace those that
    match, and a report goes to stderr and `WORKDIR/warm_start.json`.

    Args:
      model: the model of the run.
      workdir: folder of the run.

    Raises:
      InputError: `train.warm_start` is `workdir`, or `warm_start_state` raises it.
    """
    source = model.config.train.warm_start
    if not source:
        return drawn_state(model)
    if _resolved(source) == _resolved(workdir):
        raise InputError(
            f"train.warm_start='{source}' is the --workdir itself, which resumes from "
            "its own checkpoints; name another run, or leave the field empty"
        )
    state, report = warm_start_state(model)
    if distributed.is_first_process():
        write_json(as_path(workdir) / REPORT_FILE, report)
        print(to_text(report), file=sys.stderr)
    return state


def drawn_state(model: ModelSpec) -> TrainState:
    """The state of a run at step 0 without `train.warm_start`.

    Raises:
      InputError: `start_from_pretrained` raises it.
    """
    return start_from_pretrained(model, init_state(model, model.config.seed))


def _resolved(path: str | Path) -> Path:
    """The path without links; that of an object store has none."""
    path = as_path(path)
    return path if is_remote(path) else path.resolve()


def warm_start_state(model: ModelSpec) -> tuple[TrainState, dict[str, Any]]:
    """Make a state at step 0 with the weights of `train.warm_start`; write nothing.

    Args:
      model: the model of the run that starts.

    Returns:
      The state, and the report of `warm_start_report`.

    Raises:
      InputError: the run or checkpoint does not exist, its data set is missing or
        another one, or no weights of the run match.
    """
    train = model.config.train
    # 1. Match the weights, without reading any.
    with distributed.raise_on_all_processes():
        source = open_source_run(train.warm_start, train.warm_start_data)
        target = describe_run_weights(model, data_directory(model.config))
        _check_whole(source)
        plan = plan_warm_start(source, target)
    state = drawn_state(model)
    with CheckpointReader(as_path(train.warm_start)) as checkpoints:
        # 2. Dense weights: load the arrays that a match needs, all at once.
        arrays = {
            source.places[name].array
            for name, match in plan.weights.items()
            if not isinstance(match, str)
        }
        step, loaded = _load_arrays(
            checkpoints, train.warm_start_checkpoint, source, params=arrays
        )
        report = warm_start_report(source, target, plan, step)
        # Processes may read copies of the data sets, which must be the same.
        distributed.assert_same_on_all_processes(
            {"train.warm_start": report["step"], "rows carried": report["tables"]}
        )
        params = carry_weights(
            state.params, loaded.params, source, target, plan.weights
        )
        del loaded
        # 3. Tables: one stack of the source is in memory at a time.
        tables = dict(state.tables)
        for stack in source.model.embedder.stacks.values():
            moves = stack_matches(stack, source, target, plan.tables)
            if not moves:
                continue
            _, loaded = _load_arrays(
                checkpoints, str(step), source, tables={stack.name}
            )
            for target_stack, rows in moves:
                tables[target_stack.name] = move_rows(
                    tables[target_stack.name],
                    loaded.tables[stack.name],
                    target_stack,
                    stack,
                    rows,
                )
            # Or the next stack would be loaded while this one is in memory.
            del loaded
    return dataclasses.replace(state, params=params, tables=tables), report


def _check_whole(source: RunWeights) -> None:
    """Raise InputError if the checkpoints of a run lack its frozen weights."""
    method = source.model.config.tuning.method
    if any(is_frozen(source.model.config, name) for name in source.abstract.params):
        raise InputError(
            f"train.warm_start names a run with tuning.method='{method}', whose "
            "checkpoints lack the weights of its language model; start from "
            "model.pretrained, or from what `tokenrec export --format=hf` makes of the "
            "run"
        )


def _load_arrays(
    checkpoints: CheckpointReader,
    which: str,
    source: RunWeights,
    *,
    params: Iterable[str] = (),
    tables: Iterable[str] = (),
) -> tuple[int, TrainState]:
    """Load the named arrays of a checkpoint onto the mesh in use.

    Args:
      checkpoints: checkpoints of the source run.
      which: "best", "latest" or a step.
      source: the source run.
      params: names of dense arrays.
      tables: names of stacks.

    Returns:
      The step, and a state in which `...` stands for all other arrays.
    """
    mesh = jax.sharding.get_mesh()

    def on_mesh(leaf: Any) -> Any:
        sharding = jax.NamedSharding(mesh, leaf.sharding.spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    def table_on_mesh(name: str) -> Any:
        # The source is described on one device; on this mesh the layout may differ.
        shape, spec = storage_spec(source.model.embedder.stacks[name])
        dtype = source.abstract.tables[name].dtype
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=jax.NamedSharding(mesh, spec)
        )

    nothing: TrainState = jax.tree.map(lambda _: ..., source.abstract)
    wanted = dataclasses.replace(
        nothing,
        params=nothing.params
        | {name: on_mesh(source.abstract.params[name]) for name in params},
        tables=nothing.tables | {name: table_on_mesh(name) for name in tables},
    )
    return checkpoints.load_state(which, wanted)
