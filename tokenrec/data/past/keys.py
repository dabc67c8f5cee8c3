"""Keys of log rows as 64-bit hashes of ids and feature values.

A key is one column or several: `item_id`; `user_id` and a feature of the item; features
of the row. A value is hashed by itself, so that no table of values has to be kept, and a
later log gives the same value the same key. Two of n keys share their totals with a
probability of about n^2 / 2^65: 3 in a million for ten million keys.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import Feature, Schema
from tokenrec.errors import InputError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_TABLES = {"user_id": "user", "item_id": "catalogue"}


@dataclasses.dataclass(frozen=True)
class Hashes:
    """Hashes of several values per row; none where the value is missing.

    Attributes:
      offsets: `[n + 1] int64`; the values of row i are
        `values[offsets[i] : offsets[i + 1]]`.
      values: `[N] uint64`.
    """

    offsets: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of values of each row: `[n] int64`."""
        return self.offsets[1:] - self.offsets[:-1]

    @functools.cached_property
    def has_one_each(self) -> bool:
        """Whether each row has one value."""
        return len(self.values) == len(self) and bool((self.lengths == 1).all())

    def take(self, rows: np.ndarray) -> Hashes:
        """Hashes of `rows: [m] int64`, none where the row is -1."""
        if not len(self):
            return Hashes(np.zeros(len(rows) + 1, np.int64), self.values[:0])
        lengths = np.where(rows < 0, 0, self.lengths[rows])
        places = self.offsets[rows].repeat(lengths) + _count_up(lengths)
        return Hashes(_offsets(lengths), self.values[places])

    @classmethod
    def join(cls, parts: Sequence[Hashes]) -> Hashes:
        """Hashes of the rows of all parts."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls(_offsets(lengths), np.concatenate([part.values for part in parts]))

    def first_of_each(self) -> np.ndarray:
        """The first hash of each row, 0 where there is none: `[n] uint64`."""
        has_value = self.lengths > 0
        first = np.zeros(len(self), np.uint64)
        first[has_value] = self.values[self.offsets[:-1][has_value]]
        return first


def hash_column(column: pa.Array | pa.ChunkedArray, where: str) -> Hashes:
    """Hash the values of a column of integers or strings, or of lists of these.

    The values of a list are hashed once each, in ascending order of the hashes.

    Raises:
      InputError: the values are of another type.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_null(column.type):
        return Hashes(np.zeros(len(column) + 1, np.int64), np.zeros(0, np.uint64))
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        rows = pc.list_parent_indices(column).to_numpy().astype(np.int64)
        values = pc.list_flatten(column)
        present = pc.is_valid(values).to_numpy(zero_copy_only=False)
        hashes = _hash_values(values.drop_null(), where)
        rows = rows[present]
        order = np.lexsort((hashes, rows))
        rows, hashes = rows[order], hashes[order]
        is_new = np.ones(len(rows), bool)
        is_new[1:] = (rows[1:] != rows[:-1]) | (hashes[1:] != hashes[:-1])
        lengths = np.bincount(rows[is_new], minlength=len(column))
        return Hashes(_offsets(lengths), hashes[is_new])
    present = pc.is_valid(column).to_numpy(zero_copy_only=False)
    return Hashes(_offsets(present), _hash_values(column.drop_null(), where))


