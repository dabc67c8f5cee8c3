"""Attention tile by tile with an online softmax: only tiles in which some query may see some key are computed.

Milakov and Gimelshein 2018 (the online softmax); Dao et al. 2022 (FlashAttention: the tiles, the backward pass).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.attention.dense import MASKED
from tokenrec.ops.attention.pattern import (
    NO_KEY,
    NO_QUERY,
    Pattern,
    Rows,
    sees,
    take_or,
)
from tokenrec.ops.attention.softmax import pull_back


class Tiles(NamedTuple):
    """A plan: which key tiles each query tile computes.

    Attributes:
      tile: rows of a tile.
      query, key: attributes of the rows, `[n, tile]` and `[m, tile]`.
      chosen: `[n, most]`, key tiles of each query tile; counts: `[n]`, how many of them are meant.
      window: keys that a query sees; None: all before it.
    """

    tile: int
    query: Rows
    key: Rows
    chosen: np.ndarray
    counts: np.ndarray
    window: int | None

    @property
    def logits(self) -> int:
        """Of one stream and head."""
        return int(self.counts.sum()) * self.tile**2

    @property
    def held(self) -> int:
        """Logits of one stream and head that are in memory together."""
        return self.tile**2


def _tile_rows(rows: int) -> int:
    """Wide tiles make wide matrix products; along a short stream, half-empty ones on the diagonal are a large share."""
    return 256 if rows >= 4096 else 128 if rows >= 1024 else 64


def find_tiles(pattern: Pattern, window: int | None) -> Tiles:
    """Key tiles of every query tile; a tile that is left out holds no visible pair."""
    query, key = (
        pattern.rows(pattern.query_rows, window),
        pattern.rows(pattern.key_rows, window),
    )
    tile = _tile_rows(len(key.row))

    def cut(rows: Rows, none: Rows) -> Rows:
        at = np.arange(-(-len(rows.row) // tile) * tile).reshape(-1, tile)
        return take_or(rows, at, none)

    queries, keys = cut(query, NO_QUERY), cut(key, NO_KEY)
    seen = _may_see(queries, keys, window)
    count = seen.sum(axis=1)
    chosen = np.argsort(~seen, axis=1, kind="stable")[:, : count.max()].astype(np.int32)
    return Tiles(tile, queries, keys, chosen, count.astype(np.int32), window)


def _may_see(query: Rows, key: Rows, window: int | None) -> np.ndarray:
    """`[n, m] bool`: False only where no query of a tile sees a key of the other, judged by the extremes of both."""
    real_q, real_k = query.row != NO_QUERY.row, key.row != NO_KEY.row

    def least(x: np.ndarray, real: np.ndarray) -> np.ndarray:
        return np.where(real, x, np.iinfo(np.int32).max).min(axis=1)

    def most(x: np.ndarray, real: np.ndarray) -> np.ndarray:
        return np.where(real, x, -1).max(axis=1)

    # Shared keys up to the reach, a candidate's own up to the index.
    furthest = np.maximum(query.reach, query.index)
    may = least(key.index, real_k)[None, :] <= most(furthest, real_q)[:, None]
    shared = (key.candidate == -1).any(axis=1)
    meet = (
        least(key.candidate, real_k)[None] <= most(query.candidate, real_q)[:, None]
    ) & (most(key.candidate, real_k)[None] >= least(query.candidate, real_q)[:, None])
    may &= shared[None] | meet
    if window is not None:
        may &= (
            least(query.index, real_q)[:, None] - most(key.index, real_k)[None] < window
        )
        may &= (
            query.static.any(axis=1)[:, None] | (~key.static & real_k).any(axis=1)[None]
        )
    return may


def _cut(x: jax.Array, tile: int, count: int) -> jax.Array:
    """`[G, rows, ...]` -> `[count, G, tile, ...]`, zeros behind the last."""
    x = jnp.pad(x, ((0, 0), (0, count * tile - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], count, tile, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, rows: int) -> jax.Array:
    """The transpose of `_cut`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :rows]


