"""Sliding attention as a band: query tile i meets keys `[offset + i * stride, offset + i * stride + width)` alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.dense import MASKED
from tokenrec.ops.pattern import NO_KEY, NO_QUERY, Pattern, Rows, sees, take_or

TILE = 64  # query rows; wider ones hold more logits outside the window, narrower ones make matrix products small
GROUP_LOGITS = 1 << 19  # logits of the tiles that are computed together, so that they stay in the cache


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
        return self.tiles * self.tile * self.width


def _reach(query: Rows, key: Rows, window: int) -> tuple[np.ndarray, np.ndarray] | None:
    """First and last key position that each query may see, `[Q]` each; None for an order that is not a layout's."""
    shared = int(np.sum(key.candidate == -1))
    static = int(np.sum(key.static))
    in_order = np.all(np.diff(key.candidate) >= 0) and np.all(np.diff(key.index[:shared]) > 0)
    if not in_order or not key.static[:static].all():
        return None
    own = np.searchsorted(key.row, query.row)
    low = np.searchsorted(key.index[:shared], query.index - window + 1)
    low = np.where(query.static, low, np.maximum(low, static))
    own_first = np.maximum(np.searchsorted(key.candidate, query.candidate), own - window + 1)
    return np.where(low < shared, np.minimum(low, own), np.minimum(own_first, own)), own


