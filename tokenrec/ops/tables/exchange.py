"""Tables whose rows lie over all devices: ids travel to the owners, rows and gradients back; the table never.

The devices that share a part of the batch, one for each place along `tensor`, are a *batch shard*; it looks up its own
distinct ids. Row r is stored at `to_storage_index(r)`, dealt out over `CYCLE` virtual shards: rows with near numbers
lie on different devices, and how a table is stored does not depend on the mesh. Every device owns a run of places. Of a
batch shard, the device at place t along `tensor` asks only the owners at place t; the rows are gathered over `tensor`.

What one device sends to another has a fixed size, `capacity`. Where more is needed, the rows of every owner are cut
into ranges, short enough that each fits, and the exchange runs once for each range: slower, exact, and told
(`RowRoute.rounds`). All gradients of a row travel in one round, so that a row is updated once.

S batch shards, each with u distinct ids; D owners, C the capacity, w the width. The partition of `[S u, ...]` is that
of the batch, the partition of what owners hold `("data", "fsdp", "tensor")`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from tokenrec.errors import InputError
from tokenrec.ops.tables.lookup import RowsState, update_rows
from tokenrec.sharding import AXES, RULES

CYCLE = 12_288  # 3 x 2^12: a multiple of the chips of most pods
# Near the golden section of the cycle, and coprime to it: any run of row numbers is dealt out evenly.
STRIDE = 7597
_BACK = pow(STRIDE, -1, CYCLE)
BATCH_AXES, SHARE_AXIS = ("data", "fsdp"), "tensor"
# Scope of the exchange that runs only where ids fall on few devices: the planner does not count its loop.
OVERFLOW_SCOPE = "on_overflow"


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """Static plan of a table: its stored rows; `shards`, of the batch, and `shares`, devices of each, whose product is
    the number of owners; `capacity`, ids from one device to another in a round.
    """

    rows: int
    shards: int
    shares: int
    capacity: int

    @property
    def own(self) -> int:
        """Rows of a device."""
        return self.rows // (self.shards * self.shares)

    @property
    def alone(self) -> bool:
        return self.shards * self.shares == 1


class RowRoute(NamedTuple):
    """Where the rows of a step lie.

    Attributes:
      places: `[S u] int32`, of each batch shard its distinct places, sorted; the number of stored rows where padded.
      span: `[] int32`, rows of an owner that are exchanged in a round.
      rounds: `[] int32`, how often the exchange runs; 1 unless a bucket is longer than the capacity.
    """

    places: jax.Array
    span: jax.Array
    rounds: jax.Array


class CollectedGradients(NamedTuple):
    """Gradients of the first round at their owners: `rows: [D m] int32`, distinct own rows, out of range where padded;
    `gradients: [D m, w]`, summed over the batch shards. `squares: []`, squared norm of those of later rounds.
    """

    rows: jax.Array
    gradients: jax.Array
    squares: jax.Array


def stored_rows(rows: int) -> int:
    """Rows of a spread table as it is stored.

    Raises:
      InputError: more than 32-bit ids can tell apart.
    """
    stored = -(-rows // CYCLE) * CYCLE
    if stored >= 2**31:
        raise InputError(
            f"tables of one width have {rows:,} rows together, more than 32-bit ids tell apart; use another width for "
            "some of them (tokens.embedding_dims)"
        )
    return stored


def to_storage_index[T: (jax.Array, np.ndarray)](ids: T, rows: int) -> T:
    """Where the rows `ids` of a table of `rows` stored rows lie; a permutation."""
    return ids % CYCLE * STRIDE % CYCLE * (rows // CYCLE) + ids // CYCLE


def from_storage_index[T: (jax.Array, np.ndarray)](places: T, rows: int) -> T:
    """Inverse of `to_storage_index`."""
    return places % (rows // CYCLE) * CYCLE + places // (rows // CYCLE) * _BACK % CYCLE


def plan_exchange(rows: int, ids: int) -> ExchangePlan:
    """The plan for `ids` look-ups of a step, of all batch shards together, under the mesh in use.

    The capacity holds ids that fall on the owners by chance, none twice: their mean and six deviations.

    Raises:
      InputError: the devices of the mesh do not divide `CYCLE`.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    shards, shares = math.prod(sizes[axis] for axis in BATCH_AXES), sizes[SHARE_AXIS]
    check_owners(shards * shares)
    each = ids // shards
    mean = each / (shards * shares)
    return ExchangePlan(
        rows, shards, shares, min(each, 8 * math.ceil((mean + 6 * math.sqrt(mean)) / 8))
    )


