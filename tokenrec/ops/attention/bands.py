"""Sliding attention as a band of logits: each tile of queries meets one span of keys.

How it works. In a sliding layer, what a query sees lies close to itself, so the visible
logits form a band along the diagonal of the Q x K matrix. The queries are cut into n
tiles of t consecutive queries. Tile i computes logits against the *span* of keys

    [offset + i * stride, offset + i * stride + width),    width = strides * stride

and against no other key. Spans advance by a fixed stride, so that all of them are
gathered with `strides` slices of the keys, one per stride of the span, without an index
array, and all tiles run as one batched product. For w visible keys in plain causal
order, a span is about w + t keys wide, and the work is linear in the length:

                       keys
             . . . . . . . . . . . .
    tile 0   [-----]                        offset < 0: padding stands before key 0
    tile 1       [-----]
    tile 2           [-----]
    tile 3               [-----]

`plan_band` finds offset, stride and width from a `Pattern`, in NumPy. `band_forward`
and `band_backward` compute attention and its gradients; the backward pass forms the
logits again (`tokenrec.ops.attention.softmax`).

Shape letters: G streams times heads, Q queries, K keys, n tiles, t queries of a tile,
u = width keys of a span, h width of a head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

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

# Queries of a tile. Taller tiles hold more logits outside of the window, shorter ones
# make the matrix products small.
TILE = 64


class BandPlan(NamedTuple):
    """Static plan of sliding attention over a band.

    Attributes:
      tile: t, queries of a tile.
      tiles: n, number of tiles.
      stride: keys between the spans of neighbouring tiles.
      strides: strides in a span.
      window: keys that a query sees.
      offset: first key of tile 0; negative where padding has to stand before the keys.
      query: attributes of the queries of each tile, `[n, t]`.
      key: attributes of the keys of each span, `[n, u]`.
    """

    tile: int
    tiles: int
    stride: int
    strides: int
    window: int
    offset: int
    query: TokenAttributes
    key: TokenAttributes

    @property
    def width(self) -> int:
        """u, keys of a span."""
        return self.strides * self.stride

    @property
    def logits(self) -> int:
        """Logits that one stream and head computes."""
        return self.tiles * self.tile * self.width

    @property
    def live_logits(self) -> int:
        """Logits of one stream and head that are in memory together: all."""
        return self.logits


def plan_band(pattern: Pattern, window: int) -> BandPlan | None:
    """Plan the band of a sliding layer.

    Args:
      pattern: which queries may see which keys.
      window: keys that a query sees, itself included.

    Returns:
      The plan; None if the keys are not in the order of a layout, so that the keys that
      a query sees need not be near to it.
    """
    query = pattern.query_attributes(window)
    key = pattern.key_attributes(window)
    ranges = _visible_ranges(query, key, window)
    if ranges is None:
        return None
    first, last = ranges
    # 1. Cut the queries into tiles, and find the keys [low, high] that each tile needs.
    tile = min(TILE, len(first))
    tile_starts = np.arange(0, len(first), tile)
    tiles = len(tile_starts)
    low = np.minimum.reduceat(first, tile_starts)
    high = np.maximum.reduceat(last, tile_starts)
    # 2. Spans advance by what most tiles advance. Where queries are left out, or at the
    #    border of the candidates, some tiles advance by less or more.
    stride = 0
    if tiles > 1:
        stride = max(1, int(np.median(np.diff(last[tile_starts]))))
    advance = np.arange(tiles) * stride
    # 3. Make the span so wide that it holds the keys of every tile all the same.
    offset = int((low - advance).min())
    width = int((high - advance).max()) - offset + 1
    if tiles == 1:
        stride = width
    strides = -(-width // stride)
    # 4. Attributes by tile and span; outside of the stream stands fill.
    query_places = np.arange(tiles * tile).reshape(tiles, tile)
    key_places = offset + advance[:, None] + np.arange(strides * stride)
    return BandPlan(
        tile,
        tiles,
        stride,
        strides,
        window,
        offset,
        take_or_fill(query, query_places, FILL_QUERY),
        take_or_fill(key, key_places, FILL_KEY),
    )


def _visible_ranges(
    query: TokenAttributes, key: TokenAttributes, window: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Find the first and the last key that each query may see, `[Q]` each.

    Keys between them may be hidden: the mask decides. The result is None unless the
    keys are static tokens first, then the other shared tokens, both by ascending index,
    then one candidate after another.
    """
    shared = int(np.sum(key.candidate == -1))
    static = int(np.sum(key.static))
    in_order = np.all(np.diff(key.candidate) >= 0) and np.all(
        np.diff(key.index[:shared]) > 0
    )
    if not in_order or not key.static[:static].all():
        return None
    # The last visible key is the query itself: its own place among the keys.
    itself = np.searchsorted(key.position, query.position)
    # The first is the first shared key inside the window, past the static tokens unless
    # the query is static too.
    low = np.searchsorted(key.index[:shared], query.index - window + 1)
    low = np.where(query.static, low, np.maximum(low, static))
    # Where no shared key is inside the window, it is the first of the own candidate.
    own_low = np.maximum(
        np.searchsorted(key.candidate, query.candidate), itself - window + 1
    )
    first = np.where(low < shared, np.minimum(low, itself), np.minimum(own_low, itself))
    return first, itself


