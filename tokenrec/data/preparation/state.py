"""Keep what a later `prepare --like` goes on from, beside the shards of a data set.

The shards hold the events of every user, with one exception: events of valid or test of
a user who has no impression there, and so no chunk. These go to a file of their own, so
that later histories have them. A source that counts the past (`StatefulSource`) adds the
totals that it ended with.

| file of `state/` | contents |
|---|---|
| `tokenrec-events.array_record-*` | events without a chunk, a record per user and split |
| `NAME.npy` | arrays of the source |

`tokenrec.json` holds under `state` the time of the last row and the records per shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tokenrec.data import records
from tokenrec.data.interaction_log import EVENT, SCORED
from tokenrec.data.metadata import STATE
from tokenrec.data.preparation.chunks import TRAIN
from tokenrec.data.preparation.partition import ChunkRun
from tokenrec.data.source import SPLITS

EVENTS = "events"


def events_without_chunk(partition: np.ndarray, overlap: int) -> ChunkRun | None:
    """Select the events of a partition that no chunk holds; None if there are none.

    Args:
      partition: `[n]` of `encoded_row_dtype`, from `sort_and_deduplicate`.
      overlap: the longest history of a later row: no more events of a user are kept.
    """
    user, split, flags = (
        partition["user"],
        partition["split"],
        partition["row"]["flags"],
    )
    kept = np.zeros(len(partition), bool)
    for number in range(len(SPLITS)):
        # All events of train are in chunks.
        if number == TRAIN:
            continue
        in_split = split == number
        has_chunk = np.isin(user, user[in_split & ((flags & SCORED) > 0)])
        kept |= in_split & ~has_chunk & ((flags & EVENT) > 0)
    rows = np.flatnonzero(kept)
    if not len(rows) or not overlap:
        return None
    start = np.flatnonzero(np.diff(user[rows], prepend=user[rows[0]] - 1))
    lengths = np.diff(start, append=len(rows))
    # From the end of each user's run: the latest events have the lowest numbers.
    from_end = np.repeat(start + lengths, lengths) - 1 - np.arange(len(rows))
    latest = from_end < overlap
    lengths = np.minimum(lengths, overlap)
    return ChunkRun(
        split=EVENTS,
        rows=partition["row"][rows[latest]],
        start=np.concatenate([[0], np.cumsum(lengths)]),
        user=user[rows[start]],
        frozen=partition["frozen"][rows[latest]],
    )


class StateWriter:
    """Write the folder `state` of a prepared data set.

    Args:
      folder: the prepared folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / STATE
        self._folder.mkdir()
        self._events = records.SplitWriter(self._folder, EVENTS)

    def add(self, chunks: Iterable[records.Chunk]) -> None:
        """Append records of events without a chunk."""
        for chunk in chunks:
            self._events.write(chunk)

    def finish(
        self, last_time: int, arrays: Iterable[tuple[str, np.ndarray]]
    ) -> dict[str, Any]:
        """Complete the files.

        Args:
          last_time: time of the last row of the log, milliseconds.
          arrays: names and arrays of the state of the source.

        Returns:
          `Metadata.state`.
        """
        self._events.finish()
        names = []
        for name, array in arrays:
            np.save(self._folder / f"{name}.npy", array, allow_pickle=False)
            names.append(name)
        return {
            "last_time_ms": last_time,
            "events": self._events.shard_lengths,
            "source": sorted(names),
        }

    def close(self) -> None:
        """Close the file that is open, if one is."""
        self._events.close()


def read_events(folder: Path, lengths: list[int]) -> Iterator[list[bytes]]:
    """Yield the records of events without a chunk, some at a time."""
    yield from records.read_records(folder / STATE, EVENTS, lengths, 0, sum(lengths))
