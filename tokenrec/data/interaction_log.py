"""A run of prepared chunks in memory, as flat arrays: what the pipeline indexes and gathers from."""

from __future__ import annotations

import dataclasses

import numpy as np

# Bits of `InteractionLog.flags`.
EVENT = 1  # the row enters the histories of later rows
SCORED = 2  # the row is an impression of this split: a sample, and a line of `predict`
LEARNED = 4  # the row's known labels may be learned from: scored rows of train, and unscored events with a label


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """Features that belong to an item. `item_id: [N]` original ids, `ids: [N, I] int32`, `dense: [N, D] float32`.

    `codes: [N, L] int32` are its semantic ids, if the config names some.
    """

    item_id: np.ndarray
    ids: np.ndarray
    dense: np.ndarray
    codes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class InteractionLog:
    """Rows of whole chunks, chunk after chunk. R rows, U chunks; a chunk is a run of one user's rows in time order.

    A user with many rows has several chunks: each begins with the events before it that it needs as history; in these
    repeated rows only `EVENT` is set in `flags`.

    Attributes:
      start: `[U + 1] int64`, first row of each chunk.
      user_id: `[U]`, original ids (int64 or object).
      user_ids, user_dense: `[U, I_user] int32`, `[U, D_user] float32`.
      time: `[R] int64`, milliseconds.
      item: `[R] int32`, row of the catalogue.
      flags: `[R] uint8`, EVENT | SCORED | LEARNED.
      request: `[R] int64`; scored rows of one user with equal request >= 0 were shown together, -1 is a request of one.
      labels: `[R, tasks] int8`, 1, 0, or -1 where unknown.
      row_ids, row_dense: `[R, I_row] int32`, `[R, D_row] float32`, features of the group `row`.
      action_ids, action_dense: likewise of the group `action`.
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

    @property
    def num_rows(self) -> int:
        return int(self.start[-1])

    @property
    def num_chunks(self) -> int:
        return len(self.start) - 1
