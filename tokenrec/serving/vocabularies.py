"""Look up ids of raw values: frozen, and for any number of threads.

`tokenrec.data.vocabulary` numbers the values of a log while it streams past; here the
numbers are given. Values are as in `prepare`: integers (bools are 0 and 1) or texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import FIRST_KNOWN, MISSING, UNKNOWN
from tokenrec.serving.request import BadRequest, short_repr


class Places:
    """Find the place of values among distinct values.

    Args:
      values: `[V]`, int64 or strings, in any order.
    """

    def __init__(self, values: pa.Array) -> None:
        self.type = "string" if pa.types.is_string(values.type) else "int64"
        self.size = len(values)
        self._texts: dict[str, int] = {}
        if self.type == "string":
            texts = values.to_pylist()
            self._texts = dict(zip(texts, range(len(texts)), strict=True))
        else:
            numbers = np.asarray(values.cast(pa.int64()), np.int64)
            # Sorted, with the place of each: a dict of integers would take ten times
            # the memory.
            self._order = np.argsort(numbers, kind="stable")
            self._sorted = numbers[self._order]

    def find(self, values: Sequence[Any] | np.ndarray, where: str) -> np.ndarray:
        """Find places, `[n] int64`: -1 where the value is not among them, -2 where null.

        Args:
          values: n integers, or n texts, and nulls.
          where: name of the column, for messages.

        Raises:
          BadRequest: a value has another type.
        """
        if self.type == "string":
            return self._find_texts(values, where)
        return self._find_integers(values, where)

    def _find_texts(self, values: Sequence[Any] | np.ndarray, where: str) -> np.ndarray:
        places = np.empty(len(values), np.int64)
        for i, value in enumerate(values):
            if value is None:
                places[i] = -2
            elif isinstance(value, str):
                places[i] = self._texts.get(value, -1)
            else:
                raise BadRequest(_wrong(where, i, value, "a text"))
        return places

    def _find_integers(
        self, values: Sequence[Any] | np.ndarray, where: str
    ) -> np.ndarray:
        if isinstance(values, np.ndarray) and values.dtype.kind in "biu":
            numbers, null = values.astype(np.int64), None
        else:
            numbers = np.zeros(len(values), np.int64)
            null = np.zeros(len(values), bool)
            for i, value in enumerate(values):
                if value is None:
                    null[i] = True
                elif isinstance(value, (int, np.integer)):
                    numbers[i] = value
                else:
                    raise BadRequest(_wrong(where, i, value, "an integer"))
        if not self.size:
            places = np.full(len(numbers), -1)
        else:
            slot = np.minimum(np.searchsorted(self._sorted, numbers), self.size - 1)
            found = self._sorted[slot] == numbers
            places = np.where(found, self._order[slot], -1)
        return places if null is None else np.where(null, -2, places)


class TableIds:
    """Ids of the values of an embedding table.

    Args:
      values: values of the vocabulary, in the order of their ids.
      rare: `[rows] int32`, the id whose row an id reads (`tokens.min_count`); None where
        each has its own.
    """

    def __init__(self, values: pa.Array, rare: np.ndarray | None = None) -> None:
        self._places = Places(values)
        self._rare = rare

    def find(self, values: Sequence[Any] | np.ndarray, where: str) -> np.ndarray:
        """Look up ids: `[n] int32`, `MISSING` where null, `UNKNOWN` where not known."""
        places = self._places.find(values, where)
        ids = np.where(places >= 0, places + FIRST_KNOWN, UNKNOWN)
        ids = np.where(places == -2, MISSING, ids).astype(np.int32)
        return ids if self._rare is None else self._rare[ids]


def _wrong(where: str, position: int, value: Any, wanted: str) -> str:
    return (
        f"{where}[{position}]: {short_repr(value)} is a {type(value).__name__}, and the model was "
        f"trained with {wanted} there; send {wanted}, or null where it is missing"
    )