def _to_tiles(x: jax.Array, plan: BandPlan) -> jax.Array:
    """Cut queries `[G, Q, ...]` into tiles `[G, n, t, ...]`; zeros fill the last."""
    x = jnp.pad(
        x, ((0, 0), (0, plan.tiles * plan.tile - x.shape[1]), *[(0, 0)] * (x.ndim - 2))
    )
    return x.reshape(x.shape[0], plan.tiles, plan.tile, *x.shape[2:])


def _from_tiles(x: jax.Array, queries: int) -> jax.Array:
    """Join tiles `[G, n, t, ...]` to `[G, Q, ...]`, without the fill."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :queries]


def _to_spans(x: jax.Array, plan: BandPlan) -> jax.Array:
    """Copy keys `[G, K, ...]` into the spans of the tiles, `[G, n, u, ...]`.

    Zeros stand where there is no key.
    """
    # 1. Lay the keys from `offset` on out over the n + strides - 1 strides that the
    #    spans cover together.
    covered = (plan.tiles + plan.strides - 1) * plan.stride
    before = max(0, -plan.offset)
    x = x[:, max(0, plan.offset) :][:, : covered - before]
    x = jnp.pad(
        x, ((0, 0), (before, covered - before - x.shape[1]), *[(0, 0)] * (x.ndim - 2))
    )
    by_stride = x.reshape(x.shape[0], -1, plan.stride, *x.shape[2:])
    # 2. Span i is strides i, i + 1, ...: the a-th strides of all spans are one slice.
    return jnp.concatenate(
        [by_stride[:, a : a + plan.tiles] for a in range(plan.strides)], axis=2
    )


def _add_spans(x: jax.Array, plan: BandPlan, keys: int) -> jax.Array:
    """Sum spans `[G, n, u, ...]` by key, `[G, K, ...]`; transposes `_to_spans`."""
    unpadded = [(0, 0)] * (x.ndim - 2)
    # 1. Shift the a-th strides of all spans to where they belong, and add.
    parts = enumerate(jnp.split(x, plan.strides, axis=2))
    by_stride = (
        jnp.pad(part, ((0, 0), (a, plan.strides - 1 - a), *unpadded))
        for a, part in parts
    )
    x = functools.reduce(jnp.add, by_stride)
    # 2. Cut off what stands before and behind the keys; keys that no span covers get 0.
    before = max(0, plan.offset)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])[:, max(0, -plan.offset) :]
    x = x[:, : keys - before]
    return jnp.pad(x, ((0, 0), (before, keys - before - x.shape[1]), *unpadded[1:]))


def band_mask(plan: BandPlan) -> jax.Array:
    """Compute the keys of its span that each query sees, `[n, t, u] bool`.

    Padding is not taken into account.
    """
    # The barriers keep XLA from folding a mask of the stream's length into the program,
    # and from comparing the attributes again for every stream and head.
    query, key = jax.lax.optimization_barrier(
        jax.tree.map(jnp.asarray, (plan.query, plan.key))
    )
    column = query.map(lambda field: field[:, :, None])
    line = key.map(lambda field: field[:, None, :])
    return jax.lax.optimization_barrier(is_visible(column, line, plan.window))


def _masked_logits(
    plan: BandPlan, seen: jax.Array, q: jax.Array, k: jax.Array, valid: jax.Array | None
) -> jax.Array:
    """Compute masked logits `[G, n, t, u] float32` of tiles `q` and spans `k`.

    A query that sees nothing, which only padding does, has equal logits and is not NaN.

    Args:
      plan: the plan.
      seen: `[n, t, u] bool`, of `band_mask`.
      q: `[G, n, t, h]`.
      k: `[G, n, u, h]`.
      valid: `[G, K] bool`, or None.
    """
    logits = jnp.einsum("gnqd,gnkd->gnqk", q, k, preferred_element_type=jnp.float32)
    if valid is not None:
        seen = seen & _to_spans(valid, plan)[:, :, None, :]
    return jnp.where(seen, logits, MASKED)


def band_forward(
    plan: BandPlan,
    seen: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Compute attention over the band.

    Args:
      plan: the plan.
      seen: `[n, t, u] bool`, of `band_mask`.
      q: `[G, Q, h]`, scaled.
      k: `[G, K, h]`.
      v: `[G, K, h]`.
      valid: `[G, K] bool`, keys that are not padding; None: all.

    Returns:
      The output `[G, Q, h]` in the dtype of `q`, and the log of the softmax's
      denominator `[G, Q] float32`, which the backward pass needs.
    """
    logits = _masked_logits(plan, seen, _to_tiles(q, plan), _to_spans(k, plan), valid)
    maximum = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - maximum)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    spans = _to_spans(v, plan)
    # Divided after the product: t x h quotients in place of t x u.
    out = (
        jnp.einsum(
            "gnqk,gnkd->gnqd",
            weights.astype(v.dtype),
            spans,
            preferred_element_type=jnp.float32,
        )
        / total
    )
    log_sum = (maximum + jnp.log(total))[..., 0]
    queries = q.shape[1]
    return _from_tiles(out.astype(q.dtype), queries), _from_tiles(log_sum, queries)


