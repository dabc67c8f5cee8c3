"""Sliding attention as a band: query tile i meets keys `[offset + i * stride, offset + i * stride + width)` alone."""

from __future__ import annotations

import functools
from typing import NamedTuple

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

TILE = 64  # query rows; wider ones hold more logits outside the window, narrower ones make matrix products small


class Band(NamedTuple):
    """A plan of sliding attention.

    Attributes:
      tile, tiles: query rows of a tile; n, their number.
      stride, steps: keys between the spans of neighbouring tiles; strides in a span.
      window: keys that a query sees.
      offset: first key of tile 0; negative where padding has to stand before the keys.
      query, key: attributes of the rows of each tile, `[n, tile]` and `[n, steps * stride]`.
    """

    tile: int
    tiles: int
    stride: int
    steps: int
    window: int
    offset: int
    query: Rows
    key: Rows

    @property
    def width(self) -> int:
        return self.steps * self.stride

    @property
    def logits(self) -> int:
        """Of one stream and head, all of them at a time."""
        return self.tiles * self.tile * self.width

    @property
    def held(self) -> int:
        """Logits of one stream and head that are in memory together."""
        return self.logits


def _reach(query: Rows, key: Rows, window: int) -> tuple[np.ndarray, np.ndarray] | None:
    """First and last key position that each query may see, `[Q]` each; None for an order that is not a layout's."""
    shared = int(np.sum(key.candidate == -1))
    static = int(np.sum(key.static))
    in_order = np.all(np.diff(key.candidate) >= 0) and np.all(
        np.diff(key.index[:shared]) > 0
    )
    if not in_order or not key.static[:static].all():
        return None
    own = np.searchsorted(key.row, query.row)
    low = np.searchsorted(key.index[:shared], query.index - window + 1)
    low = np.where(query.static, low, np.maximum(low, static))
    own_first = np.maximum(
        np.searchsorted(key.candidate, query.candidate), own - window + 1
    )
    return np.where(low < shared, np.minimum(low, own), np.minimum(own_first, own)), own


