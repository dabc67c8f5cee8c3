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

`plan_band` finds offset, stride and width from a `Pattern`, in NumPy;
`tokenrec.ops.attention.band_passes` computes attention and its gradients.

Shape letters: Q queries, K keys, n tiles, t queries of a tile, u = width keys of a span.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.ops.attention.pattern import (
    FILL_KEY,
    FILL_QUERY,
    Pattern,
    TokenAttributes,
    take_or_fill,
)

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
        """Logits of one stream and head that are in memory together: one tile."""
        return self.tile * self.width


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
