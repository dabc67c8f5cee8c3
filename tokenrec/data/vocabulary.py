"""Distinct values as they stream past, and the vocabularies that the training split makes of them.

While a log streams, the values of an embedding table get codes in the order in which they come, and the codes that
training rows use are marked. When the stream ends, the marked values, sorted, become ids `FIRST_KNOWN`, ..., and all
others become `UNKNOWN`: the result does not depend on the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.data.metadata import checked_file
from tokenrec.data.schema import FIRST_KNOWN, MISSING, UNKNOWN, Feature
from tokenrec.errors import InputError

VOCABULARIES = "vocabularies"


class Marks:
    """A set of small integers, as a growing array of bools."""

    def __init__(self) -> None:
        self._marked = np.zeros(1024, bool)

    def add(self, codes: np.ndarray) -> None:
        if not len(codes):
            return
        top = int(codes.max()) + 1
        if top > len(self._marked):
            grown = np.zeros(max(top, 2 * len(self._marked)), bool)
            grown[: len(self._marked)] = self._marked
            self._marked = grown
        self._marked[codes] = True

    def array(self, size: int) -> np.ndarray:
        """`[size] bool`, True where marked."""
        out = np.zeros(size, bool)
        known = min(size, len(self._marked))
        out[:known] = self._marked[:known]
        return out


class ValueIndex:
    """Distinct int64 or string values, numbered in the order in which they came.

    Integers lie in a few sorted runs, each at most half as long as the one before it, so that a new value costs
    O(log n) amortised and 16 bytes; strings lie in a dict.
    """

    def __init__(self) -> None:
        self.type = ""  # "int64" or "string", "" until the first value
        self.size = 0
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._strings: dict[str, int] = {}

    def codes(self, values: pa.Array, where: str) -> np.ndarray:
        """Codes of `values`, new ones added; -1 where null. `values: [n]` -> `[n] int32`.

        Raises:
          InputError: the values are neither integers nor strings, or not of the type seen before; names `where`.
        """
        values = canonical(values, where)
        if pa.types.is_null(values.type):
            return np.full(len(values), -1, np.int32)
        kind = "int64" if pa.types.is_int64(values.type) else "string"
        if self.type not in ("", kind):
            raise InputError(
                f"{where} holds {kind} values, but {self.type} values came before; give it one type"
            )
        self.type = kind
        encoded = values.dictionary_encode()
        distinct = encoded.dictionary
        table = np.full(len(distinct) + 1, -1, np.int32)  # the last entry is for nulls
        table[:-1] = (
            self._add_integers(distinct.to_numpy())
            if kind == "int64"
            else self._add(distinct.to_pylist())
        )
        indices = (
            encoded.indices.fill_null(len(distinct))
            if encoded.null_count
            else encoded.indices
        )
        return table[indices.to_numpy(zero_copy_only=False)]

    def values(self) -> np.ndarray:
        """Values in the order of their codes: `[size]`, int64 or object."""
        if self.type == "string":
            return np.array([*self._strings, None], object)[:-1]
        out = np.empty(self.size, np.int64)
        for run, codes in self._runs:
            out[codes] = run
        return out

    def _add(self, values: Iterable[str]) -> np.ndarray:
        strings = self._strings
        codes = np.array(
            [strings.setdefault(value, len(strings)) for value in values], np.int32
        )
        self.size = len(strings)
        return codes

    def _add_integers(self, values: np.ndarray) -> np.ndarray:
        out = np.full(len(values), -1, np.int32)
        order = np.argsort(values)
        ordered = values[order]
        for run, codes in self._runs:
            at = np.minimum(np.searchsorted(run, ordered), len(run) - 1)
            found = run[at] == ordered
            out[order[found]] = codes[at[found]]
        new = np.flatnonzero(out < 0)
        if len(new):
            out[new] = np.arange(self.size, self.size + len(new), dtype=np.int32)
            self.size += len(new)
            by_value = new[np.argsort(values[new])]
            self._runs.append((values[by_value], out[by_value]))
            while len(self._runs) > 1 and 2 * len(self._runs[-1][0]) > len(
                self._runs[-2][0]
            ):
                self._runs.append(_merge(*self._runs.pop(), *self._runs.pop()))
        return out


class TableValues:
    """Values of one embedding table: codes while the log streams, ids when it has ended."""

    def __init__(self) -> None:
        self.index = ValueIndex()
        self.trained = Marks()

    def provisional(self, values: pa.Array, where: str) -> np.ndarray:
        """`[n] int32`: `FIRST_KNOWN` + code, `MISSING` where null."""
        codes = self.index.codes(values, where)
        return np.where(codes < 0, np.int32(MISSING), codes + np.int32(FIRST_KNOWN))

    def mark(self, provisional: np.ndarray) -> None:
        """Takes the values behind these ids into the vocabulary."""
        self.trained.add(provisional[provisional >= FIRST_KNOWN] - FIRST_KNOWN)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """`known: [V]`, the vocabulary in order, and `final: [size + 2] int32`, provisional id -> id."""
        values = self.index.values()
        marked = np.flatnonzero(self.trained.array(len(values)))
        order = marked[np.argsort(values[marked], kind="stable")]
        final = np.full(len(values) + FIRST_KNOWN, UNKNOWN, np.int32)
        final[MISSING] = MISSING
        final[order + FIRST_KNOWN] = np.arange(
            FIRST_KNOWN, FIRST_KNOWN + len(order), dtype=np.int32
        )
        return values[order], final


def value_tables(features: Iterable[Feature]) -> dict[str, TableValues]:
    """An empty `TableValues` for each table that needs a vocabulary.

    Raises:
      InputError: a semantic id shares its table with a feature of another kind or shape, so that ids would clash.
    """
    shapes: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for f in features:
        if f.has_vocabulary or f.kind == "semantic_id":
            shape = (f.length, f.codes) if f.kind == "semantic_id" else None
            name, known = shapes.setdefault(f.table_name, (f.name, shape))
            if known != shape:
                raise InputError(
                    f"features '{name}' and '{f.name}' share the table '{f.table_name}', but a semantic id shares one "
                    f"only with semantic ids of equal length and codes; give one of them another table"
                )
    return {name: TableValues() for name, (_, shape) in shapes.items() if shape is None}


def semantic_rows(feature: Feature) -> int:
    """Rows of a semantic id's table: the reserved ids, then the codes of each level."""
    return FIRST_KNOWN + feature.length * feature.codes


