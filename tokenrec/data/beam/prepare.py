"""Run `prepare` on Apache Beam, for a log that one machine would take too long for.

The functions that check, encode, sort, cut and serialise log rows are those of the
local path (`tokenrec/data/preparation/`). This package holds what is left without them:

- `engine.py` imports Beam and chooses its runner;
- `users.py` brings users and their log rows together in a shuffle;
- `lookup.py` and `shared_files.py` give every worker the ids that the first pass found;
- `scan.py` and `builder.py` are the two pipelines, and this module is their driver.

The steps:

1. Scan (`scan.py`): check every row, collect distinct values, summarise.
2. Driver: write vocabularies, tokenizer and catalogue, and share the ids.
3. Build (`builder.py`): encode every row again with final ids, make chunks and shards.
4. Driver: copy the shards into the folder, and write the index of chunks and metadata.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from etils import epath

from tokenrec.data import records
from tokenrec.data.beam.engine import pipeline_options
from tokenrec.data.beam.lookup import ITEM_IDS, vocabulary_file
from tokenrec.data.beam.scan import (
    USER_PARTITIONS,
    DistinctValues,
    RowSummary,
    ScanResult,
    UserSummary,
    scan,
)
from tokenrec.data.beam.shared_files import save_values
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.entities import Entities, to_vocabulary_ids
from tokenrec.data.preparation.folder import (
    NOTHING_TO_LEARN,
    check_options,
    file_checksums,
    make_metadata,
    write_catalogue,
    write_chunk_index,
    write_tokenizer,
    write_vocabularies,
)
from tokenrec.data.preparation.intake import BLOCK_ROWS, check_has_training_rows
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.preparation.partition import PreparationCounts
from tokenrec.data.preparation.staging import staged_folder
from tokenrec.data.schema import Schema
from tokenrec.data.source import SPLITS, PartitionedSource, Source
from tokenrec.data.vocabulary import TableValues, load_vocabulary, value_tables
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
) -> Metadata:
    """Write the data set that `tokenrec.data.preparation.prepare.prepare` writes.

    With more than one partition, shards hold users in another order, and means and
    deviations differ by rounding (docs/beam.md).

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

    Returns:
      The metadata of the data set.

    Raises:
      InputError: as in `prepare`; or the source has no parts, or Apache Beam is not
        installed.
    """
    check_options(source.schema, chunk_events, overlap)
    partitioned = _require_parts(source)
    beam_options = pipeline_options(arguments)
    with staged_folder(Path(out), overwrite) as folder:
        checksums = file_checksums(source.provenance)
        # Each run has a folder of its own: `load_values` keeps files of earlier runs
        # mapped, and caches them by their path.
        work_folder = (
            epath.Path(folder if work is None else work)
            / f"{Path(out).name}.work-{uuid.uuid4().hex}"
        )
        work_folder.mkdir(parents=True)
        options = _Options(
            chunk_events,
            overlap,
            os.fspath(work_folder),
            beam_options,
            partition_bytes,
            user_partitions,
        )
        try:
            entities = _scan_and_write_entities(partitioned, folder, options)
            shards = _build_and_copy_shards(partitioned, folder, entities, options)
            metadata = make_metadata(
                folder,
                source.schema,
                entities.table_rows,
                (
                    *entities.moments,
                    entities.counts.row_moments,
                    entities.counts.action_moments,
                ),
                entities.counts.by_name,
                shards,
                entities.key_types,
                source.provenance,
                checksums,
                {"chunk_events": chunk_events, "overlap": overlap},
            )
            records.write_metadata(folder, shards, metadata)
            # Last: it holds the digests of all other files but the shards.
            metadata.save(folder)
        finally:
            work_folder.rmtree()
    return metadata


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options of a run; see `prepare_with_beam`.

    Attributes:
      work: folder that all workers see, of this run alone.
      pipeline: Beam's `PipelineOptions`.
    """

    chunk_events: int
    overlap: int
    work: str
    pipeline: Any
    partition_bytes: int | None
    user_partitions: int


class _Entities(NamedTuple):
    """Results of the first pass that the rest of the run needs.

    Attributes:
      rows: summary of the log.
      splits: names of the splits that have chunks, in the order of `SPLITS`.
      key_types: "int64" or "string" for `user_id` and `item_id`.
      table_rows: rows of each embedding table.
      moments: moments of the dense features of users and of items.
      counts: numbers of users and items; the second pass adds its counts.
    """

    rows: RowSummary
    splits: list[str]
    key_types: dict[str, str]
    table_rows: dict[str, int]
    moments: tuple[Moments, Moments]
    counts: PreparationCounts


