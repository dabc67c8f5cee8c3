"""Decode records into an `InteractionLog`, with the excluded features left out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tokenrec.data import records
from tokenrec.data.interaction_log import REPEATED, InteractionLog
from tokenrec.data.metadata import Metadata
from tokenrec.data.schema import Feature, Group, Schema, columns
from tokenrec.errors import InputError

_GROUPS: tuple[Group, ...] = ("user", "row", "action")
# Fields of a log row that are no features.
_ROW_FIELDS = ("time", "item", "flags", "request", "labels")
_REMEDY = "prepare the data set again"


class LogDecoder:
    """Decoder of the records of one data set.

    Args:
      metadata: as written; its schema is the layout of the records.
      schema: the features to keep.
    """

    def __init__(self, metadata: Metadata, schema: Schema) -> None:
        full = metadata.schema
        self._row_dtype = records.row_dtype(full)
        self._user_dtype = records.user_dtype(full)
        self._tasks = len(full.tasks)
        self._targets = len(full.real_tasks)
        self._weighted = full.weighted
        self._string_ids = metadata.key_types["user_id"] == "string"
        # Columns of the records' matrices that are kept: of `ids`, and of `dense`.
        self._kept = {
            group: select_columns(full.group(group), schema.group(group))
            for group in _GROUPS
        }

    def allocate(self, start: np.ndarray) -> InteractionLog:
        """Make a log without values.

        Args:
          start: `[U + 1] int64`, first log row of each chunk.

        Raises:
          MemoryError: the log does not fit in memory.
        """
        chunks, rows = len(start) - 1, int(start[-1])
        # Filled block by block: joining blocks at the end would need the memory twice.
        matrices = {}
        for group in _GROUPS:
            ids, dense = self._kept[group]
            count = chunks if group == "user" else rows
            matrices[f"{group}_ids"] = np.empty((count, len(ids)), np.int32)
            matrices[f"{group}_dense"] = np.empty((count, len(dense)), np.float32)
        return InteractionLog(
            start=start,
            user_id=np.empty(chunks, object if self._string_ids else np.int64),
            time=np.empty(rows, np.int64),
            item=np.empty(rows, np.int32),
            flags=np.empty(rows, np.uint8),
            request=np.empty(rows, np.int64),
            labels=np.empty((rows, self._tasks), np.int8),
            targets=(
                np.empty((rows, self._targets), np.float32) if self._targets else None
            ),
            weight=np.empty(rows, np.float32) if self._weighted else None,
            **matrices,
        )

    def fill(
        self, log: InteractionLog, first: int, block: Sequence[bytes], where: str
    ) -> None:
        """Decode records into chunks of a log.

        Args:
          log: made by `allocate`.
          first: chunk of the first record.
          block: consecutive records.
          where: what messages begin with: the data set, the split and the chunks.

        Raises:
          InputError: a record is not a chunk, or does not fit the schema or the log.
        """
        last = first + len(block)
        chunk_slice = slice(first, last)
        row_slice = slice(int(log.start[first]), int(log.start[last]))
        chunks = _decode(block, str if self._string_ids else int, where)
        users = _from_bytes(
            [chunk.user for chunk in chunks],
            self._user_dtype,
            np.ones(len(block), np.int64),
            where,
        )
        rows = _from_bytes(
            [chunk.rows for chunk in chunks],
            self._row_dtype,
            np.diff(log.start[first : last + 1]),
            where,
        )
        log.user_id[chunk_slice] = [chunk.user_id for chunk in chunks]
        # User features are stored once per chunk, the others once per log row.
        for group in _GROUPS:
            ids, dense = self._kept[group]
            stored = users if group == "user" else rows
            place = chunk_slice if group == "user" else row_slice
            getattr(log, f"{group}_ids")[place] = stored[f"{group}_ids"][:, ids]
            getattr(log, f"{group}_dense")[place] = stored[f"{group}_dense"][:, dense]
        for name in _ROW_FIELDS:
            getattr(log, name)[row_slice] = rows[name]
        if log.targets is not None:
            log.targets[row_slice] = rows["targets"]
        if log.weight is not None:
            log.weight[row_slice] = rows["weight"]
        log.flags[row_slice] &= np.uint8(~REPEATED & 0xFF)


def select_columns(
    features: Sequence[Feature], selected: Sequence[Feature]
) -> tuple[np.ndarray, np.ndarray]:
    """Find the columns of some features in the matrices of all features.

    Args:
      features: the features of the matrices, in order.
      selected: some of them.

    Returns:
      `[n] int64` columns of `ids`, and `[m] int64` columns of `dense`.
    """
    place = columns(features)
    ids = [np.arange(*place.ids[f.name]) for f in selected if f.is_integer]
    dense = [np.arange(*place.dense[f.name]) for f in selected if not f.is_integer]
    none = np.zeros(0, np.int64)
    return np.concatenate([none, *ids]), np.concatenate([none, *dense])


def _decode(block: Sequence[bytes], id_type: type, where: str) -> list[records.Chunk]:
    try:
        chunks = [records.decode(record) for record in block]
    except ValueError as error:
        raise InputError(
            f"{where}: a record is not a chunk of rows: {error}; {_REMEDY}"
        ) from error
    for chunk in chunks:
        if not isinstance(chunk.user_id, id_type):
            raise InputError(
                f"{where}: user_id={chunk.user_id!r} is no {id_type.__name__}, as "
                f"key_types says; {_REMEDY}"
            )
    return chunks


def _from_bytes(
    parts: Sequence[bytes], dtype: np.dtype, counts: np.ndarray, where: str
) -> np.ndarray:
    """Join the bytes of several arrays and view them as one array.

    Args:
      parts: bytes of each array.
      dtype: type of their entries.
      counts: `[parts] int64`, number of entries that each array must have.
      where: what messages begin with.
    """
    # The index of chunks and the shards are different files: they may belong to
    # different data sets.
    sizes = np.fromiter(map(len, parts), np.int64, len(parts))
    if (sizes != counts * dtype.itemsize).any():
        raise InputError(
            f"{where}: a record does not fit the schema or the index of chunks; "
            f"{_REMEDY}"
        )
    # A user without features is an entry of no bytes, which NumPy cannot view.
    if not dtype.itemsize:
        return np.zeros(int(counts.sum()), dtype)
    return np.frombuffer(b"".join(parts), dtype)
