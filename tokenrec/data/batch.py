"""The batch: what the pipeline hands to the step. B samples, T events, C candidates, K tasks.

Retrieval: R read-outs of a sample, P goals of a read-out, L levels of a semantic id.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# A leaf is a NumPy array on the host, a jax.Array in a step, an abstract value at compile time.
Leaf = Any


class Signals(NamedTuple):
    """Features of an entity: `ids: [..., I] int32`, `dense: [..., D] float32` (NaN is missing), by `schema.columns`."""

    ids: Leaf
    dense: Leaf


class Batch(NamedTuple):
    """Samples of one shape.

    Histories are right-aligned: the newest event is at T - 1, and rows before the first event have `valid` False and
    ids 0. NIO (new impression only): a sample is a request, `target` holds its C candidates, and labels belong to
    them. UC (user centric): a sample is a stream of T events, `target` is None, and labels belong to the events.

    Attributes:
      user: `[B, .]`.
      state: `[B, T, .]`, item and context of each event (`Schema.state` columns).
      action: `[B, T, .]`.
      valid: `[B, T] bool`.
      target: `[B, C, .]`, the same columns as `state`; None in UC. Retrieval: `[B, 1, .]`, the context of the request,
        all that is known of an item being missing.
      labels: `[B, C or T, K] int8`, -1 where unknown or not to be read; None in retrieval.
      weight: `[B, C or T] float32`, 1 for a row that carries loss (training) or a score (evaluation), otherwise 0.
        Retrieval: `[B, R]`.
      items: retrieval: `[B, T] int32`, row of the catalogue of each event, -1 where there is none.
      goals: retrieval: `[B, R, P] int32`, rows of the catalogue that follow a read-out, -1 fills. R is 1, the end of
        the history, or in UC T, each event.
      codes: retrieval with semantic ids: `[B, R, P, L] int32`, codes of the goals, -1 fills.
      negatives: drawn in the step for a sampled softmax: `[B, n] int32`, rows of the catalogue.
      ages: `[B, T] int32`, whole seconds from each event to the request, in UC to the newest event of the stream; 0
        where there is no event. None unless the model reads times.
    """

    user: Signals
    state: Signals
    action: Signals
    valid: Leaf
    target: Signals | None
    labels: Leaf
    weight: Leaf
    items: Leaf = None
    goals: Leaf = None
    codes: Leaf = None
    negatives: Leaf = None
    ages: Leaf = None


class HostBatch(NamedTuple):
    """A batch and, on the host only, which rows of the log it reads: `rows: [B, C or T] int64`, -1 where weight is 0.

    Retrieval: `[B, R, P]`, the rows of the goals.
    """

    batch: Batch
    rows: Leaf


class ReadRows(NamedTuple):
    """Whose scores an evaluation batch gives, over all processes. n rows, in the order of `rows >= 0`.

    Attributes:
      rows: as `HostBatch.rows`, of the whole batch.
      user_id, item_id: `[n]` original ids.
      time: `[n] int64` milliseconds.
      item: `[n] int32`, row of the catalogue.
      labels: `[n, K] int8`, -1 where unknown.
    """

    rows: Leaf
    user_id: Leaf
    item_id: Leaf
    time: Leaf
    item: Leaf
    labels: Leaf
