"""Attention tile by tile with an online softmax, for any pattern.

How it works. Queries and keys are cut into tiles of t tokens. For every tile of
queries, `plan_tiles` lists the tiles of keys in which some query may see some key; the
other tiles are never computed. A loop over the listed tiles keeps, for each query, the
maximum m of the logits so far, the sum l of their exponentials and the weighted sum a
of the values (the online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867):

    m'  = max(m, max_j s_j)
    l'  = l exp(m - m') + sum_j exp(s_j - m')
    a'  = a exp(m - m') + sum_j exp(s_j - m') v_j

After the last tile the output is a / l and the log of the softmax's denominator is
L = m + log l. The backward pass goes through the same tiles, forms each one's logits
again, and adds up the gradients (`tokenrec.ops.attention.softmax`; Dao et al. 2022,
"FlashAttention", arXiv 2205.14135). One t x t tile of logits per stream and head is in
memory at a time.

Two nested loops do this: a scan over the n tiles of queries, and inside it a loop over
the key tiles of each, of which there may be a different number for every query tile.

Shape letters: G streams times heads, Q queries, K keys, n tiles of queries, m tiles of
keys, t tokens of a tile, h width of a head.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.attention.dense import MASKED
from tokenrec.ops.attention.pattern import (
    FILL_KEY,
    FILL_QUERY,
    Pattern,
    TokenAttributes,
    is_visible,
    take_or_fill,
)
from tokenrec.ops.attention.softmax import tile_gradients


class TilePlan(NamedTuple):
    """Static plan: which key tiles each query tile computes.

    Attributes:
      tile: t, tokens of a tile.
      query: attributes of the queries, `[n, t]`.
      key: attributes of the keys, `[m, t]`.
      chosen: `[n, most]`, numbers of the key tiles that each query tile computes, first
        in each line; `most` is the largest count.
      counts: `[n]`, how many entries of a line of `chosen` are meant.
      window: keys that a query sees; None: all before it.
    """

    tile: int
    query: TokenAttributes
    key: TokenAttributes
    chosen: np.ndarray
    counts: np.ndarray
    window: int | None

    @property
    def logits(self) -> int:
        """Logits that one stream and head computes."""
        return int(self.counts.sum()) * self.tile**2

    @property
    def live_logits(self) -> int:
        """Logits of one stream and head that are in memory together: one tile."""
        return self.tile**2


def _tile_size(keys: int) -> int:
    """Choose t for a stream of so many keys.

    Wide tiles make wide matrix products. Along a short stream, the half-empty tiles on
    the diagonal are a large share of all, and narrow ones waste less.
    """
    if keys >= 4096:
        return 256
    if keys >= 1024:
        return 128
    return 64


def plan_tiles(pattern: Pattern, window: int | None) -> TilePlan:
    """Choose the key tiles of every query tile.

    A tile that is left out holds no visible pair; a tile that is chosen may hold none.
    """
    query = pattern.query_attributes(window)
    key = pattern.key_attributes(window)
    tile = _tile_size(len(key.position))

    def cut(attributes: TokenAttributes, fill: TokenAttributes) -> TokenAttributes:
        count = -(-len(attributes.position) // tile)
        places = np.arange(count * tile).reshape(-1, tile)
        return take_or_fill(attributes, places, fill)

    queries, keys = cut(query, FILL_QUERY), cut(key, FILL_KEY)
    may_see = _may_see(queries, keys, window)
    counts = may_see.sum(axis=1)
    # A stable sort of "not chosen" puts the chosen tiles first, in the order of the
    # keys.
    by_choice = np.argsort(~may_see, axis=1, kind="stable")
    chosen = by_choice[:, : counts.max()].astype(np.int32)
    return TilePlan(tile, queries, keys, chosen, counts.astype(np.int32), window)


def _may_see(
    query: TokenAttributes, key: TokenAttributes, window: int | None
) -> np.ndarray:
    """Find the pairs of tiles that may hold a visible pair of tokens, `[n, m] bool`.

    Only the extremes of each tile's attributes are compared: n x m comparisons in place
    of Q x K. The result is True for every pair that holds a visible one, and for some
    others.
    """
    real_query = query.position != FILL_QUERY.position
    real_key = key.position != FILL_KEY.position

    # Extremes over the real tokens of every tile, `[tiles, t]` -> `[tiles]`.
    def least(x: np.ndarray, real: np.ndarray) -> np.ndarray:
        return np.where(real, x, np.iinfo(np.int32).max).min(axis=1)

    def most(x: np.ndarray, real: np.ndarray) -> np.ndarray:
        return np.where(real, x, -1).max(axis=1)

    # 1. Order: shared keys are seen up to the reach, a candidate's own up to the index.
    furthest = np.maximum(query.reach, query.index)
    least_key, most_query = least(key.index, real_key), most(furthest, real_query)
    may_see = least_key[None, :] <= most_query[:, None]
    # 2. Candidates: the key tile has a shared key, or the ranges of candidates overlap.
    shared = (key.candidate == -1).any(axis=1)
    first_key = least(key.candidate, real_key)[None]
    last_key = most(key.candidate, real_key)[None]
    first_query = least(query.candidate, real_query)[:, None]
    last_query = most(query.candidate, real_query)[:, None]
    overlap = (first_key <= last_query) & (last_key >= first_query)
    may_see &= shared[None] | overlap
    # 3. A sliding layer: the tiles are near enough, and not only static keys are left.
    if window is not None:
        nearest = least(query.index, real_query)[:, None]
        may_see &= nearest - most(key.index, real_key)[None] < window
        has_moving_key = (~key.static & real_key).any(axis=1)
        may_see &= query.static.any(axis=1)[:, None] | has_moving_key[None]
    return may_see


def _to_tiles(x: jax.Array, tile: int, count: int) -> jax.Array:
    """Cut `[G, N, ...]` into tiles `[count, G, t, ...]`; zeros fill the last one."""
    x = jnp.pad(x, ((0, 0), (0, count * tile - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], count, tile, *x.shape[2:]), 1, 0)


def _from_tiles(x: jax.Array, tokens: int) -> jax.Array:
    """Join tiles `[count, G, t, ...]` to `[G, N, ...]`, without the fill."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]


