"""Hold log rows in memory as flat arrays, and the items that they name.

`Dataset.load` reads whole chunks of a prepared data set into an `InteractionLog`.
Samples are index arrays into it (samples.py), and batches are gathered from it
(gather.py).
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Bits of `InteractionLog.flags`, per log row.
# EVENT: the log row enters the histories of the user's later log rows.
EVENT = 1
# SCORED: the log row is an impression of this split: it is evaluated, and a line of the
# file that `tokenrec predict` writes.
SCORED = 2
# LEARNED: training may use the known labels. Set for scored log rows of the training
# split, and for events that are not scored but have a label.
LEARNED = 4
# On disk only. REPEATED: an earlier chunk or split of the user holds the row as well, so
# that the rows without it are the rows of the log, each once.
REPEATED = 8


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Features of all items. N items, L levels of a semantic id.

    Attributes:
      item_id: `[N] int64 or str`, original ids.
      ids: `[N, I] int32`, integer features of the group `catalogue`.
      dense: `[N, D] float32`, the other features of that group; NaN is missing.
      codes: `[N, L] int32`, semantic ids, -1 for an item that has none; None unless the
        config names some.
      known: number of items that a run may retrieve, the first of the catalogue. The
        others are new since the data set that this one was prepared like. None: all.
    """

    item_id: np.ndarray
    ids: np.ndarray
    dense: np.ndarray
    codes: np.ndarray | None = None
    known: int | None = None


@dataclasses.dataclass(frozen=True)
class InteractionLog:
    """Log rows of whole chunks, chunk after chunk. R log rows, U chunks.

    A chunk is a contiguous run of one user's log rows in the order of time. A user with
    many log rows has several chunks. Each chunk after the first begins with the *head*:
    a repetition of the events before it, which are the history of its own log rows. In
    the head only `EVENT` is set in `flags`, so that no log row is scored twice.

    Attributes:
      start: `[U + 1] int64`, first log row of each chunk; the last entry is R.
      user_id: `[U] int64 or object`, original ids.
      user_ids: `[U, I_user] int32`, integer features of the user.
      user_dense: `[U, D_user] float32`, other features of the user.
      time: `[R] int64`, milliseconds, ascending within a chunk.
      item: `[R] int32`, catalogue row of the item.
      flags: `[R] uint8`, EVENT | SCORED | LEARNED.
      request: `[R] int64`; scored log rows of one user with equal request >= 0 were
        shown together, -1 is a request of its own.
      labels: `[R, K] int8`, per task; -1 where unknown. A binary label is 1 or 0, that
        of a task of classes the index of the class, and a number, which `targets`
        holds, is 0 here.
      row_ids: `[R, I_row] int32`, integer features of the group `row`.
      row_dense: `[R, D_row] float32`, other features of the group `row`.
      action_ids: `[R, I_action] int32`, integer features of the group `action`.
      action_dense: `[R, D_action] float32`, other features of the group `action`.
      targets: `[R, V] float32`, labels of the tasks of numbers (`Schema.real_tasks`),
        NaN where unknown; None without such a task.
      weight: `[R] float32`, weight of the row in the training loss; None without
        `Schema.weighted`.
    """

    start: np.ndarray
    user_id: np.ndarray
    user_ids: np.ndarray
    user_dense: np.ndarray
    time: np.ndarray
    item: np.ndarray
    flags: np.ndarray
    request: np.ndarray
    labels: np.ndarray
    row_ids: np.ndarray
    row_dense: np.ndarray
    action_ids: np.ndarray
    action_dense: np.ndarray
    targets: np.ndarray | None = None
    weight: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        """R, the number of log rows."""
        return int(self.start[-1])

    @property
    def num_chunks(self) -> int:
        """U, the number of chunks."""
        return len(self.start) - 1
