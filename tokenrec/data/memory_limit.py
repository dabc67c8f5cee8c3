"""Hold what grows with the number of distinct ids in memory, up to a limit.

`prepare` keeps the distinct values of a log and an array or two per user and item. Up
to `MemoryLimit.bytes` they stay in memory. Beyond that the values go to sorted files
(`spilled_values.py`), and large arrays are memory-mapped files, whose pages the
operating system writes out and drops when it needs room.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokenrec.errors import InputError

LEAST_BYTES = 2**28  # 256 MiB
BLOCK_ROWS = 65_536  # raw log rows that are encoded at a time

# Shares of the limit: distinct values in memory; blocks of raw and encoded log rows;
# values that are sorted at once; one array. The rest is for what a step copies.
_VALUES, _BLOCK, _SORTED, _ARRAY = 3 / 8, 1 / 8, 1 / 8, 1 / 64
_BYTES_OF_A_ROW = 1024  # a raw log row as Arrow columns, and encoded, with copies
_BYTES_OF_A_SORTED_VALUE = 128
# What the container may use: control groups of version 2 and 1.
_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)

_MOST_BLOCKS = 16  # blocks that are encoded at once


class Spilling(Protocol):
    """What can move its contents from memory to files."""

    @property
    def memory_bytes(self) -> int: ...

    def spill(self) -> None: ...


class MemoryLimit:
    """A limit, and the folder of what exceeds it.

    Args:
      num_bytes: the limit; None for no limit.
      folder: folder of the files; made when it is needed. The caller removes it.

    Raises:
      InputError: the limit is below `LEAST_BYTES`.
    """

    def __init__(
        self, num_bytes: int | None = None, folder: Path | None = None
    ) -> None:
        if num_bytes is not None and num_bytes < LEAST_BYTES:
            raise InputError(
                f"memory={num_bytes} bytes is less than {LEAST_BYTES >> 20}MiB, which "
                "the libraries and a block of rows take alone; raise it"
            )
        self._bytes = num_bytes
        self._folder = folder
        self._watched: list[weakref.ref[Spilling]] = []
        self._files = itertools.count()
        self._has_spilled = False

    @property
    def block_rows(self) -> int:
        """Raw log rows that are encoded at a time."""
        if self._bytes is None or not self._has_spilled:
            return BLOCK_ROWS
        # A lookup of values sweeps over their files: larger blocks need fewer sweeps.
        rows = int(self._bytes * _BLOCK) // _BYTES_OF_A_ROW
        return BLOCK_ROWS * min(max(rows // BLOCK_ROWS, 1), _MOST_BLOCKS)

    @property
    def sorted_rows(self) -> int:
        """Values that are sorted at a time."""
        if self._bytes is None:
            return np.iinfo(np.int64).max
        return int(self._bytes * _SORTED) // _BYTES_OF_A_SORTED_VALUE

    def watch(self, values: Spilling) -> None:
        """Count `values` towards the limit, for as long as they exist."""
        if self._bytes is not None:
            self._watched.append(weakref.ref(values))

    def enforce(self) -> None:
        """Let the largest of what is watched spill while all of it is too large."""
        if self._bytes is None:
            return
        while True:
            held = [v for ref in self._watched if (v := ref()) is not None]
            if sum(v.memory_bytes for v in held) <= self._bytes * _VALUES:
                return
            self._has_spilled = True
            max(held, key=lambda v: v.memory_bytes).spill()

    def file(self) -> Path:
        """Name a new file in the folder."""
        if self._folder is None:
            raise ValueError("a MemoryLimit without a folder cannot make a file")
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{next(self._files)}.bin"

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Make an array of zeros, in a memory-mapped file if it is large.

        Raises:
          OSError: the disk has no room for it.
        """
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self._bytes is None or size <= self._bytes * _ARRAY:
            return np.zeros(shape, dtype)
        path = self.file()
        _reserve(path, size)
        array = np.memmap(path, dtype, "r+", shape=shape)
        # The mapping keeps the file; without a name it ends with the array.
        path.unlink()
        return array


def _reserve(path: Path, size: int) -> None:
    """Make a file of zeros, with room on the disk for all of them.

    A full disk is an error here, and would be a SIGBUS when a mapped page is written.
    """
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
            return
        zeros = bytes(2**20)  # macOS
        for part in blocks(size, len(zeros)):
            file.write(zeros[: part.stop - part.start])


NO_LIMIT = MemoryLimit()


def default_memory() -> int:
    """Half of the machine's memory, or of what its container may use, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CONTAINER_LIMITS:
        if path.is_file() and (text := path.read_text().strip()).isdigit():
            total = min(total, int(text))
    return max(total // 2, LEAST_BYTES)


def blocks(size: int, rows: int) -> Iterator[slice]:
    """Yield slices of at most `rows` that cover `size`."""
    for first in range(0, size, rows):
        yield slice(first, min(first + rows, size))
