"""Copy the features of samples from a log into a batch, by a few large NumPy takes.

There is no loop over samples. Positions that hold nothing (padding) read some log row,
because a take must read something, and are set to missing afterwards.

Shape letters are in batch.py; R is the number of log rows, or of read-outs in
retrieval.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.data.batch import Batch, HostBatch, Signals
from tokenrec.data.interaction_log import SCORED, Catalogue, InteractionLog
from tokenrec.data.nio_samples import Requests
from tokenrec.data.sample_positions import Positions, locate
from tokenrec.data.samples import Samples

# All takes below use mode="clip": the indices of padding may be out of range, and what
# they read is set to missing.


class ContextColumns(NamedTuple):
    """Columns of `Schema.state` that are known before the item is: the context.

    Attributes:
      ids: `[I] bool`.
      dense: `[D] bool`.
    """

    ids: np.ndarray
    dense: np.ndarray


def gather(
    log: InteractionLog,
    catalogue: Catalogue,
    samples: Samples,
    chosen: np.ndarray,
    *,
    length: int,
    candidates: int,
    first_row: int,
    context: ContextColumns | None = None,
    ages: bool = False,
    unscored_weight: float = 1.0,
    row_weights: bool = False,
) -> HostBatch:
    """Gather samples into one batch.

    Args:
      log: the log that `samples` were cut from; its labels become the batch's, column
        for column. Its matrices and the catalogue's are C-contiguous, because NumPy
        would copy others whole at every take.
      catalogue: the items.
      samples: what `cut_samples` made of the log.
      chosen: `[B] int64`, which samples; -1 makes a padding sample (no event, weight
        0).
      length: T; at least the length of every chosen sample.
      candidates: C of NIO.
      first_row: number in the split of the log's first row, which `HostBatch.rows`
        counts from.
      context: None in ranking. In retrieval the log rows that samples read are goals,
        and these are the columns that a request shows of them.
      ages: the batch holds `Batch.ages`.
      unscored_weight: ranking: `Batch.weight` of log rows that are read and not scored,
        which there are in training only.
      row_weights: ranking: `Batch.weight` is multiplied by the weights of the log.
    """
    goals = context is not None
    positions = locate(samples, chosen, length, candidates, goals=goals)
    if context is not None:
        batch = _retrieval_batch(log, catalogue, samples, positions, context)
    else:
        batch = _ranking_batch(log, catalogue, samples, positions, unscored_weight)
        if row_weights and log.weight is not None:
            weights = np.take(log.weight, positions.reads, mode="clip")
            batch = batch._replace(weight=batch.weight * weights)
    if ages:
        batch = batch._replace(ages=_ages(log, samples, positions))
    rows = np.where(positions.read, positions.reads + first_row, -1)
    return HostBatch(batch, rows)


def rows_read(
    samples: Samples, chosen: np.ndarray, *, length: int, candidates: int, goals: bool
) -> np.ndarray:
    """Find the log rows that samples read, as in `HostBatch.rows`, without features.

    Args:
      samples: what `cut_samples` made of the log.
      chosen: `[B] int64`, which samples; -1 is a padding sample.
      length: T.
      candidates: C of NIO.
      goals: the samples are those of retrieval.

    Returns:
      Log rows counted from the first of the log, -1 where none: `[B, C] int64` in NIO,
      `[B, T]` in UC, `[B, R, P]` in retrieval.
    """
    positions = locate(samples, chosen, length, candidates, goals=goals)
    return np.where(positions.read, positions.reads, -1)


def _known_items(
    catalogue: Catalogue, items: np.ndarray, present: np.ndarray
) -> np.ndarray:
    """Items that a run has vectors of, of the same shape; -1 for others and none."""
    if catalogue.known is not None:
        present = present & (items < catalogue.known)
    return np.where(present, items, -1).astype(np.int32)


def _ranking_batch(
    log: InteractionLog,
    catalogue: Catalogue,
    samples: Samples,
    positions: Positions,
    unscored_weight: float,
) -> Batch:
    picked, present, rows, valid, reads, read = positions
    target = None
    if isinstance(samples, Requests):
        target = _state(log, catalogue, reads, read)
    labels = np.take(log.labels, reads, axis=0, mode="clip")
    weight = read.astype(np.float32)
    if unscored_weight != 1:
        scored = (np.take(log.flags, reads, mode="clip") & SCORED) != 0
        weight[read & ~scored] = unscored_weight
    return Batch(
        user=_signals(log.user_ids, log.user_dense, samples.chunk[picked], present),
        state=_state(log, catalogue, rows, valid),
        action=_signals(log.action_ids, log.action_dense, rows, valid),
        valid=valid,
        target=target,
        labels=np.where(read[..., None], labels, np.int8(-1)),
        weight=weight,
        targets=_targets(log, reads, read),
    )


def _targets(
    log: InteractionLog, reads: np.ndarray, read: np.ndarray
) -> np.ndarray | None:
    """Labels of the tasks of numbers, `[..., V] float32`; 0 where unknown or not read."""
    if log.targets is None:
        return None
    targets = np.take(log.targets, reads, axis=0, mode="clip")
    # Not NaN: it would pass through the loss, whose weight is 0 there.
    return np.where(read[..., None], np.nan_to_num(targets), np.float32(0))


def _retrieval_batch(
    log: InteractionLog,
    catalogue: Catalogue,
    samples: Samples,
    positions: Positions,
    context: ContextColumns,
) -> Batch:
    picked, present, rows, valid, goal_rows, is_goal = positions
    target = None
    if isinstance(samples, Requests):
        # The context of the request is that of its first goal, with the item's columns
        # set to missing: the item is what is to be found.
        target = _state(log, catalogue, goal_rows[:, 0, :1], is_goal[:, 0, :1])
        target = Signals(
            np.where(context.ids, target.ids, 0),
            np.where(context.dense, target.dense, np.nan),
        )
    items = _known_items(catalogue, np.take(log.item, rows, mode="clip"), valid)
    goals = _known_items(catalogue, np.take(log.item, goal_rows, mode="clip"), is_goal)
    codes = None
    if catalogue.codes is not None:
        codes = np.where(goals[..., None] >= 0, catalogue.codes[goals], np.int32(-1))
    return Batch(
        user=_signals(log.user_ids, log.user_dense, samples.chunk[picked], present),
        state=_state(log, catalogue, rows, valid),
        action=_signals(log.action_ids, log.action_dense, rows, valid),
        valid=valid,
        target=target,
        labels=None,
        weight=is_goal.any(axis=-1).astype(np.float32),
        items=items,
        goals=goals,
        codes=codes,
    )


def _ages(log: InteractionLog, samples: Samples, positions: Positions) -> np.ndarray:
    """Whole seconds from each event to the request or newest event: `[B, T] int32`."""
    if isinstance(samples, Requests):
        # All log rows of a request have one time.
        newest = positions.reads.reshape(len(positions.reads), -1)[:, :1]
    else:
        newest = positions.rows[:, -1:]
    # Cut to whole seconds before the difference is taken: otherwise the distance of two
    # events would depend on the milliseconds of what follows them.
    newest_s = np.take(log.time, newest, mode="clip") // 1000
    event_s = np.take(log.time, positions.rows, mode="clip") // 1000
    age = np.minimum(newest_s - event_s, np.iinfo(np.int32).max)
    return np.where(positions.valid, age, 0).astype(np.int32)


def _state(
    log: InteractionLog, catalogue: Catalogue, rows: np.ndarray, valid: np.ndarray
) -> Signals:
    """Item and context of log rows, in the columns of `Schema.state`."""
    # Features of the item are stored once in the catalogue, those of the log row beside
    # its item.
    items = np.take(log.item, rows, mode="clip")
    ids = _take_side_by_side(catalogue.ids, items, log.row_ids, rows)
    dense = _take_side_by_side(catalogue.dense, items, log.row_dense, rows)
    return Signals(_blank(ids, 0, valid), _blank(dense, np.nan, valid))


def _signals(
    ids: np.ndarray, dense: np.ndarray, rows: np.ndarray, valid: np.ndarray
) -> Signals:
    ids = np.take(ids, rows, axis=0, mode="clip")
    dense = np.take(dense, rows, axis=0, mode="clip")
    return Signals(_blank(ids, 0, valid), _blank(dense, np.nan, valid))


def _take_side_by_side(
    left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray
) -> np.ndarray:
    """Take matrix rows of two matrices and join them: `[..., D_left + D_right]`.

    Both halves are written straight into one array. Two takes and a concatenation would
    copy everything twice.
    """
    if not right.shape[1]:
        return np.take(left, left_rows, axis=0, mode="clip")
    if not left.shape[1]:
        return np.take(right, right_rows, axis=0, mode="clip")
    halves = np.empty(
        left_rows.shape, [("left", _row_type(left)), ("right", _row_type(right))]
    )
    halves["left"] = np.take(_as_records(left), left_rows, mode="clip")
    halves["right"] = np.take(_as_records(right), right_rows, mode="clip")
    return halves.view(left.dtype).reshape(*left_rows.shape, -1)


def _blank(matrix: np.ndarray, blank: float, valid: np.ndarray) -> np.ndarray:
    """Set the matrix rows that are not valid to a missing value, in place."""
    if matrix.shape[-1]:
        missing = np.full((1, matrix.shape[-1]), blank, matrix.dtype)
        np.copyto(_as_records(matrix), _as_records(missing), where=~valid)
    return matrix


def _row_type(matrix: np.ndarray) -> np.dtype:
    """Opaque type of one matrix row."""
    return np.dtype((np.void, matrix.shape[-1] * matrix.itemsize))


def _as_records(matrix: np.ndarray) -> np.ndarray:
    """View `[..., D]` as `[...]` opaque records.

    NumPy copies a record at once, four times as fast as D short columns.
    """
    return matrix.view(_row_type(matrix))[..., 0]
