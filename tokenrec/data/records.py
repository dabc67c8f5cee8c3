"""Store chunks on disk as a tensorflow-datasets data set, without using TensorFlow.

A split is ArrayRecord files, the *shards*. A record is a chunk, a run of one user's log
rows, as a `tf.train.Example` with three features. NumPy reads their bytes without
copying:

| feature | value |
|---|---|
| `user_id` | original id, int64 or UTF-8 bytes |
| `user` | features of the user, one `user_dtype` |
| `rows` | log rows of the chunk, an array of `row_dtype` |

Shards are written with `ArrayRecordWriter` directly, and described afterwards for
tensorflow-datasets. The writer of a TFDS builder would shuffle the records, and for
that keep up to 1 GB of them in memory and need TensorFlow beyond that.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from tokenrec.data.metadata import Metadata
from tokenrec.data.schema import Schema, columns
from tokenrec.errors import InputError
from tokenrec.runtime.files import read_json, read_with_retries

# Name and version of the data set in tensorflow-datasets.
NAME = "tokenrec"
VERSION = "1.0.0"
# Folder of the index: log rows of each chunk, an array per split.
INDEX = "chunks"
SHARD_BYTES = 256 << 20
# Records that are read at once.
READ_CHUNKS = 128
# No read-ahead: the pipeline asks for whole ranges of records, in any order.
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"
_REMEDY = "prepare the data set again"


def row_dtype(schema: Schema) -> np.dtype:
    """Layout of a log row on disk: the `[R]` columns of `InteractionLog`."""
    row = columns(schema.group("row"))
    action = columns(schema.group("action"))
    # Little-endian on every machine. The order is part of the format on disk.
    fields: list[tuple[Any, ...]] = [
        ("time", "<i8"),
        ("request", "<i8"),
        ("item", "<i4"),
        ("row_ids", "<i4", (row.ids_width,)),
        ("row_dense", "<f4", (row.dense_width,)),
        ("action_ids", "<i4", (action.ids_width,)),
        ("action_dense", "<f4", (action.dense_width,)),
        ("flags", "u1"),
        ("labels", "i1", (len(schema.tasks),)),
    ]
    # Only where the schema asks for them: other data sets have no such column.
    if schema.real_tasks:
        fields.append(("targets", "<f4", (len(schema.real_tasks),)))
    if schema.weighted:
        fields.append(("weight", "<f4"))
    return np.dtype(fields)


def user_dtype(schema: Schema) -> np.dtype:
    """Layout of a user's features on disk."""
    user = columns(schema.group("user"))
    return np.dtype(
        [
            ("user_ids", "<i4", (user.ids_width,)),
            ("user_dense", "<f4", (user.dense_width,)),
        ]
    )


# A group is what ArrayRecord compresses and reads together: one chunk. Measured beside
# its default, zstd:3, in processor time: written in 0.4 to 0.7 of it and read in 0.6 to
# 1.0; files 2 to 7 % larger (chunks of a few rows, Complete Journey, KuaiRand-Pure), of
# random numbers 22 %.
_WRITER_OPTIONS = "group_size:1,zstd:-1"


class Chunk(NamedTuple):
    """A record.

    Attributes:
      user_id: original id.
      user: bytes of one `user_dtype`.
      rows: bytes of an array of `row_dtype`.
    """

    user_id: int | str
    user: bytes
    rows: bytes


class Shards(NamedTuple):
    """Sizes of the shards of a split.

    Attributes:
      lengths: number of records in each shard.
      num_bytes: bytes of all records.
    """

    lengths: list[int]
    num_bytes: int


