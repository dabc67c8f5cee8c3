"""The first pass of `prepare`: rows are checked, encoded with provisional ids, and grouped by user."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.data.interaction_log import EVENT, SCORED
from tokenrec.data.preparation import encode
from tokenrec.data.preparation.chunks import TRAIN
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.partition import part_dtype
from tokenrec.data.preparation.spill import Partitions
from tokenrec.data.schema import Schema, columns
from tokenrec.data.source import SPLITS, Source
from tokenrec.data.vocabulary import TableValues, value_tables
from tokenrec.errors import InputError

BLOCK_ROWS = 65_536
PARTITION_ROWS = 131_072


class RowEncoder:
    """Raw rows to structured rows, and what it gathers on the way.

    Attributes:
      tables: values of each embedding table.
      users, items: ids and features, provisional until `to_final`.
    """

    def __init__(self, schema: Schema) -> None:
        self.schema, self.dtype = schema, part_dtype(schema)
        self.tables: dict[str, TableValues] = value_tables(schema.features)
        self.users = Entities("user_id", schema.group("user"), self.tables)
        self.items = Entities("item_id", schema.group("catalogue"), self.tables)

    def encode(self, batch: pa.RecordBatch, first: int) -> np.ndarray:
        """A block of raw rows as `[n]` of `part_dtype` with provisional ids, which counts users and items as `users`
        and `items` do; marks what training rows use. `first` is the number of the block's first row, for messages.

        Raises:
          InputError: a column or a value is wrong; names it.
        """
        features = {
            "row": self.schema.group("row"),
            "action": self.schema.group("action"),
        }
        names = ["user_id", "item_id", "time_ms", "split", "event", "scored", "request"]
        names += [f"label_{t.name}" for t in self.schema.tasks]
        names += [f.name for group in features.values() for f in group]
        encode.check_columns(batch.schema.names, list(dict.fromkeys(names)), "rows()")

        out = np.zeros(batch.num_rows, self.dtype)
        row = out["row"]
        out["user"] = self.users.codes(batch.column("user_id"), "rows()", first)
        row["item"] = self.items.codes(batch.column("item_id"), "rows()", first)
        row["time"] = encode.integers(batch, "time_ms", first)
        out["split"] = encode.integers(batch, "split", first, 0, len(SPLITS) - 1)
        row["request"] = encode.integers(batch, "request", first, -1)
        event, scored = (
            encode.flags(batch, "event", first),
            encode.flags(batch, "scored", first),
        )
        row["flags"] = event * np.uint8(EVENT) | scored * np.uint8(SCORED)
        for i, task in enumerate(self.schema.tasks):
            row["labels"][:, i] = encode.labels(batch, f"label_{task.name}", first)
        train = out["split"] == TRAIN
        for group, members in features.items():
            ids, dense = encode.encode_features(
                batch, members, self.tables, "rows()", first
            )
            row[f"{group}_ids"], row[f"{group}_dense"] = ids, dense
            for name, place in columns(members).ids.items():
                table = self.tables.get(self.schema.feature(name).table_name)
                if table is not None:  # semantic ids have no values to gather
                    table.mark(ids[train, slice(*place)])
        self.users.trained.add(out["user"][train])
        self.items.trained.add(row["item"][train])
        return out


class Intake:
    """What the first pass gathers: values, users and items in `encoder`, and rows in `partitions`."""

    def __init__(self, schema: Schema, work: Path) -> None:
        self.schema, self.encoder = schema, RowEncoder(schema)
        self.partitions = Partitions(work, self.encoder.dtype, PARTITION_ROWS)

    def read(self, source: Source) -> None:
        """Streams the source once.

        Raises:
          InputError: a column or a value is wrong, or there is no training row.
        """
        users, items = self.encoder.users, self.encoder.items
        users.read(source.users(), "users()", BLOCK_ROWS)
        items.read(source.items(), "items()", BLOCK_ROWS)
        first = 0
        for batch in blocks(source.rows()):
            self.partitions.add(self.encoder.encode(batch, first))
            first += batch.num_rows
        check_rows(first, bool(users.in_training().any()))
        for entities in (users, items):
            entities.complete()


def check_rows(rows: int, any_training: bool) -> None:
    """Raises an InputError unless there are rows, and training rows among them."""
    if not rows:
        raise InputError("rows() is empty; a data set needs at least one row")
    if not any_training:
        raise InputError(
            "rows(): no row has split 0 (train), where vocabularies come from; move the split"
        )


def blocks(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of about `BLOCK_ROWS`."""
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        for first in range(0, batch.num_rows, BLOCK_ROWS):
            waiting.append(batch.slice(first, BLOCK_ROWS))
            rows += waiting[-1].num_rows
            if rows >= BLOCK_ROWS:
                yield encode.join(waiting, "rows()")
                waiting, rows = [], 0
    if waiting:
        yield encode.join(waiting, "rows()")
