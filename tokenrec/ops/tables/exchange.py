"""Tables spread by rows over all devices: ids travel to the owners, rows come back.

How it works. Every device *owns* a run of the table's rows. The devices that share a
part of the batch are a *batch shard*. In a train step,

1. `route_ids` (`tokenrec.ops.tables.routing`): every batch shard finds its distinct ids
   and sorts them into one *bucket* per owner;
2. `fetch_rows`: the buckets are sent to their owners, which look the rows up and send
   them back. Of a batch shard, the device at place t along (context, tensor) talks to
   the owners at place t only, in one all-to-all over (data, fsdp); then the rows are
   gathered over (context, tensor);
3. `expand_rows`: every id gets its row; the transpose sums gradients per distinct id;
4. `collect_gradients`: the gradients of the distinct rows travel to the owners by the
   same buckets, and each owner sums those of different shards per row;
5. `update_owned_rows`: owners update their rows in place (row-wise AdaGrad).

Only ids, rows and gradients travel; the table never moves, and no array of its size is
made. Where a bucket is longer than what may be sent at once, steps 2, 4 and 5 run in
several *rounds*, one range of every owner's rows after another, with the same result.

Shape letters: S batch shards, each with u distinct ids; D owners; C the capacity of a
bucket; m = S C rows that an owner receives in a round; w the width. Arrays `[S u, ...]`
are partitioned as the batch is, and what owners hold, `[D ...]`, over
`("data", "fsdp", "context", "tensor")`. A table `[rows, w]` may be packed
(`tokenrec.ops.tables.packed`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.ops.tables import packed
from tokenrec.ops.tables.lookup import RowsState, update_rows
from tokenrec.ops.tables.routing import (
    BATCH_AXES,
    ROUTE_SPECS,
    SHARD_AXES,
    ExchangePlan,
    RowRoute,
    batch_spec,
    find_buckets,
    my_owners,
    rank_in_bucket,
)
from tokenrec.sharding import AXES, RULES, on_each_device

# Scope of the loops that run only where a bucket overflows. The planner, which reads it
# in the compiled program, does not count them.
OVERFLOW_SCOPE = "on_overflow"


class CollectedGradients(NamedTuple):
    """Gradients at the owners of their rows.

    Attributes:
      rows: `[D m] int32`, distinct owned rows of the first round, counted from the
        owner's first row; out of range where padded.
      gradients: `[D m, w]`, their gradients, summed over the batch shards.
      squares: `[]`, squared norm of the gradients of all later rounds.
    """

    rows: jax.Array
    gradients: jax.Array
    squares: jax.Array


def _requested_rows(
    plan: ExchangePlan, route: RowRoute, number: jax.Array
) -> jax.Array:
    """Exchange ids: the owned rows that each batch shard requests of this device.

    Returns:
      `[S, C] int32`, counted from the device's first row; `owned_rows` where padded.
    """
    entry, real = find_buckets(plan, route, number)
    index = route.indices[entry]
    first = my_owners(plan)[:, None] * plan.owned_rows
    requests = jnp.where(real, index - first, plan.owned_rows)
    return jax.lax.all_to_all(requests, BATCH_AXES, 0, 0, tiled=True)


def _later_rounds[T](
    route: RowRoute, run_round: Callable[[jax.Array, T], T], first: T
) -> T:
    """Run `run_round(number, value)` for every round after the first."""
    with jax.named_scope(OVERFLOW_SCOPE):
        return jax.lax.while_loop(
            lambda carry: carry[0] < route.rounds,
            lambda carry: (carry[0] + 1, run_round(*carry)),
            (jnp.int32(1), first),
        )[1]


def fetch_rows(plan: ExchangePlan, table: jax.Array, route: RowRoute) -> jax.Array:
    """Read the distinct rows of every batch shard, `[S u, w]`; zeros where padded.

    Args:
      plan: the plan.
      table: `[rows, w]`, over all devices.
      route: where the rows are stored.
    """

    def local(table: jax.Array, route: RowRoute) -> jax.Array:
        """Read the rows `[u, w]` of one device from tables `[owned_rows, w]`."""
        width = table.size // plan.owned_rows
        # One device owns all rows: nothing is exchanged.
        if plan.owners == 1:
            return packed.gather_rows(table, route.indices, width, distinct=True)
        empty = jnp.zeros((route.indices.shape[0], width), table.dtype)
        rows = _fetch_round(plan, table, route, jnp.int32(0), empty)
        return _later_rounds(
            route,
            lambda number, rows: _fetch_round(plan, table, route, number, rows),
            rows,
        )

    specs = (_owned_spec(2), ROUTE_SPECS)
    return on_each_device(local, specs, batch_spec(2))(table, route)


def _fetch_round(
    plan: ExchangePlan,
    table: jax.Array,
    route: RowRoute,
    number: jax.Array,
    rows: jax.Array,
) -> jax.Array:
    """Fill the rows of one round into `rows: [u, w]`.

    Args:
      plan: the plan.
      table: `[owned_rows, w]`, the rows of this device.
      route: the route of this shard, `[u]`.
      number: `[]`, the round.
      rows: `[u, w]`, with the rows of earlier rounds.
    """
    # 1. Owners answer the requests; padding is out of range and reads zeros.
    requests = _requested_rows(plan, route, number)
    answers = packed.gather_rows(table, requests, rows.shape[1])
    # 2. Back to the shard, [S, C, w] by owner, and then over its devices,
    #    [S, shard_devices, C, w]: now all owners, in order.
    answers = jax.lax.all_to_all(answers, BATCH_AXES, 0, 0, tiled=True)
    answers = jax.lax.all_gather(answers, SHARD_AXES, axis=1)
    # 3. Every index takes its row from its entry in its owner's bucket.
    owner, row = route.indices // plan.owned_rows, route.indices % plan.owned_rows
    of_round = (route.indices < plan.rows) & (row // route.range_rows == number)
    entry = owner * plan.capacity + rank_in_bucket(
        plan, route.indices, route.range_rows
    )
    answered = answers.reshape(-1, rows.shape[1])[jnp.where(of_round, entry, 0)]
    return jnp.where(of_round[:, None], answered, rows)


def expand_rows(rows: jax.Array, inverse: jax.Array) -> jax.Array:
    """Give every id its row, `[B, ..., w]`.

    The transpose sums the gradients of each distinct row of a shard.

    Args:
      rows: `[S u, w]`, of `fetch_rows`.
      inverse: `[B, ...]`, of `route_ids`.
    """

    def local(rows: jax.Array, inverse: jax.Array) -> jax.Array:
        """Expand the rows `[u, w]` of one shard by its `inverse: [B / S, ...]`."""
        return rows.at[inverse].get(mode="promise_in_bounds")

    specs = batch_spec(2), batch_spec(inverse.ndim)
    return jax.shard_map(local, in_specs=specs, out_specs=batch_spec(inverse.ndim + 1))(
        rows, inverse
    )


def collect_gradients(
    plan: ExchangePlan, route: RowRoute, gradients: jax.Array
) -> CollectedGradients:
    """Send gradients to the owners of their rows, and sum them there.

    The gradients of later rounds are counted in `squares` and dropped;
    `update_owned_rows` sends them again.

    Args:
      plan: the plan.
      route: where the rows are stored.
      gradients: `[S u, w]`, of the rows of `fetch_rows`.
    """

    def local(route: RowRoute, gradients: jax.Array) -> CollectedGradients:
        """Send the gradients `[u, w]` of one device, and sum what it receives `[m, w]`."""
        if plan.owners == 1:
            return CollectedGradients(route.indices, gradients, jnp.float32(0))

        # Within a batch shard gradients are equal, and each device sends those of its own
        # owners only, so that none is counted twice.
        # From the last round to the first, so that the first round's are left in the
        # end. One loop, not a round and then a loop: the sort inside compiles slowly.
        def receive(
            carry: tuple[jax.Array, CollectedGradients],
        ) -> tuple[jax.Array, CollectedGradients]:
            number, later = carry
            squares = later.squares + jnp.sum(jnp.square(later.gradients))
            return number - 1, CollectedGradients(
                *_summed_gradients(plan, route, gradients, number), squares
            )

        size = plan.batch_shards * plan.capacity
        nothing = CollectedGradients(
            jnp.full(size, plan.owned_rows, jnp.int32),
            jnp.zeros((size, gradients.shape[1])),
            jnp.zeros((), jnp.float32),
        )
        _, collected = jax.lax.while_loop(
            lambda carry: carry[0] >= 0, receive, (route.rounds - 1, nothing)
        )
        return collected._replace(squares=jax.lax.psum(collected.squares, AXES))

    specs = (ROUTE_SPECS, batch_spec(2))
    return on_each_device(local, specs, _COLLECTED_SPECS)(route, gradients)


def _summed_gradients(
    plan: ExchangePlan, route: RowRoute, gradients: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Exchange the gradients of a round, and sum them per row.

    Args:
      plan: the plan.
      route: the route of this shard, `[u]`.
      gradients: `[u, w]`.
      number: `[]`, the round.

    Returns:
      Distinct owned rows `[m]`, padded with `owned_rows`, and their sums `[m, w]`.
    """
    requests = _requested_rows(plan, route, number).reshape(-1)
    entry, real = find_buckets(plan, route, number)
    # Padding sends zeros to row `owned_rows`, which is out of range.
    sent = jnp.where(real[..., None], gradients[entry], 0)
    received = jax.lax.all_to_all(sent, BATCH_AXES, 0, 0, tiled=True)
    received = received.reshape(-1, gradients.shape[1])
    rows, inverse = jnp.unique(
        requests, size=requests.size, fill_value=plan.owned_rows, return_inverse=True
    )
    return rows, jax.ops.segment_sum(received, inverse, num_segments=requests.size)


