"""Keep distinct values and their codes in files, and find them by a hash.

Values lie in one file in the order of their codes. To find a value, its hash of 128 bits
is searched in *runs*: files of (hash, code), sorted by hash. A run is merged with the
one before it when that is less than twice as long, as in a log-structured merge tree, so
that there are few. Two values of one hash would be taken for one; with a billion values
the odds of such a pair are 1 to 10^21.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.memory_limit import MemoryLimit, blocks

# Values that are hashed, or entries that are merged, at a time.
_AT_ONCE = 2**18


class Hashes(NamedTuple):
    """Hashes of n values, in two halves: `[n] uint64` each."""

    high: np.ndarray
    low: np.ndarray


class _Run(NamedTuple):
    """Hashes and codes of some values, sorted by the high half."""

    high: np.ndarray
    low: np.ndarray
    codes: np.ndarray

    def find(self, wanted: Hashes) -> np.ndarray:
        """Find codes: `[n] int32`, -1 where absent. `wanted` is sorted by `high`."""
        out = np.full(len(wanted.high), -1, np.int32)
        place = np.searchsorted(self.high, wanted.high)
        open_ = np.arange(len(place))
        # Almost always one turn: values that share the high half follow one another.
        while len(open_):
            open_ = open_[place[open_] < len(self.high)]
            open_ = open_[self.high[place[open_]] == wanted.high[open_]]
            equal = self.low[place[open_]] == wanted.low[open_]
            out[open_[equal]] = self.codes[place[open_[equal]]]
            open_ = open_[~equal]
            place[open_] += 1
        return out


class SpilledValues:
    """Distinct int64 or string values in files, by code.

    Attributes:
      size: number of values; their codes are 0 to size - 1.

    Args:
      kind: "int64" or "string".
      limit: names the files.
    """

    def __init__(self, kind: str, limit: MemoryLimit) -> None:
        self.size = 0
        self._kind = kind
        self._limit = limit
        self._values = limit.file()
        self._values.touch()
        # Where each string begins in the file of the values, and where the last ends.
        self._offsets = limit.file()
        self._offsets.write_bytes(bytes(8))
        self._num_bytes = 0
        self._runs: list[_Run] = []

    def append(self, values: pa.Array) -> None:
        """Add new distinct values `[n]`; their codes follow those of before."""
        codes = np.arange(self.size, self.size + len(values), dtype=np.int32)
        hashes = []
        with self._values.open("ab") as file, self._offsets.open("ab") as offsets:
            for part in blocks(len(values), _AT_ONCE):
                array = values[part]
                self._write(array, file, offsets)
                hashes.append(hash_values(array))
        self.size += len(values)
        high, low = (np.concatenate(half) for half in zip(*hashes, strict=True))
        order = np.argsort(high)
        run = self._new_run(len(order))
        run.high[:], run.low[:], run.codes[:] = high[order], low[order], codes[order]
        self._runs.append(run)
        while len(self._runs) > 1:
            if 2 * len(self._runs[-1].codes) <= len(self._runs[-2].codes):
                break
            self._runs.append(self._merge(self._runs.pop(), self._runs.pop()))

    def find(self, values: pa.Array) -> np.ndarray:
        """Find codes of `values: [n]`: `[n] int32`, -1 where absent."""
        hashes = hash_values(values)
        order = np.argsort(hashes.high)
        hashes = Hashes(hashes.high[order], hashes.low[order])
        found = np.full(len(order), -1, np.int32)
        for run in self._runs:
            missing = np.flatnonzero(found < 0)
            found[missing] = run.find(Hashes(*(half[missing] for half in hashes)))
        out = np.empty_like(found)
        out[order] = found
        return out

    def array(self) -> pa.Array:
        """Return all values by code, int64 or large strings, mapped from the files."""
        values = _mapped(self._values)
        if self._kind == "int64":
            return pa.Array.from_buffers(pa.int64(), self.size, [None, values])
        offsets = _mapped(self._offsets)
        return pa.Array.from_buffers(
            pa.large_string(), self.size, [None, offsets, values]
        )

    def _write(self, values: pa.Array, file: BinaryIO, offsets: BinaryIO) -> None:
        if self._kind == "int64":
            file.write(values.to_numpy().data)
            return
        values = values.cast(pa.large_string())
        _, begins, data = values.buffers()
        begin = np.frombuffer(begins, np.int64)[values.offset :][: len(values) + 1]
        first, last = int(begin[0]), int(begin[-1])
        if data is not None:
            file.write(memoryview(data)[first:last])
        offsets.write((begin[1:] - first + self._num_bytes).data)
        self._num_bytes += last - first

    def _new_run(self, size: int) -> _Run:
        return _Run(
            self._limit.zeros((size,), np.uint64),
            self._limit.zeros((size,), np.uint64),
            self._limit.zeros((size,), np.int32),
        )

    def _merge(self, one: _Run, other: _Run) -> _Run:
        """Merge two sorted runs, a range of hashes at a time."""
        merged = self._new_run(len(one.codes) + len(other.codes))
        done = 0
        for part, other_part in _equal_ranges(one.high, other.high):
            high = np.concatenate([one.high[part], other.high[other_part]])
            order = np.argsort(high, kind="stable")
            place = slice(done, done + len(order))
            merged.high[place] = high[order]
            for name in ("low", "codes"):
                both = (getattr(one, name)[part], getattr(other, name)[other_part])
                getattr(merged, name)[place] = np.concatenate(both)[order]
            done += len(order)
        return merged


def hash_values(values: pa.Array) -> Hashes:
    """Hash `values: [n]`, integers or strings, to 128 bits: BLAKE2b."""
    if pa.types.is_int64(values.type):
        data = values.to_numpy().tobytes()
        raw = [data[i : i + 8] for i in range(0, len(data), 8)]
    else:
        kind = (
            pa.large_binary() if pa.types.is_large_string(values.type) else pa.binary()
        )
        raw = values.cast(kind).to_pylist()
    make = hashlib.blake2b
    digests = b"".join([make(v, digest_size=16).digest() for v in raw])
    halves = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    return Hashes(halves[:, 0].copy(), halves[:, 1].copy())


def _equal_ranges(one: np.ndarray, other: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Cut two sorted arrays of hashes into the same ranges of some entries each."""
    count = 1 + (len(one) + len(other)) // _AT_ONCE
    # Hashes are uniform, so that equal ranges have about equally many.
    cuts = (np.arange(1, count, dtype=np.float64) / count * 2.0**64).astype(np.uint64)
    ends = np.append(np.searchsorted(one, cuts), len(one))
    other_ends = np.append(np.searchsorted(other, cuts), len(other))
    first = other_first = 0
    for end, other_end in zip(ends.tolist(), other_ends.tolist(), strict=True):
        yield slice(first, end), slice(other_first, other_end)
        first, other_first = end, other_end


def _mapped(path: Path) -> pa.Buffer:
    """Map a file as a buffer; an empty one cannot be mapped."""
    if not path.stat().st_size:
        return pa.py_buffer(b"")
    return pa.py_buffer(np.memmap(path, np.uint8, "r"))