def band_backward(
    plan: BandPlan,
    seen: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    log_sum: jax.Array,
    output_dot_gradient: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Compute the gradients of q, k and v over the band.

    Args:
      plan: the plan.
      seen: `[n, t, u] bool`, of `band_mask`.
      q: `[G, Q, h]`, scaled.
      k: `[G, K, h]`.
      v: `[G, K, h]`.
      valid: `[G, K] bool`, keys that are not padding; None: all.
      log_sum: `[G, Q] float32`, from `band_forward`.
      output_dot_gradient: `[G, Q] float32`, sum of output times gradient over h.
      gradient: `[G, Q, h]`, of the output.

    Returns:
      Gradients of q `[G, Q, h]`, k `[G, K, h]` and v `[G, K, h]`, float32.
    """
    q_tiles, gradient_tiles, log_sum_tiles, dot_tiles = (
        _to_tiles(x, plan) for x in (q, gradient, log_sum, output_dot_gradient)
    )
    k_spans, v_spans = _to_spans(k, plan), _to_spans(v, plan)
    logits = _masked_logits(plan, seen, q_tiles, k_spans, valid)
    d_q, d_k, d_v = tile_gradients(
        logits, log_sum_tiles, dot_tiles, q_tiles, k_spans, v_spans, gradient_tiles
    )
    keys = k.shape[1]
    return (
        _from_tiles(d_q, q.shape[1]),
        _add_spans(d_k, plan, keys),
        _add_spans(d_v, plan, keys),
    )
