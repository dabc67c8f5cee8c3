"""Mark log rows with all that decides how a split is cut into samples.

How many samples a run of chunks has depends on the config: its paradigm, its tasks, the
length of its histories. The order of batches depends on that number, so a run counts
the samples of every window before its first step. For that it does not need the log
rows, which have a hundred bytes and more: `prepare` writes two bits per task and five
others of each row, and `log_of_marks` makes a log of them that `cut_samples` cuts as it
cuts the rows themselves. So the counts are exact for every config.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenrec.data.interaction_log import InteractionLog

# Folder of the marks: one array per split, an entry for each log row.
MARKS = "marks"
# Bits of `bits`, above EVENT, SCORED and LEARNED of interaction_log.py.
# NEW_TIME: the first log row of its chunk and time.
NEW_TIME = 8
# NEW_REQUEST: the first log row of its chunk, time and request.
NEW_REQUEST = 16
_FLAGS = NEW_TIME - 1


def marks_dtype(tasks: int) -> np.dtype:
    """Layout of the marks of a log row.

    `bits` holds the flags, `NEW_TIME` and `NEW_REQUEST`; `known` and `positive` hold a
    bit for each task, the first task in the highest bit (`np.packbits`).

    Args:
      tasks: K, tasks of the data set.
    """
    width = -(-tasks // 8)
    return np.dtype(
        [("bits", "u1"), ("known", "u1", (width,)), ("positive", "u1", (width,))]
    )


def mark_rows(rows: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Mark the log rows of whole chunks.

    Args:
      rows: `[m]` of `records.row_dtype`, chunk after chunk, each in the order of
        `preparation.chunks.sort_order`: the rows of a request follow one another.
      start: `[U + 1] int64`, first log row of each chunk.

    Returns:
      `[m]` of `marks_dtype`.
    """
    time, request, labels = rows["time"], rows["request"], rows["labels"]
    new_time = np.ones(len(rows), bool)
    new_time[1:] = time[1:] != time[:-1]
    # The last row of a chunk and the first of the next may have one time.
    new_time[start[:-1]] = True
    new_request = new_time.copy()
    # A row with request -1 is a request of its own.
    new_request[1:] |= (request[1:] != request[:-1]) | (request[1:] < 0)
    marks = np.empty(len(rows), marks_dtype(labels.shape[1]))
    flags = rows["flags"] & np.uint8(_FLAGS)
    marks["bits"] = flags | NEW_TIME * new_time | NEW_REQUEST * new_request
    marks["known"] = np.packbits(labels >= 0, axis=1)
    marks["positive"] = np.packbits(labels == 1, axis=1)
    return marks


def log_of_marks(
    marks: np.ndarray, start: np.ndarray, tasks: Sequence[int]
) -> InteractionLog:
    """Make a log that `cut_samples` cuts as it cuts the log rows that were marked.

    It has no features. Its times and requests are numbers that are equal where those of
    the rows are.

    Args:
      marks: `[R]` of `marks_dtype`, those of whole chunks.
      start: `[U + 1] int64`, first log row of each chunk.
      tasks: the label columns to read.

    Returns:
      The log. It has at most one column of labels: 1 where a task of `tasks` has a
      positive label, 0 where one is known, -1 elsewhere. No more is asked of labels:
      ranking reads rows with any known label, and retrieval has one task.
    """
    # Not a memmap: slices of that class are slow, and a file need not be read twice.
    marks = np.array(marks)
    bits = np.ascontiguousarray(marks["bits"])
    rows, chunks = len(bits), len(start) - 1
    none = np.empty((rows, 0))
    return InteractionLog(
        start=start,
        user_id=np.zeros(chunks, np.int64),
        user_ids=np.empty((chunks, 0), np.int32),
        user_dense=np.empty((chunks, 0), np.float32),
        time=np.cumsum((bits & NEW_TIME) != 0),
        item=np.zeros(rows, np.int32),
        flags=bits & np.uint8(_FLAGS),
        request=np.cumsum((bits & NEW_REQUEST) != 0),
        labels=_labels(marks, tasks),
        row_ids=none.astype(np.int32),
        row_dense=none.astype(np.float32),
        action_ids=none.astype(np.int32),
        action_dense=none.astype(np.float32),
    )


def _labels(marks: np.ndarray, tasks: Sequence[int]) -> np.ndarray:
    """The column of labels of `log_of_marks`: `[R, min(len(tasks), 1)] int8`."""
    if not tasks:
        return np.empty((len(marks), 0), np.int8)
    known, positive = (np.zeros(len(marks), bool) for _ in range(2))
    for byte in range(marks.dtype["known"].shape[0]):
        mask = sum(128 >> task % 8 for task in tasks if task // 8 == byte)
        known |= (marks["known"][:, byte] & mask) != 0
        positive |= (marks["positive"][:, byte] & mask) != 0
    # Bools are 0 and 1: -1, 0 or 1, as a positive label is known.
    labels = known.astype(np.int8) + positive - np.int8(1)
    return labels[:, None]
