"""Run `prepare` on Apache Beam, for a log that one machine would take too long for.

The functions that check, encode, sort, cut and serialise log rows are those of the
local path (`tokenrec/data/preparation/`). This package holds what is left without them:

- `engine.py` imports Beam and chooses its runner;
- `log.py` says what the second pass reads;
- `users.py` brings users and their log rows together in a shuffle;
- `lookup.py` and `shared_files.py` give every worker the ids that the first pass found;
- `problems.py` reports the first problem of the input, whichever worker met it;
- `scan.py` and `builder.py` are the two pipelines, `entities.py` the step between them,
  and this module is their driver;
- `statistics.py` is a third pipeline, for a source that declares statistics of the
  past.

The steps:

1. Scan (`scan.py`): check every row, collect distinct values, summarise.
2. Driver (`entities.py`): write vocabularies, tokenizer and catalogue; share the ids.
3. Statistics (`statistics.py`), if any: read every row again, and add the features.
4. Build (`builder.py`): encode every row again with final ids, make chunks and shards.
5. Driver: copy the shards into the folder, and write the index of rows and metadata.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from tokenrec.data import records
from tokenrec.data.beam.engine import pipeline_options
from tokenrec.data.beam.entities import WrittenEntities, write_entities
from tokenrec.data.beam.log import EncodableLog, open_log, require_parts
from tokenrec.data.beam.scan import USER_PARTITIONS, RowSummary, ScanResult, scan
from tokenrec.data.dataset import open_dataset
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.folder import (
    NOTHING_TO_LEARN,
    check_options,
    describe_tokenizer,
    file_checksums,
    make_metadata,
)
from tokenrec.data.preparation.intake import check_has_training_rows
from tokenrec.data.preparation.notices import say_notices
from tokenrec.data.preparation.row_index import IndexWriter
from tokenrec.data.preparation.staging import staged_folder
from tokenrec.data.preparation.state import StateWriter
from tokenrec.data.schema import Schema
from tokenrec.data.source import SPLITS, PartitionedSource, Source
from tokenrec.data.tokenizer import read_tokenizer
from tokenrec.data.vocabulary import value_tables
from tokenrec.errors import InputError


def prepare_with_beam(
    source: Source,
    out: Path,
    *,
    chunk_events: int = 4096,
    overlap: int = 1024,
    overwrite: bool = False,
    work: str | None = None,
    arguments: Sequence[str] = (),
    partition_bytes: int | None = None,
    user_partitions: int = USER_PARTITIONS,
    span_rows: int | None = None,
    tokenizer: Path | None = None,
) -> Metadata:
    """Write the data set that `tokenrec.data.preparation.prepare.prepare` writes.

    With more than one partition, shards hold users in another order
    (docs/guides/beam.md).

    Args:
      source: the raw log. It must come in parts (`PartitionedSource`), and none of its
        user features may be a text.
      out: folder to make, on a disk of this machine.
      chunk_events: the most log rows of a chunk, as in `prepare`.
      overlap: the most events repeated at the head of a chunk, as in `prepare`.
      overwrite: replace `out` if it is a prepared data set.
      work: folder or bucket address for temporary files that this machine and all
        workers see; default: within the new folder.
      arguments: options of Apache Beam, such as `--runner=FlinkRunner`; default: its
        local runner.
      partition_bytes: bytes of log rows that a worker of the second pass holds at a
        time; default: `builder.PARTITION_BYTES`.
      user_partitions: partitions of the users in the first pass.
      span_rows: log rows of a span of time, for statistics of the past; default:
        `statistics.SPAN_ROWS`.
      tokenizer: of a pretrained language model, as in `prepare`.

    Returns:
      The metadata of the data set.

    Raises:
      InputError: as in `prepare`; or the source has no parts, or Apache Beam is not
        installed.
    """
    check_options(source.schema, chunk_events, overlap)
    plain = require_parts(source)
    tokenizer_file = None if tokenizer is None else read_tokenizer(Path(tokenizer))
    beam_options = pipeline_options(arguments)
    with staged_folder(Path(out), overwrite) as folder:
        checksums = file_checksums(source.provenance)
        # Each run has a folder of its own: `load_values` keeps the files of earlier
        # runs mapped, and caches them by their path.
        parent = epath.Path(folder if work is None else work)
        work_folder = parent / f"{Path(out).name}.work-{uuid.uuid4().hex}"
        work_folder.mkdir(parents=True)
        options = _Options(
            chunk_events,
            overlap,
            os.fspath(work_folder),
            beam_options,
            partition_bytes,
            user_partitions,
            span_rows,
            tokenizer_file,
        )
        try:
            metadata = _run_passes(source, plain, folder, checksums, options)
        finally:
            work_folder.rmtree()
    say_notices(open_dataset(out))
    return metadata


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options of a run.

    Attributes:
      chunk_events: as in `prepare_with_beam`.
      overlap: as in `prepare_with_beam`.
      work: folder that all workers see, of this run alone.
      pipeline: Beam's `PipelineOptions`.
      partition_bytes: as in `prepare_with_beam`.
      user_partitions: as in `prepare_with_beam`.
      span_rows: as in `prepare_with_beam`.
      tokenizer_file: contents of a `tokenizer.json`; None to train a tokenizer.
    """

    chunk_events: int
    overlap: int
    work: str
    pipeline: Any
    partition_bytes: int | None
    user_partitions: int
    span_rows: int | None
    tokenizer_file: bytes | None