def _logits(
    plan: Tiles,
    q: jax.Array,
    k: jax.Array,
    valid: jax.Array | None,
    query: Rows,
    key: Rows,
) -> jax.Array:
    """Masked logits of a tile, `[G, tile, tile] float32`; `valid: [G, tile]`.

    A row that sees nothing, which only padding does, has equal logits and is not NaN.
    """
    column, row = (
        Rows(*(part[:, None] for part in query)),
        Rows(*(part[None, :] for part in key)),
    )
    # Without the barrier XLA would compare the rows again for every stream and head.
    seen = jax.lax.optimization_barrier(sees(column, row, plan.window))
    logits = jnp.einsum("gqd,gkd->gqk", q, k, preferred_element_type=jnp.float32)
    return jnp.where(
        seen if valid is None else seen & valid[:, None, :], logits, MASKED
    )


def tile_forward(
    plan: Tiles, q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Output `[G, Q, h]` and log of the softmax's denominator `[G, Q] float32`; arguments as in `band_forward`."""
    n, m = len(plan.counts), len(plan.key.row)
    keys, values = _cut(k, plan.tile, m), _cut(v, plan.tile, m)
    known = None if valid is None else _cut(valid, plan.tile, m)
    of_key = jax.tree.map(jnp.asarray, plan.key)

    def query_tile(_: None, part: Any) -> tuple[None, Any]:
        queries, query, chosen, count = part

        def key_tile(a: jax.Array, held: Any) -> Any:
            most, total, out = held
            j = chosen[a]
            logits = _logits(
                plan,
                queries,
                keys[j],
                None if known is None else known[j],
                query,
                jax.tree.map(lambda x: x[j], of_key),
            )
            new = jnp.maximum(most, jnp.max(logits, axis=-1))
            weights, fade = jnp.exp(logits - new[..., None]), jnp.exp(most - new)
            part = jnp.einsum(
                "gqk,gkd->gqd",
                weights.astype(v.dtype),
                values[j],
                preferred_element_type=jnp.float32,
            )
            return (
                new,
                total * fade + jnp.sum(weights, axis=-1),
                out * fade[..., None] + part,
            )

        shape = queries.shape[:2]
        start = (
            jnp.full(shape, MASKED),
            jnp.zeros(shape),
            jnp.zeros(queries.shape, jnp.float32),
        )
        most, total, out = jax.lax.fori_loop(0, count, key_tile, start)
        return None, ((out / total[..., None]).astype(q.dtype), most + jnp.log(total))

    parts = _cut(q, plan.tile, n), plan.query, plan.chosen, plan.counts
    _, (out, log_sum) = jax.lax.scan(query_tile, None, parts)
    return _join(out, q.shape[1]), _join(log_sum, q.shape[1])


def tile_backward(
    plan: Tiles,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    log_sum: jax.Array,
    inner: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v; arguments as in `band_backward`."""
    n, m = len(plan.counts), len(plan.key.row)
    keys, values = _cut(k, plan.tile, m), _cut(v, plan.tile, m)
    known = None if valid is None else _cut(valid, plan.tile, m)
    of_key = jax.tree.map(jnp.asarray, plan.key)

    def query_tile(sums: Any, part: Any) -> tuple[Any, jax.Array]:
        queries, pull, log_total, along, query, chosen, count = part

        def key_tile(a: jax.Array, held: Any) -> Any:
            by_q, by_k, by_v = held
            j = chosen[a]
            logits = _logits(
                plan,
                queries,
                keys[j],
                None if known is None else known[j],
                query,
                jax.tree.map(lambda x: x[j], of_key),
            )
            tile = logits, log_total, along, queries, keys[j], values[j], pull
            more_q, more_k, more_v = pull_back(*tile)
            return by_q + more_q, by_k.at[j].add(more_k), by_v.at[j].add(more_v)

        by_q, *sums = jax.lax.fori_loop(
            0, count, key_tile, (jnp.zeros(queries.shape, jnp.float32), *sums)
        )
        return tuple(sums), by_q

    parts = (
        *(_cut(x, plan.tile, n) for x in (q, gradient, log_sum, inner)),
        plan.query,
        plan.chosen,
        plan.counts,
    )
    zeros = jnp.zeros(keys.shape, jnp.float32)
    (by_k, by_v), by_q = jax.lax.scan(query_tile, (zeros, zeros), parts)
    return _join(by_q, q.shape[1]), _join(by_k, k.shape[1]), _join(by_v, k.shape[1])
