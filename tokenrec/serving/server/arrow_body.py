"""Read a request from an Arrow IPC stream: one row of `tokenrec score`'s file.

The stream holds one record batch of one row, whose columns are the fields of the JSON
request (docs/guides/server.md):

    user        struct<user_id, ...>            time_ms  int64
    history     struct<item_id: list, ...>      context  struct<...>
    candidates  struct<item_id: list, ...>      model, user_version  string

A column of numbers becomes a NumPy array that shares the memory of the body, which is
what makes long lists of candidates cheap. Nulls are those of JSON.
"""

from __future__ import annotations

import struct
from collections.abc import Buffer
from typing import Any

import pyarrow as pa

from tokenrec.serving.request import BadRequest, Limits, too_long
from tokenrec.serving.server.arrow_schema import (
    BOOL,
    COLUMN_PARTS,
    DICTIONARY,
    FLOATS,
    INTEGERS,
    Budget,
    check_messages,
)
from tokenrec.serving.server.http_io import HttpError

_OPTIONS = pa.ipc.IpcReadOptions(
    ensure_alignment=pa.ipc.Alignment.DataTypeSpecific, use_threads=False
)
# What reading a damaged stream raises.
_DAMAGE = (
    *(pa.ArrowException, OSError, ValueError, EOFError, StopIteration),
    struct.error,
)


def parse_arrow(body: Buffer, limits: Limits) -> dict[str, Any]:
    """Read a request, as `parse_request` takes it.

    Args:
      body: an IPC stream. Columns of the request may share its memory.
      limits: the most that a request may hold.

    Raises:
      HttpError: it is no sound stream, or compressed.
      BadRequest: it holds more than one row, a type that no feature has, or more values
        than a body of its size can.
      MemoryError: there is no memory to read it.
    """
    try:
        return _read(pa.py_buffer(body), limits)
    except (BadRequest, HttpError, MemoryError):
        # Arrow's error of memory is an ArrowException, too.
        raise
    except _DAMAGE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise HttpError(
            400,
            "bad_arrow",
            f"body: is no sound Arrow IPC stream: {reason}; send one record batch of "
            "one row",
        ) from None


def _read(data: pa.Buffer, limits: Limits) -> dict[str, Any]:
    messages = pa.ipc.MessageReader.open_stream(data)
    kinds = check_messages(messages, limits.columns)
    with pa.ipc.open_stream(data, options=_OPTIONS) as reader:
        batch = reader.read_next_batch()
    if batch.num_rows != 1:
        raise BadRequest(
            f"body: has {batch.num_rows} rows; send one row, which is the request"
        )
    # Buffers are as long as lengths, and the ends of offsets, claim.
    batch.validate()
    # A part that is null is not there.
    parts = {
        name: array
        for name, array in zip(kinds, batch.columns, strict=True)
        if not array.null_count
    }
    columns = {
        name: [_rows(column) for column in parts[name].flatten()]
        for name in COLUMN_PARTS
        if name in parts and isinstance(kinds[name], dict)
    }
    # Before a value becomes an object of Python: some take no byte of the body.
    for name, most in (("history", limits.history), ("candidates", limits.candidates)):
        for array in columns.get(name, ()):
            if len(array) > most:
                raise BadRequest(too_long(name, len(array), most, "rows"))
    budget = Budget(data.size)
    for name, array in parts.items():
        budget.spend(columns.get(name) or [array])
    # Every offset, dictionary index and text is sound.
    batch.validate(full=True)
    request = {
        name: array[0].as_py() for name, array in parts.items() if name not in columns
    }
    for name, arrays in columns.items():
        of_part = kinds[name]
        assert isinstance(of_part, dict)
        request[name] = {
            column: _values(array, kind)
            for (column, kind), array in zip(of_part.items(), arrays, strict=True)
        }
    return request


def _rows(column: pa.Array) -> pa.Array:
    """Rows of a column: what its only list holds. A null column has no row."""
    rows = column[0].values
    return pa.nulls(0) if rows is None else rows


def _values(array: pa.Array, kind: int) -> Any:
    """Values of a column: an array of numbers where there are no nulls, else a list."""
    # Nulls of floats become NaN.
    if kind in FLOATS or ((kind in INTEGERS or kind == BOOL) and not array.null_count):
        return array.to_numpy(zero_copy_only=False)
    if kind == DICTIONARY:
        # By reference: a long text that many rows have stays one text.
        values = [*array.dictionary.to_pylist(), None]
        places = array.indices.fill_null(len(values) - 1).to_pylist()
        return [values[place] for place in places]
    return array.to_pylist()