class _KeyTiles(NamedTuple):
    """Keys, values and attributes by key tile, for a loop that takes one at a time.

    Attributes:
      k: `[m, G, t, h]`.
      v: `[m, G, t, h]`.
      valid: `[m, G, t] bool`, or None.
      attributes: `[m, t]` each.
    """

    k: jax.Array
    v: jax.Array
    valid: jax.Array | None
    attributes: TokenAttributes


def _cut_keys(
    plan: TilePlan, k: jax.Array, v: jax.Array, valid: jax.Array | None
) -> _KeyTiles:
    """Cut keys `[G, K, h]`, values and validity `[G, K]` into the key tiles."""
    count = len(plan.key.position)
    return _KeyTiles(
        _to_tiles(k, plan.tile, count),
        _to_tiles(v, plan.tile, count),
        None if valid is None else _to_tiles(valid, plan.tile, count),
        jax.tree.map(jnp.asarray, plan.key),
    )


def _masked_logits(
    plan: TilePlan,
    q: jax.Array,
    query: TokenAttributes,
    keys: _KeyTiles,
    number: jax.Array,
) -> jax.Array:
    """Compute the masked logits of one tile, `[G, t, t] float32`.

    A query that sees nothing, which only padding does, has equal logits and is not NaN.

    Args:
      plan: the plan.
      q: `[G, t, h]`, scaled queries of the query tile.
      query: `[t]` each, their attributes.
      keys: all key tiles.
      number: `[] int32`, the key tile.
    """
    k = keys.k[number]
    valid = None if keys.valid is None else keys.valid[number]
    key = jax.tree.map(lambda field: field[number], keys.attributes)
    column = query.map(lambda field: field[:, None])
    line = key.map(lambda field: field[None, :])
    # Without the barrier XLA would compare the attributes again for every stream and
    # head.
    seen = jax.lax.optimization_barrier(is_visible(column, line, plan.window))
    logits = jnp.einsum("gqd,gkd->gqk", q, k, preferred_element_type=jnp.float32)
    return jnp.where(
        seen if valid is None else seen & valid[:, None, :], logits, MASKED
    )