def combine(columns: Sequence[Hashes], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys of several columns: every combination of a row's values.

    Args:
      columns: hashes of each column; none for the key of all rows.
      rows: number of rows.

    Returns:
      `[E] int64`, ascending: the row of each key; and `[E] uint64`, the keys. A row
      that lacks a value of a column has none.
    """
    row = np.arange(rows)
    keys = np.zeros(rows, np.uint64)
    one_each = True  # so far
    for column in columns:
        one_each = one_each and column.has_one_each
        if one_each:
            # The usual case, in a fraction of the time.
            keys = mix(mix(keys) + column.values)
            continue
        lengths = column.lengths[row]
        places = column.offsets[row].repeat(lengths) + _count_up(lengths)
        row, keys = row.repeat(lengths), keys.repeat(lengths)
        keys = mix(mix(keys) + column.values[places])
    return row, keys


def mix(values: np.ndarray) -> np.ndarray:
    """Map `[n] uint64` to themselves, one to one, as if at random.

    It is the finaliser of SplitMix64 (Steele, Lea and Flood, Fast Splittable
    Pseudorandom Number Generators, OOPSLA 2014).
    """
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class KeyColumns:
    """Columns of keys: those of the log, and those that a table has.

    Args:
      schema: features of the source.
      names: columns that keys are made of.
    """

    def __init__(self, schema: Schema, names: Sequence[str]) -> None:
        self._schema = schema
        self._features = {
            key: [f for f in schema.group(group) if f.name in names and f.name != key]  # type: ignore[arg-type]
            for key, group in _TABLES.items()
        }
        self._in_log = [f for f in schema.group("row") if f.name in names]
        self._tables = {key: KeyTable.empty(f) for key, f in self._features.items()}

    def add_table(self, key: str, table: pa.Table) -> None:
        """Describe users or items; those of earlier tables stay if they are not there.

        Args:
          key: "user_id" or "item_id".
          table: `Source.users` or `Source.items`.
        """
        self.use_table(key, self.hash_table(key, table).joined(self._tables[key]))

    def hash_table(self, key: str, table: pa.Table) -> KeyTable:
        """Hash what keys need of a table of users or items, as for `add_table`."""
        columns = {f.name: _cut(f, table[f.name]) for f in self._features[key]}
        ids = hash_column(table[key], f"column '{key}'").first_of_each()
        hashes = {n: hash_column(c, f"feature '{n}'") for n, c in columns.items()}
        return KeyTable.sort(ids, hashes)

    def use_table(self, key: str, table: KeyTable) -> None:
        """Describe users or items by a table from `hash_table`."""
        self._tables[key] = table

    def no_table(self, key: str) -> KeyTable:
        """A table without users or items."""
        return KeyTable.empty(self._features[key])

    def needs_table(self, key: str) -> bool:
        """Whether keys have columns of users (`user_id`) or of items (`item_id`)."""
        return bool(self._features[key])

    def of_rows(self, table: pa.Table) -> dict[str, Hashes]:
        """Hash ids and all columns of log rows, by the name of the column."""
        columns: dict[str, Hashes] = {}
        for key in _TABLES:
            columns[key] = hash_column(table[key], f"rows(): column '{key}'")
            columns |= self._tables[key].look_up(columns[key].first_of_each())
        for feature in self._in_log:
            where = f"rows(): feature '{feature.name}'"
            column = _cut(feature, table[feature.name])
            columns[feature.name] = hash_column(column, where)
        return columns

    def most_keys(self, key: Sequence[str]) -> int:
        """The most keys of a log row: more than 1 with multi-valued columns."""
        features = (*self._in_log, *(f for fs in self._features.values() for f in fs))
        return math.prod(f.length for f in features if f.name in key)

    def state(self) -> dict[str, np.ndarray]:
        """Return the features of users and items, from which `resume` goes on."""
        arrays: dict[str, np.ndarray] = {}
        for key, table in self._tables.items():
            if not self._features[key]:
                continue
            arrays[f"{key}s"] = table.ids
            for number, hashes in enumerate(table.hashes.values()):
                arrays[f"{key}s_offsets_{number}"] = hashes.offsets
                arrays[f"{key}s_values_{number}"] = hashes.values
        return arrays

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Describe users and items as before, where the tables since lack them."""
        for key, features in self._features.items():
            if not features:
                continue
            hashes = {
                f.name: Hashes(
                    np.array(state[f"{key}s_offsets_{number}"]),
                    np.array(state[f"{key}s_values_{number}"]),
                )
                for number, f in enumerate(features)
            }
            before = KeyTable(np.array(state[f"{key}s"]), hashes)
            self._tables[key] = self._tables[key].joined(before)


@dataclasses.dataclass(frozen=True)
class KeyTable:
    """Hashes of the features of users or items.

    Attributes:
      ids: `[V] uint64`, hashes of the ids, ascending.
      hashes: name of a feature -> its hashes.
    """

    ids: np.ndarray
    hashes: dict[str, Hashes]

    @classmethod
    def empty(cls, features: Sequence[Feature]) -> KeyTable:
        none = Hashes(np.zeros(1, np.int64), np.zeros(0, np.uint64))
        return cls(np.zeros(0, np.uint64), {f.name: none for f in features})

    @classmethod
    def sort(cls, ids: np.ndarray, hashes: dict[str, Hashes]) -> KeyTable:
        ids, order = np.unique(ids, return_index=True)
        return cls(ids, {name: h.take(order) for name, h in hashes.items()})

    def joined(self, earlier: KeyTable) -> KeyTable:
        """Add what only an earlier table has."""
        return self.join([self, earlier])

    @classmethod
    def join(cls, tables: Sequence[KeyTable]) -> KeyTable:
        """Join tables of the same features; the first one that has an id describes it."""
        # The first of equal ids is taken.
        ids = np.concatenate([table.ids for table in tables])
        names = tables[0].hashes
        hashes = {n: Hashes.join([table.hashes[n] for table in tables]) for n in names}
        return cls.sort(ids, hashes)

    def look_up(self, ids: np.ndarray) -> dict[str, Hashes]:
        """Hashes of each feature of `ids: [n]`, none of unknown ones."""
        place = np.searchsorted(self.ids, ids)
        known = place < len(self.ids)
        known[known] = self.ids[place[known]] == ids[known]
        place = np.where(known, place, -1)
        return {name: hashes.take(place) for name, hashes in self.hashes.items()}


def _cut(feature: Feature, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cut lists to the length that `prepare` keeps."""
    if feature.kind != "multi_valued" or pa.types.is_null(column.type):
        return column
    return pc.list_slice(column, 0, feature.length)


def _hash_values(values: pa.Array, where: str) -> np.ndarray:
    """Hash integers or strings without nulls: `[n] uint64`."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_integer(values.type) or pa.types.is_boolean(values.type):
        integers = values.cast(pa.int64()).to_numpy(zero_copy_only=False)
        return mix(integers.view(np.uint64))
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        encoded = values.dictionary_encode()
        distinct = [_hash_text(text) for text in encoded.dictionary.to_pylist()]
        return np.array(distinct, np.uint64)[encoded.indices.to_numpy()]
    raise InputError(
        f"{where} has the type {values.type}, but a key of statistics needs int64 or "
        "strings; cast it"
    )


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _count_up(lengths: np.ndarray) -> np.ndarray:
    """Count from 0 within each row: `[sum of lengths] int64`.

    >>> _count_up(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - starts.repeat(lengths)
