"""One step of a run again: the steps from a checkpoint to it are made as the run made them, and it is looked into.

Same code, batches, keys and mesh: on one kind of device the loss is the one that was logged, bit for bit, as far as the
device computes the same program alike every time. Nothing is written into the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.checkpoint.checkpointer import CheckpointReader
from tokenrec.checkpoint.run_folder import open_model
from tokenrec.checkpoint.warm_start import warm_state
from tokenrec.config import MeshConfig
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch
from tokenrec.data.pipeline import train_batches
from tokenrec.debug.report import (
    LISTED,
    first_not_finite,
    jsonable,
    rank,
    table_gradients,
    worst_samples,
)
from tokenrec.errors import InputError
from tokenrec.models.recommender import batch_layout
from tokenrec.ops.tables.routing import RowRoute
from tokenrec.sharding import check_batch_sizes, compiler_options, make_mesh, to_devices
from tokenrec.state import (
    ModelSpec,
    TrainState,
    abstract_state,
    bind_params,
    init_state,
)
from tokenrec.step import (
    Inputs,
    Inverses,
    gradients,
    micro_batches,
    sample_losses,
    step_inputs,
    train_step,
)
from tokenrec.tokens.embed import inverses
from tokenrec.tokens.layout import ROLES


def replay_run(
    workdir: Path,
    step: int,
    checkpoint: str = "latest-before",
    data: Path | None = None,
    mesh: MeshConfig | None = None,
    *,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Makes step `step` of the run in `workdir`, the number of updates before it, and reports on it.

    Args:
      checkpoint: "latest-before", the newest with no more updates; "start", none; or the step of one.
      data: folder of the data set, instead of the run's.
      mesh: instead of the run's.
      say: gets a line before the long part, with the number of steps to make.

    Returns:
      What can stand in a JSON file; a number that is not finite is a string, "nan" or "inf".

    Raises:
      InputError: no such run, step or checkpoint.
    """
    model, dataset = open_model(workdir, data)
    config = model.config
    if step >= config.optim.steps:
        raise InputError(
            f"--step={step}: the steps of this run are 0 to {config.optim.steps - 1}, by optim.steps"
        )
    made = make_mesh(mesh or config.mesh)
    check_batch_sizes(config, made)
    with jax.set_mesh(made):
        first, state = _state_before(model, workdir, step, checkpoint)
        origin = f"the checkpoint of step {first}" if first is not None else "the start"
        start = first or 0
        say(f"step {step} from {origin}: {step - start:,} steps to make before it")
        step_fn = jax.jit(
            train_step,
            static_argnums=0,
            donate_argnums=1,
            compiler_options=compiler_options(made),
        )
        batches = train_batches(
            dataset,
            config.data,
            start=start,
            steps=step + 1,
            seed=config.seed,
            ages=reads_event_ages(config.model),
        )
        with contextlib.closing(batches):
            applied = []
            for _ in range(start, step):
                state, metrics = step_fn(
                    model, state, to_devices(next(batches).batch, made)
                )
                applied.append(metrics.applied)
            host = next(batches)
        batch = to_devices(host.batch, made)
        seen = jax.device_get(jax.jit(_look, static_argnums=0)(model, state, batch))
        _, metrics = jax.device_get(step_fn(model, state, batch))
    finite = bool(np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm))
    samples = jax.tree.map(
        lambda leaf: _in_batch_order(leaf, config.optim.accumulate), seen["samples"]
    )
    tables = list(table_gradients(model, seen["places"], seen["by_row"]))
    weights = [
        {
            "weight": name,
            "gradient_norm": jsonable(norm),
            "not_finite": int(bad),
            "weight_norm": jsonable(size),
        }
        for name, (norm, bad, size) in seen["weights"].items()
    ]
    return {
        "step": step,
        "checkpoint": first,
        "steps_before": step - start,
        "skipped_before": [
            start + n for n, one in enumerate(jax.device_get(applied)) if not one
        ],
        "loss": jsonable(metrics.loss),
        "gradient_norm": jsonable(metrics.grad_norm),
        "finite": finite,
        "applied": bool(metrics.applied),
        "first_not_finite": None
        if finite
        else first_not_finite(samples, weights, tables),
        "weights": sorted(weights, key=lambda of: rank(of["gradient_norm"]))[:LISTED],
        "tables": sorted(tables, key=lambda of: rank(of["gradient_norm"])),
        "samples": list(worst_samples(model, dataset, host, samples["losses"])),
    }