def update_owned_rows(
    plan: ExchangePlan,
    table: jax.Array,
    state: RowsState,
    route: RowRoute,
    gradients: jax.Array,
    collected: CollectedGradients,
    *,
    rate: jax.Array,
    decay: float,
    apply: jax.Array,
) -> tuple[jax.Array, RowsState]:
    """Update owned rows in place, by row-wise AdaGrad (`lookup.update_rows`).

    Args:
      plan: the plan.
      table: `[rows, w]`, over all devices.
      state: sums of the rows, over all devices.
      route: where the rows are stored.
      gradients: `[S u, w]`, for the later rounds.
      collected: what `collect_gradients` made of them; scaled as they are.
      rate: `[]`, learning rate.
      decay: pull towards zero, per step and unit of rate.
      apply: `[] bool`; False changes nothing.

    Returns:
      The new table and state.
    """

    def local(
        table: jax.Array,
        state: RowsState,
        route: RowRoute,
        gradients: jax.Array,
        collected: CollectedGradients,
        rate: jax.Array,
        apply: jax.Array,
    ) -> tuple[jax.Array, RowsState]:
        def update(
            table: jax.Array, state: RowsState, rows: jax.Array, sums: jax.Array
        ) -> tuple[jax.Array, RowsState]:
            return update_rows(
                table, state, rows, sums, rate=rate, decay=decay, apply=apply
            )

        # The first round's gradients are here already, those of later rounds are sent
        # again: keeping them would take a buffer for every round.
        updated = update(table, state, collected.rows, collected.gradients)
        if plan.owners == 1:
            return updated
        return _later_rounds(
            route,
            lambda number, updated: update(
                *updated, *_summed_gradients(plan, route, gradients, number)
            ),
            updated,
        )

    table_specs = (_owned_spec(2), _owned_spec(1))
    scalar = PartitionSpec()
    specs = (
        *table_specs,
        ROUTE_SPECS,
        batch_spec(2),
        _COLLECTED_SPECS,
        scalar,
        scalar,
    )
    return on_each_device(local, specs, table_specs)(
        table, state, route, gradients, collected, rate, apply
    )


def _owned_spec(dimensions: int) -> PartitionSpec:
    """Partition of an array whose first dimension is split by owner."""
    return RULES("rows", *[None] * (dimensions - 1))


# Partitions of the fields of `CollectedGradients`.
_COLLECTED_SPECS = CollectedGradients._make(
    (_owned_spec(1), _owned_spec(2), PartitionSpec())
)
