"""The mask of a pattern as two spans of keys per query, packed into one integer.

A TPU kernel should not load a Q x K mask. In the streams of tokenrec, a query sees at
most two runs of consecutive keys: one of the keys that all tokens share, and one of the
keys of its own candidate. With keys numbered by place, shared keys before `border`:

    shared run  [start, stop),      stop == border if the query has an own run
    own run     [own_start, own_stop)

Let `last` be the last key that the query sees, `depth = last - start` and
`near = last - own_start`. Then the query sees key j if and only if

    0 <= last - j <= depth   and   (j < border or last - j <= near)

`pack_spans` packs `last`, and `depth` and `near` where they differ between queries,
into one int32 per query; `SpanMask` evaluates the condition from that integer and j,
with two to four comparisons, inside the kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenrec.ops.attention.pattern import Pattern, TokenAttributes

# Bits of a query's integer, an int32 that must not be negative.
QUERY_BITS = 31


class QuerySpans(NamedTuple):
    """The two runs of keys that each query sees, by place among the keys.

    An empty run is `[border, border)`.

    Attributes:
      itself: `[Q]`, place of the query's own token.
      start: `[Q]`, first shared key.
      stop: `[Q]`, end of the shared run.
      own_start: `[Q]`, first key of the query's candidate.
      own_stop: `[Q]`, end of the candidate's run.
      border: place of the first candidate's key; K if there are none.
    """

    itself: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    own_start: np.ndarray
    own_stop: np.ndarray
    border: int

    def take(self, queries: np.ndarray) -> QuerySpans:
        """Take the spans of some queries."""
        return QuerySpans(
            self.itself[queries],
            self.start[queries],
            self.stop[queries],
            self.own_start[queries],
            self.own_stop[queries],
            self.border,
        )

    def shift(self, places: int) -> QuerySpans:
        """Move all keys to places that are higher by `places`."""
        return QuerySpans(
            self.itself + places,
            self.start + places,
            self.stop + places,
            self.own_start + places,
            self.own_stop + places,
            self.border + places,
        )


def concat_spans(parts: Sequence[QuerySpans]) -> QuerySpans:
    """Put the queries of several spans of one border behind each other."""
    return QuerySpans(
        np.concatenate([part.itself for part in parts]),
        np.concatenate([part.start for part in parts]),
        np.concatenate([part.stop for part in parts]),
        np.concatenate([part.own_start for part in parts]),
        np.concatenate([part.own_stop for part in parts]),
        parts[0].border,
    )


def visible_spans(
    pattern: Pattern, window: int | None, *, packable: bool = True
) -> QuerySpans | str:
    """Find the two runs of keys that each query sees, less padding.

    The search is by bisection; no Q x K matrix is formed.

    Args:
      pattern: which queries may see which keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
      packable: refuse spans that `pack_spans` cannot hold.

    Returns:
      The spans, or the reason why what a query sees is not two runs of keys.
    """
    query = pattern.query_attributes(window)
    key = pattern.key_attributes(window)
    # 1. Where each query stands among the keys.
    itself = np.searchsorted(key.position, query.position)
    missing = itself == len(key.position)
    if missing.any() or (key.position[itself] != query.position).any():
        return (
            "some queries are not among the keys, and would see nothing where they are "
            "padding"
        )
    # 2. Check the order of the keys: shared ones by index, then each candidate's by
    #    index.
    of_candidate = key.candidate >= 0
    border = int(np.argmax(of_candidate)) if of_candidate.any() else len(key.position)
    shared, own_run = key.index[:border], _number_runs(key.candidate[border:])
    if not of_candidate[border:].all() or own_run is None:
        return (
            "the keys are not in the order shared tokens, then one candidate after "
            "another"
        )
    # The own keys of all candidates get one ascending order, for one bisection.
    order_width = int(pattern.index.max()) + 1
    own_order = own_run * order_width + key.index[border:]
    if (np.diff(shared) < 0).any() or (np.diff(own_order) <= 0).any():
        return (
            "the index of the keys does not ascend within the shared tokens or within "
            "a candidate"
        )
    # 3. The shared run: from the window's lowest index up to the query's reach.
    lowest = np.zeros_like(query.index)
    if window is not None:
        lowest = np.maximum(query.index - window + 1, 0)
    start = np.searchsorted(shared, lowest)
    stop = np.searchsorted(shared, query.reach, side="right")
    if window is not None and key.static.any():
        static = int(np.argmin(np.append(key.static, False)))
        if key.static[static:].any() or static > border:
            return (
                "static tokens are not the first keys, so that a window would see two "
                "runs of shared tokens"
            )
        start = np.where(query.static, start, np.maximum(start, static))
    # 4. The own run: the same within the query's candidate.
    run = _runs_of_queries(query, key, border, own_run)
    own_start = border + np.searchsorted(own_order, run * order_width + lowest)
    own_stop = border + np.searchsorted(
        own_order, run * order_width + query.index, side="right"
    )
    # 5. Give empty runs one form.
    own_empty = (query.candidate < 0) | (own_stop <= own_start)
    own_start = np.where(own_empty, border, own_start)
    own_stop = np.where(own_empty, border, own_stop)
    empty = stop <= start
    start = np.where(empty, border, start)
    stop = np.where(empty, border, stop)
    # The packed form needs the shared run to end at the border where there is an own
    # run.
    if packable and (~own_empty & (stop < border)).any():
        return "a candidate's token does not see the last shared tokens"
    return QuerySpans(itself, start, stop, own_start, own_stop, border)


def _number_runs(values: np.ndarray) -> np.ndarray | None:
    """Number the runs of equal values, `[N]`; None if a value has two runs."""
    change = np.flatnonzero(np.diff(values)) + 1
    if len(change) + bool(len(values)) != len(np.unique(values)):
        return None
    return np.searchsorted(change, np.arange(len(values)), side="right")


def _runs_of_queries(
    query: TokenAttributes, key: TokenAttributes, border: int, own_run: np.ndarray
) -> np.ndarray:
    """Find the run of keys that belongs to each query's candidate, `[Q]`.

    Queries without candidate get run 0, which the caller ignores.
    """
    if not len(own_run):
        return np.zeros_like(query.index)
    run_of_candidate = np.zeros(int(key.candidate.max()) + 1, own_run.dtype)
    run_of_candidate[key.candidate[border:]] = own_run
    return run_of_candidate[np.maximum(query.candidate, 0)]


@dataclasses.dataclass(frozen=True)
class SpanMask:
    """The mask as a function of a query's integer and a key's place.

    Equal masks compare equal, so that layers share compiled kernels. From its low bits
    up, a query's integer holds `near` and `depth`, where they have bits, and `last`.

    Attributes:
      depth: how many keys before the last one the shared run reaches back, the same for
        all queries; None: to the first key, or in the integer.
      depth_bits: bits of the integer that hold `depth`; 0: it is not in the integer.
      near: how many keys before the last one the own run reaches back.
      near_bits: bits of the integer that hold `near`; 0: it is not in the integer.
      border: place of the first candidate's key; None if the keys have no candidates.
    """

    depth: int | None
    depth_bits: int
    near: int
    near_bits: int
    border: int | None

    def __call__(self, query: Any, key: Any) -> Any:
        """Evaluate the mask.

        Args:
          query: integers of `pack_spans`, NumPy or JAX.
          key: places of keys, in a shape that broadcasts with `query`.

        Returns:
          Booleans in the broadcast shape: the query sees the key.
        """
        depth, near = self.depth, self.near
        if self.near_bits:
            near = query & ((1 << self.near_bits) - 1)
            query = query >> self.near_bits
        if self.depth_bits:
            depth = query & ((1 << self.depth_bits) - 1)
            query = query >> self.depth_bits
        back = query - key
        seen = back >= 0
        if depth is not None:
            seen &= back <= depth
        if self.border is not None:
            seen &= (key < self.border) | (back <= near)
        return seen


def pack_spans(spans: QuerySpans, keys: int) -> tuple[SpanMask, np.ndarray]:
    """Pack each query's spans into one integer.

    What all queries have in common stays out of the integers, which spares the kernel's
    vector unit: plain causal order is one comparison a logit, and a window two.

    Args:
      spans: the spans of Q queries.
      keys: K.

    Returns:
      The mask function, and the integers `[Q] int64`. Integers of more than
      `QUERY_BITS` bits do not fit the kernel.
    """
    has_own = spans.own_stop > spans.own_start
    last = np.where(has_own, spans.own_stop, spans.stop) - 1
    # 1. Depth: none at all if every query sees the first key, one constant if all
    #    agree.
    from_first = spans.start == 0
    depths = last - spans.start
    depth, depth_bits = None, 0
    if not from_first.all():
        # A query that sees the first key may reach back beyond it, where nothing is.
        depth = int(depths[~from_first].max())
        least = depths[~from_first].min()
        if least < depth or depths[from_first].max(initial=0) > depth:
            depth, depth_bits = None, int(depths.max()).bit_length()
    # 2. Near: one constant if all candidates' queries agree.
    nears = np.where(has_own, last - spans.own_start, 0)
    near, near_bits = int(nears.max()), 0
    if has_own.any() and nears[has_own].min() < near:
        near_bits = near.bit_length()
    # 3. Pack, high bits first.
    packed = last.astype(np.int64)
    if depth_bits:
        packed = packed << depth_bits | depths
    if near_bits:
        packed = packed << near_bits | nears
    border = spans.border if spans.border < keys else None
    return SpanMask(depth, depth_bits, near, near_bits, border), packed