def _state_before(
    model: ModelSpec, workdir: Path, step: int, checkpoint: str
) -> tuple[int | None, TrainState]:
    """The state to begin with, and the step of its checkpoint; None: the state that the run began with."""
    with CheckpointReader(workdir) as checkpoints:
        steps = checkpoints.steps
        chosen = max((one for one in steps if one <= step), default=None)
        if checkpoint.isdecimal():
            chosen = int(checkpoint)
            if chosen not in steps or chosen > step:
                before = [one for one in steps if one <= step]
                raise InputError(
                    f"--checkpoint={checkpoint}: the run has none before step {step} but {before}; or start"
                )
        if checkpoint != "start" and chosen is not None:
            return checkpoints.load_state(str(chosen), abstract_state(model))
    if model.config.train.warm_start:
        return None, warm_state(model)[0]
    return None, init_state(model, model.config.seed)


def _look(model: ModelSpec, state: TrainState, batch: Batch) -> dict[str, Any]:
    inputs = step_inputs(model, state, batch)
    _, (dense, by_row) = gradients(model, state.params, inputs)
    return {
        "weights": {
            name: (_norm(g), jnp.sum(~jnp.isfinite(g)), _norm(state.params[name]))
            for name, g in dense.items()
        },
        "places": {
            name: found.rows.indices if isinstance(found.rows, RowRoute) else found.rows
            for name, found in inputs.found.items()
        },
        "by_row": by_row,
        "samples": _samples(model, state.params, inputs),
    }


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))


def _samples(
    model: ModelSpec, params: dict[str, jax.Array], inputs: Inputs
) -> dict[str, Any]:
    """Of each sample its loss and, on the way to it, how many numbers are not finite: `[B]` arrays, or with
    micro-batches `[count, B / count]`.
    """

    def of(batch: Batch, reads: Inverses, key: jax.Array) -> dict[str, Any]:
        module = bind_params(model, params)
        entities = model.embedder.entities(inputs.rows, reads, batch)
        tokens, outputs = module.trace(entities, batch, key)
        layout = batch_layout(model.config, model.schema, model.literals, batch)
        roles = [role for role in ROLES if len(layout.rows_of(role))]
        kinds = {
            part: {f.name: f.kind for f in features}
            for part, features in model.embedder.parts.items()
        }
        return {
            "losses": sample_losses(
                model, module, outputs[-1], entities, batch, inputs.counts
            ),
            "features": {
                part: {
                    name: _bad_values(value, kinds[part][name])
                    for name, value in entity.values.items()
                }
                for part, entity in entities.items()
            },
            "tokens": {role: _bad(tokens[:, layout.rows_of(role)]) for role in roles},
            "layers": [_bad(output) for output in outputs],
        }

    count, reads = model.config.optim.accumulate, inverses(inputs.found)
    if count == 1:
        return of(inputs.batch, reads, inputs.key)
    pieces = (*micro_batches((inputs.batch, reads), count), jnp.arange(count))
    return jax.lax.map(
        lambda piece: of(piece[0], piece[1], jax.random.fold_in(inputs.key, piece[2])),
        pieces,
    )


def _bad(x: jax.Array) -> jax.Array:
    return jnp.sum(~jnp.isfinite(x), axis=tuple(range(1, x.ndim)), dtype=jnp.int32)


def _bad_values(x: jax.Array, kind: str) -> jax.Array:
    """A missing number is NaN, and no fault."""
    return _bad(jnp.where(jnp.isnan(x), 0, x) if kind in ("dense", "embedding") else x)


def _in_batch_order(leaf: np.ndarray, count: int) -> np.ndarray:
    """Micro-batch n of m takes the samples n, n + m, ..."""
    return leaf if count == 1 else np.moveaxis(leaf, 0, 1).reshape(-1)
