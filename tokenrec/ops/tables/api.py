"""One interface for tables of either placement: replicated (lookup.py), or spread by rows (exchange.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.ops.tables import exchange, lookup
from tokenrec.ops.tables.exchange import CollectedGradients, ExchangePlan, RowRoute
from tokenrec.ops.tables.lookup import RowsState, Stack, unique_ids
from tokenrec.sharding import RULES


class UniqueRows(NamedTuple):
    """The distinct rows of a stack that a step reads: `[u]` ids, or a route of S u places. `inverses`: for each array
    of ids that was looked up, `[B, ...]`, which of these rows each id is.
    """

    rows: jax.Array | RowRoute
    inverses: dict[str, jax.Array]

    @property
    def rounds(self) -> jax.Array:
        """How often rows are exchanged, 0 where they are not."""
        return self.rows.rounds if isinstance(self.rows, RowRoute) else jnp.int32(0)


def storage_spec(stack: Stack) -> tuple[tuple[int, int], PartitionSpec]:
    """Shape and partition of the array of a stack; that of its AdaGrad sums has the first dimension alone.

    Raises:
      InputError: the mesh in use cannot deal the rows of a spread stack out evenly, or they are too many.
    """
    if stack.spread:
        exchange.check_owners(jax.sharding.get_abstract_mesh().size)
        return (exchange.stored_rows(stack.rows), stack.width), RULES("rows", None)
    return (stack.rows, stack.width), RULES(None, None)


def find_unique_rows(stack: Stack, ids: Mapping[str, jax.Array]) -> UniqueRows:
    """The distinct values of `ids`, arrays `[B, ...]` of rows of the stack, all in range."""
    if stack.spread:
        plan = exchange.plan_exchange(
            exchange.stored_rows(stack.rows), sum(array.size for array in ids.values())
        )
        at, inverses = exchange.route(plan, list(ids.values()))
        return UniqueRows(at, dict(zip(ids, inverses, strict=True)))
    flat = [jax.sharding.reshard(array, RULES()).reshape(-1) for array in ids.values()]
    unique = unique_ids(jnp.concatenate(flat), stack.rows)
    start, cut = 0, {}
    for name, array in ids.items():
        inverse = unique.inverse[start : start + array.size].reshape(array.shape)
        cut[name] = jax.sharding.reshard(
            inverse, RULES("batch", *[None] * (array.ndim - 1))
        )
        start += array.size
    return UniqueRows(unique.ids, cut)


def _plan(at: RowRoute, table: jax.Array) -> ExchangePlan:
    return exchange.plan_exchange(table.shape[0], at.places.size)


def gather_rows(table: jax.Array, found: UniqueRows) -> jax.Array:
    """`[u, width]` or `[S u, width]`, the rows that were found; zeros where padded."""
    if isinstance(found.rows, RowRoute):
        return exchange.fetch(_plan(found.rows, table), table, found.rows)
    return lookup.gather_rows(table, found.rows)


def expand_rows(stack: Stack, rows: jax.Array, inverse: jax.Array) -> jax.Array:
    """`[B, ..., width]`, the row of every id, from those of `gather_rows`."""
    return (
        exchange.expand_rows(rows, inverse)
        if stack.spread
        else lookup.expand_rows(rows, inverse)
    )


def collect_gradients(
    table: jax.Array, found: UniqueRows, gradients: jax.Array
) -> CollectedGradients:
    """Gradients of what `gather_rows` returned, summed for each row of the table."""
    if isinstance(found.rows, RowRoute):
        return exchange.collect(_plan(found.rows, table), found.rows, gradients)
    return CollectedGradients(found.rows, gradients, jnp.float32(0))


def update_rows(
    table: jax.Array,
    state: RowsState,
    found: UniqueRows,
    gradients: jax.Array,
    collected: CollectedGradients,
    *,
    rate: jax.Array,
    decay: float,
    apply: jax.Array,
) -> tuple[jax.Array, RowsState]:
    """Row-wise AdaGrad, as in `lookup.update_rows`, with gradients as they were collected."""
    options: dict[str, Any] = {"rate": rate, "decay": decay, "apply": apply}
    if isinstance(found.rows, RowRoute):
        plan = _plan(found.rows, table)
        return exchange.update_spread(
            plan, table, state, found.rows, gradients, collected, **options
        )
    return lookup.update_rows(
        table, state, collected.rows, collected.gradients, **options
    )
