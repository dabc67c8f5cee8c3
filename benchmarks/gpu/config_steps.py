"""A train step of each shipped config on the device against that of the CPU.

Configs are shrunk through their fields (`benchmarks.gpu.small_configs`), without
dropout; weights, batch and keys are the same. The CPU computes in float32. The device
computes in float32 with "highest" products, and as the config is shipped: in its dtype,
with JAX's default precision, which for float32 is TF32 on such a GPU. Errors:

- `loss`, `grad_norm`: relative to the CPU's;
- `gradient`: norm of the difference of all dense gradients, as Adam's first moments
  hold them, relative to their norm;
- `rows`: the same of the updated tables, relative to the norm of their update;
- `params`: norm of the difference of the updated weights, relative to their norm.
  Adam's first step divides a gradient by itself, so that the sign of a tiny gradient
  counts as much as a large one; it is the rounding that decides such a sign.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from benchmarks.gpu.record import Recorder
from benchmarks.gpu.small_configs import small_batch, small_config, small_model
from tokenrec.config import MeshConfig
from tokenrec.config.load import shipped_configs
from tokenrec.data.batch import Batch
from tokenrec.sharding import make_mesh, to_devices
from tokenrec.state import ModelSpec, TrainState, abstract_state, init_state
from tokenrec.step import Metrics, train_step

TABLE = "train steps"
REHEARSED = ("synthetic",)
# Begun first, in case the time runs out.
FIRST = ("kuairand_27k", "lrm_1b", "kuairand_pure_uc")
# Tolerances of float32 with "highest" products. A step from weights that differ by 1e-7
# of themselves moves the gradient by 1.6e-6 and the weights by 1.5e-6 (`synthetic`).
EXACT = {
    "loss": 1e-5,
    "grad_norm": 1e-4,
    "gradient": 1e-4,
    "rows": 1e-3,
    "params": 2e-4,
}
# Tolerances as shipped. `kuairand_27k` in bfloat16 on a CPU: loss 1.1e-3, gradient and
# rows 0.033, weights 2.4e-3; TF32 rounds less.
ROUNDED = {
    "loss": 1e-2,
    "grad_norm": 2e-2,
    "gradient": 0.15,
    "rows": 0.15,
    "params": 1.5e-2,
}


class Result(NamedTuple):
    """What a step leaves, on the host."""

    before: TrainState
    after: TrainState
    metrics: Metrics


def run_step(
    model: ModelSpec,
    state: TrainState,
    batch: Batch,
    device: jax.Device,
    precision: str | None,
) -> Result:
    """Make a step on a device. It may run in any thread.

    Args:
      model: the static half of the model.
      state: the state before the step, on the host.
      batch: the batch, on the host.
      device: where to compute.
      precision: of float32 products; None: JAX's default.
    """
    mesh = make_mesh(MeshConfig(1, 1, 1), [device])
    exact = (
        jax.default_matmul_precision(precision)
        if precision
        else contextlib.nullcontext()
    )
    with jax.set_mesh(mesh), exact:
        shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model))
        placed = jax.device_put(state, shardings)
        step = jax.jit(train_step, static_argnums=0)
        after, metrics = step(model, placed, to_devices(batch, mesh))
        return Result(state, *jax.device_get((after, metrics)))


def initial_state(model: ModelSpec) -> TrainState:
    """Draw a state on the CPU, and fetch it."""
    with jax.set_mesh(make_mesh(MeshConfig(1, 1, 1), jax.devices("cpu")[:1])):
        return jax.device_get(init_state(model, 0))


def differences(result: Result, expected: Result) -> dict[str, float]:
    """The errors of a step, by the names of `EXACT`."""

    def norm(tree: Any) -> float:
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
        return float(np.sqrt(sum(np.sum(np.square(x)) for x in leaves)))

    def apart(a: Any, b: Any) -> float:
        return norm(jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), a, b))

    def moments(state: TrainState) -> Any:
        return optax.tree_utils.tree_get(state.opt_state["dense"], "mu")

    after, wanted = result.after, expected.after
    loss, grad_norm = (
        abs(float(a) - float(b)) / abs(float(b))
        for a, b in zip(result.metrics[:2], expected.metrics[:2], strict=True)
    )
    return {
        "loss": loss,
        "grad_norm": grad_norm,
        "gradient": apart(moments(after), moments(wanted)) / norm(moments(wanted)),
        "rows": apart(after.tables, wanted.tables)
        / apart(wanted.tables, expected.before.tables),
        "params": apart(after.params, wanted.params) / norm(wanted.params),
    }


PRECISIONS = ("CPU", "float32, highest", "as shipped")


def start(
    pool: concurrent.futures.Executor, name: str
) -> dict[str, concurrent.futures.Future[Result]]:
    """Draw the state of a config, and start its step in each precision."""
    exact = small_model(small_config(name, dtype="float32"))
    shipped = small_model(small_config(name))
    state, batch = initial_state(exact), small_batch(exact, 0)
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    arguments = (
        (exact, cpu, "highest"),
        (exact, device, "highest"),
        (shipped, device, None),
    )
    return {
        name: pool.submit(run_step, model, state, batch, device, precision)
        for name, (model, device, precision) in zip(PRECISIONS, arguments, strict=True)
    }


def compare(recorder: Recorder, seconds: float) -> None:
    """Add a row for each config and precision.

    Args:
      recorder: the record.
      seconds: left of the budget when this must stop.
    """
    names = REHEARSED
    if not recorder.rehearse:
        names = tuple(sorted(shipped_configs(), key=lambda name: name not in FIRST))
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count())
    started = {}
    try:
        for name in names:
            if recorder.out_of_time(seconds + 10, table=TABLE, config=name):
                continue
            with recorder.case(table=TABLE, config=name):
                started[name] = start(pool, name)
        for name, steps in started.items():
            for precision in PRECISIONS[1:]:
                row = {"config": name, "precision": precision}
                with recorder.case(table=TABLE, **row):
                    left = max(recorder.remaining() - seconds, 0)
                    expected = steps["CPU"].result(left)
                    add_row(recorder, row, steps[precision].result(left), expected)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def add_row(
    recorder: Recorder, row: dict[str, Any], result: Result, expected: Result
) -> None:
    """Add the errors of a step; it fails if one is above its tolerance."""
    tolerances = EXACT if row["precision"] == "float32, highest" else ROUNDED
    parts = differences(result, expected)
    # The error nearest to its tolerance, or beyond; NaN is beyond.
    shares = {name: parts[name] / tolerances[name] for name in parts}
    worst = float(np.nan_to_num(list(shares.values()), nan=np.inf).max())
    recorder.check(
        worst,
        1.0,
        table=TABLE,
        **row,
        loss=float(result.metrics.loss),
        cpu_loss=float(expected.metrics.loss),
        **{f"{name} error": value for name, value in parts.items()},
        applied=bool(result.metrics.applied),
    )
