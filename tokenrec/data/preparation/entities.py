"""Users and items: their original ids, their features, and which of them occur in training rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tokenrec.data.preparation.encode import (
    as_batch,
    check_columns,
    encode_features,
    strings,
)
from tokenrec.data.schema import Feature, columns
from tokenrec.data.tokenizer import encode_texts
from tokenrec.data.vocabulary import Marks, TableValues, ValueIndex
from tokenrec.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXTS_AT_ONCE = 65_536


class Entities:
    """The users or the items of a log, numbered in the order in which they came: first those of the source's table.

    A categorical feature that bears the name of the key (`user_id`, `item_id`) is known for every entity.
    """

    def __init__(
        self, key: str, features: Sequence[Feature], tables: dict[str, TableValues]
    ) -> None:
        self.key, self.features = key, features
        self.index = ValueIndex()
        self.trained = Marks()
        self._tables = tables
        self._layout = columns(features)
        self.ids = np.zeros((0, self._layout.ids_width), np.int32)
        self.dense = np.zeros((0, self._layout.dense_width), np.float32)
        self._texts: dict[str, pa.ChunkedArray] = {}

    def read(self, table: pa.Table, where: str, block_rows: int) -> None:
        """Takes in the source's table, `where` in messages, some rows at a time.

        Raises:
          InputError: a column is missing or unknown, a value does not fit, or a key is null or occurs twice.
        """
        expected = list(dict.fromkeys([self.key, *(f.name for f in self.features)]))
        check_columns(table.column_names, expected, where)
        self.ids = np.zeros((table.num_rows, self._layout.ids_width), np.int32)
        self.dense = np.full(
            (table.num_rows, self._layout.dense_width), np.nan, np.float32
        )
        self._texts = {
            f.name: strings(table, f.name, where)
            for f in self.features
            if f.kind == "text"
        }
        for first in range(0, table.num_rows, block_rows):
            batch = as_batch(table.slice(first, block_rows))
            codes = self.codes(batch.column(self.key), where, first)
            wrong = codes != np.arange(first, first + len(codes))
            if wrong.any():
                at = int(wrong.argmax())
                value = batch.column(self.key)[at].as_py()
                raise InputError(
                    f"{where}: {self.key}={value!r} occurs twice (row {first + at}); keep one of them"
                )
            rows = slice(first, first + len(codes))
            self.ids[rows], self.dense[rows] = encode_features(
                batch, self.features, self._tables, where, first
            )

    def codes(self, values: pa.Array, where: str, first: int) -> np.ndarray:
        """`[n] int32`, the number of each key; new keys are added. A null key is an InputError."""
        if values.null_count:
            at = first + int(values.is_null().to_numpy(zero_copy_only=False).argmax())
            raise InputError(
                f"{where}: column '{self.key}' is null in row {at}; every row needs one"
            )
        return self.index.codes(values, f"{where}: column '{self.key}'")

    def complete(self) -> None:
        """Gives missing features to the entities that came without any, and marks the values that training rows use."""
        known, total = len(self.ids), self.index.size
        if known < total:
            new_dense = np.full(
                (total - known, self._layout.dense_width), np.nan, np.float32
            )
            self.ids = np.concatenate(
                [self.ids, np.zeros((total - known, self._layout.ids_width), np.int32)]
            )
            self.dense = np.concatenate([self.dense, new_dense])
        for f in self.features:
            if f.name == self.key and f.kind == "categorical" and known < total:
                new = pa.array(self.index.values()[known:])
                place = self._layout.ids[f.name][0]
                self.ids[known:, place] = self._tables[f.table_name].provisional(
                    new, f"feature '{f.name}'"
                )
        trained = self.in_training()
        for f in self.features:
            if f.has_vocabulary:
                self._tables[f.table_name].mark(
                    self.ids[trained, slice(*self._layout.ids[f.name])]
                )

    def training_texts(self) -> Iterator[str]:
        """Texts of the entities that occur in training rows, feature after feature."""
        trained = self.in_training()
        for texts in self._texts.values():
            for part in texts.filter(pa.array(trained[: len(texts)])).iterchunks():
                yield from (text for text in part.to_pylist() if text is not None)

    def encode_texts(self, tokenizer: Tokenizer) -> None:
        """Fills the ids of the text features, and lets go of the strings."""
        for f in self.features:
            texts = self._texts.pop(f.name, None)
            for first in range(0, 0 if texts is None else len(texts), TEXTS_AT_ONCE):
                some = texts.slice(first, TEXTS_AT_ONCE).to_pylist()
                place = slice(*self._layout.ids[f.name])
                self.ids[first : first + len(some), place] = encode_texts(
                    tokenizer, some, f.length
                )

    def in_training(self) -> np.ndarray:
        """`[size] bool`."""
        return self.trained.array(self.index.size)


def to_final(
    ids: np.ndarray, features: Sequence[Feature], finals: dict[str, np.ndarray]
) -> None:
    """Turns the provisional ids of a matrix into ids of the vocabularies, in place."""
    layout = columns(features)
    for f in features:
        if f.has_vocabulary:
            part = ids[:, slice(*layout.ids[f.name])]
            part[...] = finals[f.table_name][part]
