"""Routes of the row exchange: which owner has which rows, and in which round.

The devices that share a part of the batch are a *batch shard*: one device for each
place along the mesh axes `context` and `tensor`. Every device *owns* a run of the table's storage
indices (`tokenrec.ops.tables.storage`). `route_ids` finds the distinct rows of every
batch shard as sorted storage indices, so that those of one owner stand together: the
*bucket* that goes there.

What one device sends to another has a fixed size, `capacity` ids, as shapes are static.
If a bucket is longer, the rows of every owner are cut into ranges of `range_rows` rows,
short enough that the bucket of each range fits, and the exchange runs once for each
range, in *rounds*. That is slower and exact. All gradients of a row travel in one
round, so that a row is updated once.

Shape letters: S batch shards, each with u distinct ids; D owners; C the capacity.
Arrays `[S u]` are partitioned as the batch is.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.ops.tables.storage import check_owners, to_storage_index
from tokenrec.sharding import AXES, RULES, on_each_device

# Mesh axes that split the batch into batch shards, and those inside a batch shard.
BATCH_AXES = ("data", "fsdp")
SHARD_AXES = ("context", "tensor")


@dataclasses.dataclass(frozen=True)
class ExchangePlan:
    """Static plan of the exchange of one table.

    Attributes:
      rows: stored rows of the table.
      batch_shards: S.
      shard_devices: devices of a batch shard; D = S * shard_devices.
      capacity: C, ids from one device to another in a round.
    """

    rows: int
    batch_shards: int
    shard_devices: int
    capacity: int

    @property
    def owners(self) -> int:
        """D, the number of devices."""
        return self.batch_shards * self.shard_devices

    @property
    def owned_rows(self) -> int:
        """Rows that one device owns."""
        return self.rows // self.owners


class RowRoute(NamedTuple):
    """Storage of the rows that a step reads.

    Attributes:
      indices: `[S u] int32`, storage indices of the distinct rows of each batch shard,
        sorted; padded with the number of stored rows.
      range_rows: `[] int32`, rows of an owner that are exchanged in a round.
      rounds: `[] int32`, how often the exchange runs; 1 unless a bucket overflows.
    """

    indices: jax.Array
    range_rows: jax.Array
    rounds: jax.Array


def plan_exchange(rows: int, ids: int) -> ExchangePlan:
    """Plan the exchange under the mesh in use.

    The capacity suffices for distinct, uniform ids: the number of them in one bucket is
    nearly Poisson, and the capacity is its mean plus six standard deviations, rounded
    up to a multiple of 8. Repeated ids only make buckets shorter.

    Args:
      rows: stored rows of the table.
      ids: look-ups of a step, over all batch shards.

    Raises:
      InputError: the number of devices does not divide `storage.CYCLE`.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    batch_shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    shard_devices = math.prod(sizes[axis] for axis in SHARD_AXES)
    owners = batch_shards * shard_devices
    check_owners(owners)
    ids_each = ids // batch_shards
    mean = ids_each / owners
    capacity = 8 * math.ceil((mean + 6 * math.sqrt(mean)) / 8)
    return ExchangePlan(rows, batch_shards, shard_devices, min(ids_each, capacity))


def batch_spec(dimensions: int) -> PartitionSpec:
    """Partition of an array whose first dimension is split as the batch."""
    return RULES("batch", *[None] * (dimensions - 1))


# Partitions of the fields of `RowRoute`.
ROUTE_SPECS = RowRoute._make((batch_spec(1), PartitionSpec(), PartitionSpec()))


