"""Look-up and update of a spread table on sparse cores, which TPUs from v5p on have beside their matrix units.

A sparse core asks the owners of its ids for rows, and sends gradients to them, without the matrix units. Of the package
`jax-tpu-embedding` two operations are used: a look-up, and a sum of gradients onto rows. All that is sent is linear, so
that ids may repeat and shards of the batch may share rows.

The package's own updates are element by element: its compiler refuses a sum over the width of a row, which row-wise
AdaGrad needs. Here the gradients of each row are summed into a table of zeros, and the sums looked up by all who read
the row; each works out the same step, and sends its share of it. So the state is that of `lookup.update_rows`.

S batch shards, each with u places; D devices of c cores; `owners` = D c; w the width, a multiple of 8. Every core owns
a run of places (exchange.py). What a core reads, its *lane*, is every (shares c)-th place of its batch shard, so that
lanes are alike.
The partition of `[S u, ...]` is that of the batch; what starts with D is laid over all devices.

Compiled for described TPUs; no sparse core has run it. On a CPU the tests put plain sums in the place of both
operations, and compare the buffers with those of the package's preprocessing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, PartitionSpec

from tokenrec.errors import InputError
from tokenrec.ops.tables.exchange import BATCH_AXES, SHARE_AXIS
from tokenrec.ops.tables.lookup import RowsState
from tokenrec.sharding import AXES, RULES

# Sparse cores of a JAX device, by `jax.Device.device_kind`; others have none.
CORES = {"TPU v5": 4, "TPU v5p": 4, "TPU v6 lite": 2, "TPU v6e": 2, "TPU7x": 2}
GRANULE = 8  # Words that a sparse core moves at once; buffers, lanes and rows of a core are multiples of it.
PADDING = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Cores:
    """Static plan of a table of `rows` stored rows.

    Attributes:
      shards: of the batch; `shares`, devices of each; `cores`, of a device.
      places: u, that a batch shard reads in a step.
      limit: places of one lane that one owner can be asked for.
    """

    rows: int
    shards: int
    shares: int
    cores: int
    places: int
    limit: int

    @property
    def owners(self) -> int:
        return self.shards * self.shares * self.cores

    @property
    def own(self) -> int:
        """Rows of an owner."""
        return self.rows // self.owners

    @property
    def lane(self) -> int:
        """Length of a lane."""
        return _padded(-(-self.places // (self.shares * self.cores)))

    @property
    def buffer(self) -> int:
        """Length of a core's list of ids: the ids for each owner begin at a multiple of `GRANULE`."""
        return min(self.lane + GRANULE * self.owners, _padded(self.limit) * self.owners)


class Partition(NamedTuple):
    """The places of a step, sorted by owner, as sparse cores read them.

    Attributes:
      ends: `[D c max(owners, 8)] int32`, where the ids for each owner end in the lists of their core.
      ids: `[D c buffer] int32`, rows of the owner.
      samples: `[D c buffer] int32`, for each id which element of the lane reads it.
      lost: `[D c lane] bool`, elements above the limit, which are not in the lists.
      dropped: `[] int32`, how many those are, on all cores.
    """

    ends: jax.Array
    ids: jax.Array
    samples: jax.Array
    lost: jax.Array
    dropped: jax.Array


class Summed(NamedTuple):
    """`gradients: [D c lane, w]`, of the row that each element reads, from all who read it; `readers: [D c lane]`, how
    many they are, 0 where padded. `squares: []`, the squared norm of the gradients, each row once.
    """

    gradients: jax.Array
    readers: jax.Array
    squares: jax.Array


def cores_per_device(device_kind: str) -> int:
    """Sparse cores of a device.

    Raises:
      InputError: it has none.
    """
    if device_kind not in CORES:
        raise InputError(
            f"device_kind='{device_kind}' has no sparse cores; those that have: {', '.join(sorted(CORES))}; "
            "exchange rows by all-to-all here (ops/exchange.py)"
        )
    return CORES[device_kind]


