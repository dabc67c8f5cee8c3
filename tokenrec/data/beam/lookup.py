"""Look up ids by binary search in sorted arrays that workers map from a file.

The local path numbers values while the log streams past. Workers of a cluster share no
such state; instead the driver writes the sorted values once, and each worker maps the
file. There is nothing to build, and the processes of a machine share the memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.beam.shared_files import load_values
from tokenrec.data.schema import FIRST_KNOWN, MISSING, UNKNOWN, Feature
from tokenrec.data.value_index import ValueIndex
from tokenrec.data.vocabulary import TableValues

# File in the shared folder with the original ids of the catalogue, sorted as its rows
# are.
ITEM_IDS = "items.arrow"


def vocabulary_file(table: str) -> str:
    """Return the path, in the shared folder, of a table's sorted values."""
    # Hexadecimal: the name of a table may hold any character.
    return f"vocabularies/{table.encode().hex()}.arrow"


def find_positions(index: ValueIndex, known: pa.Array) -> np.ndarray:
    """Find the values of an index in a sorted array.

    Args:
      index: V distinct values.
      known: `[n]`, sorted, int64 or large strings.

    Returns:
      `[V] int64`, position in `known` of each value, by code; -1 where it is absent.
    """
    values = index.values()
    kind = pa.large_string() if values.dtype == object else pa.int64()
    # Values of another type than the vocabulary are unknown.
    if not len(known) or not len(values) or known.type != kind:
        return np.full(len(values), -1)
    if kind == pa.int64():
        sorted_values = known.to_numpy()
        # A value beyond the last gets position n, which would be out of range.
        position = np.searchsorted(sorted_values, values)
        position = np.minimum(position, len(known) - 1)
        return np.where(sorted_values[position] == values, position, -1)
    return _find_strings(pa.array(values, kind), known)


def vocabulary_ids(table: TableValues, known: pa.Array) -> np.ndarray:
    """Map provisional ids to ids of a vocabulary.

    Args:
      table: V values with provisional ids.
      known: `[n]`, values of the vocabulary, sorted.

    Returns:
      `[V + 2] int32`, provisional id to vocabulary id.
    """
    position = find_positions(table.index, known)
    ids = np.where(position < 0, UNKNOWN, position + FIRST_KNOWN)
    return np.concatenate([[MISSING, UNKNOWN], ids]).astype(np.int32)


def load_vocabulary_ids(
    work: str, tables: dict[str, TableValues], features: Sequence[Feature]
) -> dict[str, np.ndarray]:
    """Compute `vocabulary_ids` for each table of some features.

    Args:
      work: folder that all workers see, with the vocabularies that the driver wrote.
      tables: values with provisional ids, by table.
      features: features whose tables are wanted.

    Returns:
      By table, `[V + 2] int32`.
    """
    names = dict.fromkeys(f.table_name for f in features if f.has_vocabulary)
    return {
        name: vocabulary_ids(tables[name], load_values(work, vocabulary_file(name)))
        for name in names
    }


def _find_strings(values: pa.Array, known: pa.Array) -> np.ndarray:
    """Find strings by a binary search for all of them at once.

    NumPy could search only a copy of `known` as Python objects. Here Arrow takes and
    compares the middles of all searches, so that `known` stays where it is mapped.
    """
    # `low` ends as the first position whose string is not less than the value.
    low = np.zeros(len(values), np.int64)
    high = np.full(len(values), len(known))
    while (low < high).any():
        middle = (low + high) // 2
        candidates = known.take(pa.array(np.minimum(middle, len(known) - 1)))
        less = pc.less(candidates, values).to_numpy(zero_copy_only=False)
        # Searches that have ended must not move.
        is_open = low < high
        less &= is_open
        low = np.where(less, middle + 1, low)
        high = np.where(less | ~is_open, high, middle)
    position = np.minimum(low, len(known) - 1)
    equal = pc.equal(known.take(pa.array(position)), values)
    return np.where(equal.to_numpy(zero_copy_only=False), position, -1)
