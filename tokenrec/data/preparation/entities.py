"""Collect the users or the items of a log: original ids, features, use in training.

An entity is a user or an item. Its *code* numbers entities in the order in which they
first occur. Its key is the original id, `user_id` or `item_id`. Features of an entity
come from the source's table; entities that occur in the log alone have missing ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tokenrec.data.memory_limit import NO_LIMIT, MemoryLimit, blocks
from tokenrec.data.preparation.encode import encode_features
from tokenrec.data.preparation.matches import Matches
from tokenrec.data.preparation.raw_columns import (
    check_columns,
    string_column,
    to_record_batch,
)
from tokenrec.data.schema import Feature, columns
from tokenrec.data.tokenizer import encode_texts
from tokenrec.data.value_index import Marks, ValueIndex
from tokenrec.data.vocabulary import TableValues
from tokenrec.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXTS_AT_ONCE = 65_536
_ROWS_AT_ONCE = 2**20


class Entities:
    """The users or the items of a log, by code.

    A categorical feature with the name of the key (`user_id`, `item_id`) is known
    for every entity, in the source's table or not.

    Attributes:
      key: `user_id` or `item_id`.
      features: features of the entity, in the order of their columns.
      index: original id to code; those of the source's table come first.
      in_log: codes of the entities that occur in the log.
      trained: codes of the entities that occur in training rows.
      ids: `[size, I] int32`, provisional ids until `to_vocabulary_ids`.
      dense: `[size, D] float32`, NaN where missing.

    Args:
      limit: of the memory that ids and features may take.
    """

    def __init__(
        self,
        key: str,
        features: Sequence[Feature],
        tables: dict[str, TableValues],
        limit: MemoryLimit = NO_LIMIT,
    ) -> None:
        self.key = key
        self.features = features
        self.index = ValueIndex(limit)
        self.in_log = Marks()
        self.trained = Marks()
        # Codes whose features are known from a table.
        self._described = Marks()
        # Shared by users, items and log: features of any of them may share a table.
        self._tables = tables
        self._layout = columns(features)
        self._limit = limit
        self.ids = np.zeros((0, self._layout.ids_width), np.int32)
        self.dense = np.zeros((0, self._layout.dense_width), np.float32)
        # Texts of the source's table, and the code of each of its rows.
        self._texts: dict[str, pa.ChunkedArray] = {}
        self._table_codes = np.zeros(0, np.int32)

    def go_on_from(self, keys: np.ndarray, ids: np.ndarray, dense: np.ndarray) -> None:
        """Start with the entities of an earlier data set, before the table is read.

        They keep their order and, where the table lacks them, their features.

        Args:
          keys: `[N] int64 or str`, original ids.
          ids: `[N, I] int32`, vocabulary ids of `features`.
          dense: `[N, D] float32`.
        """
        self._grow(len(keys))
        for part in blocks(len(keys), self._limit.block_rows):
            values = pa.array(keys[part].tolist())
            self.index.codes(values, f"column '{self.key}'")
            self.ids[part], self.dense[part] = ids[part], dense[part]
        self._described.add(np.arange(len(keys)))

    def read_table(self, table: pa.Table, where: str) -> None:
        """Read the source's table of these entities.

        Args:
          table: one row per entity, a column of the key and one for each feature.
          where: name of the table in messages, such as `users()`.

        Raises:
          InputError: a column is missing or unknown, a value does not fit its feature,
            or a key is null or occurs twice.
        """
        # The key may be a feature as well; it is one column then.
        expected = list(dict.fromkeys([self.key, *(f.name for f in self.features)]))
        check_columns(table.column_names, expected, where)
        rows = table.num_rows
        self._table_codes = np.zeros(rows, np.int32)
        in_table = Marks()  # of this table, not of an earlier data set
        # Room for the case that all are new; what is left over is cut off at the end.
        self._grow(self.index.size + rows)
        # Strings are kept as they are: the tokenizer is trained after the log was read.
        self._texts = {
            f.name: string_column(table, f.name, where)
            for f in self.features
            if f.kind == "text"
        }
        for part in blocks(rows, self._limit.block_rows):
            first = part.start
            batch = to_record_batch(table.slice(first, part.stop - first))
            codes = self.codes(batch.column(self.key), where, first)
            # Seen in an earlier block, or earlier in this one.
            repeats = in_table.array(self.index.size)[codes]
            repeats |= ~_is_first(codes)
            if repeats.any():
                repeat = int(repeats.argmax())
                value = batch.column(self.key)[repeat].as_py()
                raise InputError(
                    f"{where}: {self.key}={value!r} occurs twice (row "
                    f"{first + repeat}); keep one of them"
                )
            in_table.add(codes)
            self._described.add(codes)
            self._table_codes[first : first + len(codes)] = codes
            self.ids[codes], self.dense[codes] = encode_features(
                batch, self.features, self._tables, where, first
            )
        self.ids, self.dense = (
            self.ids[: self.index.size],
            self.dense[: self.index.size],
        )

    def codes(self, values: pa.Array, where: str, first: int) -> np.ndarray:
        """Return the code of each key, and add keys that are new.

        Args:
          values: `[n]`, original ids.
          where: name of the table or log in messages.
          first: number of the first of these rows, for messages.

        Returns:
          `[n] int32`.

        Raises:
          InputError: a key is null, or of another type than those before.
        """
        if values.null_count:
            null_row = int(values.is_null().to_numpy(zero_copy_only=False).argmax())
            raise InputError(
                f"{where}: column '{self.key}' is null in row {first + null_row}; "
                "every row needs one; fill it in or remove the row"
            )
        return self.index.codes(values, f"{where}: column '{self.key}'")

    def complete(self) -> None:
        """Give missing features to the entities that are in the log alone.

        It also marks the feature values of the entities of training rows, which enter
        the vocabularies. It is called once, after the whole log.
        """
        known, total = len(self.ids), self.index.size
        # Codes of the log's entities follow those of the table.
        self._grow(total)
        for f in self.features:
            # The key itself is never missing.
            if f.name == self.key and f.kind == "categorical" and known < total:
                keys = self.index.array()[known:]
                column = self.ids[known:, self._layout.ids[f.name][0]]
                for part in blocks(len(keys), self._limit.block_rows):
                    column[part] = self._tables[f.table_name].provisional(
                        keys[part], f"feature '{f.name}'"
                    )
        for ids, _ in self.training_features():
            for f in self.features:
                if f.has_vocabulary:
                    place = slice(*self._layout.ids[f.name])
                    self._tables[f.table_name].mark(ids[:, place])

    def training_features(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield `ids` and `dense` of the entities of training rows, some at a time."""
        trained = self.in_training()
        for part in blocks(len(trained), self._limit.block_rows):
            chosen = part.start + np.flatnonzero(trained[part])
            yield self.ids[chosen], self.dense[chosen]

    def matches(self) -> Matches:
        """Compare the entities of the log with those of the source's table.

        Entities that have no feature but their id need no table.
        """
        size = self.index.size
        in_log, described = self.in_log.array(size), self._described.array(size)
        if all(f.name == self.key for f in self.features):
            described[:] = False
        return Matches(
            self.key,
            in_table=int(described.sum()),
            in_log=int(in_log.sum()),
            matched=int((in_log & described).sum()),
            table_example=self._example(described & ~in_log),
            log_example=self._example(in_log & ~described),
        )

    def training_texts(self) -> Iterator[str]:
        """Yield the texts of the entities of training rows, feature after feature."""
        # Entities without a row in the source's table have no text.
        trained = pa.array(self.in_training()[self._table_codes])
        for texts in self._texts.values():
            for chunk in texts.filter(trained).iterchunks():
                yield from (text for text in chunk.to_pylist() if text is not None)

    def encode_texts(self, tokenizer: Tokenizer) -> None:
        """Fill in the ids of the text features, and free their strings."""
        for f in self.features:
            texts = self._texts.pop(f.name, None)
            if texts is None:
                continue
            columns_of_text = slice(*self._layout.ids[f.name])
            for first in range(0, len(texts), TEXTS_AT_ONCE):
                block = texts.slice(first, TEXTS_AT_ONCE).to_pylist()
                codes = self._table_codes[first : first + len(block)]
                self.ids[codes, columns_of_text] = encode_texts(
                    tokenizer, block, f.length
                )

    def in_training(self) -> np.ndarray:
        """Return `[size] bool`, True for an entity of a training row."""
        return self.trained.array(self.index.size)

    def _example(self, chosen: np.ndarray) -> int | str | None:
        """The id of the first of `chosen: [size] bool`, None if there is none."""
        code = int(chosen.argmax()) if len(chosen) else 0
        if not len(chosen) or not chosen[code]:
            return None
        value: int | str = self.index.array()[code].as_py()
        return value

    def _grow(self, size: int) -> None:
        """Make room for the features of `size` entities; new ones are missing."""
        ids = self._limit.zeros((size, self._layout.ids_width), np.int32)
        dense = self._limit.zeros((size, self._layout.dense_width), np.float32)
        for part in blocks(size, self._limit.block_rows):
            known = self.ids[part]
            ids[part][: len(known)] = known
            dense[part][: len(known)] = self.dense[part]
            dense[part][len(known) :] = np.nan
        self.ids, self.dense = ids, dense


def _is_first(codes: np.ndarray) -> np.ndarray:
    """Find the first occurrence of each of `codes: [n]`: `[n] bool`."""
    first = np.zeros(len(codes), bool)
    first[np.unique(codes, return_index=True)[1]] = True
    return first


def to_vocabulary_ids(
    ids: np.ndarray, features: Sequence[Feature], vocabulary_ids: dict[str, np.ndarray]
) -> None:
    """Replace the provisional ids of a matrix by ids of the vocabularies, in place.

    Args:
      ids: `[n, I] int32`, columns of `features`.
      features: features of the matrix. Semantic ids and texts have final ids already.
      vocabulary_ids: by table, `[size + 2] int32`, provisional id to vocabulary id.
    """
    layout = columns(features)
    for f in features:
        if f.has_vocabulary:
            column = ids[:, slice(*layout.ids[f.name])]
            for part in blocks(len(ids), _ROWS_AT_ONCE):
                column[part] = vocabulary_ids[f.table_name][column[part]]