def find_band(pattern: Pattern, window: int) -> Band | None:
    """The band of a sliding layer, None where the rows are in no order that has one."""
    query, key = (
        pattern.rows(pattern.query_rows, window),
        pattern.rows(pattern.key_rows, window),
    )
    reach = _reach(query, key, window)
    if reach is None:
        return None
    first, last = reach
    tile = min(TILE, len(first))
    start = np.arange(0, len(first), tile)
    tiles = len(start)
    low, high = np.minimum.reduceat(first, start), np.maximum.reduceat(last, start)
    advance = np.arange(tiles) * (
        max(1, int(np.median(np.diff(last[start])))) if tiles > 1 else 0
    )
    offset = int((low - advance).min())
    width = int((high - advance).max()) - offset + 1
    stride = int(advance[1]) if tiles > 1 else width
    steps = -(-width // stride)
    queries = take_or(query, np.arange(tiles * tile).reshape(tiles, tile), NO_QUERY)
    keys = take_or(key, offset + advance[:, None] + np.arange(steps * stride), NO_KEY)
    return Band(tile, tiles, stride, steps, window, offset, queries, keys)


def _tiles(x: jax.Array, band: Band) -> jax.Array:
    """Query rows `[G, Q, ...]` -> `[G, n, tile, ...]`, zeros behind the last."""
    x = jnp.pad(
        x, ((0, 0), (0, band.tiles * band.tile - x.shape[1]), *[(0, 0)] * (x.ndim - 2))
    )
    return x.reshape(x.shape[0], band.tiles, band.tile, *x.shape[2:])


def _untiles(x: jax.Array, rows: int) -> jax.Array:
    """The transpose of `_tiles`."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :rows]


def _spans(x: jax.Array, band: Band) -> jax.Array:
    """Key rows `[G, K, ...]` -> the span of each tile `[G, n, width, ...]`, zeros where there is no key."""
    rows, before = (band.tiles + band.steps - 1) * band.stride, max(0, -band.offset)
    x = x[:, max(0, band.offset) :][:, : rows - before]
    x = jnp.pad(
        x, ((0, 0), (before, rows - before - x.shape[1]), *[(0, 0)] * (x.ndim - 2))
    )
    strides = x.reshape(x.shape[0], -1, band.stride, *x.shape[2:])
    return jnp.concatenate(
        [strides[:, a : a + band.tiles] for a in range(band.steps)], axis=2
    )


def _unspans(x: jax.Array, band: Band, keys: int) -> jax.Array:
    """The transpose of `_spans`: spans overlap, and what they say of one key is added up."""
    rest = [(0, 0)] * (x.ndim - 2)
    parts = enumerate(jnp.split(x, band.steps, axis=2))
    strides = (
        jnp.pad(part, ((0, 0), (a, band.steps - 1 - a), *rest)) for a, part in parts
    )
    x = functools.reduce(jnp.add, strides)
    before = max(0, band.offset)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, max(0, -band.offset) :][
        :, : keys - before
    ]
    return jnp.pad(x, ((0, 0), (before, keys - before - x.shape[1]), *rest[1:]))


def band_mask(band: Band) -> jax.Array:
    """`[n, tile, width] bool`: what each tile sees of its span, less padding."""
    # The barriers keep XLA from folding a mask of the stream's length into the program, and from comparing rows again
    # for every stream and head.
    query, key = jax.lax.optimization_barrier(
        jax.tree.map(jnp.asarray, (band.query, band.key))
    )
    column, row = (
        Rows(*(part[:, :, None] for part in query)),
        Rows(*(part[:, None, :] for part in key)),
    )
    return jax.lax.optimization_barrier(sees(column, row, band.window))


def _logits(
    band: Band, seen: jax.Array, q: jax.Array, k: jax.Array, valid: jax.Array | None
) -> jax.Array:
    """Masked logits `[G, n, tile, width] float32` of tiles `q` and spans `k`, for `valid: [G, K]`.

    A row that sees nothing, which only padding does, has equal logits and is not NaN.
    """
    logits = jnp.einsum("gnqd,gnkd->gnqk", q, k, preferred_element_type=jnp.float32)
    if valid is not None:
        seen = seen & _spans(valid, band)[:, :, None, :]
    return jnp.where(seen, logits, MASKED)


def band_forward(
    band: Band,
    seen: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Output `[G, Q, h]` and log of the softmax's denominator `[G, Q] float32`.

    `seen`: of `band_mask`; `q: [G, Q, h]`, scaled; `k, v: [G, K, h]`; `valid: [G, K] bool`; G streams and heads.
    """
    logits = _logits(band, seen, _tiles(q, band), _spans(k, band), valid)
    most = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - most)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    spans = _spans(v, band)
    out = (
        jnp.einsum(
            "gnqk,gnkd->gnqd",
            weights.astype(v.dtype),
            spans,
            preferred_element_type=jnp.float32,
        )
        / total
    )
    log_sum = (most + jnp.log(total))[..., 0]
    return _untiles(out.astype(q.dtype), q.shape[1]), _untiles(log_sum, q.shape[1])


def band_backward(
    band: Band,
    seen: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    log_sum: jax.Array,
    inner: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, float32, given that of the output; `inner: [G, Q]` is the sum of output x gradient."""
    queries, pull, log_total, along = (
        _tiles(x, band) for x in (q, gradient, log_sum, inner)
    )
    k_spans, v_spans = _spans(k, band), _spans(v, band)
    logits = _logits(band, seen, queries, k_spans, valid)
    by_q, by_k, by_v = pull_back(
        logits, log_total, along, queries, k_spans, v_spans, pull
    )
    keys = k.shape[1]
    return (
        _untiles(by_q, q.shape[1]),
        _unspans(by_k, band, keys),
        _unspans(by_v, band, keys),
    )
