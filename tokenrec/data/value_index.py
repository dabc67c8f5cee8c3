"""Give distinct values a code each, in the order of their first appearance.

New values are held in memory: strings in a dict, integers in sorted arrays. What a
`MemoryLimit` does not allow goes to files (`spilled_values.py`), and memory begins anew.
"""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa

from tokenrec.data.memory_limit import NO_LIMIT, MemoryLimit
from tokenrec.data.spilled_values import SpilledValues
from tokenrec.errors import InputError

# An entry of a dict, its key and its code, besides the characters (measured).
_BYTES_OF_A_STRING = 150


class Marks:
    """A set of small integers, as an array of bools that grows."""

    def __init__(self) -> None:
        self._marked = np.zeros(1024, bool)

    def add(self, codes: np.ndarray) -> None:
        """Add `codes: [n]`, at least 0."""
        if not len(codes):
            return
        size = int(codes.max()) + 1
        if size > len(self._marked):
            # At least double, so that adding n codes costs O(n) in total.
            grown = np.zeros(max(size, 2 * len(self._marked)), bool)
            grown[: len(self._marked)] = self._marked
            self._marked = grown
        self._marked[codes] = True

    def array(self, size: int) -> np.ndarray:
        """Return the first entries as `[size] bool`, True where marked."""
        out = np.zeros(size, bool)
        known = min(size, len(self._marked))
        out[:known] = self._marked[:known]
        return out


class ValueIndex:
    """Codes of distinct int64 or string values, in the order of their first appearance.

    Attributes:
      type: "int64" or "string"; empty until the first value.
      size: number of distinct values.

    Args:
      limit: of the memory that values may take.
    """

    def __init__(self, limit: MemoryLimit = NO_LIMIT) -> None:
        self.type = ""
        self._limit = limit
        self._recent: _Strings | _Integers = _Strings(0)
        self._spilled: SpilledValues | None = None
        limit.watch(self)

    @property
    def size(self) -> int:
        return self._recent.first + len(self._recent)

    @property
    def memory_bytes(self) -> int:
        """Bytes that `spill` would free, about."""
        return self._recent.memory_bytes

    def codes(self, values: pa.Array, where: str) -> np.ndarray:
        """Look up codes, new values added.

        Args:
          values: `[n]`, integers or strings.
          where: what messages begin with.

        Returns:
          `[n] int32`, -1 where null.

        Raises:
          InputError: the values are neither integers nor strings, or not of the type
            seen before.
        """
        values = canonical(values, where)
        if pa.types.is_null(values.type):
            return np.full(len(values), -1, np.int32)
        kind = "int64" if pa.types.is_int64(values.type) else "string"
        if self.type not in ("", kind):
            raise InputError(
                f"{where} holds {kind} values, but {self.type} values came before; "
                "give it one type"
            )
        self._begin(kind)
        # Look up each distinct value of the batch once. The last entry is for nulls.
        encoded = values.dictionary_encode()
        distinct = encoded.dictionary
        distinct_codes = np.full(len(distinct) + 1, -1, np.int32)
        distinct_codes[:-1] = self._codes_of(distinct)
        indices = encoded.indices
        if encoded.null_count:
            indices = indices.fill_null(len(distinct))
        return distinct_codes[indices.to_numpy(zero_copy_only=False)]

    def find(self, values: pa.Array) -> np.ndarray:
        """Look up codes, nothing added.

        Args:
          values: `[n]`, distinct or not, of the type of this index.

        Returns:
          `[n] int32`, -1 where the value is not known.
        """
        codes = self._recent.find(values)
        if self._spilled is not None:
            missing = np.flatnonzero(codes < 0)
            codes[missing] = self._spilled.find(values.take(pa.array(missing)))
        return codes

    def array(self) -> pa.Array:
        """Return the values by code: int64 or large strings.

        They are mapped from a file if any of them were spilled.
        """
        if not self.type:
            return pa.array([], pa.int64())
        if self._spilled is None:
            return self._recent.array()
        self.spill()
        return self._spilled.array()

    def values(self) -> np.ndarray:
        """List the values by code, in memory: `[size] int64 or object`."""
        return self.array().to_numpy(zero_copy_only=False)

    def spill(self) -> None:
        """Move the values that are in memory to files."""
        if not len(self._recent):
            return
        if self._spilled is None:
            self._spilled = SpilledValues(self.type, self._limit)
        self._spilled.append(self._recent.array())
        self._recent = type(self._recent)(self._spilled.size)

    def _begin(self, kind: str) -> None:
        """Take the type of the first values."""
        if isinstance(self._recent, _Integers) != (kind == "int64"):
            self._recent = _Integers(0)
        self.type = kind

    def _codes_of(self, distinct: pa.Array) -> np.ndarray:
        """Codes of `distinct: [n]`, new ones added: `[n] int32`."""
        if self._spilled is None:
            codes = self._recent.find_or_add(distinct)
        else:
            codes = self.find(distinct)
            new = np.flatnonzero(codes < 0)
            codes[new] = self._recent.find_or_add(distinct.take(pa.array(new)))
        self._limit.enforce()
        return codes


