"""First pass of `prepare`: check and encode every log row, and group the rows by user.

The pass ends with everything that only the whole log can tell: the distinct values of
each embedding table, all users and items, and which of them training rows use.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.data.interaction_log import EVENT, SCORED
from tokenrec.data.memory_limit import NO_LIMIT, MemoryLimit, blocks
from tokenrec.data.preparation.chunks import TRAIN
from tokenrec.data.preparation.encode import encode_features
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.frozen import FrozenValues
from tokenrec.data.preparation.label_columns import read_labels
from tokenrec.data.preparation.like import Like
from tokenrec.data.preparation.partition import encoded_row_dtype
from tokenrec.data.preparation.raw_columns import (
    bool_column,
    check_columns,
    concatenate,
    integer_column,
)
from tokenrec.data.preparation.spill import UserPartitions
from tokenrec.data.schema import Schema, columns
from tokenrec.data.source import SPLITS, Source
from tokenrec.data.value_index import Marks
from tokenrec.data.vocabulary import TableValues, value_tables
from tokenrec.errors import InputError

PARTITION_ROWS = 131_072  # encoded log rows that stay in memory before they are spilled


class LogEncoder:
    """Encode raw log rows, and collect distinct values, users and items on the way.

    Attributes:
      schema: features and tasks.
      dtype: `encoded_row_dtype` of the schema.
      tables: values of each embedding table.
      users: ids and features of the users, provisional until `to_vocabulary_ids`.
      items: ids and features of the items, provisional as well.

    Args:
      like: the data set to go on from; None to begin.
      limit: of the memory that values, users and items may take.
    """

    def __init__(
        self, schema: Schema, like: Like | None = None, limit: MemoryLimit = NO_LIMIT
    ) -> None:
        self.schema = schema
        self.dtype = encoded_row_dtype(schema)
        self.tables: dict[str, TableValues] = (
            value_tables(schema.features, limit) if like is None else like.tables(limit)
        )
        self.users = Entities("user_id", schema.group("user"), self.tables, limit)
        self.items = Entities("item_id", schema.group("catalogue"), self.tables, limit)
        if like is not None:
            like.add_items(self.items)
            # Ids of another type would be other users.
            self.users.index.type = like.metadata.key_types["user_id"]

    def encode(self, batch: pa.RecordBatch, first: int) -> np.ndarray:
        """Encode a block of raw log rows.

        Users and items are numbered by their codes in `users` and `items`. Values,
        users and items of training rows are marked.

        Args:
          batch: log rows with the columns of `Source.rows`.
          first: number of the block's first row, for messages.

        Returns:
          `[n]` of `encoded_row_dtype`, with provisional ids.

        Raises:
          InputError: a column or a value is wrong; names it.
        """
        self._check_columns(batch.schema.names)

        # 1. Keys, times and flags.
        out = np.zeros(batch.num_rows, self.dtype)
        row = out["row"]
        # Items are codes here; the second pass makes them rows of the catalogue.
        out["user"] = self.users.codes(batch.column("user_id"), "rows()", first)
        row["item"] = self.items.codes(batch.column("item_id"), "rows()", first)
        row["time"] = integer_column(batch, "time_ms", first)
        out["split"] = integer_column(batch, "split", first, 0, len(SPLITS) - 1)
        row["request"] = integer_column(batch, "request", first, -1)
        event = bool_column(batch, "event", first)
        scored = bool_column(batch, "scored", first)
        # A bool times a uint8 is a uint8; a Python int would make it an int64.
        row["flags"] = event * np.uint8(EVENT) | scored * np.uint8(SCORED)

        # 2. Labels and weights.
        read_labels(batch, self.schema, row, first)

        # 3. Features. Only values of training rows will enter the vocabularies.
        in_train = out["split"] == TRAIN
        groups = {
            "row": self.schema.group("row"),
            "action": self.schema.group("action"),
        }
        for group, features in groups.items():
            ids, dense = encode_features(batch, features, self.tables, "rows()", first)
            row[f"{group}_ids"] = ids
            row[f"{group}_dense"] = dense
            for name, place in columns(features).ids.items():
                # Semantic ids have no table of values: their codes are their ids.
                table = self.tables.get(self.schema.feature(name).table_name)
                if table is not None:
                    table.mark(ids[in_train, slice(*place)])
        for entities, codes in ((self.users, out["user"]), (self.items, row["item"])):
            entities.in_log.add(codes)
            entities.trained.add(codes[in_train])
        return out

    def _check_columns(self, names: list[str]) -> None:
        expected = [
            *("user_id", "item_id", "time_ms", "split", "event", "scored", "request"),
            *(f"label_{task.name}" for task in self.schema.tasks),
            *(("row_weight",) if self.schema.weighted else ()),
            *(f.name for f in self.schema.group("row")),
            *(f.name for f in self.schema.group("action")),
        ]
        check_columns(names, list(dict.fromkeys(expected)), "rows()")


class LogIngestion:
    """Read a log once and hold what the second pass needs.

    Attributes:
      schema: features and tasks.
      encoder: distinct values, users and items of the log.
      partitions: encoded log rows by user, in memory or in the folder `work`.
      like: the data set to go on from; None to begin.
      frozen: frozen statistics of the log, in a temporary file.
      last_time: time of the last row of the log, milliseconds.
      limit: of the memory that values, users and items may take.

    Args:
      memory: bytes of that limit.
    """

    def __init__(
        self, schema: Schema, work: Path, like: Like | None, memory: int
    ) -> None:
        self.schema = schema
        self.like = like
        self.limit = MemoryLimit(memory, work / "values")
        self.encoder = LogEncoder(schema, like, self.limit)
        rows = work / "rows"
        self.partitions = UserPartitions(rows, self.encoder.dtype, PARTITION_ROWS)
        self.frozen = FrozenValues(work / "frozen")
        self.last_time = np.iinfo(np.int64).min

    def read(self, source: Source) -> None:
        """Read the source once.

        Raises:
          InputError: a column or a value is wrong, or there is no training row.
        """
        # The tables come first, so that their entities get the first codes and the rows
        # of their matrices are those codes.
        users, items = self.encoder.users, self.encoder.items
        users.read_table(source.users(), "users()")
        items.read_table(source.items(), "items()")
        if self.like is None:
            first = self._read_rows(source.rows())
            check_has_training_rows(first, bool(users.in_training().any()))
        else:
            self._read_later_rows(source, self.like)
        for entities in (users, items):
            entities.complete()

    def _read_rows(
        self, batches: Iterator[pa.RecordBatch], scored: Marks | None = None
    ) -> int:
        """Encode all rows; return their number.

        Args:
          batches: batches of the log.
          scored: receives the users of impressions.
        """
        first = 0
        for batch in rebatch(batches, self.limit):
            batch, frozen = self.frozen.add(batch)
            rows = self.encoder.encode(batch, first)
            rows["frozen"] = frozen
            self.partitions.add(rows)
            self.last_time = max(self.last_time, int(rows["row"]["time"].max()))
            if scored is not None:
                scored.add(rows["user"][(rows["row"]["flags"] & SCORED) > 0])
            first += batch.num_rows
        return first

    def _read_later_rows(self, source: Source, like: Like) -> None:
        """Read the rows later than those of `like`, and the histories before them."""
        given = later = 0
        scored = Marks()

        def rows() -> Iterator[pa.RecordBatch]:
            nonlocal given, later
            for batch in source.rows():
                given += batch.num_rows
                batch = like.later_rows(batch)
                later += batch.num_rows
                if batch.num_rows:
                    yield batch

        self._read_rows(rows(), scored)
        like.say_left_out(given - later)
        users = self.encoder.users.index
        wanted = scored.array(users.size)
        if not wanted.any():
            raise InputError(
                f"rows(): {later:,} of {given:,} rows are later than the data set that "
                "--like names, and none of them is scored, so there is nothing to "
                "score; give the log rows (or candidates) after it"
            )
        for earlier in like.histories(users, wanted, self.schema):
            self.partitions.add(earlier)


def check_has_training_rows(rows: int, any_training: bool) -> None:
    """Check that the log has rows, and that some of them are training rows.

    Raises:
      InputError: it has none.
    """
    if not rows:
        raise InputError(
            "rows() is empty; a data set needs at least one row; check the files of "
            "the source"
        )
    if not any_training:
        raise InputError(
            "rows(): no row has split 0 (train), where vocabularies come from; move "
            "the split"
        )


def rebatch(
    batches: Iterator[pa.RecordBatch], limit: MemoryLimit = NO_LIMIT
) -> Iterator[pa.RecordBatch]:
    """Yield the same log rows in batches of about `limit.block_rows`.

    Sources choose their own batch sizes; small ones would cost a dictionary encoding
    and a merge of values each, large ones memory.
    """
    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        wanted = limit.block_rows
        # A large batch is cut, and small ones are collected.
        for part in blocks(batch.num_rows, wanted):
            waiting.append(batch.slice(part.start, part.stop - part.start))
            rows += waiting[-1].num_rows
            if rows >= wanted:
                yield concatenate(waiting, "rows()")
                waiting = []
                rows = 0
    if waiting:
        yield concatenate(waiting, "rows()")
