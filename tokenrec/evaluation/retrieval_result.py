"""The result of a retrieval step, and ranks computed on the devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RetrievalResult(NamedTuple):
    """Retrieved items of a batch, and the ranks of its goals.

    B requests, k items of an answer, P goals of a request.

    Attributes:
      items: `[B, k] int32`, catalogue rows, best first; -1 where there are fewer items.
      scores: `[B, k] float32`, `-inf` where there is no item.
      ranks: `[B, P] float32` of the goals: 1 is the best, `inf` is not in the list, 0
        fills.
    """

    items: jax.Array
    scores: jax.Array
    ranks: jax.Array


def goal_ranks(
    scores: jax.Array,
    items: jax.Array,
    goals: jax.Array,
    axes: Sequence[str] = (),
) -> jax.Array:
    """Rank the goals among all scored items, on the devices.

    Equal scores share the mean of their ranks, as in `metrics.ranking.ranks_of`:

        rank = #{v: s_v > s_goal} + (#{v: s_v = s_goal} + 1) / 2

    Args:
      scores: `[B, V]`, scores of V items, `-inf` for an item that is left out.
      items: `[V] int32`, catalogue row of each column.
      goals: `[B, P] int32`, catalogue rows; -1 fills.
      axes: mesh axes over which the columns are split, inside a `shard_map`; empty
        where every device has all columns.

    Returns:
      `[B, P] float32`; `inf` for a goal that is left out, 0 for a fill.
    """
    ranks = []
    # One goal at a time, because [B, P, V] need not fit in memory.
    for p in range(goals.shape[1]):
        goal = goals[:, p : p + 1]
        # A comparison instead of a gather, which explicit sharding would make an
        # exchange.
        goal_score = jnp.max(
            jnp.where(items == goal, scores, -jnp.inf), axis=1, keepdims=True
        )
        if axes:
            goal_score = jax.lax.pmax(goal_score, axes)
        higher = jnp.sum(scores > goal_score, axis=1)
        equal = jnp.sum(scores == goal_score, axis=1)
        if axes:
            higher, equal = jax.lax.psum((higher, equal), axes)
        rank = higher + (equal + 1) / 2
        rank = jnp.where(goal_score[:, 0] > -jnp.inf, rank, jnp.inf)
        ranks.append(jnp.where(goal[:, 0] < 0, 0.0, rank))
    return jnp.stack(ranks, axis=1)
