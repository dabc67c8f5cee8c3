"""Find the log rows of samples: histories, right-aligned, and what is read.

Shape letters are in batch.py.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.data.nio_samples import Requests
from tokenrec.data.samples import Samples
from tokenrec.data.uc_samples import Streams


class Positions(NamedTuple):
    """The log rows of B samples.

    Attributes:
      picked: `[B] int64`, which sample; 0 for padding samples.
      present: `[B] bool`, False for padding samples.
      rows: `[B, T] int64`, log rows of the history or stream.
      valid: `[B, T] bool`, False for padding.
      reads: `[B, C]`, `[B, T]` or `[B, R, P] int64`, log rows that are read.
      read: of the same shape, bool, False where nothing is read.
    """

    picked: np.ndarray
    present: np.ndarray
    rows: np.ndarray
    valid: np.ndarray
    reads: np.ndarray
    read: np.ndarray


def locate(
    samples: Samples, chosen: np.ndarray, length: int, candidates: int, *, goals: bool
) -> Positions:
    """Find the log rows of samples.

    Args:
      samples: what `cut_samples` made of a log.
      chosen: `[B] int64`, which samples; -1 is a padding sample.
      length: T; at least the length of every chosen sample.
      candidates: C of NIO.
      goals: the samples are those of retrieval.
    """
    present = chosen >= 0
    picked = np.where(present, chosen, 0)
    lengths = np.where(present, samples.length[picked], 0)
    if isinstance(samples, Requests):
        rows, valid = _right_align(
            samples.event_rows, samples.stop[picked], lengths, length
        )
        reads, read = _locate_candidates(samples, picked, present, candidates)
        if goals:
            # One read-out per request, whose goals are all of its candidates.
            reads, read = reads[:, None], read[:, None]
        return Positions(picked, present, rows, valid, reads, read)
    if not goals:
        rows, valid, read = _locate_stream(samples, picked, lengths, present, length)
        return Positions(picked, present, rows, valid, rows, read)
    # A stream of retrieval holds one event more than the model sees: event t is read
    # out to find event t + 1.
    rows, valid, read = _locate_stream(samples, picked, lengths, present, length + 1)
    is_goal = (read[:, 1:] & valid[:, :-1])[..., None]
    return Positions(
        picked=picked,
        present=present,
        rows=rows[:, :-1],
        valid=valid[:, :-1],
        reads=rows[:, 1:, None],
        read=is_goal,
    )


def _locate_candidates(
    samples: Requests, picked: np.ndarray, present: np.ndarray, candidates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log rows `[B, C] int64` of the candidates, and which of them exist."""
    slots = samples.first[picked][:, None] + np.arange(candidates)
    exist = (slots < samples.first[picked + 1][:, None]) & present[:, None]
    return np.take(samples.rows, slots, mode="clip"), exist


def _locate_stream(
    samples: Streams,
    picked: np.ndarray,
    lengths: np.ndarray,
    present: np.ndarray,
    length: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log rows `[B, T] int64` of streams, which of them exist, and which are read."""
    sibling = samples.sibling[picked]
    first_read = samples.first_read[picked]
    # The run of a sibling moves one position to the left, and the sibling itself takes
    # the last position, where the event after its run would stand.
    rows, valid = _right_align(
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


def _right_align(
    event_rows: np.ndarray, stop: np.ndarray, lengths: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Log rows `[B, T]` of the newest events before `stop`, and which are valid.

    Args:
      event_rows: `[E] int64`, log row of each event.
      stop: `[B] int64`, event coordinate after the newest event.
      lengths: `[B] int64`, number of valid events.
      length: T.
    """
    # Slots before the first event are out of range, and read some event that is not
    # valid.
    slots = np.arange(-length, 0)
    rows = np.take(event_rows, stop[:, None] + slots, mode="clip")
    return rows, slots >= -lengths[:, None]
