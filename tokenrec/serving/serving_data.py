"""Load what the encoder looks up: vocabularies and the catalogue of an artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.data.schema import MISSING
from tokenrec.errors import InputError
from tokenrec.serving.artifact import Artifact
from tokenrec.serving.vocabularies import ValueNumbers, item_rows, table_ids


@dataclasses.dataclass(frozen=True)
class ServedCatalogue:
    """Items and their features. N items.

    Attributes:
      places: catalogue row of each item id.
      ids: `[N, I] int32`.
      dense: `[N, D] float32`.
    """

    places: ValueNumbers
    ids: np.ndarray
    dense: np.ndarray

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features of items: copies, blank where `rows: [n]` is negative."""
        ids = np.take(self.ids, rows, axis=0, mode="clip")
        dense = np.take(self.dense, rows, axis=0, mode="clip")
        unknown = rows < 0
        if unknown.any():
            ids[unknown] = MISSING
            dense[unknown] = np.nan
        return ids, dense


def load_catalogue(artifact: Artifact) -> ServedCatalogue:
    """Load the items of an artifact.

    Raises:
      InputError: a file is damaged.
    """
    items = read_column(artifact, "items/item_id.parquet")
    ids = artifact.read_array("items/ids.npy")
    dense = artifact.read_array("items/dense.npy")
    if not len(items) == len(ids) == len(dense):
        raise InputError(
            f"artifact '{artifact.path}': its items have {len(items)} ids and features "
            f"of {len(ids)} and {len(dense)}; export the run again"
        )
    return ServedCatalogue(item_rows(items), ids, dense)


def load_tables(
    artifact: Artifact, tables: Collection[str] | None = None, *, shared: bool = True
) -> dict[str, ValueNumbers]:
    """Load the vocabularies of an artifact, by table.

    Args:
      artifact: the artifact.
      tables: names of the tables; None for all.
      shared: of values that share a row (`tokens.min_count`) that of the row; otherwise
        every value has an id of its own.

    Raises:
      InputError: a file is damaged.
    """
    rare = {
        table: artifact.read_array(name)
        for table, name in artifact.manifest["rare_ids"].items()
        if shared
    }
    return {
        table: table_ids(read_column(artifact, name), rare.get(table))
        for table, name in artifact.manifest["vocabularies"].items()
        if tables is None or table in tables
    }


def read_column(artifact: Artifact, name: str) -> pa.Array:
    """Read the column `value` of a Parquet file of an artifact.

    Raises:
      InputError: the file is damaged.
    """
    data = artifact.read_bytes(name)
    try:
        column = pq.read_table(pa.BufferReader(data), columns=["value"])["value"]
        column.validate(full=True)
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(
            f"artifact '{artifact.path / name}' cannot be read: {error}; export the run "
            "again"
        ) from error
    return column.combine_chunks()
