"""Check an Arrow IPC stream before its values are read: messages, types, memory.

Arrow would allocate what a compressed buffer claims to hold, and arrays may share
memory: a small body could become any number of objects. So compressed streams are
refused, and a body gives no more values than its size allows.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from tokenrec.serving.request import BadRequest
from tokenrec.serving.server.http_io import HttpError

# Parts of a request whose columns hold a list of rows each.
COLUMN_PARTS = ("history", "candidates")

INTEGERS = {
    pa.type_for_alias(f"{sign}int{bits}").id
    for sign in ("", "u")
    for bits in (8, 16, 32, 64)
}
FLOATS = {pa.float16().id, pa.float32().id, pa.float64().id}
BOOL, NULL, STRUCT = pa.bool_().id, pa.null().id, pa.struct([]).id
TEXTS = {pa.string().id, pa.large_string().id, pa.string_view().id}
DICTIONARY = pa.dictionary(pa.int8(), pa.string()).id
_INT8 = pa.int8()
_LISTS = {pa.list_(_INT8).id, pa.large_list(_INT8).id, pa.list_(_INT8, 1).id}
_PLAIN = INTEGERS | FLOATS | TEXTS | {BOOL}

# Values that a body may hold beside those that its size allows: columns of nulls alone
# take none of it.
_FREE_VALUES = 1 << 16
_VALUES_PER_BYTE = 8  # A bool takes a bit.

# Bytes of a schema up to which it is remembered.
_SCHEMA_BYTES = 1 << 16

# Flatbuffers of an Arrow message: slots of `Message`, `DictionaryBatch`, `RecordBatch`.
_HEADER, _DICTIONARY_DATA, _COMPRESSION = 2, 1, 3

# Type of each field of a request, by the numbers of Arrow: of a column of a part the type
# of its rows, of a part of columns all of them.
type Kinds = dict[str, int | dict[str, int]]


def check_messages(messages: Iterable[pa.Message], most: int) -> Kinds:
    """Check that a stream holds one record batch that is not compressed.

    Args:
      messages: messages of the stream.
      most: columns that a part of a request may have.

    Returns:
      Types of the fields of the batch.

    Raises:
      ArrowInvalid: the stream is not one of Arrow 1.0 or later, or has two schemas.
      struct.error: a message has no header.
      HttpError: it is compressed.
      BadRequest: it holds more than one record batch, or a type that no feature has.
    """
    schema, batches, dictionaries = b"", 0, 0
    for message in messages:
        if message.metadata_version < pa.ipc.MetadataVersion.V5:
            raise pa.ArrowInvalid("its format is older than that of Arrow 1.0")
        if message.type == "schema":
            # The reader takes the first one, and another one may follow the batch.
            if schema:
                raise pa.ArrowInvalid("it has two schemas")
            schema = message.serialize().to_pybytes()
            continue
        batches += message.type == "record batch"
        dictionaries += message.type == "dictionary"
        if batches > 1 or dictionaries > most:
            raise BadRequest(
                "body: has more than one record batch, or too many dictionaries; send "
                "one record batch"
            )
        if _is_compressed(message):
            raise HttpError(
                415,
                "wrong_type",
                "body: its buffers are compressed; write the stream without compression",
            )
    if len(schema) > _SCHEMA_BYTES:
        return _kinds.__wrapped__(schema, most)
    return _kinds(schema, most)


def _is_compressed(message: pa.Message) -> bool:
    """Whether the buffers of a record batch, or of a dictionary, are compressed."""
    metadata = memoryview(message.metadata)
    (root,) = struct.unpack_from("<I", metadata)
    header = _follow(metadata, _slot(metadata, root, _HEADER))
    if message.type == "dictionary":
        header = _follow(metadata, _slot(metadata, header, _DICTIONARY_DATA))
    return _slot(metadata, header, _COMPRESSION) != 0


def _slot(metadata: memoryview, table: int, slot: int) -> int:
    """Place of a field of a flatbuffers table; 0 where it is not set.

    Arrow verified the message when it read it.
    """
    (back,) = struct.unpack_from("<i", metadata, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", metadata, vtable)
    entry = 4 + 2 * slot
    if entry >= size:
        return 0
    (offset,) = struct.unpack_from("<H", metadata, vtable + entry)
    return table + offset if offset else 0


def _follow(metadata: memoryview, place: int) -> int:
    """The table that a field points to."""
    return place + int(struct.unpack_from("<I", metadata, place)[0])


# A caller sends one schema again and again.
@functools.lru_cache(64)
def _kinds(schema: bytes, most: int) -> Kinds:
    """Types of the fields of a request, checked."""
    fields = list(pa.ipc.read_schema(pa.py_buffer(schema)))
    _check_names(fields, "request", most)
    kinds: Kinds = {}
    for field in fields:
        if field.type.id != STRUCT:
            kinds[field.name] = _kind(field.type, field.name)
            continue
        part = list(field.type)
        _check_names(part, field.name, most)
        is_columns = field.name in COLUMN_PARTS
        inner = {
            column.name: _kind(
                _row_type(column, field.name) if is_columns else column.type,
                f"{field.name}.{column.name}",
            )
            for column in part
        }
        kinds[field.name] = inner if is_columns else STRUCT
    return kinds


def _check_names(fields: list[pa.Field], where: str, most: int) -> None:
    names = {field.name for field in fields}
    if len(names) != len(fields):
        raise BadRequest(f"{where}: two columns have one name; send each once")
    if len(fields) > most:
        raise BadRequest(
            f"{where}: has {len(fields)} columns, more than the limit of {most}; send "
            "fewer"
        )


def _row_type(column: pa.Field, part: str) -> pa.DataType:
    """Type of the rows of a column."""
    if column.type.id not in _LISTS:
        raise BadRequest(
            f"{part}.{column.name}: is {_shown(column.type)} and no list; send a list "
            "with one value per row"
        )
    return column.type.value_type


def _kind(given: pa.DataType, where: str) -> int:
    """Check the type of one value, or of one value per row."""
    inner = given
    if given.id in _LISTS or given.id == DICTIONARY:
        inner = given.value_type
    if inner.id not in _PLAIN and inner.id != NULL:
        raise BadRequest(
            f"{where}: is {_shown(given)}; send integers, floats, bools, texts, or lists "
            "of them"
        )
    return int(given.id)


def _shown(kind: pa.DataType) -> str:
    return str(kind)[:60]


class Budget:
    """Count the values and texts that arrays refer to.

    Args:
      size: bytes of the body.
    """

    def __init__(self, size: int) -> None:
        self._values = _FREE_VALUES + _VALUES_PER_BYTE * size
        self._text = size

    def spend(self, arrays: Iterable[pa.Array]) -> None:
        """Take what arrays hold.

        Raises:
          BadRequest: it is more than a body of this size can hold.
        """
        for array in arrays:
            kind = array.type.id
            self._values -= len(array)
            if kind in TEXTS:
                self._text -= _text_bytes(array, kind)
            elif kind in _LISTS:
                # They become objects of Python, of which a body in JSON has one in two
                # bytes at most.
                self._values -= (_VALUES_PER_BYTE - 1) * len(array.values)
                self.spend([array.values])
            elif kind == STRUCT:
                self.spend(array.flatten())
            elif kind == DICTIONARY:
                self.spend([array.dictionary])
            if self._values < 0 or self._text < 0:
                raise BadRequest(
                    "body: its columns share memory, and hold more values than a body "
                    "of its size can; send each column's own values"
                )


def _text_bytes(array: pa.Array, kind: int) -> int:
    """Bytes of all texts of an array."""
    if not len(array):
        return 0
    start, stop = array.offset, array.offset + len(array)
    buffer = array.buffers()[1]
    if kind == pa.string_view().id:
        views = np.frombuffer(buffer, np.int32).reshape(-1, 4)
        return int(views[start:stop, 0].clip(0).sum(dtype=np.int64))
    offsets = np.frombuffer(buffer, np.int32 if kind == pa.string().id else np.int64)
    return int(offsets[stop]) - int(offsets[start])