class SplitWriter:
    """Write the records of a split to shards of about `SHARD_BYTES`, one at a time.

    Args:
      directory: folder of the data set.
      split: name of the split.

    Attributes:
      shard_lengths: records in each shard so far.
      num_bytes: bytes of all records so far.
    """

    def __init__(self, directory: Path, split: str) -> None:
        self._directory = directory
        self._split = split
        self._paths: list[Path] = []
        self._writer: ArrayRecordWriter | None = None
        self.shard_lengths: list[int] = []
        self.num_bytes = 0
        self._shard_bytes = 0

    def write(self, chunk: Chunk) -> None:
        """Append a record, to a new shard if the last one is full."""
        if self._writer is None or self._shard_bytes >= SHARD_BYTES:
            self._next_shard()
        record = encode(chunk)
        assert self._writer is not None
        self._writer.write(record)
        self.shard_lengths[-1] += 1
        self._shard_bytes += len(record)
        self.num_bytes += len(record)

    def finish(self) -> None:
        """Close the last shard, and give all of them their final names.

        The name of a shard holds the number of shards, which is known only now.
        """
        self.close()
        for i, path in enumerate(self._paths):
            path.rename(shard_path(self._directory, self._split, i, len(self._paths)))

    def close(self) -> None:
        """Close the file that is open, if one is."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _next_shard(self) -> None:
        self.close()
        path = self._directory / f"{NAME}-{self._split}.shard-{len(self._paths):05d}"
        self._writer = shard_writer(path)
        self._paths.append(path)
        self.shard_lengths.append(0)
        self._shard_bytes = 0


def shard_writer(path: Path) -> ArrayRecordWriter:
    """Open a new shard for its records, as `encode` returns them."""
    return ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)


def encode(chunk: Chunk) -> bytes:
    """Serialise a chunk as a `tf.train.Example`."""
    example = _example_type()()
    feature = example.features.feature
    if isinstance(chunk.user_id, str):
        feature["user_id"].bytes_list.value.append(chunk.user_id.encode())
    else:
        feature["user_id"].int64_list.value.append(chunk.user_id)
    feature["user"].bytes_list.value.append(chunk.user)
    feature["rows"].bytes_list.value.append(chunk.rows)
    # Otherwise the order of the features may change from run to run, and preparing a
    # log twice would give different files.
    return example.SerializeToString(deterministic=True)


def decode(record: bytes) -> Chunk:
    """Parse a record, the inverse of `encode`.

    Raises:
      ValueError: the bytes are not what `encode` makes of a chunk.
    """
    try:
        feature = _example_type().FromString(record).features.feature
        user = feature["user_id"]
        user_id = (
            user.int64_list.value[0]
            if user.HasField("int64_list")
            else user.bytes_list.value[0].decode()
        )
        return Chunk(
            user_id=user_id,
            user=feature["user"].bytes_list.value[0],
            rows=feature["rows"].bytes_list.value[0],
        )
    except (_decode_error(), IndexError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


@functools.cache
def _example_type() -> Any:
    """`tf.train.Example`, imported when first needed: TFDS takes about a second."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


@functools.cache
def _decode_error() -> type[Exception]:
    from google.protobuf.message import DecodeError

    return DecodeError


def record_features(schema: Schema, user_id_type: str) -> Any:
    """Describe the features of a record for tensorflow-datasets.

    Args:
      schema: schema of the data set.
      user_id_type: "int64" or "string".
    """
    import tensorflow_datasets as tfds

    user = user_dtype(schema)
    rows = row_dtype(schema)
    return tfds.features.FeaturesDict(
        {
            "user_id": tfds.features.Scalar(
                np.object_ if user_id_type == "string" else np.int64
            ),
            "user": tfds.features.Scalar(
                np.object_, doc=f"np.frombuffer(user, {user.descr})"
            ),
            "rows": tfds.features.Scalar(
                np.object_, doc=f"np.frombuffer(rows, {rows.descr})"
            ),
        }
    )


def write_metadata(
    directory: Path, shards: dict[str, Shards], metadata: Metadata
) -> None:
    """Write the files with which tensorflow-datasets opens the data set.

    These are `dataset_info.json` and `features.json`, for
    `tfds.builder_from_directory(directory)`.

    Args:
      directory: folder of the data set.
      shards: sizes of the shards of each split.
      metadata: schema, source and licence.
    """
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=directory, dataset_name=NAME, filetype_suffix="array_record"
    )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=record_features(metadata.schema, metadata.key_types["user_id"]),
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=written.lengths,
                num_bytes=written.num_bytes,
                filename_template=template,
            )
            for split, written in shards.items()
        ],
        version=VERSION,
        # The check would read every shard again.
        check_data=False,
        description=(
            f"{metadata.source}, prepared by tokenrec: a record is a chunk of one "
            "user's rows."
        ),
        citation=metadata.citation,
        license=metadata.licence,
    )