def route_ids(
    plan: ExchangePlan, ids: Sequence[jax.Array]
) -> tuple[RowRoute, list[jax.Array]]:
    """Find the distinct rows of every batch shard.

    Args:
      plan: the plan, for as many ids as there are.
      ids: arrays `[B, ...] int32` of row numbers.

    Returns:
      The route, and for each array of ids an array `[B, ...] int32`: which of the
      shard's distinct rows each id is.
    """

    def local(*ids: jax.Array) -> tuple[RowRoute, list[jax.Array]]:
        """Route the ids of one device, `[B / S, ...]` each, to indices `[u]`."""
        # All devices of a batch shard do the same work, so that nothing has to be sent
        # among them.
        flat = jnp.concatenate([array.reshape(-1) for array in ids])
        indices, inverse = jnp.unique(
            to_storage_index(flat, plan.rows),
            size=flat.size,
            fill_value=plan.rows,
            return_inverse=True,
        )
        ends = itertools.accumulate(array.size for array in ids[:-1])
        pieces = jnp.split(inverse.astype(jnp.int32), list(ends))
        inverses = [
            piece.reshape(array.shape) for piece, array in zip(pieces, ids, strict=True)
        ]
        if plan.owners == 1:
            range_rows, rounds = jnp.int32(plan.owned_rows), jnp.int32(1)
        else:
            range_rows, rounds = _fit_ranges(plan, indices)
        return RowRoute(indices, range_rows, rounds), inverses

    specs = [batch_spec(array.ndim) for array in ids]
    return on_each_device(local, tuple(specs), (ROUTE_SPECS, specs))(*ids)


def _fit_ranges(plan: ExchangePlan, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find the widest range of rows whose buckets fit, and the number of rounds.

    The range starts as all rows of an owner, and is halved until the longest bucket on
    any device holds no more than the capacity.
    """

    def longest_bucket(range_rows: jax.Array) -> jax.Array:
        """Length of the longest bucket on any device, `[] int32`."""
        rank = rank_in_bucket(plan, indices, range_rows)
        length = jnp.max(jnp.where(indices < plan.rows, rank + 1, 0))
        # Over all devices: every device must run the same number of rounds.
        return jax.lax.pmax(length, AXES)

    def halve(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        range_rows = (carry[0] + 1) // 2
        return range_rows, longest_bucket(range_rows)

    # This ends: a range of one row has one id.
    all_rows = jnp.int32(plan.owned_rows)
    range_rows, _ = jax.lax.while_loop(
        lambda carry: carry[1] > plan.capacity,
        halve,
        (all_rows, longest_bucket(all_rows)),
    )
    return range_rows, (plan.owned_rows + range_rows - 1) // range_rows


def rank_in_bucket(
    plan: ExchangePlan, indices: jax.Array, range_rows: jax.Array
) -> jax.Array:
    """Count the indices before each one that go to its owner in its round, `[u]`.

    Args:
      plan: the plan.
      indices: `[u]`, sorted storage indices of this shard.
      range_rows: rows of an owner that are exchanged in a round.
    """
    # Indices of one bucket are neighbours, and share the first index of their range.
    first_of_range = indices - indices % plan.owned_rows % range_rows
    entry = jnp.arange(indices.shape[0], dtype=jnp.int32)
    # The entry of a bucket's first index, carried on to the others by a running
    # maximum.
    starts_bucket = jnp.concatenate(
        [jnp.ones(1, bool), first_of_range[1:] != first_of_range[:-1]]
    )
    return entry - jax.lax.cummax(jnp.where(starts_bucket, entry, 0))


def my_owners(plan: ExchangePlan) -> jax.Array:
    """Number the owners at this device's place in its batch shard, `[S]`."""
    shard = jnp.arange(plan.batch_shards, dtype=jnp.int32)
    return shard * plan.shard_devices + jax.lax.axis_index(SHARD_AXES)


def find_buckets(
    plan: ExchangePlan, route: RowRoute, number: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Find the buckets of a round.

    Args:
      plan: the plan.
      route: the route of this shard, `[u]`.
      number: `[]`, the round.

    Returns:
      `[S, C]`, which of the shard's indices go to each of this device's owners, and
      `[S, C] bool`, whether there is one.
    """
    first = my_owners(plan) * plan.owned_rows
    low = first + number * route.range_rows
    # Cut to the owner's end before the sum: `low + range_rows` may pass 2^31.
    high = low + jnp.minimum(route.range_rows, first + plan.owned_rows - low)
    # Sorted indices: a bucket is the run between two bisections. Entries behind its end
    # are clipped to some index, and marked as not there.
    begin, end = (
        jnp.searchsorted(route.indices, edge).astype(jnp.int32) for edge in (low, high)
    )
    entry = begin[:, None] + jnp.arange(plan.capacity, dtype=jnp.int32)
    return jnp.minimum(entry, route.indices.shape[0] - 1), entry < end[:, None]
