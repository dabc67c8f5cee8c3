"""A source whose tables are in memory, for tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.source import Provenance

SCHEMA = Schema(
    (
        Feature("city", "categorical", "user"),
        Feature("age", "dense", "user"),
        Feature("author", "categorical", "item"),
        Feature("duration", "dense", "item", transform="log1p"),
        Feature("tags", "multi_valued", "item", length=2),
        Feature("tab", "categorical", "context"),
        Feature("place", "categorical", "item", per_row=True),
        Feature("price", "dense", "action"),
        Feature("reaction", "categorical", "action"),
    ),
    (Task("click"), Task("like")),
)


@dataclasses.dataclass
class MemorySource:
    """A source made of columns.

    Columns of the log that are not given are those of a scored event of train at time
    0, with unknown labels and missing features.
    """

    row_columns: dict[str, Any]
    user_columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    item_columns: dict[str, Any] = dataclasses.field(default_factory=dict)
    schema: Schema = SCHEMA
    batch_rows: int = 1000
    files: tuple[Path, ...] = ()

    @property
    def provenance(self) -> Provenance:
        return Provenance("memory", "CC0-1.0", "Nobody, Nowhere, 2020", self.files)

    def users(self) -> pa.Table:
        return self._table("user_id", self.schema.group("user"), self.user_columns)

    def items(self) -> pa.Table:
        return self._table("item_id", self.schema.group("catalogue"), self.item_columns)

    def rows(self) -> Iterator[pa.RecordBatch]:
        given = self.row_columns
        count = len(given["user_id"])
        columns: dict[str, Any] = {
            "item_id": pa.array([7] * count),
            "time_ms": pa.array([0] * count),
            "split": pa.array([0] * count, pa.int8()),
            "event": pa.array([True] * count),
            "scored": pa.array([True] * count),
            "request": pa.array([-1] * count),
        }
        columns |= {
            f"label_{t.name}": pa.nulls(count, pa.int8()) for t in self.schema.tasks
        }
        columns |= {
            f.name: pa.nulls(count)
            for g in ("row", "action")
            for f in self.schema.group(g)
        }  # type: ignore[arg-type]
        return iter(pa.table(columns | given).to_batches(max_chunksize=self.batch_rows))

    def _table(
        self, key: str, features: tuple[Feature, ...], given: dict[str, Any]
    ) -> pa.Table:
        count = len(given.get(key, ()))
        columns: dict[str, Any] = {key: pa.nulls(count)} | {
            f.name: pa.nulls(count) for f in features
        }
        return pa.table(columns | given)
