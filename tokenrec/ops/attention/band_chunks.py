"""A band in chunks: some of its tiles at a time, for all streams and heads.

A *chunk* is a run of tiles of a band (`tokenrec.ops.attention.bands`) that holds no
more logits than fit a processor's cache. It cuts its queries and spans of keys out of
`[B, S, H, h]` and puts heads first in one copy, so that no array of the whole stream is
copied or transposed. One loop computes chunks of equal size:

    tiles    | front |  T  |  T  |  T  | back |

The spans of the first tiles begin before the stream. A slice at a computed place cannot
leave its array, so these tiles are a chunk before the loop, where places are static and
zeros can stand in; so are those left over behind it.

Shape letters: B streams, H heads, G = B x H, Q queries, K keys, S either, n tiles of
the band, T of a chunk, t queries of a tile, u keys of a span, h width of a head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from tokenrec.ops.attention.bands import BandPlan
from tokenrec.ops.attention.platform import store_on_cpu

# A chunk has at least this share of the tiles that a span is wide, so that there are
# few chunks outside of the loop, each of which makes the program longer.
LEAST_SHARE = 0.25
# A place among tiles or tokens, static or not.
type Place = int | jax.Array


class Chunk(NamedTuple):
    """A run of tiles.

    Attributes:
      plan: the band.
      heads: H.
      first: number of the first tile.
      tiles: T.
    """

    plan: BandPlan
    heads: int
    first: Place
    tiles: int

    @property
    def query(self) -> Place:
        """Place of the first query."""
        return self.first * self.plan.tile

    @property
    def key(self) -> Place:
        """Place of the first key; it may lie outside of the stream."""
        return self.plan.offset + self.first * self.plan.stride

    @property
    def queries(self) -> int:
        """Queries of all tiles."""
        return self.tiles * self.plan.tile

    @property
    def keys(self) -> int:
        """Keys that the spans cover together."""
        return (self.tiles + self.plan.strides - 1) * self.plan.stride

    def seen_of(self, seen: jax.Array) -> jax.Array:
        """Take the chunk's part `[T, ...]` of a mask by tile `[n, ...]`."""
        return jax.lax.dynamic_slice_in_dim(seen, self.first, self.tiles)

    def tiles_of(self, x: jax.Array) -> jax.Array:
        """Cut tiles `[G, T, t, ...]` out of queries `[B, Q, H, ...]`."""
        x = jnp.moveaxis(_take(x, self.query, self.queries), 2, 1)
        return x.reshape(-1, self.tiles, self.plan.tile, *x.shape[3:])

    def spans_of(self, x: jax.Array) -> jax.Array:
        """Copy spans `[G, T, u, ...]` out of keys `[B, K, H, ...]`."""
        strides = self.plan.strides
        x = jnp.moveaxis(_take(x, self.key, self.keys), 2, 1)
        x = x.reshape(-1, self.tiles + strides - 1, self.plan.stride, *x.shape[3:])
        # Span i is strides i, i + 1, ...: the a-th strides of all spans are one slice.
        return jnp.concatenate([x[:, a : a + self.tiles] for a in range(strides)], 2)

    def put_tiles(self, x: jax.Array, tiles: jax.Array) -> jax.Array:
        """Put tiles `[G, T, t, ...]` into queries `[B, Q, H, ...]`."""
        return _put(x, self._heads_last(tiles), self.query)

    def add_spans(self, x: jax.Array, spans: jax.Array) -> jax.Array:
        """Add spans `[G, T, h, u]`, transposed, to keys `[B, K, H, h]`."""
        strides = self.plan.strides
        # Shift the a-th strides of all spans to where they belong, and add.
        by_stride = (
            jnp.pad(part, ((0, 0), (a, strides - 1 - a), (0, 0), (0, 0)))
            for a, part in enumerate(jnp.split(spans, strides, axis=3))
        )
        total = store_on_cpu(functools.reduce(jnp.add, by_stride))
        more = self._heads_last(jnp.swapaxes(total, 2, 3))
        return _put(x, _take(x, self.key, self.keys) + more, self.key)

    def _heads_last(self, x: jax.Array) -> jax.Array:
        """`[G, a, b, ...]` -> `[B, a x b, H, ...]`."""
        x = x.reshape(-1, self.heads, x.shape[1] * x.shape[2], *x.shape[3:])
        return jnp.moveaxis(x, 1, 2)


