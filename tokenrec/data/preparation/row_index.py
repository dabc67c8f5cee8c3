"""Write the index of a split: the rows of each chunk, the marks of each row, a digest.

The digest stands for the rows that samples are made of, in their order: users, times,
requests, items, flags and labels. A run that resumes compares it (run_folder.py),
because the samples that are left of an epoch follow from it. It does not depend on the
shards, on features, or on where the data set lies.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenrec.data import records
from tokenrec.data.interaction_log import REPEATED
from tokenrec.data.preparation.array_file import ArrayFile
from tokenrec.data.preparation.partition import ChunkRun, Users
from tokenrec.data.row_marks import MARKS, mark_rows

# Fields of a log row that its identity consists of, besides the user; the last two only
# where the log has them.
_IDENTITY = ("time", "request", "item", "flags", "labels", "targets", "weight")


class ChunkIndex(NamedTuple):
    """What the index holds of some chunks of one split. U chunks, m log rows.

    Attributes:
      sizes: `[U] int64`, log rows of each chunk.
      marks: `[m]` of `row_marks.marks_dtype`.
      digests: `[U, 32] uint8`, SHA-256 of each chunk's user and rows.
    """

    sizes: np.ndarray
    marks: np.ndarray
    digests: np.ndarray


def index_chunks(run: ChunkRun, users: Users) -> ChunkIndex:
    """Make the index of a run of chunks, whose items are rows of the catalogue."""
    return ChunkIndex(
        sizes=np.diff(run.start),
        marks=mark_rows(run.rows, run.start),
        digests=_digest_chunks(run, users),
    )


def _digest_chunks(run: ChunkRun, users: Users) -> np.ndarray:
    """SHA-256 of each chunk: `[U, 32] uint8`."""
    dtype = run.rows.dtype
    names = [name for name in _IDENTITY if name in (dtype.names or ())]
    fields = [(name, dtype[name].base, dtype[name].shape) for name in names]
    identity = np.empty(len(run.rows), fields)
    for name in names:
        identity[name] = run.rows[name]
    # It says nothing about the rows, and data sets from before it lack it.
    identity["flags"] &= np.uint8(~REPEATED & 0xFF)
    data, row_bytes = identity.tobytes(), identity.dtype.itemsize
    chunks = zip(
        run.start[:-1].tolist(),
        run.start[1:].tolist(),
        users.ids(run.user),
        strict=True,
    )
    digests = []
    for begin, end, user_id in chunks:
        # The letter keeps the users 7 and "7" apart, the length in front an id and the
        # rows that follow it.
        kind = "s" if isinstance(user_id, str) else "i"
        user = f"{kind}{user_id}".encode()
        rows = data[begin * row_bytes : end * row_bytes]
        length = len(user).to_bytes(4, "little")
        digests.append(hashlib.sha256(length + user + rows).digest())
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


class IndexWriter:
    """Write the index of all splits, part after part in the order of the shards.

    Marks go to disk at once: memory holds the size of each chunk.

    Args:
      folder: the prepared folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._splits: dict[str, _SplitIndex] = {}

    def add(self, split: str, part: ChunkIndex) -> None:
        """Append the index of chunks of a split."""
        if split not in self._splits:
            self._splits[split] = _SplitIndex(self._folder, split, part.marks.dtype)
        self._splits[split].add(part)

    def finish(self) -> dict[str, str]:
        """Complete the files.

        Returns:
          SHA-256 of the rows of each split, as hexadecimal digits.
        """
        (self._folder / records.INDEX).mkdir()
        return {name: split.finish() for name, split in self._splits.items()}

    def close(self) -> None:
        """Close the files that are open."""
        for split in self._splits.values():
            split.close()


class _SplitIndex:
    """The index of one split."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype) -> None:
        (folder / MARKS).mkdir(exist_ok=True)
        self._sizes_path = folder / records.INDEX / f"{split}.npy"
        self._sizes: list[np.ndarray] = []
        self._digest = hashlib.sha256()
        self._marks = ArrayFile(folder / MARKS / f"{split}.npy", dtype)

    def add(self, part: ChunkIndex) -> None:
        self._sizes.append(part.sizes)
        self._digest.update(part.digests.tobytes())
        self._marks.append(part.marks)

    def finish(self) -> str:
        np.save(self._sizes_path, np.concatenate(self._sizes).astype(np.int64))
        self._marks.finish()
        return self._digest.hexdigest()

    def close(self) -> None:
        self._marks.close()
