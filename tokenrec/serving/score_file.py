"""Score a Parquet file of requests with an artifact alone, a part at a time.

A line of the input is a request, with nested columns as the fields of the JSON request:

    user      struct<user_id, ...>           history     struct<time_ms: list, ...>
    time_ms   int64                          context     struct<...>
    candidates struct<item_id: list, ...>

A line of the output is a candidate:

    request   int64, line of the request     item_id     as it came
    user_id, time_ms                         known_item  bool, the catalogue has it
    score_TASK                               as `tokenrec predict`

In a struct a column that is null is a null value: Parquet cannot leave it out.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.errors import InputError
from tokenrec.runtime.files import atomic_replace, read_with_retries
from tokenrec.runtime.paths import make_folder
from tokenrec.serving.request import BadRequest, Limits, Request, parse_request
from tokenrec.serving.scorer import Scorer

# Requests that are in memory at a time.
_AT_ONCE = 64


def score_file(
    scorer: Scorer, requests: Path, out: Path, limits: Limits | None = None
) -> int:
    """Score a Parquet file of requests.

    Args:
      scorer: the model.
      requests: Parquet file of requests.
      out: Parquet file to write; it appears when it is complete.
      limits: the most that a request may hold; None for those of `Limits`.

    Returns:
      The number of candidates.

    Raises:
      InputError: the file cannot be read, or a request cannot be scored; the message
        names its line.
    """
    limits = limits or Limits()
    tables = _tables(scorer, requests, limits)
    first = next(tables, None)
    if first is None:
        raise InputError(f"--requests '{requests}': has no request; nothing to score")
    make_folder(out.parent)
    rows = 0
    with (
        atomic_replace(out) as partial,
        pq.ParquetWriter(partial, first.schema) as file,
    ):
        for table in itertools.chain([first], tables):
            file.write_table(table)
            rows += table.num_rows
    return rows


def read_requests(path: Path, limits: Limits) -> Iterator[tuple[int, list[Request]]]:
    """Yield the requests of a Parquet file, some at a time, with the first one's line.

    Raises:
      InputError: the file cannot be read, or a line is no request.
    """
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
            values = batch.to_pylist()
            yield (
                line,
                [
                    _parse(value, line + number, limits)
                    for number, value in enumerate(values)
                ],
            )
            line += len(values)


def _parse(value: dict[str, Any], line: int, limits: Limits) -> Request:
    # A part that is null is not there.
    given = {name: part for name, part in value.items() if part is not None}
    try:
        return parse_request(given, limits)
    except BadRequest as error:
        raise BadRequest(f"--requests, line {line}: {error}") from error


def _tables(scorer: Scorer, path: Path, limits: Limits) -> Iterator[pa.Table]:
    schema: pa.Schema | None = None
    for first, requests in read_requests(path, limits):
        if not requests:
            continue
        encoded = []
        for number, request in enumerate(requests):
            try:
                encoded.append(scorer.encode(request))
            except BadRequest as error:
                line = first + number
                raise BadRequest(f"--requests, line {line}: {error}") from error
        scores = scorer.score(encoded)
        unknown = [set(one.unknown.rows) for one in encoded]
        table = _table(scorer, first, requests, scores, unknown)
        # A part of the requests may hold nulls alone.
        schema = schema or table.schema
        yield table.cast(schema)


def _table(
    scorer: Scorer,
    first: int,
    requests: Sequence[Request],
    scores: Sequence[np.ndarray],
    unknown: Sequence[set[int]],
) -> pa.Table:
    counts = [request.candidate_count for request in requests]
    lines = np.repeat(np.arange(first, first + len(requests)), counts)
    place = pa.array(lines - first)
    columns: dict[str, Any] = {
        "request": pa.array(lines),
        "user_id": pa.array([r.user.get("user_id") for r in requests]).take(place),
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
