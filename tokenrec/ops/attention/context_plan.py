"""How the tokens of a layer lie over the parts of `mesh.context`: static plans.

Queries and keys of a layer are split into P contiguous parts of equal size. The queries
of a part see keys of other parts, too, which come over the network:

- *all keys*: in a full layer, or where a window is longer than a part, keys and values
  are all-gathered;
- *a halo*: else the last tokens of the part before are enough, one collective-permute.

In causal order the last part of a full layer has nearly twice the mean work, and all
devices wait for it. So the queries are cut into 2 P chunks, and part p computes chunks
p and 2 P - 1 - p, whose work adds up to the same for every p (Llama 3, arXiv
2407.21783, 2024, section 3.3.2). Part p holds chunks 2 p and 2 p + 1: two
collective-permutes bring every chunk to where it is computed, and two bring the outputs
back. The stream itself keeps its order.

Shape letters: P parts; Q queries and K keys of the whole layer.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from tokenrec.ops.attention.pattern import Pattern
from tokenrec.ops.attention.span_mask import (
    QuerySpans,
    concat_spans,
    visible_spans,
)


class Part(NamedTuple):
    """The attention that one place along `mesh.context` computes.

    Attributes:
      pattern: its queries, ascending, and its keys.
      first_key: place of the first of these keys in the arrays at hand, which hold all
        K keys, or the halo and the part's own.
    """

    pattern: Pattern
    first_key: int

    def cut(self, window: int | None) -> Part:
        """Leave out the keys before the first and behind the last that is visible."""
        spans = visible_spans(self.pattern, window, packable=False)
        if isinstance(spans, str) or self.pattern.keeps_static(window):
            return self
        first, stop = _extent(spans)
        keys = self.pattern.key_positions[first:stop]
        pattern = dataclasses.replace(self.pattern, key_positions=keys)
        return Part(pattern, self.first_key + first)


class SplitPlan(NamedTuple):
    """The attention of one layer over P parts.

    Attributes:
      parts: what each part computes.
      keys: keys in the arrays at hand, the same for all parts.
      halo: how many of them come from the part before; None: the arrays hold all keys.
      balanced: chunks of queries are exchanged, so that all parts have the same work.
    """

    parts: tuple[Part, ...]
    keys: int
    halo: int | None
    balanced: bool

    def spans(self, window: int | None) -> QuerySpans | str:
        """Find the keys that each query sees, by place in the arrays at hand.

        Returns:
          The spans of the queries of all parts, `[Q]`, each part's in the order in
          which its chunks arrive (`arrival`); or the reason why they are no spans.
        """
        found = []
        for number, part in enumerate(self.parts):
            spans = visible_spans(part.pattern, window)
            if isinstance(spans, str):
                return spans
            if self.balanced:
                spans = spans.take(arrival(number, len(spans.start)))
            found.append(spans.shift(part.first_key))
        return concat_spans(found)


def _extent(spans: QuerySpans) -> tuple[int, int]:
    """The places from the first key that any query sees, or is, to behind the last."""
    first, stop = int(spans.itself.min()), int(spans.itself.max()) + 1
    for start, end in ((spans.start, spans.stop), (spans.own_start, spans.own_stop)):
        real = end > start
        if real.any():
            first = min(first, int(start[real].min()))
            stop = max(stop, int(end[real].max()))
    return first, stop


def arrival(part: int, queries: int) -> np.ndarray:
    """Order in which the ascending queries of a part arrive, `[queries]`.

    The first collective-permute carries even chunks, the second odd ones. The lower of
    a part's two chunks is its own number.
    """
    order = np.arange(queries)
    return np.roll(order, queries // 2) if part % 2 else order


def chunk_owner(chunk: int, parts: int) -> int:
    """Number the part that computes a chunk of queries.

    >>> [chunk_owner(chunk, 4) for chunk in range(8)]
    [0, 1, 2, 3, 3, 2, 1, 0]
    """
    return min(chunk, 2 * parts - 1 - chunk)


def plan_split(pattern: Pattern, window: int | None, parts: int) -> SplitPlan:
    """Plan the attention of a layer whose queries and keys are split into parts.

    Args:
      pattern: which queries see which keys; Q and K are multiples of `parts`.
      window: keys that a query of a sliding layer sees; None in a full layer.
      parts: P.
    """
    halo = _halo(pattern, window, parts)
    queries = np.split(pattern.query_positions, parts)
    keys = len(pattern.key_positions)
    if halo is not None:
        own = keys // parts
        made = []
        for number, own_queries in enumerate(queries):
            # Before the first part there is nothing, and its halo is never read.
            first = max(number * own - halo, 0)
            part_keys = pattern.key_positions[first : (number + 1) * own]
            part = dataclasses.replace(
                pattern, query_positions=own_queries, key_positions=part_keys
            )
            made.append(Part(part, halo + own - len(part_keys)))
        return SplitPlan(tuple(made), halo + own, halo, balanced=False)
    # A window limits the work of every query, and needs no balance.
    balanced = window is None and len(queries[0]) % 2 == 0
    if balanced:
        chunks = np.split(pattern.query_positions, 2 * parts)
        queries = [
            np.concatenate([chunks[number], chunks[2 * parts - 1 - number]])
            for number in range(parts)
        ]
    whole = (dataclasses.replace(pattern, query_positions=each) for each in queries)
    return SplitPlan(tuple(Part(each, 0) for each in whole), keys, None, balanced)


def _halo(pattern: Pattern, window: int | None, parts: int) -> int | None:
    """Count the keys of the part before that a part's queries see.

    Returns:
      The largest count of any part, at least 1; None if a part needs others than its
      own and those of the part before it.
    """
    if window is None or pattern.keeps_static(window):
        return None
    # Keys of candidates stand behind one border, which differs between parts.
    if (pattern.candidate[pattern.key_positions] >= 0).any():
        return None
    own = len(pattern.key_positions) // parts
    halo = 1
    for number, queries in enumerate(np.split(pattern.query_positions, parts)):
        part = dataclasses.replace(pattern, query_positions=queries)
        spans = visible_spans(part, window)
        if isinstance(spans, str):
            return None
        first, stop = _extent(spans)
        halo = max(halo, number * own - first)
        if stop > (number + 1) * own:
            return None
    return halo if halo <= own else None
