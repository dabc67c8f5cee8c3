"""Collect distinct values while a log streams past, and number them as a vocabulary.

1. While the log streams, each value of an embedding table gets a *code*, in the order
   in which values appear. A code plus `FIRST_KNOWN` is a *provisional id*, with which
   log rows can be written at once.
2. Codes that occur in log rows of the training split are marked.
3. At the end the marked values, sorted, get the ids `FIRST_KNOWN`, ...; all others get
   `UNKNOWN`. The result does not depend on the order of the log rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.data.metadata import checked_file
from tokenrec.data.schema import FIRST_KNOWN, MISSING, UNKNOWN, Feature
from tokenrec.errors import InputError
from tokenrec.runtime.files import read_with_retries

# Folder of the vocabularies, a Parquet file per table.
VOCABULARIES = "vocabularies"


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

    Strings are in a dict. Integers are in a few sorted runs, each at most half as long
    as the one before it, as in a log-structured merge tree: a new value costs O(log n)
    amortised and 12 bytes, much less than an entry of a dict.

    Attributes:
      type: "int64" or "string"; empty until the first value.
      size: number of distinct values.
    """

    def __init__(self) -> None:
        self.type = ""
        self.size = 0
        # Sorted values, and the code of each.
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._strings: dict[str, int] = {}

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
        self.type = kind
        # Look up each distinct value of the batch once. The last entry is for nulls.
        encoded = values.dictionary_encode()
        distinct = encoded.dictionary
        distinct_codes = np.full(len(distinct) + 1, -1, np.int32)
        distinct_codes[:-1] = (
            self._add_integers(distinct.to_numpy())
            if kind == "int64"
            else self._add_strings(distinct.to_pylist())
        )
        indices = encoded.indices
        if encoded.null_count:
            indices = indices.fill_null(len(distinct))
        return distinct_codes[indices.to_numpy(zero_copy_only=False)]

    def find(self, values: np.ndarray) -> np.ndarray:
        """Look up codes, nothing added.

        Args:
          values: `[n] int64 or object`, of the type of this index.

        Returns:
          `[n] int32`, -1 where the value is not known.
        """
        if self.type == "string":
            return np.array([self._strings.get(v, -1) for v in values], np.int32)
        out = np.full(len(values), -1, np.int32)
        for run, codes in self._runs:
            place = np.minimum(np.searchsorted(run, values), len(run) - 1)
            known = run[place] == values
            out[known] = codes[place[known]]
        return out

    def value(self, code: int) -> int | str:
        """Find the value of one code, without a list of all."""
        if self.type == "string":
            return next(itertools.islice(self._strings, code, None))
        for run, codes in self._runs:
            place = np.flatnonzero(codes == code)
            if len(place):
                return int(run[place[0]])
        raise IndexError(f"code {code} of {self.size} values")

    def values(self) -> np.ndarray:
        """List the values in the order of their codes: `[size] int64 or object`."""
        if self.type == "string":
            # The appended None keeps NumPy from making a string array of fixed width.
            return np.array([*self._strings, None], object)[:-1]
        out = np.empty(self.size, np.int64)
        for run, codes in self._runs:
            out[codes] = run
        return out

    def _add_strings(self, values: Iterable[str]) -> np.ndarray:
        strings = self._strings
        codes = np.array(
            [strings.setdefault(value, len(strings)) for value in values], np.int32
        )
        self.size = len(strings)
        return codes

    def _add_integers(self, values: np.ndarray) -> np.ndarray:
        """Codes of distinct `values: [n] int64`, new ones added."""
        out = np.full(len(values), -1, np.int32)
        order = np.argsort(values)
        ordered = values[order]
        for run, codes in self._runs:
            place = np.minimum(np.searchsorted(run, ordered), len(run) - 1)
            known = run[place] == ordered
            out[order[known]] = codes[place[known]]
        # New values are a run of their own. Then runs are merged until each is at most
        # half as long as the one before it.
        new = np.flatnonzero(out < 0)
        if len(new):
            out[new] = np.arange(self.size, self.size + len(new), dtype=np.int32)
            self.size += len(new)
            by_value = new[np.argsort(values[new])]
            self._runs.append((values[by_value], out[by_value]))
            while len(self._runs) > 1:
                last, before = self._runs[-1][0], self._runs[-2][0]
                if 2 * len(last) <= len(before):
                    break
                self._runs.append(_merge(*self._runs.pop(), *self._runs.pop()))
        return out