def save_vocabulary(directory: Path, table: str, known: np.ndarray) -> Path:
    """Writes `vocabularies/<table>.parquet` with the columns `id` and `value`; returns its path."""
    folder = directory / VOCABULARIES
    folder.mkdir(exist_ok=True)
    path = folder / f"{quote(table, safe='')}.parquet"
    ids = np.arange(FIRST_KNOWN, FIRST_KNOWN + len(known), dtype=np.int32)
    values = pa.array(known, pa.string() if known.dtype == object else pa.int64())
    pq.write_table(pa.table({"id": ids, "value": values}), path)
    return path


def load_vocabulary(directory: Path, table: str) -> np.ndarray:
    """Known values of a table of a prepared data set; the value at position i has id `FIRST_KNOWN` + i.

    Raises:
      InputError: the data set has no vocabulary of that name (a semantic id's codes are its ids), or its file is
        missing or damaged.
    """
    path = checked_file(directory, f"{VOCABULARIES}/{quote(table, safe='')}.parquet")
    if path is None:
        raise InputError(f"table '{table}' has no vocabulary in '{directory}'")
    try:
        values = pq.read_table(path)["value"]
        values.validate(full=True)
        return values.to_numpy()
    except (pa.ArrowException, OSError, KeyError, ValueError, OverflowError) as error:
        raise InputError(
            f"data: cannot read '{path}': {error}; prepare the data set again"
        ) from error


def canonical(values: pa.Array, where: str) -> pa.Array:
    """Integers (and bools) as int64, strings as `string`, nulls as they are."""
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
                f"{where} holds a value that is not an int64: {error}; write it as a string"
            ) from error
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return values.cast(pa.string())
    raise InputError(
        f"{where} has the type {kind}, but ids are int64 or string; cast it"
    )


def _merge(
    values: np.ndarray, codes: np.ndarray, other: np.ndarray, other_codes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    at = np.searchsorted(other, values)
    return np.insert(other, at, values), np.insert(other_codes, at, codes)
