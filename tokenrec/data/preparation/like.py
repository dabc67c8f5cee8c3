"""Open the data set that a new one is prepared like, for `prepare --like`.

The new data set keeps everything that a trained model depends on: the schema with its
normalisation, the vocabularies, the tokenizer, the rows of the items. It holds rows that
are later than the earlier data set, each with the history that it would have if both
logs had been prepared in one piece.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data import records
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import EVENT, REPEATED
from tokenrec.data.memory_limit import MemoryLimit
from tokenrec.data.metadata import STATE, checked_file
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.partition import encoded_row_dtype
from tokenrec.data.preparation.state import read_events
from tokenrec.data.schema import Schema, Task
from tokenrec.data.schema_difference import schema_differences
from tokenrec.data.source import SPLITS, Source, StatefulSource
from tokenrec.data.tokenizer import TOKENIZER_FILE
from tokenrec.data.value_index import ValueIndex
from tokenrec.data.vocabulary import (
    FrozenValues,
    TableValues,
    Vocabulary,
    value_tables,
)
from tokenrec.errors import InputError

# Split of the new rows, and of the events before them. Events need a split before that
# of the rows, and none in which events alone make a chunk (train).
NEW_SPLIT = SPLITS.index("test")
_EARLIER_SPLIT = SPLITS.index("valid")


def open_like(path: Path) -> Like:
    """Open a prepared data set to go on from.

    Raises:
      InputError: it is none, is damaged, or cannot be gone on from.
    """
    try:
        dataset = open_dataset(path)
    except InputError as error:
        raise InputError(f"--like '{path}': {error}") from error
    metadata = dataset.metadata
    if "like" in metadata.options:
        raise InputError(
            f"--like '{path}' was itself prepared with --like and holds the users of "
            "its own rows alone; give the run or the data set that it was prepared "
            "like, and the log of all rows since then"
        )
    if not metadata.state:
        raise InputError(
            f"--like '{path}': the data set '{dataset.directory}' was prepared by a "
            "version that did not keep what later rows go on from; prepare it again "
            "(a run trained on it stays as it is)"
        )
    return Like(dataset)


class Like:
    """A data set that a new one goes on from.

    Attributes:
      metadata: of the earlier data set.
      items: number of its items, whose rows the new catalogue keeps.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self._folder = dataset.directory
        self.metadata = dataset.metadata
        self.items = dataset.metadata.schema.items

    @property
    def last_time(self) -> int:
        """Time of the last row, milliseconds."""
        return int(self.metadata.state["last_time_ms"])

    def check_source(self, source: Source) -> None:
        """Check that a source has the features and tasks of this data set.

        Raises:
          InputError: it has others; the message lists the differences.
        """
        declared = _declared(self.metadata.schema)
        differences = list(
            schema_differences(declared, _declared(source.schema), compare_items=False)
        )
        if differences:
            listed = "\n  ".join(differences)
            raise InputError(
                f"the source does not have the schema of '{self._folder}', which "
                f"--like names:\n  {listed}\ngive the source the same schema and options"
            )

    def tables(self, limit: MemoryLimit) -> dict[str, TableValues]:
        """Return the values of each embedding table, by its name."""
        return {
            name: FrozenValues(Vocabulary(self._folder, name).parts(), limit)
            for name in value_tables(self.metadata.schema.features)
        }

    def tokenizer(self, given: bytes | None = None) -> bytes | None:
        """Return the contents of `tokenizer.json`; None if this data set has none.

        Args:
          given: contents of the file that `--tokenizer` names, if any.

        Raises:
          InputError: `given` is another tokenizer, or the file is damaged.
        """
        path = checked_file(self._folder, TOKENIZER_FILE)
        own = None if path is None else path.read_bytes()
        if given is not None and given != own:
            other = "no tokenizer" if own is None else "another tokenizer"
            raise InputError(
                f"--tokenizer does not go with --like: '{self._folder}' has {other}, and "
                "the new data set keeps what it has; leave --tokenizer out"
            )
        return own

    def add_items(self, items: Entities) -> None:
        """Start a new catalogue with the items of this one, in their order."""
        # Those of the shards, from which a config may exclude features.
        whole = open_dataset(self._folder).catalogue
        items.go_on_from(whole.item_id, whole.ids, whole.dense)

    def resume(self, source: Source) -> None:
        """Let a source that counts the past go on from the end of this data set's log.

        Raises:
          InputError: the totals that this data set has are not those of the source.
        """
        if isinstance(source, StatefulSource):
            names = self.metadata.state["source"]
            arrays = {n: self._dataset.read_array(f"{STATE}/{n}.npy") for n in names}
            source.resume(arrays, self.last_time)

    def later_rows(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Keep the rows later than this data set, all of one split.

        Args:
          batch: rows as `Source.rows` yields them.
        """
        names = batch.schema.names
        # A column that is missing or of another type is refused when it is encoded.
        if "time_ms" not in names or not pa.types.is_int64(batch["time_ms"].type):
            return batch
        if "split" in names:
            split = pa.array(np.full(batch.num_rows, NEW_SPLIT, np.int8))
            batch = batch.set_column(names.index("split"), "split", split)
        later = pc.greater(batch["time_ms"], self.last_time)
        # A null time is kept, and refused when it is encoded.
        return batch.filter(later.fill_null(True))

    def histories(
        self, users: ValueIndex, wanted: np.ndarray, schema: Schema
    ) -> Iterator[np.ndarray]:
        """Yield the events of this data set, each once, as encoded rows.

        Args:
          users: users of the new log, original id to code.
          wanted: `[users.size] bool`, the users whose events are needed.
          schema: schema of the new data set.
        """
        dtype = encoded_row_dtype(schema)
        for block in self._event_records():
            try:
                chunks = [records.decode(record) for record in block]
            except ValueError as error:
                raise InputError(
                    f"--like: a record of '{self._folder}' is not a chunk of rows: "
                    f"{error}; prepare the data set again"
                ) from error
            kind = pa.int64() if users.type == "int64" else pa.string()
            ids = pa.array([chunk.user_id for chunk in chunks], kind)
            codes = users.find(ids)
            parts = []
            for chunk, code in zip(chunks, codes.tolist(), strict=True):
                if code < 0 or not wanted[code]:
                    continue
                rows = np.frombuffer(chunk.rows, dtype["row"])
                is_event = (rows["flags"] & (EVENT | REPEATED)) == EVENT
                rows = rows[is_event]
                encoded = np.zeros(len(rows), dtype)
                encoded["user"] = code
                encoded["split"] = _EARLIER_SPLIT
                encoded["row"] = rows
                encoded["row"]["flags"] |= np.uint8(REPEATED)
                parts.append(encoded)
            if parts:
                yield np.concatenate(parts)

    def describe(self) -> dict[str, object]:
        """Return what the new data set keeps of this one, in its `options`."""
        return {
            "items": self.items,
            "ids_digest": self.metadata.schema.ids_digest,
            "last_time_ms": self.last_time,
        }

    def say_left_out(self, count: int) -> None:
        """Say how many rows of the new log were not later than this data set."""
        if count:
            last = np.datetime64(self.last_time, "ms")
            print(
                f"tokenrec: {count:,} rows are not later than {last}Z, the last row of "
                f"'{self._folder}', and were left out: its histories have them",
                file=sys.stderr,
            )

    def _event_records(self) -> Iterator[list[bytes]]:
        for split in self._dataset.splits:
            yield from self._dataset.records(split)
        yield from read_events(self._folder, self.metadata.state["events"])


def _declared(schema: Schema) -> Schema:
    """The schema as a source declares it, without what `prepare` adds."""
    features = [
        dataclasses.replace(f, mean=0.0, deviation=1.0) for f in schema.features
    ]
    tasks = [
        Task(task.name, task.weight, task.kind, task.classes) for task in schema.tasks
    ]
    return Schema(tuple(features), tuple(tasks), weighted=schema.weighted)
