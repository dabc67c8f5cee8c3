"""Ids of values by binary search in sorted arrays, which workers map from a file and need not build."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.beam.shared_files import load_values
from tokenrec.data.schema import FIRST_KNOWN, MISSING, UNKNOWN, Feature
from tokenrec.data.vocabulary import TableValues, ValueIndex


def positions(index: ValueIndex, known: pa.Array) -> np.ndarray:
    """`[index.size] int64`: where each value, in the order of its code, stands in the sorted `known`; -1: nowhere."""
    values = index.values()
    kind = pa.large_string() if values.dtype == object else pa.int64()
    if not len(known) or not len(values) or known.type != kind:
        return np.full(len(values), -1)
    if kind == pa.int64():
        sorted_values = known.to_numpy()
        at = np.minimum(np.searchsorted(sorted_values, values), len(known) - 1)
        return np.where(sorted_values[at] == values, at, -1)
    return _find_strings(pa.array(values, kind), known)


def final_ids(table: TableValues, known: pa.Array) -> np.ndarray:
    """`[size + 2] int32`, provisional id -> id in the vocabulary `known`."""
    at = positions(table.index, known)
    return np.concatenate(
        [[MISSING, UNKNOWN], np.where(at < 0, UNKNOWN, at + FIRST_KNOWN)]
    ).astype(np.int32)


def load_finals(
    work: str, tables: dict[str, TableValues], features: Sequence[Feature]
) -> dict[str, np.ndarray]:
    """`final_ids` of every table of `features`, from the vocabularies that the driver left in `work`."""
    names = dict.fromkeys(f.table_name for f in features if f.has_vocabulary)
    return {
        name: final_ids(tables[name], load_values(work, vocabulary_name(name)))
        for name in names
    }


def vocabulary_name(table: str) -> str:
    """Name in `work` of a table's known values."""
    return f"vocabularies/{table.encode().hex()}.arrow"


ITEM_IDS = (
    "items.arrow"  # name in `work` of the original ids of the catalogue, row after row
)


def _find_strings(values: pa.Array, known: pa.Array) -> np.ndarray:
    """NumPy would search only a copy of `known` as Python objects; taking the middles leaves it where it is mapped."""
    low, high = (
        np.zeros(len(values), np.int64),
        np.full(len(values), len(known)),
    )  # the first that is not less
    while (low < high).any():
        middle = (low + high) // 2
        less = pc.less(
            known.take(pa.array(np.minimum(middle, len(known) - 1))), values
        ).to_numpy(zero_copy_only=False)
        less &= low < high
        low, high = (
            np.where(less, middle + 1, low),
            np.where(less, high, np.where(low < high, middle, high)),
        )
    at = np.minimum(low, len(known) - 1)
    return np.where(
        pc.equal(known.take(pa.array(at)), values).to_numpy(zero_copy_only=False),
        at,
        -1,
    )