def find_band(pattern: Pattern, window: int) -> Band | None:
    """The band of a sliding layer, None where the rows are in no order that has one."""
    query, key = pattern.rows(pattern.query_rows, window), pattern.rows(pattern.key_rows, window)
    reach = _reach(query, key, window)
    if reach is None:
        return None
    first, last = reach
    tile = min(TILE, len(first))
    start = np.arange(0, len(first), tile)
    tiles = len(start)
    low, high = np.minimum.reduceat(first, start), np.maximum.reduceat(last, start)
    advance = np.arange(tiles) * (max(1, int(np.median(np.diff(last[start])))) if tiles > 1 else 0)
    offset = int((low - advance).min())
    width = int((high - advance).max()) - offset + 1
    stride = int(advance[1]) if tiles > 1 else width
    steps = -(-width // stride)
    queries = take_or(query, np.arange(tiles * tile).reshape(tiles, tile), NO_QUERY)
    keys = take_or(key, offset + advance[:, None] + np.arange(steps * stride), NO_KEY)
    return Band(tile, tiles, stride, steps, window, offset, queries, keys)


def _groups(band: Band, streams: int) -> tuple[int, int]:
    """Groups of tiles, and tiles of a group."""
    group = max(1, GROUP_LOGITS // (streams * band.tile * band.width))
    groups = -(-band.tiles // group)
    return groups, -(-band.tiles // groups)


def _by_group(rows: Rows, none: Rows, groups: int, group: int) -> Rows:
    """`[n, width]` -> `[groups, group, width]`."""

    def cut(part: np.ndarray, other: int | bool) -> np.ndarray:
        fill = np.full((groups * group - len(part), part.shape[1]), other, part.dtype)
        return np.concatenate([part, fill]).reshape(groups, group, -1)

    return Rows(*(cut(part, other) for part, other in zip(rows, none, strict=True)))


def _cut(x: jax.Array, band: Band, groups: int, group: int) -> jax.Array:
    """Query rows `[G, Q, ...]` -> `[groups, G, group, tile, ...]`, zeros behind the last."""
    x = jnp.pad(x, ((0, 0), (0, groups * group * band.tile - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], groups, group, band.tile, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, rows: int) -> jax.Array:
    """The transpose of `_cut`: `[groups, G, group, tile, ...]` -> `[G, rows, ...]`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[4:])[:, :rows]


def _strides(x: jax.Array, band: Band, count: int) -> jax.Array:
    """Key rows `[G, K, ...]` -> `[G, count, stride, ...]` from `offset` on, zeros where there is no key."""
    rows, before = count * band.stride, max(0, -band.offset)
    x = x[:, max(0, band.offset) :][:, : rows - before]
    x = jnp.pad(x, ((0, 0), (before, rows - before - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(x.shape[0], count, band.stride, *x.shape[2:])


def _unstrides(x: jax.Array, band: Band, keys: int) -> jax.Array:
    """The transpose of `_strides`: `[G, count, stride, ...]` -> `[G, K, ...]`."""
    before = max(0, band.offset)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, max(0, -band.offset) :][:, : keys - before]
    return jnp.pad(x, ((0, 0), (before, keys - before - x.shape[1]), *[(0, 0)] * (x.ndim - 2)))


def _spans(x: jax.Array, steps: int) -> jax.Array:
    """`[G, group + steps - 1, stride, ...]` -> the span of each tile, `[G, group, steps * stride, ...]`."""
    group = x.shape[1] - steps + 1
    return jnp.concatenate([x[:, a : a + group] for a in range(steps)], axis=2)


def _unspans(x: jax.Array, steps: int) -> jax.Array:
    """The transpose of `_spans`: spans overlap, and what they say of one key is added up."""
    rest = [(0, 0)] * (x.ndim - 2)
    parts = enumerate(jnp.split(x, steps, axis=2))
    return functools.reduce(jnp.add, (jnp.pad(part, ((0, 0), (a, steps - 1 - a), *rest)) for a, part in parts))


def _logits(band: Band, q: jax.Array, k: jax.Array, valid: jax.Array, query: Rows, key: Rows) -> jax.Array:
    """Masked logits `[G, group, tile, width] float32`; `valid: [B, group, width]`, G = B x heads."""
    column, row = Rows(*(part[:, :, None] for part in query)), Rows(*(part[:, None, :] for part in key))
    see = (sees(column, row, band.window) & valid[:, :, None, :]) | (column.row == row.row)
    # Without the barrier XLA would compare the rows again for every head.
    see = jax.lax.optimization_barrier(see)[:, None]
    logits = jnp.einsum("gnqd,gnkd->gnqk", q, k, preferred_element_type=jnp.float32)
    by_stream = logits.reshape(valid.shape[0], -1, *logits.shape[1:])
    return jnp.where(see, by_stream, MASKED).reshape(logits.shape)


def _each_group(body: Callable[..., Any], carry: Any, parts: Any, groups: int) -> tuple[Any, Any]:
    """`lax.scan`, without a loop around a single group."""
    if groups > 1:
        return jax.lax.scan(body, carry, parts)
    carry, made = body(carry, jax.tree.map(lambda x: x[0], parts))
    return carry, jax.tree.map(lambda x: x[None], made)


def band_forward(band: Band, q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Output `[G, Q, h]` and log of the softmax's denominator `[G, Q] float32`.

    `q: [G, Q, h]`, scaled; `k, v: [G, K, h]`; `valid: [B, K] bool`; G = B x heads, streams first.
    """
    groups, group = _groups(band, q.shape[0])
    count = groups * group + band.steps - 1
    keys, values, known = (_strides(x, band, count) for x in (k, v, valid))

    def compute(_: None, part: Any) -> tuple[None, Any]:
        number, queries, query, key = part
        slab = [
            jax.lax.dynamic_slice_in_dim(x, number * group, group + band.steps - 1, 1) for x in (keys, values, known)
        ]
        k_span, v_span, known_span = (_spans(x, band.steps) for x in slab)
        logits = _logits(band, queries, k_span, known_span, query, key)
        most = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - most)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = jnp.einsum("gnqk,gnkd->gnqd", weights.astype(v.dtype), v_span, preferred_element_type=jnp.float32)
        return None, ((out / total).astype(q.dtype), (most + jnp.log(total))[..., 0])

    parts = (
        jnp.arange(groups),
        _cut(q, band, groups, group),
        _by_group(band.query, NO_QUERY, groups, group),
        _by_group(band.key, NO_KEY, groups, group),
    )
    _, (out, log_sum) = _each_group(compute, None, parts, groups)
    return _join(out, q.shape[1]), _join(log_sum, q.shape[1])


def band_backward(
    band: Band,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array,
    log_sum: jax.Array,
    inner: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, given that of the output; `inner: [G, Q]` is the sum of output x gradient."""
    groups, group = _groups(band, q.shape[0])
    count = groups * group + band.steps - 1
    keys, values, known = (_strides(x, band, count) for x in (k, v, valid))

    def compute(sums: Any, part: Any) -> tuple[Any, jax.Array]:
        number, queries, pull, log_total, along, query, key = part
        place = number * group, group + band.steps - 1, 1
        slab = [jax.lax.dynamic_slice_in_dim(x, *place) for x in (keys, values, known)]
        k_span, v_span, known_span = (_spans(x, band.steps) for x in slab)
        logits = _logits(band, queries, k_span, known_span, query, key)
        weights = jnp.exp(logits - log_total[..., None])
        by_weight = jnp.einsum("gnqd,gnkd->gnqk", pull, v_span, preferred_element_type=jnp.float32)
        by_logit = (weights * (by_weight - along[..., None])).astype(q.dtype)
        by_v = jnp.einsum("gnqk,gnqd->gnkd", weights.astype(q.dtype), pull, preferred_element_type=jnp.float32)
        by_k = jnp.einsum("gnqk,gnqd->gnkd", by_logit, queries, preferred_element_type=jnp.float32)
        by_q = jnp.einsum("gnqk,gnkd->gnqd", by_logit, k_span, preferred_element_type=jnp.float32)
        sums = tuple(
            _add_slab(total, _unspans(x, band.steps), place) for total, x in zip(sums, (by_k, by_v), strict=True)
        )
        return sums, by_q

    parts = (
        jnp.arange(groups),
        *(_cut(x, band, groups, group) for x in (q, gradient, log_sum, inner)),
        _by_group(band.query, NO_QUERY, groups, group),
        _by_group(band.key, NO_KEY, groups, group),
    )
    zeros = jnp.zeros(keys.shape, jnp.float32)
    (by_k, by_v), by_q = _each_group(compute, (zeros, zeros), parts, groups)
    return _join(by_q, q.shape[1]), _unstrides(by_k, band, k.shape[1]), _unstrides(by_v, band, k.shape[1])


def _add_slab(total: jax.Array, slab: jax.Array, place: tuple[jax.Array, int, int]) -> jax.Array:
    start, length, axis = place
    held = jax.lax.dynamic_slice_in_dim(total, start, length, axis)
    return jax.lax.dynamic_update_slice_in_dim(total, held + slab, start, axis)
