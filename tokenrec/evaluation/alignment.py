"""Evaluate the alignment tasks of a model: how surprising are the answers?

The items are a fixed, evenly spaced choice of those that the tasks train on, so that the
figure shows whether the model has learned the catalogue, not how it does on new items.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tokenrec.alignment import losses_by_task
from tokenrec.data.batch import Batch, Signals
from tokenrec.sharding import RULES, batch_shards, reshard
from tokenrec.state import ModelSpec, TrainState, bind_params

# Items that are asked about; all, where there are fewer.
ITEMS = 1_024
# Items at a time, or one for each part of the mesh's batch: scores of all words are
# large.
TOGETHER = 32


def make_alignment_evaluator(
    model: ModelSpec, mesh: Mesh
) -> Callable[[TrainState, Callable[[], None] | None], dict[str, Any]]:
    """Make the function that evaluates the alignment tasks of a model's states.

    Call the result under the mesh of the state, on all processes.

    Args:
      model: static half of the run, with `alignment`.
      mesh: the mesh.

    Returns:
      A function from a state, and what to call after every batch, to name of a task ->
      `{"template", "loss"}`, the mean of -log P(answer | question) in nats.
    """
    alignment = model.alignment
    assert alignment is not None
    shards = batch_shards(mesh)
    size = -(-TOGETHER // shards) * shards
    count = min(ITEMS, len(alignment.titles))
    # Rows of the last batch that fill it count 0.
    items = (np.arange(count) * len(alignment.titles) // count).astype(np.int32)
    rows, counts = (
        np.pad(x, (0, -count % size)).reshape(-1, size)
        for x in (items, np.ones(count, np.float32))
    )

    @jax.jit
    def total(
        params: dict[str, jax.Array], rows: jax.Array, counts: jax.Array
    ) -> jax.Array:
        """Sum of the losses of each task over a batch, `[tasks]`."""
        rows, counts = (reshard(x, RULES("batch")) for x in (rows, counts))
        batch = _without_events(jnp.stack([rows] * len(alignment.tasks), axis=1))
        losses = losses_by_task(alignment, bind_params(model, params), batch, None)
        return jnp.stack([jnp.sum(loss * counts) for loss in losses])

    def evaluate(
        state: TrainState, between_batches: Callable[[], None] | None = None
    ) -> dict[str, Any]:
        sums = np.zeros(len(alignment.tasks))
        for part in zip(rows, counts, strict=True):
            sums += jax.device_get(total(state.params, *part))
            if between_batches is not None:
                between_batches()
        return {
            task.name: {"template": task.template, "loss": float(loss / count)}
            for task, loss in zip(alignment.tasks, sums, strict=True)
        }

    return evaluate


def _without_events(aligned: jax.Array) -> Batch:
    """A batch of items alone, `aligned: [B, tasks]`."""
    # A batch of 1 has lost its sharding in a slice.
    valid = reshard(aligned[:, :1] < 0, RULES("batch", None))
    nothing = Signals(None, None)
    return Batch(
        user=nothing,
        state=nothing,
        action=nothing,
        valid=valid,
        target=None,
        labels=None,
        weight=None,
        aligned=aligned,
    )