def check_owners(devices: int) -> None:
    """Raises InputError where rows cannot be dealt out evenly."""
    if CYCLE % devices:
        raise InputError(
            f"a mesh of {devices} devices: tables that are spread by rows need a number of devices that divides "
            f"{CYCLE:,}; use another number, or raise tokens.replicate_rows above the rows of every table"
        )


def route(
    plan: ExchangePlan, ids: Sequence[jax.Array]
) -> tuple[RowRoute, list[jax.Array]]:
    """The distinct rows that `ids`, arrays `[B, ...]`, name; and for each array which rows of its shard it reads."""

    def local(*parts: jax.Array) -> tuple[RowRoute, list[jax.Array]]:
        flat = jnp.concatenate([part.reshape(-1) for part in parts])
        places, inverse = jnp.unique(
            to_storage_index(flat, plan.rows),
            size=flat.size,
            fill_value=plan.rows,
            return_inverse=True,
        )
        cuts = itertools.accumulate(part.size for part in parts[:-1])
        pieces = jnp.split(inverse.astype(jnp.int32), list(cuts))
        inverses = [
            piece.reshape(part.shape) for piece, part in zip(pieces, parts, strict=True)
        ]
        span, rounds = (
            (jnp.int32(plan.own), jnp.int32(1))
            if plan.alone
            else _fitting(plan, places)
        )
        return RowRoute(places, span, rounds), inverses

    specs = [_batch(part.ndim) for part in ids]
    return _manual(local, tuple(specs), (_ROUTE, specs))(*ids)


