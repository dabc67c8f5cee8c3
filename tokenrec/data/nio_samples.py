"""Cut requests: a history and the candidates that share it (NIO, new impression only).

samples.py has a picture.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tokenrec.data.interaction_log import InteractionLog
from tokenrec.data.log_index import (
    count_events,
    index_chunks,
    index_history_ends,
    index_time_groups,
)


@dataclasses.dataclass(frozen=True)
class Requests:
    """NIO samples. N samples, E events, M read log rows.

    Attributes:
      event_rows: `[E] int64`, log row of each event (`[1]` zero without events).
      chunk: `[N] int32`, chunk of the log.
      stop: `[N] int64`, event coordinate after the newest event of the history.
      length: `[N] int32`, events in the history, at most T.
      first: `[N + 1] int64`; sample n has the candidates `rows[first[n]:first[n + 1]]`.
      rows: `[M] int64`, read log rows, sample after sample.
      opens: `[N] bool`, True for the first sample of a request. A request with more
        than C candidates has several samples.
    """

    event_rows: np.ndarray
    chunk: np.ndarray
    stop: np.ndarray
    length: np.ndarray
    first: np.ndarray
    rows: np.ndarray
    opens: np.ndarray


def cut_requests(
    log: InteractionLog,
    scored: np.ndarray,
    events: int,
    candidates: int,
    *,
    freeze_at: int | None = None,
) -> Requests:
    """Group the scored log rows into requests, and cut requests at C candidates.

    Args:
      log: whole chunks.
      scored: `[R] bool`, log rows to read.
      events: T, the most events of a history.
      candidates: C, the most candidates of a sample.
      freeze_at: milliseconds; histories end before this time. None: before the request.
    """
    event_rows, before = count_events(log)
    time_group = index_time_groups(log)

    # 1. Sort the read log rows by time group and request number: a request is a
    #    contiguous run. lexsort is stable, so its candidates stay in log order.
    rows = np.flatnonzero(scored)
    rows = rows[np.lexsort((log.request[rows], time_group[rows]))]
    groups = time_group[rows]
    requests = log.request[rows]

    # 2. Find where a request begins; a log row with request -1 is alone.
    opens = np.ones(len(rows), bool)
    opens[1:] = (
        (groups[1:] != groups[:-1])
        | (requests[1:] != requests[:-1])
        | (requests[1:] < 0)
    )

    # 3. Number the candidates within their request, and begin a sample at every C-th.
    rank = np.arange(len(rows))
    rank -= np.maximum.accumulate(np.where(opens, rank, 0))
    first = np.flatnonzero(rank % candidates == 0)

    # 4. The history ends before the time group, so that no candidate sees an event of
    #    its own time, and begins in the chunk of the request.
    chunk = index_chunks(log)[rows[first]]
    stop = before[index_history_ends(log, freeze_at)[rows[first]]]
    length = np.minimum(events, stop - before[log.start[chunk]]).astype(np.int32)
    return Requests(
        event_rows=event_rows,
        chunk=chunk,
        stop=stop,
        length=length,
        first=np.append(first, len(rows)),
        rows=rows,
        opens=rank[first] == 0,
    )