def shard_path(directory: Path, split: str, shard: int, shards: int) -> Path:
    """Path of a shard.

    Args:
      directory: folder of the data set.
      split: name of the split.
      shard: number of the shard, from 0.
      shards: number of shards of the split.
    """
    return directory / f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def shard_lengths(info: Path) -> dict[str, list[int]]:
    """Read the number of records in each shard of each split from `dataset_info.json`.

    Raises:
      InputError: the file is missing, cannot be read, or lacks these numbers.
    """
    value = read_json(info, "data:", _REMEDY)
    try:
        # Protocol buffers write int64 as JSON strings.
        return {
            str(s["name"]): [int(n) for n in s["shardLengths"]]
            for s in value.get("splits", ())
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"data: '{info}' does not tell the records of each shard "
            f"({type(error).__name__}: {error}); {_REMEDY}"
        ) from error


def read_records(
    directory: Path, split: str, lengths: list[int], start: int, stop: int
) -> Iterator[list[bytes]]:
    """Yield the records [start, stop) of a split, at most `READ_CHUNKS` at a time.

    Args:
      directory: folder of the data set.
      split: name of the split.
      lengths: records of each shard, as `shard_lengths` read them.
      start: first record, counted over all shards.
      stop: record after the last one.

    Raises:
      InputError: a shard is missing, truncated or damaged; the message names it.
      StorageError: the storage is at fault, again and again.
    """
    first = 0
    for shard, length in enumerate(lengths):
        begin = max(start - first, 0)
        end = min(stop - first, length)
        first += length
        if begin < end:
            path = shard_path(directory, split, shard, len(lengths))
            yield from _read_shard(path, length, begin, end)


def check_shard_lengths(directory: Path, split: str, lengths: list[int]) -> None:
    """Check that the shards of a split exist, are whole, and have their records.

    Reads the ends of the files only: a run whose last shard is missing should not learn
    of it after days.

    Args:
      directory: folder of the data set.
      split: name of the split.
      lengths: records of each shard, as `shard_lengths` read them.

    Raises:
      InputError: a shard is missing, truncated, or of another data set.
      StorageError: the storage is at fault, again and again.
    """
    for shard, length in enumerate(lengths):
        path = shard_path(directory, split, shard, len(lengths))
        _Shard(path, length).close()


def _read_shard(path: Path, length: int, begin: int, end: int) -> Iterator[list[bytes]]:
    """Yield the records [begin, end) of a shard that should have `length` records."""
    with contextlib.closing(_Shard(path, length)) as shard:
        for place in range(begin, end, READ_CHUNKS):
            yield shard.read(place, min(place + READ_CHUNKS, end))


class _Shard:
    """A shard that is open; a read that the storage fails is tried again.

    Args:
      path: path of the shard.
      length: number of its records.

    Raises:
      InputError: the shard is missing, damaged or of another data set.
      StorageError: the storage is at fault, again and again.
    """

    def __init__(self, path: Path, length: int) -> None:
        self._path = path
        self._length = length
        self._reader: ArrayRecordReader | None = None
        self._attempt(self._open)

    def read(self, begin: int, end: int) -> list[bytes]:
        """Read the records [begin, end)."""
        return self._attempt(lambda: self._open().read(begin, end))

    def close(self) -> None:
        """Close the file."""
        reader, self._reader = self._reader, None
        if reader is not None:
            self._attempt(reader.close)

    def _attempt[T](self, action: Callable[[], T]) -> T:
        def attempt() -> T:
            try:
                return action()
            except BaseException:
                # A reader that has failed stays failed: the next attempt needs another.
                self._reader = None
                raise

        return read_with_retries(
            attempt, self._path, "data: the shard", _REMEDY, damage=(RuntimeError,)
        )

    def _open(self) -> ArrayRecordReader:
        """Return the reader, opened if it is not."""
        if self._reader is not None:
            return self._reader
        if not self._path.is_file():
            # Not `exists` alone: it is False as well where the storage is at fault.
            self._path.stat()
            raise InputError(f"data: the shard '{self._path}' is no file; {_REMEDY}")
        reader = ArrayRecordReader(os.fspath(self._path), RANDOM_ACCESS)
        if not reader.ok():
            # The constructor keeps its error to itself, and `close` raises it.
            reader.close()
        num_records = reader.num_records()
        # A shard of another data set opens without an error, but has another number of
        # records.
        if num_records != self._length:
            raise InputError(
                f"data: the shard '{self._path}' holds {num_records} records, not "
                f"{self._length}; it belongs to another data set, so prepare this one "
                "again"
            )
        self._reader = reader
        return reader
