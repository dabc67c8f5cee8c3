"""Inspect one training step on the devices: gradients, losses and bad numbers.

A number is bad if it is NaN or infinite. The functions here are traced by `jax.jit`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tokenrec.data.batch import Batch
from tokenrec.losses import sample_losses
from tokenrec.micro_batches import (
    Inverses,
    join_samples,
    micro_batch_count,
    micro_batches,
)
from tokenrec.models.stream_layout import batch_layout
from tokenrec.ops.tables.routing import RowRoute
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.step import Inputs, gradients, step_inputs
from tokenrec.tokens.embed import inverses
from tokenrec.tokens.layout import ROLES
from tokenrec.tokens.output_vectors import NEGATIVES_PART


def inspect_step(model: ModelSpec, state: TrainState, batch: Batch) -> dict[str, Any]:
    """Compute the losses and gradients of a step, and where bad numbers are.

    Args:
      model: the model.
      state: the state before the step.
      batch: the batch of the step.

    Returns:
      A dict of
      - weights: dense weight -> (gradient norm, bad numbers in it, norm of the weight);
      - places: stack -> `[n] int32`, where the rows of the batch are stored;
      - by_row: stack -> `[n, w] float32`, gradients of these rows;
      - samples: per-sample losses and counts, as `_inspect_samples` returns them.
    """
    inputs = step_inputs(model, state, batch)
    # The gradients of the step, before clipping.
    _, (dense, by_row) = gradients(model, state.params, inputs)
    return {
        "weights": {
            name: (_norm(g), jnp.sum(~jnp.isfinite(g)), _norm(state.params[name]))
            for name, g in dense.items()
        },
        "places": {
            # Spread tables have a route; the rows of replicated ones are their places.
            name: found.rows.indices if isinstance(found.rows, RowRoute) else found.rows
            for name, found in inputs.unique.items()
        },
        "by_row": by_row,
        "samples": _inspect_samples(model, state.params, inputs),
    }


def _inspect_samples(
    model: ModelSpec, params: dict[str, jax.Array], inputs: Inputs
) -> dict[str, Any]:
    """Compute the loss of each sample, and count the bad numbers on the way to it.

    Args:
      model: the model.
      params: its dense weights.
      inputs: inputs of the step.

    Returns:
      losses: `[B] float32`; features: part -> feature -> `[B] int32`; tokens: role ->
      `[B] int32`; layers: a list of `[B] int32`.
    """

    def inspect(batch: Batch, reads: Inverses, keys: jax.Array) -> dict[str, Any]:
        """Inspect one of M micro-batches; arrays are `[B / M]`."""
        module = bind_params(model, params)
        entities = model.embedder.entities(inputs.rows, reads, batch)
        # The outputs of all layers, where `__call__` returns the last one.
        tokens, outputs = module.trace(entities, batch, keys)
        layout = batch_layout(model.config, model.schema, model.literals, batch)
        roles = [role for role in ROLES if len(layout.positions_of(role))]
        kinds = {
            part: {feature.name: feature.kind for feature in features}
            for part, features in model.embedder.parts.items()
        }
        return {
            # By the counts of the whole step, so that the losses add up to that of the
            # step.
            "losses": sample_losses(
                model, module, outputs[-1], entities, batch, inputs.counts, keys
            ),
            "features": {
                part: {
                    name: _count_bad_values(value, kinds[part][name])
                    for name, value in entity.values.items()
                }
                for part, entity in entities.items()
            },
            "tokens": {
                role: _count_bad(tokens[:, layout.positions_of(role)]) for role in roles
            },
            "layers": [_count_bad(output) for output in outputs],
        }

    count, reads = micro_batch_count(model, inputs.batch), inverses(inputs.unique)
    if count == 1:
        return inspect(inputs.batch, reads, inputs.keys)
    pieces = micro_batches(inputs.batch, reads, inputs.keys, count)
    inspected: dict[str, Any] = jax.lax.map(lambda piece: inspect(*piece), pieces)
    # All micro-batches meet all negatives, `[M, B]`: one of them tells about each
    # sample's own.
    negatives = inspected["features"].pop(NEGATIVES_PART, None)
    inspected = jax.tree.map(join_samples, inspected)
    if negatives is not None:
        inspected["features"][NEGATIVES_PART] = {
            name: bad[0] for name, bad in negatives.items()
        }
    return inspected


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))


def _count_bad(x: jax.Array) -> jax.Array:
    """`[B] int32`: bad numbers of each sample in `x: [B, ...]`."""
    return jnp.sum(~jnp.isfinite(x), axis=tuple(range(1, x.ndim)), dtype=jnp.int32)


def _count_bad_values(x: jax.Array, kind: str) -> jax.Array:
    """`[B] int32`: as `_count_bad`, of a feature; a missing number is NaN, not bad."""
    if kind in ("dense", "embedding"):
        x = jnp.where(jnp.isnan(x), 0, x)
    return _count_bad(x)
