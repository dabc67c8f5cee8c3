"""Look-up, gradient and update of a spread table by the row exchange."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokenrec.ops.tables import exchange, routing
from tokenrec.ops.tables.lookup import RowsState


def exchange_step(
    table: jax.Array,
    sums: jax.Array,
    ids: jax.Array,
    loss: Callable[[jax.Array], jax.Array],
    rate: float,
) -> tuple[jax.Array, jax.Array, RowsState]:
    """Look ids up, take the gradient of a loss, and update the rows that were read.

    Args:
      table: `[rows, w]`, or packed, as it is stored over all devices.
      sums: `[rows]`, of row-wise AdaGrad, stored alike.
      ids: `[n] int32`.
      loss: of the looked-up rows, `[n, w]` to `[]`.
      rate: learning rate.

    Returns:
      The row of every id `[n, w]`, and the new table and its state.
    """
    plan = routing.plan_exchange(sums.shape[0], ids.size)
    route, (inverse,) = routing.route_ids(plan, [ids])
    rows = exchange.fetch_rows(plan, table, route)

    def loss_of(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        vectors = exchange.expand_rows(rows, inverse)
        return loss(vectors), vectors

    gradients, vectors = jax.grad(loss_of, has_aux=True)(rows)
    collected = exchange.collect_gradients(plan, route, gradients)
    new_table, state = exchange.update_owned_rows(
        plan,
        table,
        RowsState(sums),
        route,
        gradients,
        collected,
        rate=jnp.float32(rate),
        decay=0.0,
        apply=jnp.bool_(True),
    )
    return vectors, new_table, state
