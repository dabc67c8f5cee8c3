"""Turn the log of any `Source` into a prepared data set.

Memory does not depend on the number of log rows, and on the number of distinct ids only
up to a limit.

Two passes: steps 1 and 2 read the log, steps 3 and 4 its encoded rows.

1. Intake (`intake.py`). The source's tables and then its log rows stream past once.
   Each value is checked (`raw_columns.py`) and encoded with a provisional id
   (`encode.py`); users and items get codes, and features of their own (`entities.py`).
2. Partitions by user (`spill.py`). The encoded rows are grouped by user: in memory
   while they are few, beyond that in temporary files.

   Between the passes, ids become final: the sorted values of training rows are the
   vocabularies (`folder.py`, `vocabulary.py`).
3. Chunks (`partition.py`, `chunks.py`). One partition at a time is sorted, freed from
   repeats, counted and cut into chunks. Means and deviations of dense features are
   gathered on the way (`moments.py`).
4. Shards (`tokenrec/data/records.py`). Each chunk is written as one record, and its
   rows are noted in the index of the split (`row_index.py`).

Memory holds, at any time:

- the distinct values of each embedding table and the features of all users and items,
  as long as the limit has room for them: `memory_limit.py` has the shares of it, and
  says where the rest goes;
- a few bytes per value, user and item, and 8 per chunk;
- a block of raw rows (65,536, more once values lie in files) and at most
  `PARTITION_ROWS` (131,072) encoded rows, more only where a single user has more;
- the strings of text features, until they are encoded.

| file of the folder | written |
|---|---|
| `scratch/` (rows by user, spilled values) | during 1 and 2; removed at the end |
| `vocabularies/`, `tokenizer.json`, `items/` | between the passes |
| shards | during 4 |
| `marks/` (how each row is cut into samples) | during 4 |
| `frozen/` (statistics as of the start of a split) | during 4 |
| `state/` (what later rows go on from) | during 4 |
| `chunks/` (rows of each chunk) | after the last shard |
| `dataset_info.json`, `features.json`, `tokenrec.json` | last |

All of this happens in a folder that gets its name when it is complete (`staging.py`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tokenrec.data import records
from tokenrec.data.dataset import open_dataset
from tokenrec.data.memory_limit import default_memory
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.catalogue import write_catalogue
from tokenrec.data.preparation.entities import to_vocabulary_ids
from tokenrec.data.preparation.folder import (
    NOTHING_TO_LEARN,
    check_options,
    describe_tokenizer,
    file_checksums,
    make_metadata,
    write_tokenizer,
    write_vocabularies,
)
from tokenrec.data.preparation.frozen import FrozenWriter, describe_frozen
from tokenrec.data.preparation.intake import LogIngestion
from tokenrec.data.preparation.like import open_like
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.preparation.notices import say_notices
from tokenrec.data.preparation.partition import (
    ChunkRun,
    PreparationCounts,
    Users,
    chunk_records,
    cut_into_chunks,
    sort_and_deduplicate,
)
from tokenrec.data.preparation.row_index import IndexWriter, index_chunks
from tokenrec.data.preparation.staging import scratch_folder, staged_folder
from tokenrec.data.preparation.state import StateWriter, events_without_chunk
from tokenrec.data.source import Provenance, Source, StatefulSource
from tokenrec.data.tokenizer import read_tokenizer
from tokenrec.errors import InputError

_DEFAULTS = {"chunk_events": 4096, "overlap": 1024}


def prepare(
    source: Source,
    out: Path,
    *,
    chunk_events: int | None = None,
    overlap: int | None = None,
    overwrite: bool = False,
    scratch: Path | None = None,
    like: Path | None = None,
    memory: int | None = None,
    tokenizer: Path | None = None,
) -> Metadata:
    """Write the prepared data set of `source` to the folder `out`.

    Args:
      source: the raw log.
      out: folder to make.
      chunk_events: the most log rows of a chunk, not counting the events repeated at
        its head; by default 4096, or that of `like`.
      overlap: the most events that are repeated at the head of a chunk. It is the
        longest history that a row there can have. By default 1024, or that of `like`.
      overwrite: replace `out` if it is a prepared data set.
      scratch: folder for temporary files, which take about as much room as the data
        set; default: within the new folder, beside `out`.
      like: a prepared data set to go on from. The new one keeps its vocabularies,
        tokenizer, normalisation and items, holds the rows that are later than it as
        split "test", with the histories that follow from both, and needs no train
        split. A run that was trained on `like` can score it.
      memory: bytes that the distinct ids, their features and the blocks that are worked
        on may take, about; what exceeds them goes to `scratch`. By default half of the
        machine's memory.
      tokenizer: `tokenizer.json` of a pretrained language model, or the folder that
        holds it. Texts are encoded with it instead of a tokenizer that is trained on
        them, and the data set keeps the file, byte for byte.

    Returns:
      The metadata of the data set.

    Raises:
      InputError: `out` exists, an option or a value of the source is wrong, the disk is
        full, or the schema has a text and the library `tokenizers` is missing; or
        `like` cannot be gone on from, or has another tokenizer than `tokenizer`, which
        may be none. `out` is unchanged.
    """
    earlier = None if like is None else open_like(like)
    defaults = _DEFAULTS if earlier is None else earlier.metadata.options
    options = {
        "chunk_events": _given(chunk_events, defaults["chunk_events"]),
        "overlap": _given(overlap, defaults["overlap"]),
    }
    check_options(source.schema, **options)
    tokenizer_file = None if tokenizer is None else read_tokenizer(Path(tokenizer))
    if earlier is not None:
        tokenizer_file = earlier.tokenizer(tokenizer_file)
        earlier.check_source(source)
        earlier.resume(source)
    with staged_folder(Path(out), overwrite) as folder:
        # A file that is missing or unreadable should end the run now, not after hours.
        checksums = file_checksums(source.provenance)
        work = (
            folder / "scratch"
            if scratch is None
            else scratch_folder(Path(scratch), Path(out))
        )
        try:
            memory = default_memory() if memory is None else memory
            ingestion = LogIngestion(source.schema, work, earlier, memory)
            ingestion.read(source)
            writer = _FolderWriter(ingestion, folder, tokenizer_file)
            writer.write_entities()
            writer.write_chunks(**options)
            writer.write_state(source)
            metadata = writer.write_metadata(
                source.provenance,
                checksums,
                options | describe_tokenizer(tokenizer_file) | describe_frozen(source),
            )
        finally:
            shutil.rmtree(work, ignore_errors=True)
    say_notices(open_dataset(out))
    return metadata


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


class _FolderWriter:
    """Second pass: write what the first pass collected to `folder`.

    The methods are called once each, in this order: `write_entities` makes the ids
    final, `write_chunks` needs final ids, `write_state` and `write_metadata` describe
    what was written.

    Args:
      tokenizer_file: contents of a `tokenizer.json`; None to train a tokenizer.
    """

    def __init__(
        self, ingestion: LogIngestion, folder: Path, tokenizer_file: bytes | None
    ) -> None:
        self.ingestion = ingestion
        self.folder = folder
        self.tokenizer_file = tokenizer_file
        self.like = ingestion.like
        self.schema = ingestion.schema
        self.users = ingestion.encoder.users
        self.items = ingestion.encoder.items
        self.vocabulary_ids: dict[str, np.ndarray] = {}
        self.table_rows: dict[str, int] = {}
        self.split_writers: dict[str, records.SplitWriter] = {}
        self.index_writer = IndexWriter(folder)
        self.frozen_writer = FrozenWriter(folder, ingestion.frozen)
        # One that goes on from another cannot be gone on from: it lacks other users.
        self.state_writer = None if self.like else StateWriter(folder)
        self.state: dict[str, Any] = {}
        self.row_digests: dict[str, str] = {}
        self.counts = PreparationCounts.empty(self.schema)
        # Moments of rows and actions are part of `counts`.
        self.moments = [
            Moments(self.schema.group(group)) for group in ("user", "catalogue")
        ]

    def write_entities(self) -> None:
        """Write vocabularies, tokenizer and catalogue; ids are final from here on."""
        self.vocabulary_ids, self.table_rows = write_vocabularies(
            self.folder, self.schema, self.ingestion.encoder.tables
        )
        self.table_rows |= write_tokenizer(
            self.folder,
            self.schema,
            (self.users, self.items),
            self.tokenizer_file,
        )
        for entities in (self.users, self.items):
            to_vocabulary_ids(entities.ids, entities.features, self.vocabulary_ids)
        self.item_rows = write_catalogue(
            self.folder,
            self.items,
            self.like.items if self.like else 0,
            self.ingestion.limit,
        )
        self._count_entities()
        self.chunk_users = Users(self.users, self.schema)
        # The catalogue is on disk; free its matrices before the second pass.
        self.items.ids = self.items.ids[:0]
        self.items.dense = self.items.dense[:0]

    def _count_entities(self) -> None:
        counts = self.counts.by_name
        # Each user and item of a training row counts once, however often it occurs.
        for name, entities, moments in zip(
            ("users", "items"), (self.users, self.items), self.moments, strict=True
        ):
            for features in entities.training_features():
                moments.add(*features)
            counts[name] = entities.index.size
            counts[f"{name}_train"] = int(entities.in_training().sum())
            entities.matches().count(counts)

    def write_chunks(self, chunk_events: int, overlap: int) -> None:
        """Write the shards of all splits, and their index."""
        try:
            for partition in self.ingestion.partitions.read():
                row = partition["row"]
                # From code of an item to its row of the catalogue.
                row["item"] = self.item_rows[row["item"]]
                for group in ("row", "action"):
                    to_vocabulary_ids(
                        row[f"{group}_ids"],
                        self.schema.group(group),
                        self.vocabulary_ids,
                    )
                partition = sort_and_deduplicate(partition, self.schema, self.counts)
                for run in cut_into_chunks(partition, chunk_events, overlap):
                    self._write_run(run)
                self._write_events(events_without_chunk(partition, overlap))
            for split_writer in self.split_writers.values():
                split_writer.finish()
            self.row_digests = self.index_writer.finish()
            self.frozen_writer.finish()
        finally:
            self.index_writer.close()
            self.frozen_writer.close()
            if self.state_writer is not None:
                self.state_writer.close()
            for split_writer in self.split_writers.values():
                split_writer.close()
        if not self.split_writers:
            raise InputError(NOTHING_TO_LEARN)

    def _write_run(self, run: ChunkRun) -> None:
        # A split without chunks has no shards, so that it is absent from the metadata.
        if run.split not in self.split_writers:
            self.split_writers[run.split] = records.SplitWriter(self.folder, run.split)
        for chunk in chunk_records(run, self.chunk_users):
            self.split_writers[run.split].write(chunk)
        self.index_writer.add(run.split, index_chunks(run, self.chunk_users))
        self.frozen_writer.add(run)

    def _write_events(self, run: ChunkRun | None) -> None:
        if run is not None and self.state_writer is not None:
            self.state_writer.add(chunk_records(run, self.chunk_users))

    def write_state(self, source: Source) -> None:
        """Write what a later data set goes on from."""
        if self.state_writer is not None:
            arrays = source.state() if isinstance(source, StatefulSource) else {}
            self.state = self.state_writer.finish(
                self.ingestion.last_time, arrays.items()
            )

    def write_metadata(
        self, provenance: Provenance, checksums: dict[str, str], options: dict[str, Any]
    ) -> Metadata:
        """Write the JSON files of the folder.

        Args:
          provenance: origin of the data.
          checksums: SHA-256 of the raw files.
          options: options of `prepare` that change its output, and `describe_frozen`.
        """
        shards = {
            split: records.Shards(writer.shard_lengths, writer.num_bytes)
            for split, writer in self.split_writers.items()
        }
        moments = (
            *self.moments,
            self.counts.row_moments,
            self.counts.action_moments,
        )
        about_like = {} if self.like is None else {"like": self.like.describe()}
        metadata = make_metadata(
            self.folder,
            self.like.metadata.schema
            if self.like
            else self.counts.label_moments.fill_in(self.schema),
            self.table_rows,
            () if self.like else moments,
            self.counts.by_name,
            shards,
            {e.key: e.index.type for e in (self.users, self.items)},
            provenance,
            checksums,
            {**options, **about_like},
            self.row_digests,
            self.state,
        )
        records.write_metadata(self.folder, shards, metadata)
        # Last: it holds the digests of all other files but the shards.
        metadata.save(self.folder)
        return metadata
