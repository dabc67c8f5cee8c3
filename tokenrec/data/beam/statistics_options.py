"""Options of the pipeline of statistics, and where its files lie."""

from __future__ import annotations

import dataclasses
import functools

from tokenrec.data.beam.shared_files import load_record
from tokenrec.data.past.declaration import PastStatistics
from tokenrec.data.past.keys import KeyTable
from tokenrec.data.past.partitions import PartitionFeatures
from tokenrec.data.schema import Schema

# Files in the shared folder: hashes of the items, and of the users of each partition.
ITEMS = "statistics/items"
USERS = "statistics/users"


@dataclasses.dataclass(frozen=True)
class StatisticsOptions:
    """Options of the pipeline of statistics, sent to every worker.

    Attributes:
      statistics: the declaration, which was checked.
      schema: features and tasks of the source, without the statistics.
      partitions: number of partitions of the users.
      spans: number of spans of time, and of the shards of a key's runs.
      work: folder that all workers see.
    """

    statistics: PastStatistics
    schema: Schema
    partitions: int
    spans: int
    work: str

    def features(self) -> PartitionFeatures:
        """The statistics, with nothing counted yet."""
        return PartitionFeatures(self.statistics, self.schema)


@functools.lru_cache(maxsize=1)
def load_items(work: str) -> KeyTable:
    """Return the hashes of the items, read once by a worker."""
    table: KeyTable = load_record(work, ITEMS)
    return table


def numbered(folder: str, number: int) -> str:
    """Path, in the shared folder, of what belongs to a partition or to a shard."""
    # Padded, so that `load_records` yields the files in the order of numbers.
    return f"{folder}/{number:012d}"


def state_folder(part: str) -> str:
    """Folder, in the shared folder, of a part of the state."""
    return f"statistics/state/{part}"
