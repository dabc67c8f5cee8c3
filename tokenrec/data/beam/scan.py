"""The first pass: every row and every user is checked and counted, and distinct values are gathered.

Rows never leave the worker that reads them. What is shuffled are distinct values per block of rows: those of the
embedding tables and of the items to one worker per table, those of the users to `USER_PARTITIONS` workers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.beam.engine import beam_library
from tokenrec.data.beam.shared_files import load, save_records
from tokenrec.data.beam.users import (
    LogBlock,
    UserBlock,
    gather_users,
    read_users,
    spread_log,
    spread_users,
)
from tokenrec.data.interaction_log import SCORED
from tokenrec.data.preparation.chunks import TRAIN
from tokenrec.data.preparation.intake import RowEncoder, blocks
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.schema import Schema
from tokenrec.data.source import SPLITS, LogPart, PartitionedSource
from tokenrec.data.vocabulary import Marks, ValueIndex
from tokenrec.errors import InputError

USER_PARTITIONS = 256
_ITEMS, _TABLE = "items", "table"

Values = tuple[
    np.ndarray, np.ndarray
]  # distinct values, int64 or object, and which of them training rows use


class Distinct(NamedTuple):
    """Distinct values of one embedding table, or of the items (`table` None), all of one `type`."""

    table: str | None
    type: str
    values: np.ndarray
    trained: np.ndarray


class RowCount(NamedTuple):
    """Rows, their least and greatest time, and which splits have a row that a chunk can be made for."""

    rows: int
    earliest: int
    latest: int
    splits: frozenset[str]


class UserCount(NamedTuple):
    """Users of a partition, the type of their ids, and the dense features of those in training rows."""

    partition: int
    users: int
    type: str
    moments: Moments


class Scan(NamedTuple):
    """What the first pass found."""

    rows: RowCount | None
    users: list[UserCount]
    distinct: list[Distinct]


def scan(
    source: PartitionedSource,
    work: str,
    options: Any,
    user_partitions: int = USER_PARTITIONS,
) -> Scan:
    """Runs the pass on Apache Beam; `work` is a folder that all workers see.

    Raises:
      InputError: a part cannot be read, or a row or a user is wrong; names the part. Of several problems it is the
        first one of the first part.
    """
    beam = beam_library()
    schema, tags = source.schema, ("values", "counted", "users")
    with beam.Pipeline(options=options) as pipeline:
        rows = (
            pipeline
            | "Row parts" >> beam.Create(list(enumerate(source.row_parts())))
            | "Spread row parts" >> beam.Reshuffle()
            | "Scan rows"
            >> beam.FlatMap(_scan_rows, schema, user_partitions).with_outputs(
                "problems", *tags
            )
        )
        table = (
            pipeline
            | "User parts" >> beam.Create(list(enumerate(source.user_parts())))
            | "Spread user parts" >> beam.Reshuffle()
            | "Scan user table"
            >> beam.FlatMap(spread_user_part, schema, user_partitions).with_outputs(
                "problems", "users"
            )
        )
        users = (
            {"table": table.users, "log": rows.users}
            | "Join users" >> beam.CoGroupByKey()
            | "Scan users"
            >> beam.FlatMap(_scan_users, schema).with_outputs(
                "problems", "values", "counted"
            )
        )
        _ = (
            (rows.values, users.values)
            | "All values" >> beam.Flatten()
            | "Distinct" >> beam.CombinePerKey(_union)
            | "Save values" >> beam.Map(_save_values, work)
        )
        _ = (
            rows.counted
            | "Count" >> beam.CombineGlobally(_sum)
            | "Save count" >> beam.Map(_save, work, "rows")
        )
        _ = (
            users.counted
            | "All user counts" >> beam.combiners.ToList()
            | "Save user counts" >> beam.Map(_save, work, "users")
        )
        save_first_problem((table.problems, rows.problems, users.problems), work)
    raise_problem(work)
    counted = next(load(work, "scan/rows"), None)
    users_counted = sorted(
        next(load(work, "scan/users"), ()), key=lambda u: u.partition
    )
    return Scan(counted, users_counted, list(load(work, "scan/values")))


def spread_user_part(
    numbered: tuple[int, LogPart], schema: Schema, partitions: int
) -> Iterator[Any]:
    """Blocks of a part of the table of users by partition, tagged "users"; a problem of the input, "problems"."""
    tagged = _tagger()
    try:
        for block in read_users(numbered, schema):
            for piece in spread_users(block, partitions):
                yield tagged("users", piece)
    except InputError as error:
        yield tagged("problems", ((0, numbered[0]), str(error)))


def save_first_problem(problems: Sequence[Any], work: str) -> None:
    """Adds to the pipeline what keeps the least of all (place, message) for `raise_problem`.

    Problems travel as data because an exception in a worker is tried again, and comes back as text.
    """
    beam = beam_library()
    _ = (
        problems
        | "All problems" >> beam.Flatten()
        | "First problem"
        >> beam.CombineGlobally(functools.partial(min, default=None)).without_defaults()
        | "Save problem" >> beam.Map(_save, work, "problem")
    )


def raise_problem(work: str) -> None:
    """Raises an InputError with the problem that a pass left in `work`, if there is one."""
    for _, message in load(work, "scan/problem"):
        raise InputError(message)


def _scan_rows(
    numbered: tuple[int, LogPart], schema: Schema, partitions: int
) -> Iterator[Any]:
    tagged = _tagger()
    number, part = numbered
    first = 0
    try:
        for batch in blocks(part.read()):
            encoder = RowEncoder(schema)
            try:
                out = encoder.encode(batch, first)
            except InputError as error:
                raise InputError(f"{part.name}: {error}") from error
            for name, table in encoder.tables.items():
                if table.index.type:
                    known, _ = table.finish()
                    yield tagged(
                        "values",
                        (
                            (_TABLE, name, table.index.type),
                            (known, np.ones(len(known), bool)),
                        ),
                    )
            items = encoder.items
            yield tagged(
                "values",
                (
                    (_ITEMS, "", items.index.type),
                    (items.index.values(), items.in_training()),
                ),
            )
            users = pa.array(encoder.users.index.values())
            for piece in spread_log(
                LogBlock((number, first), users, encoder.users.in_training()),
                partitions,
            ):
                yield tagged("users", piece)
            yield tagged("counted", _count(out))
            first += batch.num_rows
    except InputError as error:
        yield tagged("problems", ((1, number), str(error)))


def _scan_users(
    grouped: tuple[int, dict[str, Iterable[Any]]], schema: Schema
) -> Iterator[Any]:
    tagged = _tagger()
    partition, group = grouped
    table: Iterable[UserBlock] = group["table"]
    try:
        users, tables, numbered = gather_users(schema, table, group["log"])
    except InputError as error:
        yield tagged("problems", ((2, partition), str(error)))
        return
    for block, codes in numbered:
        users.trained.add(codes[block.rows])
    users.complete()
    for name, values in tables.items():
        if values.index.type:
            known, _ = values.finish()
            yield tagged(
                "values",
                ((_TABLE, name, values.index.type), (known, np.ones(len(known), bool))),
            )
    moments = Moments(users.features)
    moments.add(users.dense[users.in_training()])
    yield tagged(
        "counted", UserCount(partition, users.index.size, users.index.type, moments)
    )


def _tagger() -> Any:
    from apache_beam.pvalue import TaggedOutput

    return TaggedOutput


def _count(part: np.ndarray) -> RowCount:
    time, flags = part["row"]["time"], part["row"]["flags"]
    matters = np.where(part["split"] == TRAIN, flags > 0, (flags & SCORED) > 0)
    splits = frozenset(SPLITS[number] for number in np.unique(part["split"][matters]))
    return RowCount(len(part), int(time.min()), int(time.max()), splits)


def _sum(counts: Iterable[RowCount | None]) -> RowCount | None:
    given = [count for count in counts if count is not None]
    if not given:
        return None
    rows, earliest, latest, splits = zip(*given, strict=True)
    return RowCount(sum(rows), min(earliest), max(latest), frozenset().union(*splits))


def _union(parts: Iterable[Values]) -> Values:
    index, trained = ValueIndex(), Marks()
    for values, marked in parts:
        if len(values):
            trained.add(index.codes(pa.array(values), "values")[marked])
    return index.values(), trained.array(index.size)


def _save_values(keyed: tuple[tuple[str, str, str], Values], work: str) -> None:
    (what, name, kind), (values, trained) = keyed
    found = Distinct(name if what == _TABLE else None, kind, values, trained)
    save_records(work, f"scan/values/{what}-{name.encode().hex()}-{kind}", found)


def _save(value: Any, work: str, name: str) -> None:
    if value is not None:
        save_records(work, f"scan/{name}/all", value)
