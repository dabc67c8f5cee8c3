"""Encode the columns of features, as `tokenrec.data.preparation.encode` does in bulk.

Letters: n rows, I and D columns of `ids` and `dense`, F features of the kind `dense`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenrec.data.schema import FIRST_KNOWN, Feature, columns
from tokenrec.serving.request import BadRequest, Column, short_repr
from tokenrec.serving.vocabularies import ValueNumbers

_NUMBERS = {int, float, bool, type(None)}


class FeatureGroup:
    """Encode raw columns of features that lie side by side in two matrices.

    Args:
      features: the features, in the order of their columns.
      tables: ids of each table of categorical and multi-valued features.

    Attributes:
      features: as given.
      place: columns of each feature.
    """

    def __init__(
        self, features: Sequence[Feature], tables: Mapping[str, ValueNumbers]
    ) -> None:
        self.features = tuple(features)
        self.place = columns(features)
        self._widths = self.place.ids_width, self.place.dense_width
        self._tables = tables
        # Feature of each column; of a feature with a vocabulary also apart.
        self._id_names = _column_names(self.place.ids)
        self._dense_names = _column_names(self.place.dense)
        self._coded = {f.name for f in features if f.has_vocabulary}
        # A feature of several columns that is missing is missing in the first.
        self._first_ids = {start for start, _ in self.place.ids.values()}
        self._first_dense = {start for start, _ in self.place.dense.values()}

    def blank(self, *lead: int) -> tuple[np.ndarray, np.ndarray]:
        """Matrices of missing values, `[..., I]` and `[..., D]`."""
        ids_width, dense_width = self._widths
        ids = np.zeros((*lead, ids_width), np.int32)
        dense = np.empty((*lead, dense_width), np.float32)
        dense.fill(np.nan)
        return ids, dense

    def encode(
        self,
        given: Mapping[str, Column],
        part: str,
        ids: np.ndarray,
        dense: np.ndarray,
        rows: np.ndarray | None = None,
    ) -> None:
        """Fill the columns of the features that are given.

        Args:
          given: raw values by feature; others are left as they are.
          part: part of the request, for messages.
          ids: `[n, I] int32`, filled in place.
          dense: `[n, D] float32`, filled in place.
          rows: `[n] bool`, rows to fill; None for all.

        Raises:
          BadRequest: a value does not fit its feature.
        """
        chosen = slice(None) if rows is None else rows
        numbers: list[tuple[int, str]] = []
        for f in self.features:
            if f.name not in given:
                continue
            where = f"{part}.{f.name}"
            if f.kind == "dense":
                numbers.append((self.place.dense[f.name][0], f.name))
                continue
            if f.kind == "categorical":
                start = self.place.ids[f.name][0]
                encoded = self._tables[f.table_name].find(given[f.name], where)
                ids[chosen, start] = encoded[chosen]
                continue
            spans = self.place.ids if f.is_integer else self.place.dense
            matrix = ids if f.is_integer else dense
            lists = self._lists(f, given[f.name], where)
            matrix[chosen, slice(*spans[f.name])] = lists[chosen]
        if numbers:
            # All numbers at once: a request has few rows and many columns.
            places = [start for start, _ in numbers]
            wide = _numbers([given[name] for _, name in numbers], part, numbers)
            if rows is None:
                dense[:, places] = wide.T
            else:
                dense[np.ix_(rows, places)] = wide.T[rows]

    def count(
        self,
        ids: np.ndarray,
        dense: np.ndarray,
        unknown: dict[str, int],
        missing: dict[str, int],
    ) -> None:
        """Add the unknown and the missing values of each feature to the counts."""
        from_ids = (ids == 0).sum(axis=0)
        for column in np.flatnonzero(from_ids).tolist():
            if column in self._first_ids:
                _add(missing, self._id_names[column], from_ids[column])
        from_dense = np.isnan(dense).sum(axis=0)
        for column in np.flatnonzero(from_dense).tolist():
            if column in self._first_dense:
                _add(missing, self._dense_names[column], from_dense[column])
        from_ids = (ids == 1).sum(axis=0)
        for column in np.flatnonzero(from_ids).tolist():
            if self._id_names[column] in self._coded:
                _add(unknown, self._id_names[column], from_ids[column])

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
                out[i] = _numbers([value], where, [(0, f"{f.name}[{i}]")])[0]
            else:
                out[i] = _codes(f, value, place)
        return out


def _column_names(spans: Mapping[str, tuple[int, int]]) -> list[str]:
    """Feature of each column of a matrix."""
    return [name for name, (start, stop) in spans.items() for _ in range(start, stop)]


def _add(counts: dict[str, int], name: str, count: Any) -> None:
    counts[name] = counts.get(name, 0) + int(count)


def _numbers(
    lists: Sequence[Column], part: str, names: Sequence[tuple[int, str]]
) -> np.ndarray:
    """Convert F columns of numbers to `[F, n] float32`, NaN where null."""
    for values, (_, name) in zip(lists, names, strict=True):
        # NumPy would parse a text.
        if isinstance(values, np.ndarray) and values.dtype.kind in "biuf":
            continue
        if not set(map(type, values)) <= _NUMBERS:
            _refuse_others(values, f"{part}.{name}")
    exact = np.array(lists, np.float64)
    with np.errstate(over="ignore"):
        numbers = exact.astype(np.float32)
    if np.isinf(numbers).any():
        column, row = np.argwhere(np.isinf(numbers))[0].tolist()
        raise BadRequest(
            f"{part}.{names[column][1]}[{row}]: {exact[column, row]} is not a finite "
            "float32; send null where it is missing"
        )
    return numbers


def _refuse_others(values: Column, where: str) -> None:
    """Raise BadRequest for a value that is no number."""
    for i, value in enumerate(values):
        if value is not None and not isinstance(value, (int, float, np.number)):
            raise BadRequest(
                f"{where}[{i}]: {short_repr(value)} is no number; send one, or null "
                "where it is missing"
            )


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
