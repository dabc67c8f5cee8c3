"""Group encoded log rows by user on disk, so that memory does not grow with the log.

A user's rows are anywhere in a log, but chunks need them together. Sorting the whole
log would need room for it; instead, rows are spilled to files by a digit of the user's
code (a radix partition), and a file that is still too large is split by the next digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

FAN_OUT = 64  # files of a level: the base of the digits
LEVELS = (
    6  # 64 ** 6 exceeds any int32 code, so that the last level holds one user a file
)


class UserPartitions:
    """Log rows in partitions of some users each, all rows of a user in one partition.

    `add` rows in any order, then `read` the partitions once. Up to `limit` rows stay in
    memory as one partition; beyond that rows go to `FAN_OUT` files. Rows of a user keep
    their order.

    Args:
      folder: folder for temporary files; made when it is needed.
      dtype: type of a row, with an int32 field `user`.
      limit: rows that may be in memory. Only a single user with more rows exceeds it.
      level: number of digits that the rows' users have in common, counted from the
        lowest; 0 for the caller.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype, limit: int, level: int = 0
    ) -> None:
        self._folder = folder
        self._dtype = dtype
        self._limit = limit
        self._level = level
        self._in_memory: list[np.ndarray] = []
        self._rows = 0
        self._rows_of_file = np.zeros(FAN_OUT, np.int64)
        self._spilled = False

    def add(self, rows: np.ndarray) -> None:
        """Add `rows: [n]` of the structured dtype."""
        self._rows += len(rows)
        if not self._spilled and self._rows <= self._limit:
            self._in_memory.append(rows)
            return
        if not self._spilled:
            # It fails if the folder exists: another run's rows must not be mixed in.
            self._folder.mkdir(parents=True)
            self._spilled = True
            for earlier in self._in_memory:
                self._append_to_files(earlier)
            self._in_memory = []
        self._append_to_files(rows)

    def read(self) -> Iterator[np.ndarray]:
        """Yield each partition, `[n]` of the structured dtype, and remove its file.

        It can be called once.
        """
        if not self._spilled:
            if self._in_memory:
                rows = np.concatenate(self._in_memory)
                self._in_memory = []  # freed while the caller works on the copy
                yield rows
            return
        for digit in np.flatnonzero(self._rows_of_file):
            path = self._path(int(digit))
            if (
                self._rows_of_file[digit] <= self._limit
                or self._level + 1 == LEVELS
                or self._holds_one_user(path)
            ):
                rows = np.fromfile(path, self._dtype)
                path.unlink()
                yield rows
                continue
            # Too large: split by the next digit, in a folder beside the file.
            finer = UserPartitions(
                path.with_suffix(""), self._dtype, self._limit, self._level + 1
            )
            for block in self._blocks(path):
                finer.add(block)
            path.unlink()
            yield from finer.read()

    def _append_to_files(self, rows: np.ndarray) -> None:
        """Append each row to the file of its user's digit."""
        digit = rows["user"] // FAN_OUT**self._level % FAN_OUT
        # A stable sort keeps the order of a user's rows.
        ordered = rows[np.argsort(digit, kind="stable")]
        counts = np.bincount(digit, minlength=FAN_OUT)
        ends = np.cumsum(counts)
        for i in np.flatnonzero(counts):
            # Files do not stay open: over all levels that would be up to 384 of them.
            with self._path(int(i)).open("ab") as file:
                file.write(ordered[ends[i] - counts[i] : ends[i]].view(np.uint8).data)
        self._rows_of_file += counts

    def _blocks(self, path: Path) -> Iterator[np.ndarray]:
        """Yield the rows of a file, at most `limit` at a time."""
        with path.open("rb") as file:
            while data := file.read(self._limit * self._dtype.itemsize):
                yield np.frombuffer(data, self._dtype)

    def _holds_one_user(self, path: Path) -> bool:
        first = None
        for block in self._blocks(path):
            first = block["user"][0] if first is None else first
            if (block["user"] != first).any():
                return False
        return True

    def _path(self, digit: int) -> Path:
        return self._folder / f"{digit:02d}.rows"