def _fitting(plan: ExchangePlan, places: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The widest span, halved from all own rows, whose buckets fit on all devices; and how many rounds it makes."""

    def longest(span: jax.Array) -> jax.Array:
        index = _index_in_bucket(plan, places, span)
        return jax.lax.pmax(jnp.max(jnp.where(places < plan.rows, index + 1, 0)), AXES)

    def halve(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        span = (carry[0] + 1) // 2
        return span, longest(span)

    whole = jnp.int32(plan.own)
    # A span of one row has one id: this ends.
    span, _ = jax.lax.while_loop(
        lambda carry: carry[1] > plan.capacity, halve, (whole, longest(whole))
    )
    return span, (plan.own + span - 1) // span


def _index_in_bucket(
    plan: ExchangePlan, places: jax.Array, span: jax.Array
) -> jax.Array:
    """How many places before it, `[u]`, go to the same owner in the same round."""
    first = places - places % plan.own % span  # of the range
    here = jnp.arange(places.shape[0], dtype=jnp.int32)
    opens = jnp.concatenate([jnp.ones(1, bool), first[1:] != first[:-1]])
    return here - jax.lax.cummax(jnp.where(opens, here, 0))


def fetch(plan: ExchangePlan, table: jax.Array, at: RowRoute) -> jax.Array:
    """`[S u, w]`, the rows of the places; zeros where padded. `table: [rows, w]`, over all devices."""

    def local(table: jax.Array, at: RowRoute) -> jax.Array:
        if plan.alone:
            return table.at[at.places].get(
                mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
            )
        rows = _answers(
            plan,
            table,
            at,
            jnp.int32(0),
            jnp.zeros((at.places.shape[0], table.shape[1]), table.dtype),
        )
        return _further_rounds(
            at, lambda number, rows: _answers(plan, table, at, number, rows), rows
        )

    return _manual(local, (_owned(2), _ROUTE), _batch(2))(table, at)


def _further_rounds[T](at: RowRoute, again: Callable[[jax.Array, T], T], first: T) -> T:
    """`again(number, value)` for every round after the first. The scope tells readers of the program that these loops
    run on overflow only.
    """
    with jax.named_scope(OVERFLOW_SCOPE):
        return jax.lax.while_loop(
            lambda carry: carry[0] < at.rounds,
            lambda carry: (carry[0] + 1, again(*carry)),
            (jnp.int32(1), first),
        )[1]


def _answers(
    plan: ExchangePlan,
    table: jax.Array,
    at: RowRoute,
    number: jax.Array,
    rows: jax.Array,
) -> jax.Array:
    """`rows` with those of a round filled in."""
    asked = _asked(plan, at, number)
    answer = table.at[asked].get(mode="fill", fill_value=0)
    answer = jax.lax.all_to_all(
        answer, BATCH_AXES, 0, 0, tiled=True
    )  # [S, C, w], by owner
    answer = jax.lax.all_gather(
        answer, SHARE_AXIS, axis=1
    )  # [S, shares, C, w]: owners in order
    owner, own = at.places // plan.own, at.places % plan.own
    here = (at.places < plan.rows) & (own // at.span == number)
    index = owner * plan.capacity + _index_in_bucket(plan, at.places, at.span)
    found = answer.reshape(-1, table.shape[1])[jnp.where(here, index, 0)]
    return jnp.where(here[:, None], found, rows)


def _my_owners(plan: ExchangePlan) -> jax.Array:
    """`[S]`, the owners that this device asks: those with its own place along `tensor`."""
    return jnp.arange(plan.shards, dtype=jnp.int32) * plan.shares + jax.lax.axis_index(
        SHARE_AXIS
    )


def _buckets(
    plan: ExchangePlan, at: RowRoute, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`[S, C]` which of the places go to each of my owners in a round, and whether there is one."""
    first = _my_owners(plan) * plan.own
    low = first + number * at.span
    high = low + jnp.minimum(
        at.span, first + plan.own - low
    )  # low + span alone may pass 2^31
    begin, end = (
        jnp.searchsorted(at.places, edge).astype(jnp.int32) for edge in (low, high)
    )
    index = begin[:, None] + jnp.arange(plan.capacity, dtype=jnp.int32)
    return jnp.minimum(index, at.places.shape[0] - 1), index < end[:, None]


def _asked(plan: ExchangePlan, at: RowRoute, number: jax.Array) -> jax.Array:
    """`[S, C]`, own rows that each batch shard asks this device for in a round; `own` where padded."""
    index, real = _buckets(plan, at, number)
    sent = jnp.where(
        real, at.places[index] - _my_owners(plan)[:, None] * plan.own, plan.own
    )
    return jax.lax.all_to_all(sent, BATCH_AXES, 0, 0, tiled=True)


def expand_rows(rows: jax.Array, inverse: jax.Array) -> jax.Array:
    """`[B, ..., w]`: of the shard's `rows: [S u, w]` the one that each entry of `inverse: [B, ...]` reads.

    Its transpose sums the gradients of each distinct row of a shard.
    """

    def local(rows: jax.Array, inverse: jax.Array) -> jax.Array:
        return rows.at[inverse].get(mode="promise_in_bounds")

    specs = _batch(2), _batch(inverse.ndim)
    return jax.shard_map(local, in_specs=specs, out_specs=_batch(inverse.ndim + 1))(
        rows, inverse
    )


def collect(
    plan: ExchangePlan, at: RowRoute, gradients: jax.Array
) -> CollectedGradients:
    """Sends `gradients: [S u, w]` to the owners of their rows."""

    def local(at: RowRoute, gradients: jax.Array) -> CollectedGradients:
        if plan.alone:
            return CollectedGradients(at.places, gradients, jnp.float32(0))

        # Backwards, so that what is left is the first round's. One loop, not a round and a loop: sorts compile slowly.
        def receive(
            carry: tuple[jax.Array, CollectedGradients],
        ) -> tuple[jax.Array, CollectedGradients]:
            number, later = carry
            squares = later.squares + jnp.sum(jnp.square(later.gradients))
            return number - 1, CollectedGradients(
                *_summed(plan, at, gradients, number), squares
            )

        size = plan.shards * plan.capacity
        nothing = CollectedGradients(
            jnp.full(size, plan.own, jnp.int32),
            jnp.zeros((size, gradients.shape[1])),
            jnp.zeros((), jnp.float32),
        )
        _, found = jax.lax.while_loop(
            lambda carry: carry[0] >= 0, receive, (at.rounds - 1, nothing)
        )
        return found._replace(squares=jax.lax.psum(found.squares, AXES))

    return _manual(local, (_ROUTE, _batch(2)), _COLLECTED)(at, gradients)


def _summed(
    plan: ExchangePlan, at: RowRoute, gradients: jax.Array, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Distinct own rows of a round `[m]`, and the sums of their gradients `[m, w]`."""
    asked = _asked(plan, at, number).reshape(-1)
    index, real = _buckets(plan, at, number)
    sent = jnp.where(real[..., None], gradients[index], 0)
    came = jax.lax.all_to_all(sent, BATCH_AXES, 0, 0, tiled=True).reshape(
        -1, gradients.shape[1]
    )
    rows, inverse = jnp.unique(
        asked, size=asked.size, fill_value=plan.own, return_inverse=True
    )
    return rows, jax.ops.segment_sum(came, inverse, num_segments=asked.size)


def update_spread(
    plan: ExchangePlan,
    table: jax.Array,
    state: RowsState,
    at: RowRoute,
    gradients: jax.Array,
    collected: CollectedGradients,
    *,
    rate: jax.Array,
    decay: float,
    apply: jax.Array,
) -> tuple[jax.Array, RowsState]:
    """`update_rows` at the owners, in place.

    `gradients: [S u, w]`, and what `collect` made of them, both scaled alike.
    """

    def local(
        table: jax.Array,
        state: RowsState,
        at: RowRoute,
        gradients: jax.Array,
        collected: CollectedGradients,
        rate: jax.Array,
        apply: jax.Array,
    ) -> tuple[jax.Array, RowsState]:
        def change(
            table: jax.Array, state: RowsState, rows: jax.Array, sums: jax.Array
        ) -> tuple[jax.Array, RowsState]:
            return update_rows(
                table, state, rows, sums, rate=rate, decay=decay, apply=apply
            )

        changed = change(table, state, collected.rows, collected.gradients)
        if plan.alone:
            return changed

        def again(
            number: jax.Array, changed: tuple[jax.Array, RowsState]
        ) -> tuple[jax.Array, RowsState]:
            return change(*changed, *_summed(plan, at, gradients, number))

        return _further_rounds(at, again, changed)

    given = (
        _owned(2),
        _owned(1),
        _ROUTE,
        _batch(2),
        _COLLECTED,
        PartitionSpec(),
        PartitionSpec(),
    )
    made = (_owned(2), _owned(1))
    return _manual(local, given, made)(
        table, state, at, gradients, collected, rate, apply
    )


def _manual(local: Callable[..., Any], given: Any, made: Any) -> Callable[..., Any]:
    # Collectives here leave values equal along `tensor` in ways that the check cannot see.
    return jax.shard_map(local, in_specs=given, out_specs=made, check_vma=False)


def _batch(dimensions: int) -> PartitionSpec:
    return RULES("batch", *[None] * (dimensions - 1))


def _owned(dimensions: int) -> PartitionSpec:
    return RULES("rows", *[None] * (dimensions - 1))


# Partitions of a Route and of Collected.
_ROUTE: Any = RowRoute(*([_batch(1)] + [PartitionSpec()] * 2))  # type: ignore[arg-type]
_COLLECTED: Any = CollectedGradients(*[_owned(1), _owned(2), PartitionSpec()])  # type: ignore[arg-type]
