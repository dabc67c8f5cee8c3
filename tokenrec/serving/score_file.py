"""Answer a Parquet file of requests with an artifact alone, a part at a time.

A line of the input is a request, with nested columns as the fields of the JSON request:

    user      struct<user_id, ...>           history     struct<time_ms: list, ...>
    time_ms   int64                          context     struct<...>
    candidates struct<item_id: list, ...>

or, for an artifact of a retrieval run, k, drop_seen, exclude and filter instead of the
candidates (retrieval_request.py).

A line of the output is a candidate, or an item of an answer:

    request   int64, line of the request     request   int64, line of the request
    user_id, time_ms                         user_id, time_ms
    item_id   as it came                     rank      int32, from 1
    known_item  bool, the catalogue has it   item_id   as the catalogue has it
    score_TASK  as `tokenrec predict`        score     as `tokenrec predict`

In a struct a column that is null is a null value: Parquet cannot leave it out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tokenrec.errors import InputError
from tokenrec.runtime.files import read_with_retries
from tokenrec.runtime.table_file import write_tables
from tokenrec.serving.request import BadRequest, Limits, Request, parse_request
from tokenrec.serving.retrieval_request import RetrievalRequest, parse_retrieval
from tokenrec.serving.retriever import Retrieved, Retriever
from tokenrec.serving.scorer import Scorer

# Requests that are in memory at a time.
_AT_ONCE = 64


def score_file(
    scorer: Scorer | Retriever,
    requests: Path,
    out: Path,
    limits: Limits | None = None,
) -> int:
    """Answer a Parquet file of requests.

    Args:
      scorer: the model.
      requests: Parquet file of requests.
      out: Parquet file to write; it appears when it is complete.
      limits: the most that a request may hold; None for those of `Limits`.

    Returns:
      The number of candidates, or of items found.

    Raises:
      InputError: the file cannot be read, or a request cannot be answered; the message
        names its line.
    """
    tables = _tables(scorer, requests, limits or Limits())
    first = next(tables, None)
    if first is None:
        raise InputError(f"--requests '{requests}': has no request; nothing to score")
    # A part of the requests may hold nulls alone.
    rest = (table.cast(first.schema) for table in tables)
    return write_tables(itertools.chain([first], rest), out)


def _tables(
    scorer: Scorer | Retriever, path: Path, limits: Limits
) -> Iterator[pa.Table]:
    """Yield the output, a part of the requests at a time."""
    if isinstance(scorer, Retriever):
        for first, wanted in _read(path, limits, parse_retrieval):
            found = _items_table(scorer, first, wanted)
            users = _users([one.request for one in wanted], path)
            yield _with_users(found, users, first)
        return
    for first, requests in read_requests(path, limits):
        scored = _scores_table(scorer, first, requests)
        yield _with_users(scored, _users(requests, path), first)


def read_requests(path: Path, limits: Limits) -> Iterator[tuple[int, list[Request]]]:
    """Yield the requests of a Parquet file, some at a time, with the first one's line.

    Raises:
      InputError: the file cannot be read, or a line is no request.
    """
    return _read(path, limits, parse_request)


def _read[T](
    path: Path, limits: Limits, parse: Callable[[Any, Limits], T]
) -> Iterator[tuple[int, list[T]]]:
    damage = (pa.ArrowException,)
    file = read_with_retries(
        lambda: pq.ParquetFile(path),
        path,
        "--requests",
        "give a Parquet file of requests",
        damage=damage,
    )
    line = 0
    with file:
        for batch in file.iter_batches(_AT_ONCE):
            values = [_without_nulls(value) for value in batch.to_pylist()]
            if values:
                yield line, _each(lambda value: parse(value, limits), values, line)
            line += len(values)


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """A line less what is null: a part, or a condition of a filter, is not there."""
    given = {name: part for name, part in value.items() if part is not None}
    if isinstance(given.get("filter"), dict):
        given["filter"] = {
            name: condition
            for name, condition in given["filter"].items()
            if condition is not None
        }
    return given


def _each[T, U](apply: Callable[[T], U], values: Sequence[T], first: int) -> list[U]:
    """Apply a function to lines; name the line in what it raises."""
    results = []
    for line, value in enumerate(values, first):
        try:
            results.append(apply(value))
        except BadRequest as error:
            raise BadRequest(f"--requests, line {line}: {error}") from error
    return results


def _items_table(
    retriever: Retriever, first: int, requests: Sequence[RetrievalRequest]
) -> pa.Table:
    """A table row per item found."""
    encoded = _each(retriever.encode, requests, first)
    prefixes = retriever.prefill(encoded)
    answers = retriever.retrieve(list(zip(prefixes, encoded, strict=True)))
    counts = [len(answer.items) for answer in answers]
    lines = np.repeat(np.arange(first, first + len(requests)), counts)
    place = pa.array(lines - first)
    ranks = [np.arange(1, count + 1, dtype=np.int32) for count in counts]
    return pa.table(
        {
            "request": pa.array(lines),
            "rank": pa.array(np.concatenate(ranks)),
            "item_id": pa.array(_joined(answers), retriever.item_type),
            "score": pa.array(np.concatenate([answer.scores for answer in answers])),
            "time_ms": pa.array([one.request.time_ms for one in requests]).take(place),
        }
    )


def _joined(answers: Sequence[Retrieved]) -> list[Any]:
    return [item for answer in answers for item in answer.items]


def _users(requests: Sequence[Request], path: Path) -> pa.Array:
    """Ids of the users of requests, in the type of their file."""
    # Not the type of the values: a part of the requests may have no user.
    user = pq.read_schema(path).field("user").type
    kind = user.field("user_id").type if user.get_field_index("user_id") >= 0 else None
    return pa.array([request.user.get("user_id") for request in requests], kind)


def _with_users(table: pa.Table, users: pa.Array, first: int) -> pa.Table:
    """Add the id of each user, after the line of the request."""
    place = pc.subtract(table["request"], first)
    return table.add_column(1, "user_id", users.take(place))


def _scores_table(scorer: Scorer, first: int, requests: Sequence[Request]) -> pa.Table:
    """A table row per candidate."""
    encoded = _each(scorer.encode, requests, first)
    scores = scorer.score(encoded)
    unknown = [set(one.unknown.rows) for one in encoded]
    counts = [request.candidate_count for request in requests]
    lines = np.repeat(np.arange(first, first + len(requests)), counts)
    place = pa.array(lines - first)
    columns: dict[str, Any] = {
        "request": pa.array(lines),
        "item_id": pa.array(
            [item for request in requests for item in request.candidates["item_id"]]
        ),
        "time_ms": pa.array([r.time_ms for r in requests]).take(place),
        "known_item": pa.array(
            [
                row not in of_request
                for of_request, count in zip(unknown, counts, strict=True)
                for row in range(count)
            ]
        ),
    }
    together = np.concatenate(scores)
    for column, name in enumerate(scorer.outputs):
        columns[name] = pa.array(np.ascontiguousarray(together[:, column]))
    return pa.table(columns)