class _Strings:
    """Strings and their codes, as a dict.

    Attributes:
      first: code of the first string.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self._codes: dict[str, int] = {}
        self._characters = 0

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def memory_bytes(self) -> int:
        return _BYTES_OF_A_STRING * len(self._codes) + self._characters

    def find(self, values: pa.Array) -> np.ndarray:
        """Look up codes of `values: [n]`, -1 where absent: `[n] int32`."""
        get = self._codes.get
        return np.array([get(v, -1) for v in values.to_pylist()], np.int32)

    def find_or_add(self, values: pa.Array) -> np.ndarray:
        """Look up codes of distinct `values: [n]`, new ones added: `[n] int32`."""
        strings, first, before = self._codes, self.first, len(self._codes)
        codes = np.array(
            [strings.setdefault(v, first + len(strings)) for v in values.to_pylist()],
            np.int32,
        )
        if len(values):
            # As if all new strings were as long as these are on average.
            self._characters += values.nbytes * (len(strings) - before) // len(values)
        return codes

    def array(self) -> pa.Array:
        """List the strings by code: `[len(self)]`."""
        strings = iter(self._codes)
        # Some at a time: a list of all would take as much room as the dict again.
        parts = []
        while part := list(itertools.islice(strings, 2**18)):
            parts.append(pa.array(part, pa.large_string()))
        return pa.concat_arrays(parts) if parts else pa.array([], pa.large_string())


class _Integers:
    """Integers and their codes, in a few sorted runs.

    Each run is at most half as long as the one before it, as in a log-structured merge
    tree: a new value costs O(log n) amortised and 12 bytes.

    Attributes:
      first: code of the first integer.
    """

    def __init__(self, first: int) -> None:
        self.first = first
        self._size = 0
        # Sorted values, and the code of each.
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def __len__(self) -> int:
        return self._size

    @property
    def memory_bytes(self) -> int:
        return sum(run.nbytes + codes.nbytes for run, codes in self._runs)

    def find(self, values: pa.Array) -> np.ndarray:
        """Look up codes of `values: [n]`, -1 where absent: `[n] int32`."""
        return self._find(values.to_numpy(zero_copy_only=False))

    def find_or_add(self, values: pa.Array) -> np.ndarray:
        """Look up codes of distinct `values: [n]`, new ones added: `[n] int32`."""
        numbers = values.to_numpy()
        # Ascending searches are faster.
        order = np.argsort(numbers)
        out = np.empty(len(numbers), np.int32)
        out[order] = self._find(numbers[order])
        # New values are a run of their own. Then runs are merged until each is at most
        # half as long as the one before it.
        new = np.flatnonzero(out < 0)
        if len(new):
            first = self.first + self._size
            out[new] = np.arange(first, first + len(new), dtype=np.int32)
            self._size += len(new)
            by_value = new[np.argsort(numbers[new])]
            self._runs.append((numbers[by_value], out[by_value]))
            while len(self._runs) > 1:
                last, before = self._runs[-1][0], self._runs[-2][0]
                if 2 * len(last) <= len(before):
                    break
                self._runs.append(_merge(*self._runs.pop(), *self._runs.pop()))
        return out

    def array(self) -> pa.Array:
        """List the integers by code: `[len(self)]`."""
        out = np.empty(self._size, np.int64)
        for run, codes in self._runs:
            out[codes - self.first] = run
        return pa.array(out)

    def _find(self, values: np.ndarray) -> np.ndarray:
        out = np.full(len(values), -1, np.int32)
        for run, codes in self._runs:
            place = np.minimum(np.searchsorted(run, values), len(run) - 1)
            known = run[place] == values
            out[known] = codes[place[known]]
        return out


def _merge(
    values: np.ndarray, codes: np.ndarray, other: np.ndarray, other_codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merge two sorted runs of values and their codes."""
    place = np.searchsorted(other, values)
    return np.insert(other, place, values), np.insert(other_codes, place, codes)


def canonical(values: pa.Array, where: str) -> pa.Array:
    """Convert integers and bools to int64, and any string type to `string`.

    Args:
      values: `[n]`; nulls stay.
      where: what messages begin with.

    Raises:
      InputError: the values are of another type, or too large for int64.
    """
    kind = values.type
    if pa.types.is_dictionary(kind):
        values = values.dictionary_decode()
        kind = values.type
    if pa.types.is_null(kind) or pa.types.is_int64(kind) or pa.types.is_string(kind):
        return values
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{where} holds a value that is not an int64: {error}; write it as a "
                "string"
            ) from error
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return values.cast(pa.string())
    raise InputError(
        f"{where} has the type {kind}, but ids are int64 or string; cast it"
    )
