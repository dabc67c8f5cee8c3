"""Exact top-k of a catalogue whose item vectors are sharded over all devices.

Every device scores the items of its own table rows for the whole batch, and keeps its k
best. Queries, histories and goals travel to all devices; the k best items of each
device and the counts behind the ranks come back. No item vector moves, and no device
holds `[B, V]`: it holds `[B, V / devices]` scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tokenrec.evaluation.retrieval_result import RetrievalResult, goal_ranks
from tokenrec.ops.tables.packed import unpack
from tokenrec.ops.tables.routing import BATCH_AXES
from tokenrec.ops.tables.storage import from_storage_index, to_storage_index
from tokenrec.sharding import AXES, RULES


def sharded_top_k(
    queries: jax.Array,
    table: jax.Array,
    goals: jax.Array,
    history: tuple[jax.Array, jax.Array] | None,
    *,
    first: int,
    items: int,
    count: int,
    key: Callable[[jax.Array], jax.Array],
) -> RetrievalResult:
    """Retrieve the items with the highest `query . key(row)`, and rank the goals.

    The result is that of scoring the whole catalogue. Call it inside `jax.jit`, under
    the mesh.

    Args:
      queries: `[B, d]`.
      table: `[rows, d]`, a stack of embedding tables in storage order, split over all
        devices; it may be packed (`tokenrec.ops.tables.packed`).
      goals: `[B, P] int32`, catalogue rows; -1 fills.
      history: `[B, T] int32`, catalogue rows whose scores change, -1 fills, and
        `[B, T] float32`, what is added to them: `-inf` leaves an item out. It is added
        once per event. None changes none.
      first: table row of the first item.
      items: number of items V; the catalogue is table rows `first` to `first + V - 1`.
      count: k, items returned, V at most.
      key: maps table rows `[n, d]` to the vectors that the head scores.

    Returns:
      k items of each request, and the ranks of its goals.
    """

    batch = RULES("batch", None)
    search = jax.shard_map(
        functools.partial(
            _score_own_rows, first=first, items=items, count=count, key=key
        ),
        in_specs=(batch, RULES("rows", None), batch, batch),
        out_specs=batch,
        check_vma=False,
    )
    queries, goals, history = jax.sharding.reshard((queries, goals, history), batch)
    return search(queries, table, goals, history)


def _score_own_rows(
    queries: jax.Array,
    table: jax.Array,
    goals: jax.Array,
    history: tuple[jax.Array, jax.Array] | None,
    *,
    first: int,
    items: int,
    count: int,
    key: Callable[[jax.Array], jax.Array],
) -> RetrievalResult:
    """Search the table rows of one device, and merge with the other devices.

    Arguments as in `sharded_top_k`, of this device: its b requests, and its part of the
    table, `[rows / devices, d]`.
    """
    # 1. The whole batch on every device.
    batch_shard = queries.shape[0]
    queries, goals, history = jax.lax.all_gather(
        (queries, goals, history), BATCH_AXES, tiled=True
    )
    # 2. Scores of this device's rows. Rows of other tables in the stack are no items.
    table = unpack(table, queries.shape[1])
    own_rows = table.shape[0]
    begin = jax.lax.axis_index(AXES) * own_rows
    stored_rows = own_rows * jax.lax.axis_size(AXES)
    storage_index = begin + jnp.arange(own_rows, dtype=jnp.int32)
    item = from_storage_index(storage_index, stored_rows) - first
    is_item = (item >= 0) & (item < items)
    products = jnp.einsum("bd,vd->bv", queries, key(table))
    scores = jnp.where(is_item, products, -jnp.inf)
    # 3. Scores of the history's items are changed by the device that owns them; others
    # are out of range.
    if history is not None:
        seen, added = history
        column = to_storage_index(jnp.maximum(seen, 0) + first, stored_rows) - begin
        column = jnp.where((seen >= 0) & (column >= 0), column, own_rows)
        row = jnp.arange(len(column))[:, None]
        scores = scores.at[row, column].add(added, mode="drop")
    # 4. The best of each device, then the best of those.
    values, columns = jax.lax.top_k(scores, min(count, own_rows))
    values, candidates = jax.lax.all_gather(
        (values, item[columns]), AXES, axis=1, tiled=True
    )
    values, columns = jax.lax.top_k(values, min(count, items))
    best = jnp.take_along_axis(candidates, columns, axis=1)
    best = jnp.where(values > -jnp.inf, best, -1)
    result = RetrievalResult(best, values, goal_ranks(scores, item, goals, AXES))
    # 5. Each batch shard keeps its own requests.
    start = jax.lax.axis_index(BATCH_AXES) * batch_shard
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_shard), result
    )
