"""FLOPs and bytes of attention, by formula.

XLA reports neither for a Pallas kernel, and counts masked pairs in a dense product.
Here the cost is that of the mathematics: with n visible (query, key) pairs, H heads of
width h and m products of queries and keys,

    FLOPs = 2 m n H h        (a multiply-add is two FLOPs; the softmax is not counted)

A kernel computes whole tiles instead of pairs; `visible_tiles` counts those.

Q queries, K keys, S tokens of a stream.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tokenrec.ops.attention.pattern import Pattern

# Products of [Q, h] x [h, K] size. A kernel that keeps no Q x K matrix computes the
# logits again in its backward pass; model FLOPs, which MFU counts, leave that one out.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS, MODEL_BACKWARD_PRODUCTS = 2, 5, 4


def visible_pairs(pattern: Pattern, window: int | None) -> int:
    """Count the (query, key) pairs that see each other.

    Equals `pattern.visible(window).sum()`, in O((Q + K) log K) time and O(Q + K)
    memory.

    Args:
      pattern: which of Q queries see which of K keys.
      window: keys that a query of a sliding layer sees; None for full attention.
    """
    query = pattern.attributes(pattern.query_positions, window)
    key = pattern.attributes(pattern.key_positions, window)
    # A key of candidate c at index i is placed at c * span + i, beyond all keys of
    # other candidates, so that one sorted array answers for all of them.
    span = int(pattern.index.max(initial=0)) + 2
    # Indices in (lowest, highest] are seen. An index below -1 would be another
    # candidate's.
    window_start = np.full(len(query.index), -1)
    if window is not None:
        window_start = np.maximum(query.index - window, -1)
    total = 0
    # Keys in four groups: static or not, of the query's own candidate or of none.
    for static in (False, True):
        # Sliding layers show static keys to static queries within the window, or, if
        # they keep static keys, to all queries and however far back.
        shown_to_all = static and pattern.keeps_static(window)
        sees_group = np.ones(len(query.index), bool)
        if static and window is not None and not shown_to_all:
            sees_group = query.static
        lowest = np.full_like(window_start, -1) if shown_to_all else window_start
        for own in (False, True):
            in_group = (key.static == static) & ((key.candidate >= 0) == own)
            offset = key.candidate[in_group] * span if own else 0
            places = np.sort(key.index[in_group] + offset)
            seeing = sees_group & (query.candidate >= 0) if own else sees_group
            start = query.candidate[seeing] * span if own else 0
            highest = (query.index if own else query.reach)[seeing]
            low = np.minimum(lowest[seeing], highest)
            last = np.searchsorted(places, start + highest, side="right")
            first = np.searchsorted(places, start + low, side="right")
            total += int((last - first).sum())
    return total


def visible_tiles(
    pattern: Pattern, window: int | None, block_q: int, block_k: int
) -> int:
    """Count the tiles with a visible pair: those that a skipping kernel computes.

    Takes `[block_q, K]` booleans of memory.

    Args:
      pattern: which of Q queries see which of K keys.
      window: keys that a query of a sliding layer sees; None for full attention.
      block_q: queries of a tile.
      block_k: keys of a tile.
    """
    starts = np.arange(0, len(pattern.key_positions), block_k)
    count = 0
    for first in range(0, len(pattern.query_positions), block_q):
        strip = dataclasses.replace(
            pattern, query_positions=pattern.query_positions[first : first + block_q]
        )
        seen_keys = strip.visible(window).any(axis=0)
        count += int(np.add.reduceat(seen_keys, starts).astype(bool).sum())
    return count


def attention_flops(pairs: int, heads: int, head_dim: int, products: int) -> float:
    """Compute the FLOPs of products over (query, key) pairs, without the softmax.

    Args:
      pairs: (query, key) pairs of all streams.
      heads: H.
      head_dim: h, the width of a head.
      products: number of products, as `FORWARD_PRODUCTS`.
    """
    return 2.0 * products * pairs * heads * head_dim


def attention_bytes(
    queries: int, keys: int, heads: int, head_dim: int, itemsize: int, *, backward: bool
) -> float:
    """Compute the fewest bytes to and from memory of one stream: every array once.

    The forward pass moves q, k, v, the output and the float32 logsumexp; the backward
    pass those, and the gradients of the output, q, k and v.

    Args:
      queries: Q.
      keys: K.
      heads: H.
      head_dim: h, the width of a head.
      itemsize: bytes of a number in q, k and v.
      backward: the backward pass instead of the forward pass.
    """
    vectors = 4 * queries + 4 * keys if backward else 2 * queries + 2 * keys
    return float(heads * (vectors * head_dim * itemsize + 4 * queries))
