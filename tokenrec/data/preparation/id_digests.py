"""Compute digests of what the ids of a prepared folder mean.

Values are hashed and not files, because another version of a library may write the same
values as other bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.dataset import ITEMS
from tokenrec.data.memory_limit import blocks
from tokenrec.data.schema import Schema
from tokenrec.data.tokenizer import TOKENIZER_FILE
from tokenrec.data.vocabulary import Vocabulary, value_tables

_ITEMS_AT_ONCE = 2**18
_LENGTH_BYTES = 4


class IdDigests(NamedTuple):
    """SHA-256 digests of the meaning of ids, as in `Schema`.

    Attributes:
      ids: of the vocabularies, the tokenizer and the item ids.
      vocabularies: of the vocabularies and the tokenizer.
    """

    ids: str
    vocabularies: str


def digest_ids(folder: Path, schema: Schema) -> IdDigests:
    """Compute the digests of a folder whose vocabularies and items are written."""
    ids, vocabularies = hashlib.sha256(), hashlib.sha256()
    for part in _item_parts(folder):
        ids.update(part)
    for table in sorted(value_tables(schema.features)):
        for part in _table_parts(folder, table):
            ids.update(part)
            vocabularies.update(part)
    # Without a text there may be one all the same, for the literal texts of prompts.
    if (folder / TOKENIZER_FILE).is_file():
        tokenizer = (folder / TOKENIZER_FILE).read_bytes()
        ids.update(tokenizer)
        vocabularies.update(tokenizer)
    return IdDigests(ids.hexdigest(), vocabularies.hexdigest())


def _table_parts(folder: Path, table: str) -> Iterator[bytes]:
    """Yield what is hashed of a vocabulary: number, NumPy's kind, and the values."""
    vocabulary = Vocabulary(folder, table)
    kind = "i" if vocabulary.type == "int64" else "O"
    yield f"table {table}: {vocabulary.size} {kind}\n".encode()
    yield from map(_value_bytes, vocabulary.parts())


def _item_parts(folder: Path) -> Iterator[bytes]:
    """Yield what is hashed of the item ids, in the same form."""
    path = folder / ITEMS / "item_id.npy"
    items = np.load(path, mmap_mode="r", allow_pickle=False)
    yield f"items: {len(items)} {items.dtype.kind}\n".encode()
    for part in blocks(len(items), _ITEMS_AT_ONCE):
        yield _value_bytes(pa.array(items[part].tolist()))


def _value_bytes(values: pa.Array) -> bytes:
    """Join int64 values, or strings with their lengths in front, as bytes.

    The length keeps ["ab", "c"] and ["a", "bc"] apart.
    """
    if pa.types.is_int64(values.type):
        # Little-endian on every machine.
        return values.to_numpy().astype("<i8", copy=False).tobytes()
    values = values.cast(pa.large_string())
    _, offsets, data = values.buffers()
    begin = np.frombuffer(offsets, np.int64)[values.offset :][: len(values) + 1]
    lengths = np.diff(begin)
    place = begin[:-1] - begin[0] + _LENGTH_BYTES * np.arange(len(lengths))
    out = np.empty(int(lengths.sum()) + _LENGTH_BYTES * len(lengths), np.uint8)
    is_text = np.ones(len(out), bool)
    for byte in range(_LENGTH_BYTES):
        out[place + byte] = lengths >> (8 * byte) & 0xFF
        is_text[place + byte] = False
    if data is not None:
        out[is_text] = np.frombuffer(data, np.uint8)[begin[0] : begin[-1]]
    return out.tobytes()