def _scan_and_write_entities(
    source: PartitionedSource, folder: Path, options: _Options
) -> _Entities:
    """Run the scan; write vocabularies, tokenizer and catalogue, and share the ids."""
    schema, tables = source.schema, value_tables(source.schema.features)
    # 1. The table of items is read before the log: it is small, and a problem in it
    #    ends the run soon.
    items = Entities("item_id", schema.group("catalogue"), tables)
    items.read_table(source.items(), "items()", BLOCK_ROWS)
    result = scan(source, options.work, options.pipeline, options.user_partitions)

    # 2. Check what only the whole log shows.
    rows = _check_log(source, result)
    user_id_type = _check_one_type(
        "rows(): column 'user_id'", [summary.type for summary in result.users]
    )

    # 3. Make ids final, as the local path does between its passes.
    _add_distinct_values(result.distinct, items, tables)
    moments = _entity_moments(schema, result.users, items)
    vocabulary_ids, table_rows = write_vocabularies(folder, schema, tables)
    # Only items can have texts here (`_require_parts`).
    table_rows |= write_tokenizer(folder, schema, (items,))
    to_vocabulary_ids(items.ids, items.features, vocabulary_ids)
    write_catalogue(folder, items)

    # 4. Share the sorted values with the workers of the second pass.
    for name in tables:
        save_values(options.work, vocabulary_file(name), load_vocabulary(folder, name))
    save_values(options.work, ITEM_IDS, np.sort(items.index.values()))

    counts = PreparationCounts.empty(schema)
    counts.by_name["items"] = items.index.size
    counts.by_name["users"] = sum(summary.users for summary in result.users)
    return _Entities(
        rows,
        [name for name in SPLITS if name in rows.splits],
        {"user_id": user_id_type, "item_id": items.index.type},
        table_rows,
        moments,
        counts,
    )


def _build_and_copy_shards(
    source: PartitionedSource, folder: Path, entities: _Entities, options: _Options
) -> dict[str, records.Shards]:
    """Run the second pass; add its counts to `entities.counts`."""
    # tensorflow-datasets takes about a second to import.
    from tokenrec.data.beam import builder

    partitions = builder.count_partitions(
        source.schema,
        entities.rows.rows,
        options.partition_bytes or builder.PARTITION_BYTES,
    )
    build_options = builder.BuildOptions(
        source.schema, options.chunk_events, options.overlap, partitions, options.work
    )
    splits = entities.splits
    shards, built, reports = builder.build_shards(
        source, build_options, splits, entities.key_types["user_id"], options.pipeline
    )
    sizes: dict[str, list[np.ndarray]] = {name: [] for name in splits}
    # In the order of partitions: so are the records of the shards.
    for report in reports:
        entities.counts.merge(report.counts)
        for name, chunk_rows in report.sizes.items():
            sizes[name].append(chunk_rows)
    write_chunk_index(folder, sizes)
    _copy_shards(built, folder, shards)
    return shards


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


def _require_parts(source: Source) -> PartitionedSource:
    """Return the source, if Beam can read it.

    Raises:
      InputError: it has no parts, or a text of users.
    """
    has_parts = all(
        hasattr(source, name) for name in ("row_parts", "user_parts", "check_times")
    )
    if not has_parts:
        raise InputError(
            f"source '{source.provenance.name}' does not come in parts, so --beam "
            "cannot read it; leave --beam out, or write its rows to Parquet files and "
            "use the source delimited"
        )
    texts = [f.name for f in source.schema.group("user") if f.kind == "text"]
    if texts:
        raise InputError(
            f"feature '{texts[0]}' is a text of users, whom --beam never gathers in "
            "one place to train a tokenizer on; leave it out, or leave --beam out"
        )
    return source  # type: ignore[return-value]


def _check_log(source: PartitionedSource, result: ScanResult) -> RowSummary:
    """Check the summary of the log, and return it."""
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


def _entity_moments(
    schema: Schema, users: Sequence[UserSummary], items: Entities
) -> tuple[Moments, Moments]:
    """Moments of the dense features of users and of items."""
    user_moments = Moments(schema.group("user"))
    for summary in users:
        user_moments.merge(summary.moments)
    item_moments = Moments(schema.group("catalogue"))
    item_moments.add(items.dense[items.in_training()])
    return user_moments, item_moments


def _add_distinct_values(
    distinct: Sequence[DistinctValues], items: Entities, tables: dict[str, TableValues]
) -> None:
    """Add the scanned values to the items and tables; mark those of training rows."""
    # A worker sees one block at a time; only here can types of two blocks be compared.
    for name in dict.fromkeys(d.table for d in distinct):
        types = [d.type for d in distinct if d.table == name]
        where = f"table '{name}'"
        if name is None:
            where = "rows(): column 'item_id'"
            if items.index.type:
                types = [items.index.type, *types]
        _check_one_type(where, types)
    for d in distinct:
        values = pa.array(d.values, pa.string() if d.type == "string" else pa.int64())
        if d.table is None:
            items.trained.add(items.codes(values, "rows()", 0)[d.trained])
        else:
            # Workers send the values of training rows only.
            table = tables[d.table]
            table.mark(table.provisional(values, f"table '{d.table}'"))
    items.complete()


def _check_one_type(where: str, types: Sequence[str]) -> str:
    """Return the one type of `types`, in which "" stands for no value.

    Raises:
      InputError: there are two types.
    """
    different = sorted({kind for kind in types if kind})
    if len(different) > 1:
        raise InputError(
            f"{where} holds {' values here and '.join(different)} values there; give "
            "it one type"
        )
    return different[0]
