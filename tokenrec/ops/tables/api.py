"""One interface for tables of either placement: replicated (lookup.py), or spread by rows (exchange.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.ops.tables import exchange, lookup
from tokenrec.ops.tables.exchange import Collected, Exchange, Route
from tokenrec.ops.tables.lookup import RowsState, Stack, unique_ids
from tokenrec.sharding import RULES


class Found(NamedTuple):
    """The distinct rows of a stack that a step reads: `[u]` ids, or a route of S u places. `inverses`: for each array
    of ids that was looked up, `[B, ...]`, which of these rows each id is.
    """

    rows: jax.Array | Route
    inverses: dict[str, jax.Array]

    @property
    def rounds(self) -> jax.Array:
        """How often rows are exchanged, 0 where they are not."""
        return self.rows.rounds if isinstance(self.rows, Route) else jnp.int32(0)


def stored(stack: Stack) -> tuple[tuple[int, int], PartitionSpec]:
    """Shape and partition of the array of a stack; that of its AdaGrad sums has the first dimension alone.

    Raises:
      InputError: the mesh in use cannot deal the rows of a spread stack out evenly, or they are too many.
    """
    if stack.spread:
        exchange.check_owners(jax.sharding.get_abstract_mesh().size)
        return (exchange.stored_rows(stack.rows), stack.width), RULES("rows", None)
    return (stack.rows, stack.width), RULES(None, None)


def find(stack: Stack, ids: Mapping[str, jax.Array]) -> Found:
    """The distinct values of `ids`, arrays `[B, ...]` of rows of the stack, all in range."""
    if stack.spread:
        plan = exchange.plan_exchange(exchange.stored_rows(stack.rows), sum(array.size for array in ids.values()))
        at, inverses = exchange.route(plan, list(ids.values()))
        return Found(at, dict(zip(ids, inverses, strict=True)))
    flat = [jax.sharding.reshard(array, RULES()).reshape(-1) for array in ids.values()]
    unique = unique_ids(jnp.concatenate(flat), stack.rows)
    start, cut = 0, {}
    for name, array in ids.items():
        inverse = unique.inverse[start : start + array.size].reshape(array.shape)
        cut[name] = jax.sharding.reshard(inverse, RULES("batch", *[None] * (array.ndim - 1)))
        start += array.size
    return Found(unique.ids, cut)


def _plan(at: Route, table: jax.Array) -> Exchange:
    return exchange.plan_exchange(table.shape[0], at.places.size)


def gather(table: jax.Array, found: Found) -> jax.Array:
    """`[u, width]` or `[S u, width]`, the rows that were found; zeros where padded."""
    if isinstance(found.rows, Route):
        return exchange.fetch(_plan(found.rows, table), table, found.rows)
    return lookup.gather_rows(table, found.rows)


def spread(stack: Stack, rows: jax.Array, inverse: jax.Array) -> jax.Array:
    """`[B, ..., width]`, the row of every id, from those of `gather`."""
    return exchange.spread_local(rows, inverse) if stack.spread else lookup.spread_rows(rows, inverse)


def collect(table: jax.Array, found: Found, gradients: jax.Array) -> Collected:
    """Gradients of what `gather` returned, summed for each row of the table."""
    if isinstance(found.rows, Route):
        return exchange.collect(_plan(found.rows, table), found.rows, gradients)
    return Collected(found.rows, gradients, jnp.float32(0))


def update(
    table: jax.Array,
    state: RowsState,
    found: Found,
    gradients: jax.Array,
    collected: Collected,
    *,
    rate: jax.Array,
    decay: float,
    apply: jax.Array,
) -> tuple[jax.Array, RowsState]:
    """Row-wise AdaGrad, as in `lookup.update_rows`, with gradients as they were collected."""
    options: dict[str, Any] = {"rate": rate, "decay": decay, "apply": apply}
    if isinstance(found.rows, Route):
        plan = _plan(found.rows, table)
        return exchange.update_spread(plan, table, state, found.rows, gradients, collected, **options)
    return lookup.update_rows(table, state, collected.rows, collected.gradients, **options)
