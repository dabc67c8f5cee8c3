"""Measure a model during training: effective ranks and gates at every evaluation.

`train.log_states` turns it on. The training loop logs the values as `rank/layer_0`,
`gate/layer_0` and so on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.analysis.event_states import (
    layer_names,
    real_events,
    states_and_gates,
    with_all_positions,
)
from tokenrec.analysis.rank import LEAST_ROWS, effective_rank, singular_values
from tokenrec.data.dataset import Dataset
from tokenrec.data.pipeline import eval_batches
from tokenrec.sharding import local_batch_indices, to_devices, to_host
from tokenrec.state import ModelSpec, TrainState

type StateLogger = Callable[[TrainState], dict[str, dict[str, float | None]]]


def make_state_logger(model: ModelSpec, dataset: Dataset, mesh: Mesh) -> StateLogger:
    """Make a function that measures the event states of one fixed batch.

    The batch has `data.eval_batch_size` streams, evenly spread over `train.eval_split`;
    if the split is read in several windows (`data.window_rows`), over the first of
    them. Call the function under the mesh, in all processes.

    Args:
      model: the model that is trained.
      dataset: its data set.
      mesh: the mesh of the training.

    Returns:
      `log_states(state) -> {"rank": {...}, "gate": {...}}`. "rank" has "tokens",
      "layer_0" and so on, the effective rank of at most 4,096 event states, or None
      where one is not finite. "gate" has "layer_0" and so on, the mean gate at these
      events; it is absent without `model.gate`.
    """
    config = model.config
    all_positions = with_all_positions(model)
    size = config.data.eval_batch_size

    # 1. One batch, split over the processes as in training.
    one_shape = dataclasses.replace(config.data, buckets=())
    host, _ = next(
        eval_batches(dataset, one_shape, config.train.eval_split, limit=size)
    )
    local_indices = local_batch_indices(mesh, size, "data.eval_batch_size")
    local_batch = jax.tree.map(lambda leaf: leaf[local_indices], host.batch)
    batch = to_devices(local_batch, mesh)

    # 2. The events to measure: at most LEAST_ROWS, evenly spread over the batch.
    real = np.argwhere(real_events(all_positions, host.batch))
    count = min(len(real), LEAST_ROWS)
    streams, events = real[np.linspace(0, len(real) - 1, count).astype(int)].T

    compute = jax.jit(functools.partial(states_and_gates, all_positions))

    def log_states(state: TrainState) -> dict[str, dict[str, float | None]]:
        layers, gates = (
            [of_layer[streams, events] for of_layer in part]
            for part in to_host(compute(state, batch))
        )
        names = layer_names(len(layers) - 1)
        ranks = map(_rank, layers)
        values: dict[str, dict[str, float | None]] = {
            "rank": dict(zip(names, ranks, strict=True))
        }
        if gates:
            values["gate"] = {
                name: float(gate.mean())
                for name, gate in zip(names[1:], gates, strict=True)
            }
        return values

    return log_states


def _rank(states: np.ndarray) -> float | None:
    """Compute the effective rank of `[n, d]`; None if it is undefined.

    Training continues through a step that is not finite, so measuring must not raise.
    """
    if not len(states) or not np.isfinite(states).all():
        return None
    return effective_rank(singular_values(states))
