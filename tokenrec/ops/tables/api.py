"""Embedding look-up and update: one interface for replicated and for spread tables.

A train step uses it in this order, once per stack of tables:

    unique = find_unique_rows(stack, ids)          # distinct rows that the batch reads
    rows = gather_rows(stack, table, unique)       # each of them once
    vectors = expand_rows(stack, rows, unique.inverses[name])     # a row per id
    ...                                            # loss, and the gradient of `rows`
    collected = collect_gradients(stack, unique, gradients)
    table, state = update_rows(stack, table, state, unique, gradients, collected, ...)

A stack is replicated over the mesh (`tokenrec.ops.tables.lookup`) or spread by rows
over all devices (`tokenrec.ops.tables.exchange`), as `Stack.spread` says. The array of
a spread stack has the layout of `tokenrec.ops.tables.packed`; its AdaGrad sums are
`[rows]` in either layout.

Shape letters: B streams, u distinct rows, S batch shards, w the width of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.errors import InputError
from tokenrec.ops.tables import exchange, lookup, packed, routing
from tokenrec.ops.tables.exchange import CollectedGradients
from tokenrec.ops.tables.lookup import RowsState, Stack, unique_ids
from tokenrec.ops.tables.routing import ExchangePlan, RowRoute
from tokenrec.ops.tables.storage import check_owners
from tokenrec.sharding import RULES


class UniqueRows(NamedTuple):
    """The distinct rows of a stack that a step reads.

    Attributes:
      rows: `[u] int32`, distinct rows of a replicated stack; for a spread stack a
        route, with u distinct rows for each of the S batch shards.
      inverses: for each array of ids that was looked up an array `[B, ...] int32`,
        which of the distinct rows each id is.
    """

    rows: jax.Array | RowRoute
    inverses: dict[str, jax.Array]

    @property
    def rounds(self) -> jax.Array:
        """Number of exchanges of a step, `[] int32`; 0 for a replicated stack."""
        return self.rows.rounds if isinstance(self.rows, RowRoute) else jnp.int32(0)


def storage_spec(stack: Stack) -> tuple[tuple[int, int], PartitionSpec]:
    """Compute shape and partition of the array of a stack under the mesh in use.

    Its AdaGrad sums, `[Stack.stored_rows]`, are split as its first dimension is.

    Raises:
      InputError: the rows of a spread stack do not divide evenly over the mesh in use,
        or they are too many.
    """
    if stack.spread:
        check_owners(jax.sharding.get_abstract_mesh().size)
        return stored_shape(stack), RULES("rows", None)
    return stored_shape(stack), RULES(None, None)


def stored_shape(stack: Stack) -> tuple[int, int]:
    """Compute the shape of the array of a stack under the mesh in use, if there is one.

    Returns:
      `(rows, w)`, or the shape of packed lines.
    """
    # A replicated stack is small, and so is a copy of it with padded rows.
    if not stack.spread:
        return stack.rows, stack.width
    devices = jax.sharding.get_abstract_mesh().size
    return packed.packed_shape(stack.stored_rows, stack.width, devices)


def find_unique_rows(stack: Stack, ids: Mapping[str, jax.Array]) -> UniqueRows:
    """Find the distinct rows of a stack that a batch reads.

    Args:
      stack: the stack.
      ids: arrays `[B, ...] int32` of rows of the stack, by name, all in range.

    Raises:
      InputError: an array of ids has no batch dimension or is not int32.
    """
    for name, array in ids.items():
        if array.ndim < 1 or array.dtype != jnp.int32:
            raise InputError(
                f"ids {name!r} {array.shape} {array.dtype}: rows of stack "
                f"{stack.name!r} are looked up by [B, ...] int32; convert them"
            )
    if stack.spread:
        total = sum(array.size for array in ids.values())
        plan = routing.plan_exchange(stack.stored_rows, total)
        route, inverses = routing.route_ids(plan, list(ids.values()))
        return UniqueRows(route, dict(zip(ids, inverses, strict=True)))
    # Every device finds the distinct rows of the whole batch: the table is replicated,
    # and so must its update be.
    flat = [jax.sharding.reshard(array, RULES()).reshape(-1) for array in ids.values()]
    unique = unique_ids(jnp.concatenate(flat), stack.rows)
    start, by_name = 0, {}
    for name, array in ids.items():
        inverse = unique.inverse[start : start + array.size].reshape(array.shape)
        spec = RULES("batch", *[None] * (array.ndim - 1))
        by_name[name] = jax.sharding.reshard(inverse, spec)
        start += array.size
    return UniqueRows(unique.ids, by_name)


def _plan(stack: Stack, route: RowRoute) -> ExchangePlan:
    # A route has an index for every id, so the plan is that of `find_unique_rows`.
    return routing.plan_exchange(stack.stored_rows, route.indices.size)


def gather_rows(stack: Stack, table: jax.Array, unique: UniqueRows) -> jax.Array:
    """Read the distinct rows, `[u, w]` or `[S u, w]`; zeros where padded.

    Args:
      stack: the stack.
      table: its array, of the shape of `stored_shape`.
      unique: its distinct rows.
    """
    if not isinstance(unique.rows, RowRoute):
        return packed.gather_rows(table, unique.rows, stack.width, distinct=True)
    return exchange.fetch_rows(_plan(stack, unique.rows), table, unique.rows)


def expand_rows(stack: Stack, rows: jax.Array, inverse: jax.Array) -> jax.Array:
    """Give every id its row, `[B, ..., w]`.

    Args:
      stack: the stack.
      rows: `[u, w]` or `[S u, w]`, of `gather_rows`.
      inverse: `[B, ...] int32`, of `UniqueRows.inverses`.
    """
    if stack.spread:
        return exchange.expand_rows(rows, inverse)
    return lookup.expand_rows(rows, inverse)


def collect_gradients(
    stack: Stack, unique: UniqueRows, gradients: jax.Array
) -> CollectedGradients:
    """Sum the gradients of each row of the table, on the device that updates it.

    Args:
      stack: the stack.
      unique: its distinct rows.
      gradients: `[u, w]` or `[S u, w]`, gradient of what `gather_rows` returned.

    Raises:
      InputError: the gradients do not have the shape of those rows.
    """
    ids = unique.rows.indices if isinstance(unique.rows, RowRoute) else unique.rows
    if gradients.shape != (ids.size, stack.width):
        raise InputError(
            f"gradients {gradients.shape} are not those of {ids.size} rows of stack "
            f"{stack.name!r}; use the gradient of what gather_rows returned, "
            f"{(ids.size, stack.width)}"
        )
    if isinstance(unique.rows, RowRoute):
        plan = _plan(stack, unique.rows)
        return exchange.collect_gradients(plan, unique.rows, gradients)
    return CollectedGradients(unique.rows, gradients, jnp.float32(0))


def update_rows(
    stack: Stack,
    table: jax.Array,
    state: RowsState,
    unique: UniqueRows,
    gradients: jax.Array,
    collected: CollectedGradients,
    *,
    rate: jax.Array,
    decay: float,
    apply: jax.Array,
) -> tuple[jax.Array, RowsState]:
    """Update the rows that were read, by row-wise AdaGrad (`lookup.update_rows`).

    Args:
      stack: the stack.
      table: its array, of the shape of `stored_shape`.
      state: its AdaGrad sums.
      unique: its distinct rows.
      gradients: `[u, w]` or `[S u, w]`, gradient of what `gather_rows` returned.
      collected: what `collect_gradients` made of them; both may be scaled alike, as by
        gradient clipping.
      rate: `[]`, learning rate.
      decay: pull towards zero, per step and unit of rate.
      apply: `[] bool`; False changes nothing.

    Returns:
      The new table and state.
    """
    options: dict[str, Any] = {"rate": rate, "decay": decay, "apply": apply}
    if isinstance(unique.rows, RowRoute):
        plan = _plan(stack, unique.rows)
        return exchange.update_owned_rows(
            plan, table, state, unique.rows, gradients, collected, **options
        )
    return lookup.update_rows(
        table, state, collected.rows, collected.gradients, **options
    )