def _take(x: jax.Array, place: Place, count: int) -> jax.Array:
    """Take `count` tokens of `[B, S, ...]`.

    At a static place, zeros stand in for tokens outside of the stream.
    """
    if isinstance(place, int):
        return _pad(x, -place, place + count - x.shape[1])
    return jax.lax.dynamic_slice_in_dim(x, place, count, axis=1)


def _put(x: jax.Array, part: jax.Array, place: Place) -> jax.Array:
    """Replace tokens of `[B, S, ...]`.

    At a static place, tokens of the part outside of the stream are left out.
    """
    if isinstance(place, int):
        part = _pad(part, min(0, place), min(0, x.shape[1] - place - part.shape[1]))
        place = max(0, place)
    return jax.lax.dynamic_update_slice_in_dim(x, part, place, axis=1)


def _pad(x: jax.Array, before: int, after: int) -> jax.Array:
    """Put zeros before and behind the tokens of `[B, S, ...]`, or cut where negative."""
    x = x[:, max(0, -before) : x.shape[1] - max(0, -after)]
    others = [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, ((0, 0), (max(0, before), max(0, after)), *others))


def stream_logits(plan: BandPlan, heads: int, max_logits: int) -> int:
    """Logits that one stream adds to those in memory."""
    # A stream that fits is taken whole, with as many others as fit. Of longer ones, all
    # go through one loop over chunks.
    if heads * plan.logits <= max_logits:
        return heads * plan.logits
    return heads * math.ceil(LEAST_SHARE * plan.strides) * plan.live_logits


class Cut(NamedTuple):
    """The tiles of a band as chunks.

    Attributes:
      before: `(first, tiles)` of the chunks before the loop.
      loop: numbers of the first tiles of the loop's chunks.
      behind: `(first, tiles)` of the chunks behind the loop.
    """

    before: list[tuple[int, int]]
    loop: range
    behind: list[tuple[int, int]]


def cut_tiles(plan: BandPlan, queries: int, keys: int, most: int) -> Cut:
    """Cut a band over Q queries and K keys into chunks of up to `most` tiles."""

    def pieces(first: int, last: int) -> Iterator[tuple[int, int]]:
        for start in range(first, last, most):
            yield start, min(most, last - start)

    # 1. Find the tiles that lie inside of the stream with their spans.
    front = max(0, -(plan.offset // plan.stride))
    fitting = (keys - plan.offset - plan.width) // plan.stride + 1
    back = min(queries // plan.tile, fitting, plan.tiles)
    inside = back - front
    if plan.tiles <= most or inside < 1:
        return Cut(list(pieces(0, plan.tiles)), range(0), [])
    # 2. Cut them into chunks, not too small, that leave the fewest over.
    largest = min(most, inside)
    sizes = range(largest, largest // 2, -1)
    size = min(sizes, key=lambda size: inside % size)
    back -= inside % size
    return Cut(
        list(pieces(0, front)),
        range(front, back, size),
        list(pieces(back, plan.tiles)),
    )


def over_chunks[R](
    plan: BandPlan,
    q: jax.Array,
    k: jax.Array,
    max_logits: int,
    step: Callable[[R, Chunk], R],
    results: R,
) -> R:
    """Compute one chunk after another.

    Args:
      plan: the band.
      q: `[B, Q, H, h]`; only its shape is read.
      k: `[B, K, H, h]`; only its shape is read.
      max_logits: most logits of a chunk, unless the smallest one has more.
      step: `(results, chunk) -> results`.
      results: those before the first chunk.

    Returns:
      The results after the last chunk.
    """
    batch, queries, heads, _ = q.shape
    least = math.ceil(LEAST_SHARE * plan.strides)
    most = max(least, max_logits // (batch * heads * plan.live_logits))
    cut = cut_tiles(plan, queries, k.shape[1], most)

    def run(results: R, first: Place, tiles: int) -> R:
        return step(results, Chunk(plan, heads, first, tiles))

    for first, tiles in cut.before:
        results = run(results, first, tiles)
    if cut.loop:
        results, _ = jax.lax.scan(
            lambda results, first: (run(results, first, cut.loop.step), None),
            results,
            jnp.asarray(cut.loop, jnp.int32),
        )
    for first, tiles in cut.behind:
        results = run(results, first, tiles)
    return results
