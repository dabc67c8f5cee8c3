"""The second pass: rows get their final ids, meet their users, and become records of a tensorflow-datasets builder.

The shuffle groups rows by a hash of the user's id into partitions of about `PARTITION_BYTES`; one worker holds one at a
time, and passes it through the functions of the local path (partition.py). The builder's own writer then sorts the
records by number, partition after partition, into shards.
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
from tokenrec.data.beam.engine import beam_library
from tokenrec.data.beam.lookup import ITEM_IDS, load_finals, positions
from tokenrec.data.beam.scan import raise_problem, save_first_problem, spread_user_part
from tokenrec.data.beam.shared_files import load, load_values, save_records
from tokenrec.data.beam.users import LogBlock, gather_users, spread_log
from tokenrec.data.preparation.entities import to_final
from tokenrec.data.preparation.intake import RowEncoder, blocks
from tokenrec.data.preparation.partition import Tally, chunks_of, cut, finish, user_rows
from tokenrec.data.schema import Schema
from tokenrec.data.source import LogPart, PartitionedSource
from tokenrec.errors import InputError

PARTITION_BYTES = 64 << 20
_KEY_BITS = 40  # a record's number: its partition, then its place there


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What every worker of the second pass knows."""

    schema: Schema
    chunk_events: int
    overlap: int
    partitions: int
    work: str


class Report(NamedTuple):
    """What came out of a partition: counts, and for each split the rows of each chunk."""

    tally: Tally
    sizes: dict[str, np.ndarray]


