"""Cut a log into samples: requests (NIO) or streams (UC), as flat index arrays.

A sample says which log rows are its history and which log rows it *reads*, that is,
scores or learns from. No features are copied here; gather.py does that per batch. The
equations are in docs/methods.md section 3.

**NIO (new impression only): a sample is a request.** Scored log rows of one user with
one time and one request number share a sample; at most C of them, the candidates. The
history holds the newest T events of a strictly earlier time. Example with T = 4, C = 2,
E = event, S = scored:

    time         1    2    3    4    4    5
    log row      a    b    c    d    e    f
    flags        E    E    E    ES   ES   S

    request 1    history [-  a  b  c]    candidates [d  e]
    request 2    history [b  c  d  e]    candidates [f  -]

The candidates d and e do not see each other, nor the outcomes of each other.

**UC (user centric): a sample is a stream.** A stream is a run of at most T events, most
of which are read. Causal attention hides from each event its own action and everything
later. Where a chunk has more than T events, the next stream repeats the newest
`overlap` events as history that is not read. Example with T = 4, overlap = 2:

    log row      a  b  c  d  e  f  g
    stream 1    [a  b  c  d]              reads a b c d
    stream 2          [c  d  e  f]        reads     e f
    stream 3                [e  f  g]     reads       g

**Ties in UC.** Of events at one time only the first may be read in a stream, because a
later one would see the actions of the others. In evaluation each later one, a
*sibling*, gets a stream of its own, from which the others are left out:

    time         1  2  2  3
    log row      a  b  c  d
    stream 1    [a  b  c  d]     reads a b d
    stream 2    [a  c]           reads c       (evaluation only)

**Frozen histories** (`tokenrec evaluate --freeze-at`). Events from a time on enter no
history. A request of NIO then has the history of that time, and in UC every scored
event from then on is read in a stream of its own, as a sibling is. Example as above,
frozen at time 2:

    stream 1    [a]              reads a
    streams     [a b] [a c] [a d]    read b, c and d

**Retrieval** reads *goals*: log rows whose items are to be found. In NIO, and in every
evaluation, the goals of a request are its positives. In UC training a stream holds one
event more than the model sees, and the goal of an event is the event after it.
"""

from __future__ import annotations

import numpy as np

from tokenrec.config import DataConfig
from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED, InteractionLog
from tokenrec.data.log_index import count_events, index_chunks
from tokenrec.data.nio_samples import Requests, cut_requests
from tokenrec.data.uc_samples import Streams, cut_streams
from tokenrec.errors import InputError

type Samples = Requests | Streams


def cut_samples(
    log: InteractionLog,
    config: DataConfig,
    *,
    train: bool,
    freeze_at: int | None = None,
) -> Samples:
    """Cut a log into the samples of `config.paradigm`.

    Samples are in the order of time within a chunk, and chunk after chunk.

    Args:
      log: whole chunks; `log.labels: [R, K] int8` holds the configured tasks only.
      config: its fields objective, paradigm, events, overlap and candidates are read.
      train: leave out log rows without a known label, and in UC the siblings.
      freeze_at: milliseconds; events from this time on enter no history. Evaluation of
        ranking only.

    Returns:
      `Requests` in NIO and in every evaluation of retrieval, otherwise `Streams`.

    Raises:
      InputError: UC, and a scored log row is not an event.
    """
    if config.objective == "retrieval":
        return _cut_goals(log, config, train=train)
    known = (log.labels >= 0).any(axis=1)
    if config.paradigm == "nio":
        scored = (log.flags & SCORED) != 0
        read = scored & known if train else scored
        return cut_requests(
            log, read, config.events, config.candidates, freeze_at=freeze_at
        )
    _check_scored_are_events(log)
    # Training also learns from events of other splits that have a label; evaluation
    # reads what is scored in this split.
    wanted = LEARNED | EVENT if train else SCORED
    read = (log.flags & wanted) == wanted
    if train:
        read &= known
    return cut_streams(
        log,
        read,
        config.events,
        config.overlap,
        siblings=not train,
        freeze_at=freeze_at,
    )


def _cut_goals(log: InteractionLog, config: DataConfig, *, train: bool) -> Samples:
    """Cut samples of retrieval, whose read log rows are goals."""
    goal = (log.flags & SCORED) != 0
    # Without a task every scored log row is a goal.
    if log.labels.shape[1]:
        goal &= log.labels[:, 0] == 1
    if config.paradigm == "nio" or not train:
        return cut_requests(log, goal, config.events, config.candidates)
    _, before = count_events(log)
    goal &= (log.flags & EVENT) != 0
    # The read-out of a goal is the event before it, so the first event of a chunk is
    # the goal of none.
    goal &= before[:-1] > before[log.start[:-1]][index_chunks(log)]
    # One event more than the model sees: the last event of a stream is a goal only.
    return cut_streams(log, goal, config.events + 1, config.overlap, siblings=False)


def _check_scored_are_events(log: InteractionLog) -> None:
    stray = np.flatnonzero((log.flags & (SCORED | EVENT)) == SCORED)
    if stray.size:
        raise InputError(
            f"data.paradigm='uc', but {stray.size} scored rows are not events (the "
            f"first is row {stray[0]}): a history of purchases alone carries no "
            "negatives to learn from; use data.paradigm='nio'"
        )
