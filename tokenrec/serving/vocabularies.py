"""Look up ids of raw values: frozen, and for any number of threads.

`tokenrec.data.vocabulary` numbers the values of a log while it streams past; here the
numbers are given. Values are as in `prepare`: integers (bools are 0 and 1) or texts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import FIRST_KNOWN, MISSING, UNKNOWN
from tokenrec.serving.request import BadRequest, short_repr

# Integers up to this number are in a dict, which is faster for the few values of a
# request, and more of them in sorted arrays, which take a tenth of the memory.
DICT_INTEGERS = 1_000_000

_NONE = type(None)
_TYPES: dict[str, set[type]] = {"int64": {int, bool, _NONE}, "string": {str, _NONE}}


class ValueNumbers:
    """The number of each of distinct values.

    Args:
      values: `[V]`, int64 or strings, in any order.
      numbers: `[V] int`, their numbers.
      missing: number of null.
      unknown: number of any other value.
    """

    def __init__(
        self, values: pa.Array, numbers: np.ndarray, missing: int, unknown: int
    ) -> None:
        self.type = "string" if pa.types.is_string(values.type) else "int64"
        self._missing, self._unknown = missing, unknown
        self._by_value: dict[Any, int] | None = None
        if self.type == "string" or len(values) <= DICT_INTEGERS:
            known = values.to_pylist()
            self._by_value = dict(zip(known, numbers.tolist(), strict=True))
            self._by_value[None] = missing
        else:
            integers = np.asarray(values, np.int64)
            order = np.argsort(integers, kind="stable")
            self._sorted, self._numbers = integers[order], numbers[order]

    def find(self, values: Sequence[Any] | np.ndarray, where: str) -> np.ndarray:
        """Find the numbers of values, `[n] int64`.

        Args:
          values: n integers, or n texts, and nulls.
          where: name of the column, for messages.

        Raises:
          BadRequest: a value has another type.
        """
        plain = values.tolist() if isinstance(values, np.ndarray) else values
        if not set(map(type, plain)) <= _TYPES[self.type]:
            plain = self._plain(plain, where)
        if self._by_value is not None:
            found = map(self._by_value.get, plain, itertools.repeat(self._unknown))
            return np.fromiter(found, np.int64, len(plain))
        null = np.array([value is None for value in plain], bool)
        integers = np.array([value or 0 for value in plain], np.int64)
        slot = np.searchsorted(self._sorted, integers)
        slot = np.minimum(slot, len(self._sorted) - 1)
        found = self._sorted[slot] == integers
        numbers = np.where(found, self._numbers[slot], self._unknown)
        return np.where(null, self._missing, numbers)

    def _plain(self, values: Sequence[Any], where: str) -> list[Any]:
        """Convert NumPy scalars; refuse values of another type."""
        plain = []
        for i, value in enumerate(values):
            item = value.item() if isinstance(value, np.generic) else value
            if type(item) not in _TYPES[self.type]:
                wanted = "a text" if self.type == "string" else "an integer"
                raise BadRequest(
                    f"{where}[{i}]: {short_repr(value)} is a {type(value).__name__}, "
                    f"and the model was trained with {wanted} there; send {wanted}, or "
                    "null where it is missing"
                )
            plain.append(item)
        return plain


def item_rows(items: pa.Array) -> ValueNumbers:
    """Catalogue row of each item id; negative where null or not known."""
    return ValueNumbers(items, np.arange(len(items)), -2, -1)


def table_ids(values: pa.Array, rare: np.ndarray | None = None) -> ValueNumbers:
    """Id of each value of a table: `MISSING` where null, `UNKNOWN` where not known.

    Args:
      values: values of the vocabulary, in the order of their ids.
      rare: `[rows] int32`, the id whose row an id reads (`tokens.min_count`); None where
        each has its own.
    """
    ids = np.arange(FIRST_KNOWN, FIRST_KNOWN + len(values))
    return ValueNumbers(values, ids if rare is None else rare[ids], MISSING, UNKNOWN)
