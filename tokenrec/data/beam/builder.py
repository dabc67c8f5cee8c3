"""Second pass on Beam: encode the log again with final ids, and build the records.

The shuffle groups log rows by a hash of the user's id into partitions of about
`PARTITION_BYTES`. One worker holds one partition at a time and passes it through the
functions of the local path (`preparation/partition.py`). The writer of the
tensorflow-datasets builder then sorts the records by their numbers, partition after
partition, into shards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from tokenrec.data import records
from tokenrec.data.beam.engine import beam_library, create_parts, tagged_output
from tokenrec.data.beam.lookup import ITEM_IDS, find_positions, load_vocabulary_ids
from tokenrec.data.beam.problems import raise_first_problem, save_first_problem
from tokenrec.data.beam.scan import partition_user_part
from tokenrec.data.beam.shared_files import load_records, load_values, save_records
from tokenrec.data.beam.users import LogBlock, gather_users, partition_log
from tokenrec.data.preparation.entities import to_vocabulary_ids
from tokenrec.data.preparation.intake import LogEncoder, rebatch
from tokenrec.data.preparation.partition import (
    PreparationCounts,
    Users,
    chunk_records,
    cut_into_chunks,
    sort_and_deduplicate,
)
from tokenrec.data.preparation.row_index import ChunkIndex, index_chunks
from tokenrec.data.preparation.state import events_without_chunk
from tokenrec.data.schema import Schema
from tokenrec.data.source import LogPart
from tokenrec.errors import InputError

PARTITION_BYTES = 64 << 20
# A record's number has the number of its partition in the high bits, and its position
# within the partition in these low bits.
_POSITION_BITS = 40


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """Options of the second pass, sent to every worker.

    Attributes:
      schema: features and tasks of the source.
      chunk_events: the most new rows of a chunk.
      overlap: the most events that a chunk repeats at its head.
      partitions: number of partitions of the users.
      work: folder that all workers see.
    """

    schema: Schema
    chunk_events: int
    overlap: int
    partitions: int
    work: str


class PartitionReport(NamedTuple):
    """Counts of one partition.

    Attributes:
      counts: counts of its log rows and moments of their features.
      chunks: index of its chunks, by split.
      events: records of its events that no chunk holds.
    """

    counts: PreparationCounts
    chunks: dict[str, ChunkIndex]
    events: list[records.Chunk]


def count_partitions(
    schema: Schema, rows: int, partition_bytes: int = PARTITION_BYTES
) -> int:
    """Compute how many partitions of about `partition_bytes` the log needs.

    Args:
      schema: features and tasks, which decide the size of a log row.
      rows: log rows.
      partition_bytes: bytes of encoded log rows of a partition.
    """
    log_bytes = rows * records.row_dtype(schema).itemsize
    return max(1, -(-log_bytes // partition_bytes))


def build_shards(
    row_parts: Sequence[LogPart],
    user_parts: Sequence[LogPart],
    options: BuildOptions,
    splits: Sequence[str],
    user_id_type: str,
    pipeline_options: Any,
) -> tuple[dict[str, records.Shards], str, Iterator[PartitionReport]]:
    """Run the second pass, and write the shards of `splits` below `options.work`.

    Args:
      row_parts: parts of the log.
      user_parts: parts of the source's table of users.
      options: options of the pass.
      splits: names of the splits that have chunks.
      user_id_type: "int64" or "string".
      pipeline_options: Beam's `PipelineOptions`.

    Returns:
      The shards of each split, their folder, and the reports of the partitions in
      order, each of which is read when it is asked for.

    Raises:
      InputError: rows of one request have different times.
    """
    builder = Tokenrec(row_parts, user_parts, options, splits, user_id_type)
    config = tfds.download.DownloadConfig(beam_options=pipeline_options)
    try:
        # The builder prints the name of a folder that exists for this pass only.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare(
                download_config=config, file_format="array_record"
            )
    except Exception:
        # The builder refuses a split without records. If a problem of the input is why,
        # its message says more.
        raise_first_problem(options.work)
        raise
    raise_first_problem(options.work)
    shards = {}
    for name in splits:
        info = builder.info.splits[name]
        shards[name] = records.Shards(list(info.shard_lengths), info.num_bytes)
    return shards, str(builder.data_path), load_records(options.work, "reports")


class Tokenrec(tfds.core.GeneratorBasedBuilder):
    """Build records of `tokenrec.data.records` on Apache Beam.

    The name of the class is the first part of the shards' names.
    """

    VERSION = tfds.core.Version(records.VERSION)

    def __init__(
        self,
        row_parts: Sequence[LogPart],
        user_parts: Sequence[LogPart],
        options: BuildOptions,
        splits: Sequence[str],
        user_id_type: str,
    ) -> None:
        self._row_parts = row_parts
        self._user_parts = user_parts
        self._options = options
        self._splits = splits
        self._user_id_type = user_id_type
        super().__init__(data_dir=f"{options.work}/builder", file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = records.record_features(self._options.schema, self._user_id_type)
        # Without this the writer would order records by a hash of their numbers.
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any, pipeline: Any) -> dict[str, Any]:
        beam, options = beam_library(), self._options
        rows = create_parts(pipeline, self._row_parts, "Row") | (
            "Encode rows" >> beam.FlatMap(_encode_rows, options)
        )
        table = create_parts(pipeline, self._user_parts, "User") | (
            "Encode users"
            >> beam.FlatMap(
                partition_user_part, options.schema, options.partitions
            ).with_outputs("problems", "users")
        )
        chunks = (
            {"table": table.users, "log": rows}
            | "Join users" >> beam.CoGroupByKey()
            | "Make chunks"
            >> beam.FlatMap(_make_chunks, options).with_outputs(
                "problems", "reports", *self._splits
            )
        )
        _ = chunks.reports | "Save reports" >> beam.Map(_save_report, options.work)
        save_first_problem((table.problems, chunks.problems), options.work)
        return {name: chunks[name] for name in self._splits}

    def _example_writer(self) -> tfds.core.writer.ExampleWriter:
        return _ShardWriter(self.info.file_format)

    def _generate_examples(self) -> None:
        raise NotImplementedError(
            "the splits come from one PCollection each, see _split_generators"
        )


class _ShardWriter(tfds.core.writer.ExampleWriter):
    """Write the bytes of `records.encode` to any path.

    The builder serialises the fields of a record in any order, so that records are
    encoded again. ArrayRecord opens local files only, so that a shard is made in one
    and copied.
    """

    def write(self, path: Any, examples: Iterable[tuple[int, bytes]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "shard")
            with contextlib.closing(records.shard_writer(local)) as writer:
                for _, example in examples:
                    writer.write(records.encode(records.decode(example)))
            with local.open("rb") as shard, epath.Path(path).open("wb") as file:
                shutil.copyfileobj(shard, file)


def _encode_rows(
    numbered: tuple[int, LogPart], options: BuildOptions
) -> Iterator[tuple[int, LogBlock]]:
    """Encode a part of the log with final ids; yield its rows by partition of users."""
    number, part = numbered
    groups = {group: options.schema.group(group) for group in ("row", "action")}
    all_features = [f for features in groups.values() for f in features]
    first = 0
    for batch in rebatch(part.read()):
        # An encoder per block; its codes and provisional ids are replaced below.
        encoder = LogEncoder(options.schema)
        rows = encoder.encode(batch, first)
        row = rows["row"]
        item_ids = load_values(options.work, ITEM_IDS)
        # From code of an item in this block to its row of the catalogue.
        row["item"] = find_positions(encoder.items.index, item_ids)[row["item"]]
        vocabulary_ids = load_vocabulary_ids(options.work, encoder.tables, all_features)
        for group, features in groups.items():
            to_vocabulary_ids(row[f"{group}_ids"], features, vocabulary_ids)
        block = LogBlock((number, first), batch.column("user_id"), rows)
        yield from partition_log(block, options.partitions)
        first += batch.num_rows


def _make_chunks(
    grouped: tuple[int, dict[str, Iterable[Any]]], options: BuildOptions
) -> Iterator[Any]:
    """Make the chunks of a partition of users; yield records by split, and a report."""
    tagged = tagged_output()
    partition, group = grouped
    schema = options.schema
    # 1. Number the users of the partition, and give their features final ids.
    users, tables, log_blocks = gather_users(schema, group["table"], group["log"])
    if not log_blocks:
        # Users who are in the table alone have no chunks.
        return
    users.complete()
    vocabulary_ids = load_vocabulary_ids(options.work, tables, users.features)
    to_vocabulary_ids(users.ids, users.features, vocabulary_ids)

    # 2. Collect the log rows in the order of the log.
    rows = np.concatenate([block.rows for block, _ in log_blocks])
    rows["user"] = np.concatenate([codes for _, codes in log_blocks])
    del log_blocks  # the rows were copied; this is most of the partition's memory

    # 3. The steps of the local path.
    counts, chunks = PreparationCounts.empty(schema), {}
    try:
        rows = sort_and_deduplicate(rows, schema, counts)
    except InputError as error:
        yield tagged("problems", ((3, partition), str(error)))
        return
    chunk_users = Users(users, schema)
    for run in cut_into_chunks(rows, options.chunk_events, options.overlap):
        chunks[run.split] = index_chunks(run, chunk_users)
        for position, chunk in enumerate(chunk_records(run, chunk_users)):
            key = (partition << _POSITION_BITS) + position
            yield tagged(run.split, (key, chunk._asdict()))
    rest = events_without_chunk(rows, options.overlap)
    events = [] if rest is None else [*chunk_records(rest, chunk_users)]
    yield tagged("reports", (partition, PartitionReport(counts, chunks, events)))


def _save_report(numbered: tuple[int, PartitionReport], work: str) -> None:
    partition, report = numbered
    # Padded, so that `load_records` yields the reports in the order of partitions.
    save_records(work, f"reports/{partition:012d}", report)
