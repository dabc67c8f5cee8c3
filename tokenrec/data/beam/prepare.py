"""`prepare` on Apache Beam: the same data set from a log that one machine would take too long for.

Two pipelines and, between and after them, the driver. The first (scan.py) checks every row and finds the distinct
values; from these the driver writes vocabularies and the catalogue, with the functions of the local path. The second
(builder.py) makes the records. The driver then moves the shards into the folder and describes them.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from etils import epath

from tokenrec.data import records
from tokenrec.data.beam.engine import pipeline_options
from tokenrec.data.beam.lookup import ITEM_IDS, vocabulary_name
from tokenrec.data.beam.scan import USER_PARTITIONS, Distinct, scan
from tokenrec.data.beam.shared_files import save_values
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.entities import Entities, to_final
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
from tokenrec.data.preparation.intake import BLOCK_ROWS, check_rows
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.preparation.partition import Tally
from tokenrec.data.preparation.staging import staged
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
    """Writes what `tokenrec.data.preparation.prepare.prepare` writes, and returns its metadata.

    Of more than one partition, shards hold users in another order, and means and deviations differ by rounding.

    Args:
      source: the raw log; it must come in parts (`PartitionedSource`), and none of its user features may be a text.
      out: folder to make, on a disk of this machine.
      chunk_events, overlap, overwrite: as in `prepare`.
      work: folder or bucket address for temporary files that this machine and all workers see; default: within `out`.
      arguments: options of Apache Beam, such as `--runner=FlinkRunner`; default: its local runner.
      partition_bytes: rows that a worker of the second pass holds at a time; default `builder.PARTITION_BYTES`.
      user_partitions: shares of the users in the first pass.

    Raises:
      InputError: as in `prepare`; or the source has no parts, or Apache Beam is not installed.
    """
    check_options(source.schema, chunk_events, overlap)
    parted = _parted(source)
    options = pipeline_options(arguments)
    with staged(Path(out), overwrite) as folder:
        checksums = checksums_of(source.provenance)
        # A name of its own for each run: a process keeps open what it has mapped (exchange.load_values).
        place = (
            epath.Path(folder if work is None else work)
            / f"{Path(out).name}.work-{uuid.uuid4().hex}"
        )
        place.mkdir(parents=True)
        try:
            metadata = _prepare(
                parted,
                folder,
                os.fspath(place),
                checksums,
                {"chunk_events": chunk_events, "overlap": overlap},
                options,
                partition_bytes,
                user_partitions,
            )
        finally:
            place.rmtree()
    return metadata


def _prepare(
    source: PartitionedSource,
    folder: Path,
    work: str,
    checksums: dict[str, str],
    settings: dict[str, int],
    options: object,
    partition_bytes: int | None,
    user_partitions: int,
) -> Metadata:
    from tokenrec.data.beam import builder  # tensorflow-datasets takes about a second

    schema, tables = source.schema, value_tables(source.schema.features)
    items = Entities("item_id", schema.group("catalogue"), tables)
    items.read(source.items(), "items()", BLOCK_ROWS)
    found = scan(source, work, options, user_partitions)
    if found.rows is None:
        check_rows(0, False)
        raise AssertionError
    check_rows(
        found.rows.rows,
        any(d.table is None and d.trained.any() for d in found.distinct),
    )
    source.check_times(found.rows.earliest, found.rows.latest)
    if not found.rows.splits:
        raise InputError(NOTHING_TO_LEARN)
    user_id_type = _one_type(
        "rows(): column 'user_id'", [count.type for count in found.users]
    )
    _take_in(found.distinct, items, tables)

    moments = [Moments(schema.group("user")), Moments(schema.group("catalogue"))]
    for count in found.users:
        moments[0].merge(count.moments)
    moments[1].add(items.dense[items.in_training()])
    finals, table_rows = write_vocabularies(folder, schema, tables)
    table_rows |= write_tokenizer(folder, schema, (items,))
    to_final(items.ids, items.features, finals)
    write_catalogue(folder, items)
    for name in tables:
        save_values(work, vocabulary_name(name), load_vocabulary(folder, name))
    save_values(work, ITEM_IDS, np.sort(items.index.values()))
    key_types = {"user_id": user_id_type, "item_id": items.index.type}
    tally = Tally.empty(schema)
    tally.counts["items"], tally.counts["users"] = (
        items.index.size,
        sum(count.users for count in found.users),
    )
    del items, finals

    partitions = builder.count_partitions(
        schema, found.rows.rows, partition_bytes or builder.PARTITION_BYTES
    )
    job = builder.BuildOptions(
        schema, settings["chunk_events"], settings["overlap"], partitions, work
    )
    splits = [name for name in SPLITS if name in found.rows.splits]
    shards, built, reports = builder.build(source, job, splits, user_id_type, options)
    for report in reports:
        tally.merge(report.tally)
    sizes = {
        name: [r.sizes[name] for r in reports if name in r.sizes] for name in splits
    }
    write_chunk_index(folder, sizes)
    for name in splits:
        for shard in range(len(shards[name].lengths)):
            target = records.shard_path(folder, name, shard, len(shards[name].lengths))
            with (
                (epath.Path(built) / target.name).open("rb") as written,
                target.open("wb") as file,
            ):
                shutil.copyfileobj(written, file)
    metadata = describe(
        folder,
        schema,
        table_rows,
        (*moments, tally.row, tally.action),
        tally.counts,
        shards,
        key_types,
        source.provenance,
        checksums,
        settings,
    )
    records.write_metadata(folder, shards, metadata)
    metadata.save(folder)
    return metadata


def _parted(source: Source) -> PartitionedSource:
    if not all(
        hasattr(source, name) for name in ("row_parts", "user_parts", "check_times")
    ):
        raise InputError(
            f"source '{source.provenance.name}' does not come in parts, so --beam cannot read it; leave --beam out, or "
            f"write its rows to Parquet files and use the source delimited"
        )
    texts = [f.name for f in source.schema.group("user") if f.kind == "text"]
    if texts:
        raise InputError(
            f"feature '{texts[0]}' is a text of users, whom --beam never gathers in one place to train a tokenizer on; "
            f"leave it out, or leave --beam out"
        )
    return source  # type: ignore[return-value]


def _take_in(
    distinct: Sequence[Distinct], items: Entities, tables: dict[str, TableValues]
) -> None:
    """Adds the values that the scan found to the items and the tables, and marks those of training rows."""
    for name in dict.fromkeys(d.table for d in distinct):
        where = "rows(): column 'item_id'" if name is None else f"table '{name}'"
        known = [] if name is not None or not items.index.type else [items.index.type]
        _one_type(where, [*known, *(d.type for d in distinct if d.table == name)])
    for found in distinct:
        values = pa.array(
            found.values, pa.string() if found.type == "string" else pa.int64()
        )
        if found.table is None:
            items.trained.add(items.codes(values, "rows()", 0)[found.trained])
        else:
            tables[found.table].mark(
                tables[found.table].provisional(values, f"table '{found.table}'")
            )
    items.complete()


def _one_type(where: str, types: Sequence[str]) -> str:
    different = sorted({kind for kind in types if kind})
    if len(different) > 1:
        raise InputError(
            f"{where} holds {' values here and '.join(different)} values there; give it one type"
        )
    return different[0]
