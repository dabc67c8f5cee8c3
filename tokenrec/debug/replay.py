"""Replay one step of a run, and report on its loss, gradients and samples.

The steps from a checkpoint to the one in question are made again with the same code,
batches, keys and mesh, so the loss equals the logged one bit for bit if the device
computes the same program alike every time. Nothing is written into the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.checkpoint.device_history import read_history
from tokenrec.checkpoint.pretrained import add_frozen, saved_part
from tokenrec.checkpoint.reader import CheckpointReader
from tokenrec.checkpoint.run_folder import open_model
from tokenrec.checkpoint.warm_start import drawn_state, warm_start_state
from tokenrec.compiler_options import compiler_options, refusals_of
from tokenrec.config import MeshConfig
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch, HostBatch
from tokenrec.data.dataset import Dataset
from tokenrec.data.pipeline import train_batches
from tokenrec.debug.report import (
    MAX_LISTED,
    descending_order,
    first_not_finite,
    table_gradients,
    to_json_number,
    worst_samples,
)
from tokenrec.debug.step_inspection import inspect_step
from tokenrec.elastic import with_split
from tokenrec.errors import InputError
from tokenrec.run_setup import count_epoch_steps
from tokenrec.runtime.paths import as_path
from tokenrec.sharding import (
    check_batch_sizes,
    make_mesh,
    make_run_mesh,
    split_batch,
    to_devices,
)
from tokenrec.state import ModelSpec, TrainState, abstract_state
from tokenrec.step import Metrics, train_step


def replay_run(
    workdir: Path,
    step: int,
    checkpoint: str = "latest-before",
    data: Path | None = None,
    mesh: MeshConfig | None = None,
    *,
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Replay a step and report on it.

    Args:
      workdir: folder of the run.
      step: the step, which is the number of updates made before it.
      checkpoint: where to start: "latest-before" is the newest checkpoint with no more
        updates, "start" none; or the step of a checkpoint.
      data: folder of the data set; None for the one in the run's config.
      mesh: mesh; None for the one in the run's config.
      log: called with a line for the user before the steps are made.

    Returns:
      A report that JSON can represent; a number that is not finite is a string, "nan"
      or "inf".

    Raises:
      InputError: the run, step or checkpoint does not exist.
    """
    # 1. Open the run.
    model, dataset = open_model(workdir, data)
    config = model.config
    epoch_steps = count_epoch_steps(config, dataset)
    model = dataclasses.replace(model, epoch_steps=epoch_steps)
    # Before the mesh is made: a wrong number must not cost a compilation.
    if step >= config.optim.steps:
        raise InputError(
            f"--step={step}: the steps of this run are 0 to {config.optim.steps - 1}, "
            "by optim.steps"
        )
    device_mesh = make_mesh(mesh) if mesh else make_run_mesh(config)
    models = _models_by_step(model, workdir, device_mesh)
    check_batch_sizes(models(step).config, device_mesh)
    chosen = config.train.compiler_options
    with jax.set_mesh(device_mesh), refusals_of(chosen):
        # 2. Restore, and make the steps before the one in question.
        # `first` is None if no checkpoint is used; the steps then start at 0.
        first, state = _state_before(model, workdir, step, checkpoint)
        origin = f"the checkpoint of step {first}" if first is not None else "the start"
        start = first or 0
        log(f"step {step} from {origin}: {step - start:,} steps to make before it")
        step_fn = jax.jit(
            train_step,
            static_argnums=0,
            donate_argnums=1,
            compiler_options=compiler_options(device_mesh, chosen),
        )
        state, host, applied = _advance(
            step_fn, models, dataset, state, device_mesh, start, step
        )
        model = models(step)
        # 3. Inspect the step, then make it.
        batch = to_devices(host.batch, device_mesh)
        inspected = jax.jit(inspect_step, static_argnums=0)(model, state, batch)
        inspected = jax.device_get(inspected)
        # Last, because the step donates the state.
        _, metrics = jax.device_get(step_fn(model, state, batch))
    skipped = [start + n for n, is_applied in enumerate(applied) if not is_applied]
    return {
        "step": step,
        "checkpoint": first,
        "steps_before": step - start,
        "skipped_before": skipped,
    } | _report(model, dataset, host, inspected, metrics)