def count_partitions(
    schema: Schema, rows: int, partition_bytes: int = PARTITION_BYTES
) -> int:
    """Partitions that hold about `partition_bytes` each."""
    return max(1, -(-rows * records.row_dtype(schema).itemsize // partition_bytes))


def build(
    source: PartitionedSource,
    job: BuildOptions,
    splits: Sequence[str],
    user_id_type: str,
    options: Any,
) -> tuple[dict[str, records.Shards], str, list[Report]]:
    """Writes the shards of `splits` below `job.work`; returns them, their folder, and the partitions' reports in order.

    Raises:
      InputError: rows of one request have different times.
    """
    builder = Tokenrec(source, job, splits, user_id_type)
    config = tfds.download.DownloadConfig(beam_options=options)
    try:
        with contextlib.redirect_stdout(
            io.StringIO()
        ):  # it names a folder that is soon gone
            builder.download_and_prepare(
                download_config=config, file_format="array_record"
            )
    except Exception:  # a split may be empty because of the problem, which says more
        raise_problem(job.work)
        raise
    raise_problem(job.work)
    shards = {
        name: records.Shards(
            list(builder.info.splits[name].shard_lengths),
            builder.info.splits[name].num_bytes,
        )
        for name in splits
    }
    return shards, str(builder.data_path), list(load(job.work, "reports"))


class Tokenrec(tfds.core.GeneratorBasedBuilder):
    """Records of `tokenrec.data.records`, made on Apache Beam. Its name is the first part of the shards' names."""

    VERSION = tfds.core.Version(records.VERSION)

    def __init__(
        self,
        source: PartitionedSource,
        job: BuildOptions,
        splits: Sequence[str],
        user_id_type: str,
    ) -> None:
        self._source, self._job, self._splits, self._user_id_type = (
            source,
            job,
            splits,
            user_id_type,
        )
        super().__init__(data_dir=f"{job.work}/builder", file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = records.record_features(self._job.schema, self._user_id_type)
        return tfds.core.DatasetInfo(
            builder=self, features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any, pipeline: Any) -> dict[str, Any]:
        beam, job = beam_library(), self._job
        rows = (
            pipeline
            | "Row parts" >> beam.Create(list(enumerate(self._source.row_parts())))
            | "Spread row parts" >> beam.Reshuffle()
            | "Encode rows" >> beam.FlatMap(_encode_rows, job)
        )
        table = (
            pipeline
            | "User parts" >> beam.Create(list(enumerate(self._source.user_parts())))
            | "Spread user parts" >> beam.Reshuffle()
            | "Encode users"
            >> beam.FlatMap(spread_user_part, job.schema, job.partitions).with_outputs(
                "problems", "users"
            )
        )
        made = (
            {"table": table.users, "log": rows}
            | "Join users" >> beam.CoGroupByKey()
            | "Make chunks"
            >> beam.FlatMap(_make_chunks, job).with_outputs(
                "problems", "reports", *self._splits
            )
        )
        _ = made.reports | "Save reports" >> beam.Map(_save_report, job.work)
        save_first_problem((table.problems, made.problems), job.work)
        return {name: made[name] for name in self._splits}

    def _example_writer(self) -> tfds.core.writer.ExampleWriter:
        return _ShardWriter(self.info.file_format)

    def _generate_examples(self) -> None:
        raise NotImplementedError(
            "the splits come from one PCollection each, see _split_generators"
        )


class _ShardWriter(tfds.core.writer.ExampleWriter):
    """Writes records with the bytes of `records.encode` (the builder puts their fields in any order), and anywhere:
    ArrayRecord opens local files only, so that a shard is made in one and copied."""

    def write(self, path: Any, examples: Iterable[tuple[int, bytes]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder, "shard")
            super().write(
                local,
                (
                    (key, records.encode(records.decode(example)))
                    for key, example in examples
                ),
            )
            with local.open("rb") as made, epath.Path(path).open("wb") as file:
                shutil.copyfileobj(made, file)


def _encode_rows(
    numbered: tuple[int, LogPart], job: BuildOptions
) -> Iterator[tuple[int, LogBlock]]:
    number, part = numbered
    groups = {group: job.schema.group(group) for group in ("row", "action")}
    first = 0
    for batch in blocks(part.read()):
        encoder = RowEncoder(job.schema)
        out = encoder.encode(batch, first)
        row = out["row"]
        row["item"] = positions(encoder.items.index, load_values(job.work, ITEM_IDS))[
            row["item"]
        ]
        finals = load_finals(
            job.work,
            encoder.tables,
            [f for features in groups.values() for f in features],
        )
        for group, features in groups.items():
            to_final(row[f"{group}_ids"], features, finals)
        yield from spread_log(
            LogBlock((number, first), batch.column("user_id"), out), job.partitions
        )
        first += batch.num_rows


def _make_chunks(
    grouped: tuple[int, dict[str, Iterable[Any]]], job: BuildOptions
) -> Iterator[Any]:
    from apache_beam.pvalue import TaggedOutput

    partition, group = grouped
    schema, tally, sizes = job.schema, Tally.empty(job.schema), {}
    users, tables, numbered = gather_users(schema, group["table"], group["log"])
    if not numbered:  # users of the table alone
        return
    users.complete()
    to_final(users.ids, users.features, load_finals(job.work, tables, users.features))
    part = np.concatenate([block.rows for block, _ in numbered])
    part["user"] = np.concatenate([codes for _, codes in numbered])
    del numbered
    try:
        part = finish(part, schema, tally)
    except InputError as error:
        yield TaggedOutput("problems", ((3, partition), str(error)))
        return
    user_ids, features = users.index.values(), user_rows(users, schema)
    for run in cut(part, job.chunk_events, job.overlap):
        sizes[run.split] = np.diff(run.start)
        for place, chunk in enumerate(chunks_of(run, user_ids, features)):
            yield TaggedOutput(
                run.split, ((partition << _KEY_BITS) + place, chunk._asdict())
            )
    yield TaggedOutput("reports", (partition, Report(tally, sizes)))


def _save_report(numbered: tuple[int, Report], work: str) -> None:
    partition, report = numbered
    save_records(work, f"reports/{partition:012d}", report)
