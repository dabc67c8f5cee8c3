"""Samples to a `HostBatch`: a few large takes, no loop over samples."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.data.batch import Batch, HostBatch, Signals
from tokenrec.data.interaction_log import Catalogue, InteractionLog
from tokenrec.data.samples import Requests, Samples, Streams


class ContextColumns(NamedTuple):
    """Columns of `Schema.state` that a request shows before its item is known. `ids: [I] bool`, `dense: [D] bool`."""

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
) -> HostBatch:
    """Gathers the chosen samples into one batch.

    Args:
      log: the log that `samples` were cut from; its labels become the batch's, column for column. Its matrices and
        the catalogue's are C-contiguous: NumPy would copy others whole at every take.
      chosen: `[B] int64`, which samples; -1 makes a padding sample (no event, weight 0).
      length: T; at least the length of every chosen sample.
      candidates: C of NIO.
      first_row: number in the split of the log's first row; added to `HostBatch.rows`.
      context: retrieval, where the rows that samples read are goals: what may be known of their request.
      ages: the batch holds those of the events.
    """
    at = _places(samples, chosen, length, candidates, goals=context is not None)
    picked, present, rows, valid, reads, read = at
    if context is not None:
        made = _gather_goals(log, catalogue, samples, at, context)
    else:
        made = Batch(
            user=_signals(log.user_ids, log.user_dense, samples.chunk[picked], present),
            state=_state(log, catalogue, rows, valid),
            action=_signals(log.action_ids, log.action_dense, rows, valid),
            valid=valid,
            target=_state(log, catalogue, reads, read)
            if isinstance(samples, Requests)
            else None,
            labels=np.where(
                read[..., None],
                np.take(log.labels, reads, axis=0, mode="clip"),
                np.int8(-1),
            ),
            weight=read.astype(np.float32),
        )
    if ages:
        made = made._replace(ages=_ages(log, samples, at))
    return HostBatch(made, np.where(read, reads + first_row, -1))


def rows_read(
    samples: Samples, chosen: np.ndarray, *, length: int, candidates: int, goals: bool
) -> np.ndarray:
    """Rows of the log that the chosen samples read, -1 where none: what `gather` calls `HostBatch.rows`."""
    at = _places(samples, chosen, length, candidates, goals=goals)
    return np.where(at.read, at.reads, -1)


class _Places(NamedTuple):
    """Where samples lie in a log: `picked, present: [B]`, `rows, valid: [B, T]` of the history, and what is read,
    `reads, read: [B, C or T]`, or goals, `[B, R, P]`.
    """

    picked: np.ndarray
    present: np.ndarray
    rows: np.ndarray
    valid: np.ndarray
    reads: np.ndarray
    read: np.ndarray


def _places(
    samples: Samples, chosen: np.ndarray, length: int, candidates: int, *, goals: bool
) -> _Places:
    present = chosen >= 0
    picked = np.where(present, chosen, 0)
    lengths = np.where(present, samples.length[picked], 0)
    if isinstance(samples, Requests):
        rows, valid = _right_aligned(
            samples.event_rows, samples.stop[picked], lengths, length
        )
        reads, read = _candidates(samples, picked, present, candidates)
        return _Places(
            picked,
            present,
            rows,
            valid,
            *((reads[:, None], read[:, None]) if goals else (reads, read)),
        )
    if not goals:
        rows, valid, read = _stream(samples, picked, lengths, present, length)
        return _Places(picked, present, rows, valid, rows, read)
    # A stream holds one event more than the model reads; what an event is to find is the event after it.
    rows, valid, read = _stream(samples, picked, lengths, present, length + 1)
    is_goal = (read[:, 1:] & valid[:, :-1])[..., None]
    return _Places(
        picked, present, rows[:, :-1], valid[:, :-1], rows[:, 1:, None], is_goal
    )


def _ages(log: InteractionLog, samples: Samples, at: _Places) -> np.ndarray:
    """`[B, T] int32`, as `Batch.ages`. Rows of a request have one time."""
    newest = (
        at.reads.reshape(len(at.reads), -1)[:, :1]
        if isinstance(samples, Requests)
        else at.rows[:, -1:]
    )
    # Cut to seconds before the difference is taken: how far two events lie apart must not depend on what follows them.
    newest_s, event_s = (
        np.take(log.time, rows, mode="clip") // 1000 for rows in (newest, at.rows)
    )
    return np.where(
        at.valid, np.minimum(newest_s - event_s, np.iinfo(np.int32).max), 0
    ).astype(np.int32)


def _gather_goals(
    log: InteractionLog,
    catalogue: Catalogue,
    samples: Samples,
    at: _Places,
    context: ContextColumns,
) -> Batch:
    picked, present, rows, valid, goal_rows, is_goal = at
    target = None
    if isinstance(samples, Requests):
        target = _state(log, catalogue, goal_rows[:, 0, :1], is_goal[:, 0, :1])
        target = Signals(
            np.where(context.ids, target.ids, 0),
            np.where(context.dense, target.dense, np.nan),
        )
    items = np.take(log.item, rows, mode="clip")
    goals = np.where(is_goal, np.take(log.item, goal_rows, mode="clip"), -1).astype(
        np.int32
    )
    codes = None
    if catalogue.codes is not None:
        codes = np.where(is_goal[..., None], catalogue.codes[goals], np.int32(-1))
    return Batch(
        user=_signals(log.user_ids, log.user_dense, samples.chunk[picked], present),
        state=_state(log, catalogue, rows, valid),
        action=_signals(log.action_ids, log.action_dense, rows, valid),
        valid=valid,
        target=target,
        labels=None,
        weight=is_goal.any(axis=-1).astype(np.float32),
        items=np.where(valid, items, -1).astype(np.int32),
        goals=goals,
        codes=codes,
    )


def _candidates(
    samples: Requests, picked: np.ndarray, present: np.ndarray, candidates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log rows `[B, C]` of the candidates, and which of them exist."""
    slots = samples.first[picked][:, None] + np.arange(candidates)
    exist = (slots < samples.first[picked + 1][:, None]) & present[:, None]
    return np.take(samples.rows, slots, mode="clip"), exist