def _merge(
    values: np.ndarray, codes: np.ndarray, other: np.ndarray, other_codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Merge two sorted runs of values and their codes."""
    place = np.searchsorted(other, values)
    return np.insert(other, place, values), np.insert(other_codes, place, codes)


class TableValues:
    """Values of one embedding table: provisional ids first, ids at the end.

    Attributes:
      index: all values.
      trained: codes of the values that training log rows hold.
    """

    def __init__(self) -> None:
        self.index = ValueIndex()
        self.trained = Marks()

    def provisional(self, values: pa.Array, where: str) -> np.ndarray:
        """Look up provisional ids, new values added: `[n] int32`, `MISSING` where null.

        Raises:
          InputError: see `ValueIndex.codes`.
        """
        codes = self.index.codes(values, where)
        return np.where(codes < 0, np.int32(MISSING), codes + np.int32(FIRST_KNOWN))

    def mark(self, provisional: np.ndarray) -> None:
        """Take the values of provisional ids `[n] int32` into the vocabulary."""
        self.trained.add(provisional[provisional >= FIRST_KNOWN] - FIRST_KNOWN)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Number the vocabulary.

        Returns:
          known: `[V]`, the values of the vocabulary; number i has id `FIRST_KNOWN + i`.
          final: `[size + 2] int32`, provisional id -> id.
        """
        # Sort the marked values, so that ids do not depend on the order of log rows.
        values = self.index.values()
        marked = np.flatnonzero(self.trained.array(len(values)))
        order = marked[np.argsort(values[marked], kind="stable")]
        final = np.full(len(values) + FIRST_KNOWN, UNKNOWN, np.int32)
        final[MISSING] = MISSING
        final[order + FIRST_KNOWN] = np.arange(
            FIRST_KNOWN, FIRST_KNOWN + len(order), dtype=np.int32
        )
        return values[order], final


class FrozenValues(TableValues):
    """Values of the embedding table of an earlier data set, which stays as it is.

    Provisional ids are ids already, `UNKNOWN` for a value that the table lacks.

    Args:
      known: `[V] int64 or object`, the values in the order of their ids.
    """

    def __init__(self, known: np.ndarray) -> None:
        super().__init__()
        self._known = known
        if len(known):
            kind = pa.string() if known.dtype == object else pa.int64()
            self.index.codes(pa.array(known, kind), "the vocabulary")

    def provisional(self, values: pa.Array, where: str) -> np.ndarray:
        """Look up ids: `[n] int32`, `MISSING` where null, `UNKNOWN` where not known."""
        ids = super().provisional(values, where)
        return np.where(ids < FIRST_KNOWN + len(self._known), ids, np.int32(UNKNOWN))

    def mark(self, provisional: np.ndarray) -> None:
        """Take no value in."""

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the values, and `[V + 2] int32`, each id for itself."""
        return self._known, np.arange(FIRST_KNOWN + len(self._known), dtype=np.int32)


def value_tables(features: Iterable[Feature]) -> dict[str, TableValues]:
    """Make an empty `TableValues` for each table that needs a vocabulary.

    Raises:
      InputError: a semantic id shares its table with a feature of another kind or
        shape, so that ids would clash.
    """
    # Table -> the first feature with it, and that feature's shape: levels and codes of
    # a semantic id, None of any other.
    shapes: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for feature in features:
        if feature.has_vocabulary or feature.kind == "semantic_id":
            shape = None
            if feature.kind == "semantic_id":
                shape = (feature.length, feature.codes)
            name, known = shapes.setdefault(feature.table_name, (feature.name, shape))
            if known != shape:
                raise InputError(
                    f"features '{name}' and '{feature.name}' share the table "
                    f"'{feature.table_name}', but a semantic id shares one only with "
                    "semantic ids of equal length and codes; give one of them another "
                    "table"
                )
    return {name: TableValues() for name, (_, shape) in shapes.items() if shape is None}


def semantic_rows(feature: Feature) -> int:
    """Number of table rows of a semantic id: reserved ids, then each level's codes."""
    return FIRST_KNOWN + feature.length * feature.codes


def save_vocabulary(directory: Path, table: str, known: np.ndarray) -> Path:
    """Write `vocabularies/<table>.parquet` with the columns `id` and `value`.

    Args:
      directory: folder of the data set.
      table: name of the table.
      known: `[V] int64 or object`, the values in the order of their ids.

    Returns:
      Path of the file.
    """
    folder = directory / VOCABULARIES
    folder.mkdir(exist_ok=True)
    path = folder / f"{quote(table, safe='')}.parquet"
    # The ids follow from the order; they are written for readers other than tokenrec.
    ids = np.arange(FIRST_KNOWN, FIRST_KNOWN + len(known), dtype=np.int32)
    values = pa.array(known, pa.string() if known.dtype == object else pa.int64())
    pq.write_table(pa.table({"id": ids, "value": values}), path)
    return path


def load_vocabulary(directory: Path, table: str) -> np.ndarray:
    """Read the known values of a table of a prepared data set.

    Returns:
      `[V] int64 or object`; the value at position i has id `FIRST_KNOWN + i`.

    Raises:
      InputError: the data set has no vocabulary of that name (a semantic id's codes are
        its ids), or its file is missing or damaged.
    """
    path = checked_file(directory, f"{VOCABULARIES}/{quote(table, safe='')}.parquet")
    if path is None:
        raise InputError(
            f"table '{table}' has no vocabulary in '{directory}'; name a table of a "
            "categorical or multi-valued feature"
        )

    def read() -> np.ndarray:
        values = pq.read_table(path)["value"]
        values.validate(full=True)
        return values.to_numpy()

    return read_with_retries(
        read,
        path,
        "data:",
        "prepare the data set again",
        damage=(pa.ArrowException, KeyError, ValueError, OverflowError),
    )


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
