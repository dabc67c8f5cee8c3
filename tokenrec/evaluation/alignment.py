"""Evaluate the alignment tasks of a model: how surprising are the answers?

The items are a fixed, evenly spaced choice of those that the tasks train on, so that the
figure shows whether the model has learned the catalogue, not how it does on new items.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.alignment import losses_by_task
from tokenrec.data.batch import Batch, Signals
from tokenrec.sharding import RULES
from tokenrec.state import ModelSpec, TrainState, bind_params

# Items that are asked about; all, where there are fewer.
ITEMS = 1_024


def make_alignment_evaluator(
    model: ModelSpec,
) -> Callable[[TrainState], dict[str, float]]:
    """Make the function that evaluates the alignment tasks of a model's states.

    Call the result under the mesh of the state, on all processes.

    Args:
      model: static half of the run, with `alignment`.

    Returns:
      A function from a state to the mean of -log P(answer | question), in nats, of each
      template.
    """
    alignment = model.alignment
    assert alignment is not None
    size = model.config.data.eval_batch_size
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
        rows, counts = (jax.sharding.reshard(x, RULES("batch")) for x in (rows, counts))
        batch = _without_events(jnp.stack([rows] * len(alignment.tasks), axis=1))
        losses = losses_by_task(alignment, bind_params(model, params), batch, None)
        return jnp.stack([jnp.sum(loss * counts) for loss in losses])

    def evaluate(state: TrainState) -> dict[str, float]:
        sums = [total(state.params, *part) for part in zip(rows, counts, strict=True)]
        means = np.sum(jax.device_get(sums), axis=0) / count
        return {
            task.template: float(mean)
            for task, mean in zip(alignment.tasks, means, strict=True)
        }

    return evaluate


def _without_events(aligned: jax.Array) -> Batch:
    """A batch of items alone, `aligned: [B, tasks]`."""
    valid = aligned[:, :1] < 0
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
