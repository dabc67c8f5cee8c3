"""Runs of keys per query, and the blocks of them that a tiled kernel has to visit.

In the streams of tokenrec a query sees at most two runs of consecutive keys
(`tokenrec.ops.attention.span_mask`). A kernel that walks over blocks of keys wants, for
each block of queries, one interval of key blocks; and in the backward pass, for each
block of keys, one interval of query blocks. One pair of intervals per layer would be
wide: a candidate's tokens see events and, far behind them, each other, and an event is
seen by the events of its window and, far behind them, by the candidates. So the pairs
of a query and a key are split in three *parts*, each with narrow intervals of its own:

    queries without candidate,  shared keys
    queries of candidates,      shared keys
    queries of candidates,      keys of their candidate

A part that is empty is left out. In plain causal order there is one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.ops.attention.span_mask import QuerySpans


class KeyRuns(NamedTuple):
    """What each query sees, and the blocks that hold it, by place among the keys.

    P counts the parts, Q' the queries with the fill of the last block, which see
    nothing. All arrays are int32.

    Attributes:
      start: `[P, Q']`, first key of the query's run.
      stop: `[P, Q']`, end of the query's run.
      key_blocks: `[P, 2, query blocks]`, interval of key blocks of a query block.
      query_blocks: `[P, 2, key blocks]`, interval of query blocks of a key block.
    """

    start: np.ndarray
    stop: np.ndarray
    key_blocks: np.ndarray
    query_blocks: np.ndarray


def visited_pairs(runs: KeyRuns, block_q: int, block_k: int) -> int:
    """Count the pairs of a query and a key in the tiles that a kernel visits."""
    return int(np.diff(runs.key_blocks, axis=1).clip(0).sum()) * block_q * block_k


def make_key_runs(spans: QuerySpans, keys: int, block_q: int, block_k: int) -> KeyRuns:
    """Split the spans into parts and find the blocks of each.

    Args:
      spans: the runs of keys that each query sees.
      keys: K.
      block_q: queries of a block.
      block_k: keys of a block.
    """
    queries = len(spans.start)
    of_candidate = spans.own_stop > spans.own_start
    shared_stop = np.where(of_candidate, spans.start, spans.stop)
    candidate_stop = np.where(of_candidate, spans.stop, spans.start)
    parts = [
        (start, stop)
        for start, stop in (
            (spans.start, shared_stop),
            (spans.start, candidate_stop),
            (spans.own_start, spans.own_stop),
        )
        if (stop > start).any()
    ]
    # 1. Fill up the last block with queries that see nothing.
    fill = (0, -queries % block_q)
    start, stop = (
        np.stack([np.pad(run, fill) for run in side])
        for side in zip(*parts, strict=True)
    )
    # 2. The intervals of key blocks, from the lowest key to the highest of a block's
    #    queries.
    empty = stop <= start
    by_block = (len(parts), -1, block_q)
    first = np.where(empty, keys, start).reshape(by_block).min(axis=2) // block_k
    end = -(-np.where(empty, 0, stop).reshape(by_block).max(axis=2) // block_k)
    # 3. The intervals of query blocks, from the first to the last one that visits a key
    #    block.
    block = np.arange(-(-keys // block_k))[:, None]
    visits = (first[:, None] <= block) & (block < end[:, None])
    first_query = np.argmax(visits, axis=2)
    end_query = visits.shape[2] - np.argmax(visits[:, :, ::-1], axis=2)
    end_query = np.where(visits.any(axis=2), end_query, 0)
    return KeyRuns(
        *(
            array.astype(np.int32)
            for array in (
                start,
                stop,
                np.stack([first, end], axis=1),
                np.stack([first_query, end_query], axis=1),
            )
        )
    )
