"""The best items of a catalogue whose vectors are spread by rows: every device scores its own rows for the whole batch.

Queries, histories and goals travel to all devices, the best of each device and counts come back; no vector moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokenrec.ops.tables.routing import BATCH_AXES
from tokenrec.ops.tables.storage import from_storage_index, to_storage_index
from tokenrec.sharding import AXES, RULES


class RetrievalResult(NamedTuple):
    """Answers of a batch. `items: [B, k] int32`, rows of the catalogue, best first, -1 where there are fewer;
    `scores: [B, k]`; `ranks: [B, P] float32` of the goals, 1 the best, `inf` outside of the list, 0 fills.
    """

    items: jax.Array
    scores: jax.Array
    ranks: jax.Array


def sharded_top_k(
    queries: jax.Array,
    table: jax.Array,
    goals: jax.Array,
    seen: jax.Array | None,
    *,
    first: int,
    items: int,
    count: int,
    key: Callable[[jax.Array], jax.Array],
) -> RetrievalResult:
    """Scores `query . key(row)` of all items.

    Args:
      queries: `[B, d]`, goals: `[B, P]`, -1 fills, and seen: `[B, T]`, items to leave out, -1 fills, or None.
      table: the spread stack, `[rows, d]`; `items` rows from row number `first` on are the catalogue.
      count: k, items returned, at most all.
      key: of rows, as the head scores them.
    """

    def local(
        queries: jax.Array, table: jax.Array, goals: jax.Array, seen: jax.Array | None
    ) -> RetrievalResult:
        size = queries.shape[0]
        queries, goals, seen = jax.lax.all_gather(
            (queries, goals, seen), BATCH_AXES, tiled=True
        )
        own = table.shape[0]
        begin, rows = jax.lax.axis_index(AXES) * own, own * jax.lax.axis_size(AXES)
        item = (
            from_storage_index(begin + jnp.arange(own, dtype=jnp.int32), rows) - first
        )
        real = (item >= 0) & (item < items)
        scores = jnp.where(real, jnp.einsum("bd,vd->bv", queries, key(table)), -jnp.inf)
        if seen is not None:
            at = to_storage_index(jnp.maximum(seen, 0) + first, rows) - begin
            at = jnp.where((seen >= 0) & (at >= 0), at, own)
            scores = scores.at[jnp.arange(len(at))[:, None], at].set(
                -jnp.inf, mode="drop"
            )
        values, at = jax.lax.top_k(scores, min(count, own))
        values, best = jax.lax.all_gather((values, item[at]), AXES, axis=1, tiled=True)
        values, at = jax.lax.top_k(values, min(count, items))
        best = jnp.where(values > -jnp.inf, jnp.take_along_axis(best, at, axis=1), -1)
        found = RetrievalResult(best, values, _ranks(scores, item, goals))
        mine = jax.lax.axis_index(BATCH_AXES) * size
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, mine, size), found
        )

    batch = RULES("batch", None)
    made = jax.shard_map(
        local,
        in_specs=(batch, RULES("rows", None), batch, batch),
        out_specs=batch,
        check_vma=False,
    )
    queries, goals, seen = jax.sharding.reshard((queries, goals, seen), batch)
    return made(queries, table, goals, seen)


def _ranks(scores: jax.Array, item: jax.Array, goals: jax.Array) -> jax.Array:
    """`[B, P]` ranks of the goals among the scores, `[B, own]` a device; equals share the mean of theirs."""
    ranks = []
    for p in range(goals.shape[1]):  # one at a time: [B, P, own] need not fit in memory
        goal = goals[:, p : p + 1]
        own = jax.lax.pmax(
            jnp.max(jnp.where(item == goal, scores, -jnp.inf), axis=1, keepdims=True),
            AXES,
        )
        higher, equal = jax.lax.psum(
            (jnp.sum(scores > own, axis=1), jnp.sum(scores == own, axis=1)), AXES
        )
        rank = jnp.where(own[:, 0] > -jnp.inf, higher + (equal + 1) / 2, jnp.inf)
        ranks.append(jnp.where(goal[:, 0] < 0, 0.0, rank))
    return jnp.stack(ranks, axis=1)
