"""The batch: what the pipeline hands to the step. B samples, T events, C candidates, K tasks."""

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
      target: `[B, C, .]`, the same columns as `state`; None in UC.
      labels: `[B, C or T, K] int8`, -1 where unknown or not to be read.
      weight: `[B, C or T] float32`, 1 for a row that carries loss (training) or a score (evaluation), otherwise 0.
    """

    user: Signals
    state: Signals
    action: Signals
    valid: Leaf
    target: Signals | None
    labels: Leaf
    weight: Leaf


class HostBatch(NamedTuple):
    """A batch and, on the host only, which rows it read out: `rows: [B, C or T] int64`, -1 where weight is 0."""

    batch: Batch
    rows: Leaf


class ReadRows(NamedTuple):
    """Whose scores an evaluation batch gives, n rows: original ids and times, in the order of `HostBatch.rows >= 0`.

    `user_id, item_id: [n]`, `time: [n] int64` milliseconds.
    """

    user_id: Leaf
    item_id: Leaf
    time: Leaf
