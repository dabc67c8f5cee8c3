"""Encode the columns of features, as `tokenrec.data.preparation.encode` does in bulk.

Letters: n rows, I and D columns of `ids` and `dense`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenrec.data.schema import FIRST_KNOWN, Feature, columns
from tokenrec.serving.request import BadRequest, Column, short_repr
from tokenrec.serving.vocabularies import TableIds


class FeatureEncoder:
    """Encode raw columns into matrices.

    Args:
      tables: ids of each table of categorical and multi-valued features.
    """

    def __init__(self, tables: Mapping[str, TableIds]) -> None:
        self._tables = tables

    def encode(
        self,
        features: Sequence[Feature],
        group: Sequence[Feature],
        given: Mapping[str, Column],
        part: str,
        ids: np.ndarray,
        dense: np.ndarray,
        rows: np.ndarray | None = None,
    ) -> None:
        """Fill the columns of some features.

        Args:
          features: features to encode; the columns of others are left as they are.
          group: all features of the matrices, in the order of their columns.
          given: raw values by feature.
          part: part of the request, for messages.
          ids: `[n, I] int32`, filled in place.
          dense: `[n, D] float32`, filled in place.
          rows: `[n] bool`, rows to fill; None for all.

        Raises:
          BadRequest: a value does not fit its feature.
        """
        place = columns(group)
        for f in features:
            where = f"{part}.{f.name}"
            matrix, spans = (ids, place.ids) if f.is_integer else (dense, place.dense)
            encoded = self._column(f, given[f.name], where)
            out = matrix[:, slice(*spans[f.name])]
            if rows is None:
                out[:] = encoded
            else:
                out[rows] = encoded[rows]

    def _column(self, f: Feature, values: Column, where: str) -> np.ndarray:
        """Encode a column, `[n, length]`."""
        if f.kind == "categorical":
            return self._tables[f.table_name].find(values, where)[:, None]
        if f.kind == "dense":
            return _numbers(values, where)[:, None]
        return self._lists(f, values, where)

    def _lists(self, f: Feature, values: Column, where: str) -> np.ndarray:
        """Encode a column of lists, `[n, length]`."""
        kind = np.int32 if f.is_integer else np.float32
        out = np.full((len(values), f.length), 0 if f.is_integer else np.nan, kind)
        for i, value in enumerate(values):
            if value is None:
                continue
            place = f"{where}[{i}]"
            if not isinstance(value, (list, tuple, np.ndarray)):
                raise BadRequest(
                    f"{place}: {short_repr(value)} is no list, and a {f.kind} feature "
                    "is one; send a list, or null where it is missing"
                )
            if f.kind == "multi_valued":
                kept = value[: f.length]
                out[i, : len(kept)] = self._tables[f.table_name].find(kept, place)
                continue
            if len(value) not in (0, f.length):
                raise BadRequest(
                    f"{place}: has {len(value)} values, and the length of the feature "
                    f"is {f.length}; send as many, or null where it is missing"
                )
            if not len(value):
                continue
            if f.kind == "embedding":
                out[i] = _numbers(value, place)
            else:
                out[i] = _codes(f, value, place)
        return out


def _numbers(values: Column, where: str) -> np.ndarray:
    """Convert numbers to float32, NaN where null."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
        exact = values.astype(np.float64)
    else:
        exact = np.full(len(values), np.nan)
        for i, value in enumerate(values):
            if value is None:
                continue
            if not isinstance(value, (int, float, np.number)):
                raise BadRequest(
                    f"{where}[{i}]: {short_repr(value)} is no number; send one, or "
                    "null where it is missing"
                )
            exact[i] = value
    with np.errstate(over="ignore"):
        numbers = exact.astype(np.float32)
    if np.isinf(numbers).any():
        place = int(np.isinf(numbers).argmax())
        raise BadRequest(
            f"{where}[{place}]: {exact[place]} is not a finite float32; send null where "
            "it is missing"
        )
    return numbers


def _codes(f: Feature, codes: Sequence[Any] | np.ndarray, where: str) -> np.ndarray:
    """Ids of a semantic id: each level has a range of its own, as in `prepare`."""
    ids = np.zeros(f.length, np.int32)
    for level, code in enumerate(codes):
        if code is None:
            continue
        if not isinstance(code, (int, np.integer)) or not 0 <= code < f.codes:
            raise BadRequest(
                f"{where}: {short_repr(code)} is no code; codes are 0 to {f.codes - 1}"
            )
        ids[level] = FIRST_KNOWN + level * f.codes + code
    return ids
