"""Any source to a prepared data set: rows stream once, and memory depends on distinct ids, not on rows.

First pass (intake.py): rows are checked, encoded with provisional ids (vocabulary.py) and grouped by user on disk
(spill.py). Second pass, some users at a time: rows are given their final ids, ordered, freed from repeats and cut into
chunks (partition.py), and written (records.py). The folder appears when it is whole (staging.py).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from tokenrec.data import records
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.entities import to_final
from tokenrec.data.preparation.folder import (
    NOTHING_TO_LEARN,
    check_options,
    checksums_of,
    describe,
    write_catalogue,
    write_chunk_index,
    write_tokenizer,
    write_vocabularies,
)
from tokenrec.data.preparation.intake import Intake
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.preparation.partition import (
    ChunkRun,
    Tally,
    chunks_of,
    cut,
    finish,
    user_rows,
)
from tokenrec.data.preparation.staging import scratch_folder, staged
from tokenrec.data.source import SPLITS, Provenance, Source
from tokenrec.errors import InputError


def prepare(
    source: Source,
    out: Path,
    *,
    chunk_events: int = 4096,
    overlap: int = 1024,
    overwrite: bool = False,
    scratch: Path | None = None,
) -> Metadata:
    """Writes the prepared data set of `source` to the folder `out`, and returns its metadata.

    Args:
      source: the raw log.
      out: folder to make.
      chunk_events: rows of a chunk, not counting the events repeated at its head.
      overlap: the most events that are repeated at the head of a chunk: the longest history a row can have there.
      overwrite: replace `out` if it is a prepared data set.
      scratch: folder for temporary files, about as large as the data set; default: beside `out`.

    Raises:
      InputError: `out` exists, an option or a value of the source is wrong, the disk is full, or the schema has a text
        and the library `tokenizers` is missing. `out` is unchanged.
    """
    check_options(source.schema, chunk_events, overlap)
    with staged(Path(out), overwrite) as folder:
        checksums = checksums_of(source.provenance)
        work = (
            folder / "scratch"
            if scratch is None
            else scratch_folder(Path(scratch), Path(out))
        )
        try:
            intake = Intake(source.schema, work)
            intake.read(source)
            output = _Output(intake, folder)
            output.write_entities()
            output.write_chunks(chunk_events, overlap)
            options = {"chunk_events": chunk_events, "overlap": overlap}
            metadata = output.write_metadata(source.provenance, checksums, options)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return metadata


class _Output:
    """The second pass: what the intake holds becomes files in `folder`."""

    def __init__(self, intake: Intake, folder: Path) -> None:
        self.intake, self.folder, self.schema = intake, folder, intake.schema
        self.users, self.items = intake.encoder.users, intake.encoder.items
        self.finals: dict[str, np.ndarray] = {}
        self.table_rows: dict[str, int] = {}
        self.writers: dict[str, records.SplitWriter] = {}
        self.tally = Tally.empty(self.schema)
        self.moments = [
            Moments(self.schema.group(group)) for group in ("user", "catalogue")
        ]

    def write_entities(self) -> None:
        """Vocabularies, the tokenizer and the catalogue; from here on ids are final."""
        for entities, moments in zip(
            (self.users, self.items), self.moments, strict=True
        ):
            moments.add(entities.dense[entities.in_training()])
        self.finals, self.table_rows = write_vocabularies(
            self.folder, self.schema, self.intake.encoder.tables
        )
        self.table_rows |= write_tokenizer(
            self.folder, self.schema, (self.users, self.items)
        )
        for entities in (self.users, self.items):
            to_final(entities.ids, entities.features, self.finals)
        self.item_rows = write_catalogue(self.folder, self.items)
        self.tally.counts["items"], self.tally.counts["users"] = (
            self.items.index.size,
            self.users.index.size,
        )
        self.user_ids, self.user_rows = (
            self.users.index.values(),
            user_rows(self.users, self.schema),
        )
        self.items.ids, self.items.dense = self.items.ids[:0], self.items.dense[:0]

    def write_chunks(self, chunk_events: int, overlap: int) -> None:
        """Second pass."""
        sizes: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        try:
            for part in self.intake.partitions.read():
                row = part["row"]
                row["item"] = self.item_rows[row["item"]]
                for group in ("row", "action"):
                    to_final(row[f"{group}_ids"], self.schema.group(group), self.finals)
                for run in cut(
                    finish(part, self.schema, self.tally), chunk_events, overlap
                ):
                    self._write(run)
                    sizes[run.split].append(np.diff(run.start))
            for writer in self.writers.values():
                writer.finish()
        finally:
            for writer in self.writers.values():
                writer.close()
        if not self.writers:
            raise InputError(NOTHING_TO_LEARN)
        write_chunk_index(self.folder, {name: sizes[name] for name in self.writers})

    def _write(self, run: ChunkRun) -> None:
        if run.split not in self.writers:
            self.writers[run.split] = records.SplitWriter(self.folder, run.split)
        for chunk in chunks_of(run, self.user_ids, self.user_rows):
            self.writers[run.split].write(chunk)

    def write_metadata(
        self, provenance: Provenance, checksums: dict[str, str], options: dict[str, int]
    ) -> Metadata:
        shards = {
            name: records.Shards(w.shard_lengths, w.num_bytes)
            for name, w in self.writers.items()
        }
        moments = (*self.moments, self.tally.row, self.tally.action)
        key_types = {e.key: e.index.type for e in (self.users, self.items)}
        metadata = describe(
            self.folder,
            self.schema,
            self.table_rows,
            moments,
            self.tally.counts,
            shards,
            key_types,
            provenance,
            checksums,
            options,
        )
        records.write_metadata(self.folder, shards, metadata)
        metadata.save(self.folder)
        return metadata
