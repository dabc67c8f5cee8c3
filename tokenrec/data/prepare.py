"""Any source to a prepared data set: rows stream once, and memory depends on distinct ids, not on rows.

First pass (intake.py): rows are checked, encoded with provisional ids (vocabulary.py) and grouped by user on disk
(spill.py). Second pass, some users at a time: rows are ordered, freed from repeats, given their final ids, cut into
chunks (chunks.py) and written (records.py). The folder appears when it is whole (staging.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from tokenrec.data import records
from tokenrec.data.chunks import TRAIN, check_requests, cut_chunks, first_of_repeats, learned, order_rows
from tokenrec.data.dataset import ITEMS
from tokenrec.data.entities import to_final
from tokenrec.data.intake import Intake
from tokenrec.data.log import EVENT, LEARNED, SCORED
from tokenrec.data.moments import Moments
from tokenrec.data.schema import TEXT_TABLE, Feature, Metadata
from tokenrec.data.source import SPLITS, Provenance, Source
from tokenrec.data.staging import scratch_folder, staged
from tokenrec.data.tokenizer import save_tokenizer, table_rows, tokenizers_library, train_tokenizer
from tokenrec.data.vocabulary import save_vocabulary, semantic_rows
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
    for name, value, least in (("chunk_events", chunk_events, 1), ("overlap", overlap, 0)):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    if any(f.kind == "text" for f in source.schema.features):
        tokenizers_library()  # missing, it is to end the run now and not after the log
    with staged(Path(out), overwrite) as folder:
        checksums = _checksums(source.provenance)
        work = folder / "scratch" if scratch is None else scratch_folder(Path(scratch), Path(out))
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
        self.finals: dict[str, np.ndarray] = {}
        self.table_rows: dict[str, int] = {}
        self.writers: dict[str, records.SplitWriter] = {}
        self.counts: Counter[str] = Counter()
        self.moments = [Moments(self.schema.group(group)) for group in ("user", "catalogue", "row", "action")]

    def write_entities(self) -> None:
        """Vocabularies, the tokenizer and the catalogue; from here on ids are final."""
        for entities, moments in ((self.intake.users, self.moments[0]), (self.intake.items, self.moments[1])):
            moments.add(entities.dense[entities.in_training()])
        for f in self.schema.features:
            if f.kind == "semantic_id":
                self.table_rows[f.table_name] = semantic_rows(f)
            elif f.has_vocabulary and f.table_name not in self.finals:
                known, self.finals[f.table_name] = self.intake.tables[f.table_name].finish()
                self.table_rows[f.table_name] = len(known) + 2
                save_vocabulary(self.folder, f.table_name, known)
        self._write_tokenizer()
        for entities in (self.intake.users, self.intake.items):
            to_final(entities.ids, entities.features, self.finals)
        values = self.intake.items.index.values()
        order = np.argsort(values, kind="stable")
        self.item_rows = np.empty(len(order), np.int32)
        self.item_rows[order] = np.arange(len(order), dtype=np.int32)
        folder = self.folder / ITEMS
        folder.mkdir()
        np.save(folder / "item_id.npy", values[order].astype(str) if values.dtype == object else values[order])
        np.save(folder / "ids.npy", self.intake.items.ids[order])
        np.save(folder / "dense.npy", self.intake.items.dense[order])
        self.counts["items"], self.counts["users"] = self.intake.items.index.size, self.intake.users.index.size
        self.user_ids = self.intake.users.index.values()
        self.user_rows = np.zeros(self.intake.users.index.size, records.user_dtype(self.schema))
        self.user_rows["user_ids"], self.user_rows["user_dense"] = self.intake.users.ids, self.intake.users.dense
        self.intake.items.ids, self.intake.items.dense = self.intake.items.ids[:0], self.intake.items.dense[:0]

    def _write_tokenizer(self) -> None:
        """Trains on the texts of training entities, if the schema has any, and gives every text its ids."""
        codes = [f.codes for f in self.schema.features if f.kind == "text"]
        if not codes:
            return
        both = (self.intake.users, self.intake.items)
        tokenizer = train_tokenizer(itertools.chain(*(entities.training_texts() for entities in both)), codes[0])
        for entities in both:
            entities.encode_texts(tokenizer)
        self.table_rows[TEXT_TABLE] = table_rows(tokenizer)
        save_tokenizer(tokenizer, self.folder)

    def write_chunks(self, chunk_events: int, overlap: int) -> None:
        """Second pass."""
        sizes: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        try:
            for part in self.intake.partitions.read():
                user, split, row = self._finish(part)
                for number, name in enumerate(SPLITS):
                    cut = cut_chunks(user, row["time"], split, row["flags"], number, chunk_events, overlap)
                    if len(cut.rows):
                        rows = row[cut.rows]
                        rows["flags"][cut.repeated] = EVENT
                        self._write(name, rows, cut.start, user[cut.rows[cut.start[:-1]]])
                        sizes[name].append(np.diff(cut.start))
            for writer in self.writers.values():
                writer.finish()
        finally:
            for writer in self.writers.values():
                writer.close()
        if not self.writers:
            raise InputError("rows(): no row is an event, scored, or has a label, so there is nothing to learn from")
        (self.folder / records.INDEX).mkdir()
        for name in self.writers:
            np.save(self.folder / records.INDEX / f"{name}.npy", np.concatenate(sizes[name]).astype(np.int64))
            self.counts[f"chunks_{name}"] = sum(self.writers[name].shard_lengths)

    def _finish(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of some users, ordered, without repeats, counted, with final ids: user, split, row."""
        part["row"]["item"] = self.item_rows[part["row"]["item"]]
        row = part["row"]
        part = part[order_rows(part["user"], row["time"], row["request"], row["item"])]
        row = part["row"]
        first = first_of_repeats(part["user"], row["time"], row["item"], row["flags"] & SCORED)
        self.counts["repeats_dropped"] += int((~first).sum())
        part = part[first]
        user, split, row = part["user"], part["split"], part["row"]
        check_requests(user, row["time"], row["request"])
        for group in ("row", "action"):
            to_final(row[f"{group}_ids"], self.schema.group(group), self.finals)
        row["flags"] |= learned(split, row["flags"], row["labels"]) * np.uint8(LEARNED)
        for number, name in enumerate(SPLITS):
            inside = split == number
            scored = inside & ((row["flags"] & SCORED) > 0)
            self.counts[f"rows_{name}"] += int(inside.sum())
            self.counts[f"scored_{name}"] += int(scored.sum())
            self.counts[f"events_{name}"] += int((inside & ((row["flags"] & EVENT) > 0)).sum())
            for i, task in enumerate(self.schema.tasks):
                self.counts[f"positives_{name}_{task.name}"] += int((row["labels"][scored, i] == 1).sum())
        self.counts["learned_train"] += int(((row["flags"] & LEARNED) > 0).sum())
        train = split == TRAIN
        self.moments[2].add(row["row_dense"][train])
        self.moments[3].add(row["action_dense"][train])
        return user, split, row

    def _write(self, split: str, rows: np.ndarray, start: np.ndarray, users: np.ndarray) -> None:
        if split not in self.writers:
            self.writers[split] = records.SplitWriter(self.folder, split)
        data, size = memoryview(rows.tobytes()), rows.dtype.itemsize
        writer = self.writers[split]
        for begin, end, code in zip(start[:-1].tolist(), start[1:].tolist(), users.tolist(), strict=True):
            user_id = self.user_ids[code]
            writer.write(
                records.Chunk(
                    user_id if isinstance(user_id, str) else int(user_id),
                    self.user_rows[code].tobytes(),
                    bytes(data[begin * size : end * size]),
                )
            )

    def write_metadata(self, provenance: Provenance, checksums: dict[str, str], options: dict[str, int]) -> Metadata:
        normalised: dict[str, Feature] = {}
        for moments in self.moments:
            normalised |= moments.features()
        features = tuple(normalised.get(f.name, f) for f in self.schema.features)
        key_types = {e.key: e.index.type for e in (self.intake.users, self.intake.items)}
        metadata = Metadata(
            schema=dataclasses.replace(
                self.schema, features=features, tables=self.table_rows, items=self.counts["items"]
            ),
            source=provenance.name,
            licence=provenance.licence,
            citation=provenance.citation,
            checksums=checksums,
            counts=dict(sorted({**self.counts, **provenance.counts}.items())),
            options=dict(options),
            key_types=key_types,
        )
        records.write_metadata(self.folder, self.writers, metadata)
        metadata.save(self.folder)
        return metadata


def _checksums(provenance: Provenance) -> dict[str, str]:
    """File name -> SHA-256; a name that occurs twice gets its folder in front."""
    files = [Path(path) for path in provenance.files]
    twice = {name for name, n in Counter(path.name for path in files).items() if n > 1}
    out = {}
    for path in files:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"source: cannot read '{os.fspath(path)}': {error.strerror}") from error
        out[f"{path.parent.name}/{path.name}" if path.name in twice else path.name] = digest
    return out