def tile_forward(
    plan: TilePlan, q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Compute attention over the tiles of the plan.

    Args:
      plan: the plan.
      q: `[G, Q, h]`, scaled.
      k: `[G, K, h]`.
      v: `[G, K, h]`.
      valid: `[G, K] bool`, keys that are not padding; None: all.

    Returns:
      The output `[G, Q, h]` in the dtype of `q`, and the log of the softmax's
      denominator `[G, Q] float32`, which the backward pass needs.
    """
    keys = _cut_keys(plan, k, v, valid)

    def query_tile(_: None, tile: Any) -> tuple[None, Any]:
        """Compute output `[G, t, h]` and L `[G, t]` of one query tile."""
        q_tile, query, chosen, count = tile

        # The carry is m, l `[G, t]` and a `[G, t, h]`, float32.
        def add_key_tile(step: jax.Array, carry: Any) -> Any:
            maximum, total, weighted = carry
            number = chosen[step]
            logits = _masked_logits(plan, q_tile, query, keys, number)
            new_maximum = jnp.maximum(maximum, jnp.max(logits, axis=-1))
            weights = jnp.exp(logits - new_maximum[..., None])
            # What was summed so far is relative to the old maximum.
            rescale = jnp.exp(maximum - new_maximum)
            addend = jnp.einsum(
                "gqk,gkd->gqd",
                weights.astype(v.dtype),
                keys.v[number],
                preferred_element_type=jnp.float32,
            )
            return (
                new_maximum,
                total * rescale + jnp.sum(weights, axis=-1),
                weighted * rescale[..., None] + addend,
            )

        shape = q_tile.shape[:2]
        start = (
            jnp.full(shape, MASKED),
            jnp.zeros(shape),
            jnp.zeros(q_tile.shape, jnp.float32),
        )
        maximum, total, weighted = jax.lax.fori_loop(0, count, add_key_tile, start)
        out = (weighted / total[..., None]).astype(q.dtype)
        return None, (out, maximum + jnp.log(total))

    q_tiles = _to_tiles(q, plan.tile, len(plan.counts))
    _, (out, log_sum) = jax.lax.scan(
        query_tile, None, (q_tiles, plan.query, plan.chosen, plan.counts)
    )
    return _from_tiles(out, q.shape[1]), _from_tiles(log_sum, q.shape[1])


def tile_backward(
    plan: TilePlan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    log_sum: jax.Array,
    output_dot_gradient: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of q, k and v over the tiles of the plan.

    Args:
      plan: the plan.
      q: `[G, Q, h]`, scaled.
      k: `[G, K, h]`.
      v: `[G, K, h]`.
      valid: `[G, K] bool`, keys that are not padding; None: all.
      log_sum: `[G, Q] float32`, from `tile_forward`.
      output_dot_gradient: `[G, Q] float32`, sum of output times gradient over h.
      gradient: `[G, Q, h]`, of the output.

    Returns:
      Gradients of q `[G, Q, h]`, k `[G, K, h]` and v `[G, K, h]`, float32.
    """
    keys = _cut_keys(plan, k, v, valid)

    def query_tile(key_gradients: Any, tile: Any) -> tuple[Any, jax.Array]:
        """Add one query tile's part to d(k) and d(v), and compute its d(q).

        d(k) and d(v) of all key tiles, `[m, G, t, h] float32`, are the carry of the
        scan.
        """
        q_tile, gradient_tile, log_sum_tile, dot_tile, query, chosen, count = tile

        def add_key_tile(step: jax.Array, carry: Any) -> Any:
            d_q, d_k, d_v = carry
            number = chosen[step]
            more_q, more_k, more_v = tile_gradients(
                _masked_logits(plan, q_tile, query, keys, number),
                log_sum_tile,
                dot_tile,
                q_tile,
                keys.k[number],
                keys.v[number],
                gradient_tile,
            )
            return d_q + more_q, d_k.at[number].add(more_k), d_v.at[number].add(more_v)

        d_q, *key_gradients = jax.lax.fori_loop(
            0,
            count,
            add_key_tile,
            (jnp.zeros(q_tile.shape, jnp.float32), *key_gradients),
        )
        return tuple(key_gradients), d_q

    tiles = (
        *(
            _to_tiles(x, plan.tile, len(plan.counts))
            for x in (q, gradient, log_sum, output_dot_gradient)
        ),
        plan.query,
        plan.chosen,
        plan.counts,
    )
    zeros = jnp.zeros(keys.k.shape, jnp.float32)
    (d_k, d_v), d_q = jax.lax.scan(query_tile, (zeros, zeros), tiles)
    return (
        _from_tiles(d_q, q.shape[1]),
        _from_tiles(d_k, k.shape[1]),
        _from_tiles(d_v, k.shape[1]),
    )
