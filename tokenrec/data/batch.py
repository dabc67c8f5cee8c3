"""Define the batch that the input pipeline hands to the step.

Shape letters of this package:

| letter | meaning |
|---|---|
| B | samples of a batch |
| T | events of a history or stream, padding included: one of `stream_lengths` |
| C | candidates of a request (`data.candidates`) |
| K | tasks |
| R | read-outs of a sample, in retrieval |
| P | goals of a read-out, in retrieval |
| L | levels of a semantic id |
| I, D | columns of `ids` and of `dense` (schema.py) |

Two paradigms fill a batch (docs/methods.md section 3; samples.py has pictures):

- *NIO* (new impression only): a sample is a request. `target` holds its C candidates,
  and labels belong to the candidates.
- *UC* (user centric): a sample is a stream of T events. `target` is None, and labels
  belong to the events.

Two objectives:

- *ranking*: predict the labels of log rows.
- *retrieval*: predict items. A *read-out* is a position at which items are predicted,
  and its *goals* are the items to find: in NIO the positives of the request, read out
  at the end of the history (R = 1, P = C); in UC the next event, at every event
  (R = T, P = 1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

# A leaf is a NumPy array on the host, a jax.Array in a step, and an abstract value at
# compile time.
Leaf = Any


class Signals(NamedTuple):
    """Features of one entity; `schema.columns` says which column is which feature.

    Attributes:
      ids: `[..., I] int32`, ids of embedding tables; 0 is missing.
      dense: `[..., D] float32`; NaN is missing.
    """

    ids: Leaf
    dense: Leaf


class Batch(NamedTuple):
    """Samples of one shape.

    Histories are right-aligned: the newest event is at position T - 1. A position
    before the first event is padding: `valid` is False, and every feature is missing.

    Attributes:
      user: `[B, I or D]`, features of the user.
      state: `[B, T, I or D]`, item and context of each event (columns of
        `Schema.state`).
      action: `[B, T, I or D]`, what the user did at each event.
      valid: `[B, T] bool`, True for events, False for padding.
      target: ranking, NIO: `[B, C, I or D]`, item and context of each candidate, with
        the columns of `state`. Retrieval, NIO: `[B, 1, I or D]`, the context of the
        request; features of an item are missing. UC: None.
      labels: ranking: `[B, C, K] int8` in NIO, `[B, T, K] int8` in UC; -1 where
        unknown or not to be read, otherwise as in `InteractionLog.labels`: 1 or 0, or
        the index of a class. Retrieval: None.
      weight: `[B, C] float32` in NIO, `[B, T]` in UC, `[B, R]` in retrieval; 1 where
        there is a loss (training) or a score (evaluation), otherwise 0. In training the
        weight of the row if the data set has weights, and in UC times
        `data.unscored_weight` at events that are not scored.
      items: retrieval: `[B, T] int32`, catalogue row of each event; -1 for padding.
        Ranking: None.
      goals: retrieval: `[B, R, P] int32`, catalogue rows of the goals; -1 fills up.
        Ranking: None.
      codes: retrieval with semantic ids: `[B, R, P, L] int32`, codes of the goals; -1
        fills up. Otherwise None.
      negatives: `[B, n] int32`, catalogue rows drawn inside the step for a sampled
        softmax; None in the input pipeline.
      aligned: `[B, tasks] int32`, items drawn inside the step for `head.alignment`; None
        in the input pipeline.
      ages: `[B, T] int32`, whole seconds from each event to the request (NIO) or to the
        newest event of the stream (UC); 0 for padding. None unless the model reads
        them.
      targets: ranking: `[B, C, V] float32` in NIO, `[B, T, V]` in UC, labels of the V
        tasks of numbers, in the order of the tasks; 0 where the label is not known.
        None without such a task.
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
    targets: Leaf = None
    aligned: Leaf = None


class HostBatch(NamedTuple):
    """A batch, and the log rows behind it, which stay on the host.

    Attributes:
      batch: the samples of this process.
      rows: number in the split of each log row that is read, -1 where `weight` is 0:
        `[B, C] int64` in NIO, `[B, T]` in UC, `[B, R, P]` (log rows of the goals) in
        retrieval.
    """

    batch: Batch
    rows: Leaf


class ReadRows(NamedTuple):
    """Identities of the log rows that an evaluation batch reads, over all processes.

    n is the number of log rows read. The `[n]` fields are in the order of
    `rows[rows >= 0]`.

    Attributes:
      rows: as `HostBatch.rows`, but of the whole batch.
      user_id: `[n]`, original ids of the users.
      item_id: `[n]`, original ids of the items.
      time: `[n] int64`, milliseconds.
      item: `[n] int32`, catalogue row of the item.
      labels: `[n, K] int8`, -1 where unknown, as in `Batch.labels`.
      request: `[n] int64`, number of the request; -1 for a row on its own.
      targets: `[n, V] float32`, NaN where unknown; None without a task of numbers.
    """

    rows: Leaf
    user_id: Leaf
    item_id: Leaf
    time: Leaf
    item: Leaf
    labels: Leaf
    request: Leaf
    targets: Leaf = None