def plan_cores(rows: int, places: int, width: int, cores: int, limit: int | None = None) -> Cores:
    """The plan for `places` of each batch shard, under the mesh in use.

    Args:
      rows: stored; a multiple of 8 times the sparse cores of the mesh.
      limit: places of one core that one owner can be asked for; by default those that distinct places reach by chance,
        their mean and six deviations. Ids that come often need more, and are better made distinct. The compiler refuses
        what a core's memory does not hold; at width 16, 5,240 compiled for v5p and v6e, 10,000 for v5p alone.

    Raises:
      InputError: a width or number of rows that sparse cores cannot store.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    shards, shares = math.prod(sizes[axis] for axis in BATCH_AXES), sizes[SHARE_AXIS]
    owners = shards * shares * cores
    if width % GRANULE:
        raise InputError(
            f"a table of width {width} on sparse cores: widths are multiples of {GRANULE} there; use "
            f"{_padded(width)} (tokens.embedding_dim, tokens.embedding_dims)"
        )
    if rows % (GRANULE * owners):
        raise InputError(
            f"a table of {rows:,} stored rows does not divide over {owners} sparse cores in multiples of {GRANULE}; "
            f"store {-(-rows // (GRANULE * owners)) * GRANULE * owners:,}"
        )
    plan = Cores(rows, shards, shares, cores, places, limit=1)
    mean = plan.lane / owners
    chance = _padded(math.ceil(mean + 6 * math.sqrt(mean)))
    return dataclasses.replace(plan, limit=min(plan.lane, chance) if limit is None else limit)


def table_format(mesh: Mesh, dimensions: int) -> Format:
    """How sparse cores store a table `[rows, w]` or its sums `[rows]`: row after row, without tiles.

    Arguments and results of a compiled step need it, else XLA copies the table into it and back every step.
    """
    spec = PartitionSpec(AXES, *[None] * (dimensions - 1))
    layout = Layout(tuple(range(dimensions)), tiling=((GRANULE,),))
    return Format(layout, jax.NamedSharding(mesh, spec))


def partition(plan: Cores, places: jax.Array) -> Partition:
    """The lists of every core for `places: [S u] int32`, of each batch shard sorted; `plan.rows` where padded."""

    def local(places: jax.Array) -> Partition:
        lanes = _to_lanes(plan, places, plan.rows)
        ends, ids, samples, lost = jax.vmap(functools.partial(_lists, plan))(lanes)
        dropped = jax.lax.psum(jnp.sum(lost, dtype=jnp.int32), AXES)
        return Partition(ends.reshape(-1), ids.reshape(-1), samples.reshape(-1), lost.reshape(-1), dropped)

    return _manual(local, (RULES("batch"),), _PARTITION)(places)


def _lists(plan: Cores, places: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Ends, ids and samples of one core, and which of its places are above the limit."""
    edges = jnp.arange(plan.owners + 1, dtype=jnp.int32) * plan.own
    begin = jnp.searchsorted(places, edges).astype(jnp.int32)
    sent = jnp.minimum(jnp.diff(begin), plan.limit)
    sizes = _padded(sent)
    start = jnp.cumsum(sizes, dtype=jnp.int32) - sizes
    slot = jnp.arange(plan.buffer, dtype=jnp.int32)
    # Of owners that start at one slot the last is the one with ids.
    owner = jnp.searchsorted(start, slot, side="right").astype(jnp.int32) - 1
    index = slot - start[owner]
    real = index < sent[owner]
    sample = jnp.minimum(begin[owner] + index, plan.lane - 1)
    ids = jnp.where(real, places[sample] - owner * plan.own, PADDING)
    here = jnp.arange(plan.lane, dtype=jnp.int32) - begin[jnp.minimum(places // plan.own, plan.owners - 1)]
    lost = (places < plan.rows) & (here >= plan.limit)
    fill = jnp.broadcast_to(start[-1] + sizes[-1], max(GRANULE - plan.owners, 0))
    return jnp.concatenate([start + sent, fill]), ids, jnp.where(real, sample, PADDING), lost


def fetch(plan: Cores, table: jax.Array, at: Partition) -> jax.Array:
    """`[S u, w]`, the rows of the places; zeros where padded. `table: [rows, w]`, over all devices.

    Rows above the limit are NaN, so that no loss is taken from a wrong row.
    """

    def local(table: jax.Array, at: Partition) -> jax.Array:
        rows = jnp.where(at.lost[:, None], jnp.nan, _look_up(plan, at, table))
        return _from_lanes(plan, rows)

    return _manual(local, (_all(2), _PARTITION), RULES("batch", None))(table, at)


def collect(plan: Cores, at: Partition, gradients: jax.Array) -> Summed:
    """Sums `gradients: [S u, w]` by row, over the places of all batch shards."""

    def local(gradients: jax.Array, at: Partition) -> Summed:
        width = gradients.shape[1]
        lanes = _to_lanes(plan, gradients, 0).reshape(-1, width)
        # A column of ones counts the readers; rows are multiples of the granule.
        counted = jnp.zeros((lanes.shape[0], GRANULE)).at[:, 0].set(1)
        empty = jnp.zeros((plan.own * plan.cores, width + GRANULE))
        sums = _add(plan, at, empty, jnp.concatenate([lanes, counted], axis=1), "sum_gradients")
        found = _look_up(plan, at, sums)
        gradients, readers = found[:, :width], found[:, width]
        squares = jnp.sum(jnp.square(gradients) / jnp.maximum(readers, 1)[:, None])
        return Summed(gradients, readers, jax.lax.psum(squares, AXES))

    made: Any = Summed(*[_all(2), _all(1), PartitionSpec()])  # type: ignore[arg-type]
    return _manual(local, (RULES("batch", None), _PARTITION), made)(gradients, at)


def update(
    plan: Cores,
    table: jax.Array,
    state: RowsState,
    at: Partition,
    summed: Summed,
    *,
    rate: jax.Array,
    decay: float,
    apply: jax.Array,
    epsilon: float = 1e-8,
) -> tuple[jax.Array, RowsState]:
    """Row-wise AdaGrad, as in `lookup.update_rows`, in place.

    Changes nothing where `apply` is False, or ids were dropped. A row with n readers gets n parts of its step, which
    add up to it within rounding.
    """

    def local(
        table: jax.Array, state: RowsState, at: Partition, summed: Summed, rate: jax.Array, apply: jax.Array
    ) -> tuple[jax.Array, RowsState]:
        gradients = jnp.where(apply & (at.dropped == 0), summed.gradients, 0)
        squared = jnp.mean(jnp.square(gradients), axis=-1)
        total = _look_up(plan, at, state.sum) + squared
        step = gradients / (jnp.sqrt(total)[:, None] + epsilon)
        if decay:
            step += jnp.where((squared > 0)[:, None], decay * _look_up(plan, at, table), 0)
        share = 1 / jnp.maximum(summed.readers, 1)
        table = _add(plan, at, table, -rate * step * share[:, None], "add_steps")
        return table, RowsState(_add(plan, at, state.sum, squared * share, "add_squares"))

    made = (_all(2), RowsState(_all(1)))  # type: ignore[arg-type]
    summed_spec = Summed(*[_all(2), _all(1), PartitionSpec()])  # type: ignore[arg-type]
    given = (*made, _PARTITION, summed_spec, PartitionSpec(), PartitionSpec())
    return _manual(local, given, made)(table, state, at, summed, rate, apply)


def _to_lanes(plan: Cores, values: jax.Array, fill: int) -> jax.Array:
    """`[c, lane, ...]`, what the cores of this device take of the shard's `values: [u, ...]`."""
    lanes = plan.shares * plan.cores
    pad = [(0, lanes * plan.lane - plan.places)] + [(0, 0)] * (values.ndim - 1)
    dealt = jnp.pad(values, pad, constant_values=fill).reshape(plan.lane, lanes, *values.shape[1:]).swapaxes(0, 1)
    return jax.lax.dynamic_slice_in_dim(dealt, jax.lax.axis_index(SHARE_AXIS) * plan.cores, plan.cores)


def _from_lanes(plan: Cores, values: jax.Array) -> jax.Array:
    """`[u, ...]` of the batch shard, from what every core of it has, `[c lane, ...]`."""
    dealt = values.reshape(plan.cores, plan.lane, *values.shape[1:])
    dealt = jax.lax.all_gather(dealt, SHARE_AXIS, tiled=True)
    return dealt.swapaxes(0, 1).reshape(-1, *values.shape[1:])[: plan.places]


def _look_up(plan: Cores, at: Partition, table: jax.Array) -> jax.Array:
    """`[c lane, w]`, or `[c lane]` of a table without width: the row that each element reads, zeros for none."""
    lists, options = _operands(plan, at)
    return _primitives()[0].bind(*lists, table, device_batch_size=plan.cores * plan.lane, **options)


def _add(plan: Cores, at: Partition, table: jax.Array, values: jax.Array, name: str) -> jax.Array:
    """The table with `values: [c lane, w]` added to the rows that they are read from."""
    lists, options = _operands(plan, at)
    # Gradient descent by a rate of -1; every operation of a program needs a name of its own.
    name = f"{name}_{table.shape[0]}_{table.shape[-1]}"
    return _primitives()[1].bind(*lists, table, values, jnp.float32(-1), computation_name=name, **options)


def _operands(plan: Cores, at: Partition) -> tuple[tuple[jax.Array, ...], dict[str, int]]:
    gains = jnp.ones(at.ids.shape[0], jnp.float32)
    options = {"max_ids_per_partition": plan.limit, "max_unique_ids_per_partition": plan.limit, "sharding_strategy": 1}
    return (at.ends, at.ids, at.samples, gains, jnp.int32(1)), options


@functools.cache
def _primitives() -> tuple[Any, Any]:
    """Look-up and gradient descent of the package.

    Raises:
      InputError: it is not installed.
    """
    try:
        from jax_tpu_embedding.sparsecore.lib.core.primitives import (
            sparse_dense_matmul_csr,
            sparse_dense_matmul_grad_with_sgd,
        )
    except ImportError as error:
        raise InputError(
            "tables on sparse cores need the package jax-tpu-embedding, which does not load here "
            f"({error}); pip install 'tokenrec[sparsecore]' (Linux, x86-64)"
        ) from error
    return (
        sparse_dense_matmul_csr.tpu_sparse_dense_matmul_csr_primitive,
        sparse_dense_matmul_grad_with_sgd.tpu_sparse_dense_matmul_grad_with_sgd_primitive,
    )


def _padded[T: (int, jax.Array)](size: T) -> T:
    return (size + GRANULE - 1) // GRANULE * GRANULE


def _manual(local: Callable[..., Any], given: Any, made: Any) -> Callable[..., Any]:
    # Collectives here leave values equal along `tensor` in ways that the check cannot see.
    return jax.shard_map(local, in_specs=given, out_specs=made, check_vma=False)


def _all(dimensions: int) -> PartitionSpec:
    return PartitionSpec(AXES, *[None] * (dimensions - 1))


_PARTITION: Any = Partition(_all(1), _all(1), _all(1), _all(1), PartitionSpec())  # type: ignore[arg-type]
