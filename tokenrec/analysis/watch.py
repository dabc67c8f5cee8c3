"""What an evaluation logs of the inside of a model: how many directions event states fill, how open the gates are."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.analysis.event_states import (
    all_rows,
    layer_names,
    real_events,
    states_and_gates,
)
from tokenrec.analysis.rank import LEAST_ROWS, effective_rank, singular_values
from tokenrec.data.dataset import Dataset
from tokenrec.data.pipeline import eval_batches
from tokenrec.sharding import local_batch_indices, to_devices, to_host
from tokenrec.state import ModelSpec, TrainState

Watch = Callable[[TrainState], dict[str, dict[str, float | None]]]


def make_state_logger(model: ModelSpec, dataset: Dataset, mesh: Mesh) -> Watch:
    """`watch(state) -> {"rank": {"tokens", "layer_0", ...}, "gate": {"layer_0", ...}}` of one fixed batch.

    The batch has `data.eval_batch_size` streams, evenly spread over `train.eval_split`; of a split of several windows
    (`data.window_rows`) it is those that lie in the first one. "rank" is the effective rank of
    at most 4,096 of its event states, None where one is not finite; "gate" the mean gate at them, left out without
    `model.gate`. Call it under the mesh, in all processes.
    """
    config, whole = model.config, all_rows(model)
    size = config.data.eval_batch_size
    one_shape = dataclasses.replace(config.data, buckets=())
    split = config.train.eval_split
    every, _ = next(eval_batches(dataset, one_shape, split, limit=size))
    own = local_batch_indices(mesh, size, "data.eval_batch_size")
    batch = to_devices(jax.tree.map(lambda leaf: leaf[own], every.batch), mesh)
    real = np.argwhere(real_events(whole, every.batch))
    streams, rows = real[
        np.linspace(0, len(real) - 1, min(len(real), LEAST_ROWS)).astype(int)
    ].T
    look = jax.jit(functools.partial(states_and_gates, whole))

    def watch(state: TrainState) -> dict[str, dict[str, float | None]]:
        seen = to_host(look(state, batch))
        layers, gates = (
            [of_layer[streams, rows] for of_layer in part] for part in seen
        )
        names = layer_names(len(layers) - 1)
        found: dict[str, dict[str, float | None]] = {
            "rank": dict(zip(names, map(_rank, layers), strict=True))
        }
        if gates:
            found["gate"] = {
                name: float(gate.mean())
                for name, gate in zip(names[1:], gates, strict=True)
            }
        return found

    return watch


def _rank(states: np.ndarray) -> float | None:
    """None where there is none: a log must not end a run that goes on."""
    return (
        effective_rank(singular_values(states))
        if len(states) and np.isfinite(states).all()
        else None
    )