def _run_passes(
    source: Source,
    plain: PartitionedSource,
    folder: Path,
    checksums: dict[str, str],
    options: _Options,
) -> Metadata:
    """Write all files of the data set to `folder`.

    Args:
      source: the source.
      plain: the same without statistics of the past.
      folder: the prepared folder.
      checksums: SHA-256 of the raw files.
      options: options of the run.
    """
    rows, written = _scan_log(source.schema, plain, folder, options)
    log = open_log(
        source,
        plain,
        rows,
        options.work,
        options.pipeline,
        options.partition_bytes,
        options.span_rows,
    )
    shards, row_digests, state = _build_shards(log, folder, rows, written, options)
    counts = written.counts
    metadata = make_metadata(
        folder,
        counts.label_moments.fill_in(source.schema),
        written.table_rows,
        (*written.moments, counts.row_moments, counts.action_moments),
        counts.by_name,
        shards,
        written.key_types,
        source.provenance,
        checksums,
        {
            "chunk_events": options.chunk_events,
            "overlap": options.overlap,
            **describe_tokenizer(options.tokenizer_file),
        },
        row_digests,
        state,
    )
    records.write_metadata(folder, shards, metadata)
    # Last: it holds the digests of all other files but the shards.
    metadata.save(folder)
    return metadata


def _scan_log(
    schema: Schema, source: PartitionedSource, folder: Path, options: _Options
) -> tuple[RowSummary, WrittenEntities]:
    """Run the first pass, and write what it found (steps 1 and 2).

    Args:
      schema: schema of the data set.
      source: the log without statistics, which have neither ids nor tables.
      folder: the prepared folder.
      options: options of the run.
    """
    tables = value_tables(schema.features)
    # The table of items is read before the log: it is small, and a problem in it ends
    # the run soon.
    items = Entities("item_id", schema.group("catalogue"), tables)
    items.read_table(source.items(), "items()")
    result = scan(source, options.work, options.pipeline, options.user_partitions)
    rows = _check_log(source, result)
    written = write_entities(
        folder, options.work, schema, items, tables, result, options.tokenizer_file
    )
    # Items and values are freed on return; workers read theirs from the shared folder.
    return rows, written


def _check_log(source: PartitionedSource, result: ScanResult) -> RowSummary:
    """Check what only the whole log shows, and return its summary."""
    # Without a row, no summary was saved.
    if result.rows is None:
        check_has_training_rows(0, False)
        raise AssertionError("check_has_training_rows refuses a log without rows")
    # Every training row has an item.
    any_training = any(d.table is None and d.trained.any() for d in result.distinct)
    check_has_training_rows(result.rows.rows, any_training)
    source.check_times(result.rows.earliest, result.rows.latest)
    if not result.rows.splits:
        raise InputError(NOTHING_TO_LEARN)
    return result.rows


def _build_shards(
    log: EncodableLog,
    folder: Path,
    rows: RowSummary,
    written: WrittenEntities,
    options: _Options,
) -> tuple[dict[str, records.Shards], dict[str, str], dict[str, Any]]:
    """Run the second pass (steps 4 and 5); add its counts to `written.counts`.

    Returns:
      The shards of each split, the SHA-256 of its rows, and `Metadata.state`.
    """
    # Imported here: tensorflow-datasets takes about a second.
    from tokenrec.data.beam import builder

    build_options = builder.BuildOptions(
        log.schema, options.chunk_events, options.overlap, log.partitions, options.work
    )
    splits = [name for name in SPLITS if name in rows.splits]
    shards, built, reports = builder.build_shards(
        log.row_parts,
        log.user_parts,
        build_options,
        splits,
        written.key_types["user_id"],
        options.pipeline,
    )
    # Reports come in the order of partitions, and so do the records of the shards: the
    # index must have the same order.
    with (
        contextlib.closing(IndexWriter(folder)) as index,
        contextlib.closing(StateWriter(folder)) as state_writer,
    ):
        for report in reports:
            written.counts.merge(report.counts)
            for name, part in report.chunks.items():
                index.add(name, part)
            state_writer.add(report.events)
        row_digests = index.finish()
        state = state_writer.finish(rows.latest, log.state)
    _copy_shards(built, folder, shards)
    return shards, row_digests, state


def _copy_shards(
    built: str, folder: Path, shards: Mapping[str, records.Shards]
) -> None:
    """Copy shards from the shared folder, which may be a bucket, to the data set."""
    for name, split_shards in shards.items():
        count = len(split_shards.lengths)
        for shard in range(count):
            target = records.shard_path(folder, name, shard, count)
            with (
                (epath.Path(built) / target.name).open("rb") as written,
                target.open("wb") as file,
            ):
                shutil.copyfileobj(written, file)