def _state_before(
    model: ModelSpec, workdir: Path, step: int, checkpoint: str
) -> tuple[int | None, TrainState]:
    """Load or make the state to start from.

    Args:
      model: the model of the run.
      workdir: folder of the run.
      step: the step to replay.
      checkpoint: as in `replay_run`.

    Returns:
      The step of the checkpoint and its state; None and the initial state without one.
    """
    with CheckpointReader(workdir) as checkpoints:
        steps = checkpoints.steps
        chosen = max((known for known in steps if known <= step), default=None)
        if checkpoint.isdecimal():
            chosen = int(checkpoint)
            if chosen not in steps or chosen > step:
                before = [known for known in steps if known <= step]
                raise InputError(
                    f"--checkpoint={checkpoint}: the run has none before step {step} "
                    f"but {before}; or start"
                )
        # Without a checkpoint before the step, "latest-before" starts at the beginning.
        if checkpoint != "start" and chosen is not None:
            abstract = abstract_state(model)
            found, state = checkpoints.load_state(
                str(chosen), saved_part(model, abstract)
            )
            return found, add_frozen(model, state, abstract, workdir)
    if model.config.train.warm_start:
        return None, warm_start_state(model)[0]
    return None, drawn_state(model)


def _models_by_step(
    model: ModelSpec, workdir: Path, mesh: Mesh
) -> Callable[[int], ModelSpec]:
    """Give the model the updates of each step, which followed the devices of the run.

    Micro-batches follow the devices of now: they change nothing but rounding.

    Returns:
      A function of the step.
    """
    history = read_history(as_path(workdir))
    first = history.first_devices if history else None

    @functools.cache
    def with_updates(updates: int) -> ModelSpec:
        split = split_batch(model.config, mesh, first, updates)
        return dataclasses.replace(
            model, config=with_split(model.config, split), updates=split.updates
        )

    def at(step: int) -> ModelSpec:
        use = history.at(step) if history else None
        return with_updates(use.updates if use else 1)

    return at


def _advance(
    step_fn: Callable[[ModelSpec, TrainState, Batch], tuple[TrainState, Metrics]],
    models: Callable[[int], ModelSpec],
    dataset: Dataset,
    state: TrainState,
    mesh: Mesh,
    start: int,
    step: int,
) -> tuple[TrainState, HostBatch, list[np.ndarray]]:
    """Make the steps from `start` up to `step`, without `step` itself.

    Args:
      step_fn: the compiled training step; it donates the state.
      models: the model as it computes a step.
      dataset: the data set of the run.
      state: the state at `start`.
      mesh: the mesh in use.
      start: first step that is made.
      step: step that is not made any more.

    Returns:
      The state before `step`, its batch on the host, and for each step made whether its
      update was applied.
    """
    config = models(step).config
    batches = train_batches(
        dataset,
        config.data,
        start=start,
        # The batch of the step itself, and no more: readers prefetch.
        steps=step + 1,
        seed=config.seed,
        ages=reads_event_ages(config.model),
    )
    applied = []
    with contextlib.closing(batches):
        for number in range(start, step):
            batch = to_devices(next(batches).batch, mesh)
            state, metrics = step_fn(models(number), state, batch)
            applied.append(metrics.applied)
        host = next(batches)
    return state, host, jax.device_get(applied)


def _report(
    model: ModelSpec,
    dataset: Dataset,
    host: HostBatch,
    inspected: dict[str, Any],
    metrics: Metrics,
) -> dict[str, Any]:
    """Report on a step.

    Args:
      model: the model.
      dataset: the data set of the run.
      host: the batch of the step.
      inspected: result of `inspect_step`.
      metrics: metrics of the step.
    """
    is_finite = bool(np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm))
    samples = inspected["samples"]
    tables = list(table_gradients(model, inspected["places"], inspected["by_row"]))
    weights = [
        {
            "weight": name,
            "gradient_norm": to_json_number(gradient_norm),
            "not_finite": int(bad),
            "weight_norm": to_json_number(weight_norm),
        }
        for name, (gradient_norm, bad, weight_norm) in inspected["weights"].items()
    ]
    origin = None if is_finite else first_not_finite(samples, weights, tables)
    return {
        "loss": to_json_number(metrics.loss),
        "gradient_norm": to_json_number(metrics.grad_norm),
        "finite": is_finite,
        "applied": bool(metrics.applied),
        "first_not_finite": origin,
        "weights": sorted(weights, key=_by_gradient)[:MAX_LISTED],
        "tables": sorted(tables, key=_by_gradient),
        "samples": list(worst_samples(model, dataset, host, samples["losses"])),
    }


def _by_gradient(entry: dict[str, Any]) -> float:
    return descending_order(entry["gradient_norm"])