def _stream(
    samples: Streams,
    picked: np.ndarray,
    lengths: np.ndarray,
    present: np.ndarray,
    length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log rows `[B, T]` of the streams, which of them exist, and which are read."""
    sibling, first_read = samples.sibling[picked], samples.first_read[picked]
    # A sibling's own row stands where the event after its run would stand.
    rows, valid = _right_aligned(
        samples.event_rows, samples.stop[picked] + sibling, lengths, length
    )
    rows[sibling, -1] = first_read[sibling]
    read = (
        valid
        & np.take(samples.readable, rows, mode="clip")
        & (rows >= first_read[:, None])
        & ~sibling[:, None]
    )
    read[:, -1] |= sibling & present
    return rows, valid, read


def _right_aligned(
    event_rows: np.ndarray, stop: np.ndarray, lengths: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log rows `[B, T]` of the events before `stop`, and which of them are among the newest `lengths`."""
    slots = np.arange(-length, 0)
    return np.take(event_rows, stop[:, None] + slots, mode="clip"), slots >= -lengths[
        :, None
    ]


def _state(
    log: InteractionLog, catalogue: Catalogue, rows: np.ndarray, valid: np.ndarray
) -> Signals:
    """Catalogue columns first, as in `Schema.state`."""
    items = np.take(log.item, rows, mode="clip")
    ids = _joined(catalogue.ids, items, log.row_ids, rows)
    dense = _joined(catalogue.dense, items, log.row_dense, rows)
    return Signals(_blanked(ids, 0, valid), _blanked(dense, np.nan, valid))


def _signals(
    ids: np.ndarray, dense: np.ndarray, rows: np.ndarray, valid: np.ndarray
) -> Signals:
    ids, dense = (np.take(matrix, rows, axis=0, mode="clip") for matrix in (ids, dense))
    return Signals(_blanked(ids, 0, valid), _blanked(dense, np.nan, valid))


def _joined(
    left: np.ndarray, left_rows: np.ndarray, right: np.ndarray, right_rows: np.ndarray
) -> np.ndarray:
    """Rows of two matrices side by side."""
    if not right.shape[1]:
        return np.take(left, left_rows, axis=0, mode="clip")
    if not left.shape[1]:
        return np.take(right, right_rows, axis=0, mode="clip")
    halves = np.empty(
        left_rows.shape, [("left", _row_type(left)), ("right", _row_type(right))]
    )
    halves["left"] = np.take(_as_rows(left), left_rows, mode="clip")
    halves["right"] = np.take(_as_rows(right), right_rows, mode="clip")
    return halves.view(left.dtype).reshape(*left_rows.shape, -1)


def _blanked(matrix: np.ndarray, blank: float, valid: np.ndarray) -> np.ndarray:
    """The matrix, `[..., D]`, with the rows that are not valid set to a missing value, in place."""
    if matrix.shape[-1]:
        missing = np.full((1, matrix.shape[-1]), blank, matrix.dtype)
        np.copyto(_as_rows(matrix), _as_rows(missing), where=~valid)
    return matrix


def _row_type(matrix: np.ndarray) -> np.dtype:
    return np.dtype((np.void, matrix.shape[-1] * matrix.itemsize))


def _as_rows(matrix: np.ndarray) -> np.ndarray:
    """A view of `[..., D]` as `[...]` opaque rows: NumPy copies one at once, four times as fast as D short columns."""
    return matrix.view(_row_type(matrix))[..., 0]
