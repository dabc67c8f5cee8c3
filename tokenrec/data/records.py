"""Chunks on disk: a tensorflow-datasets data set of ArrayRecord shards, streamed out and read without TensorFlow.

A record is a `tf.train.Example` of three features, whose bytes NumPy reads without copying:

| feature | value |
|---|---|
| `user_id` | original id, int64 or UTF-8 bytes |
| `user` | the user's feature columns, one `user_dtype` |
| `rows` | the chunk's rows, an array of `row_dtype` |

Shards go straight to `ArrayRecordWriter`, and `tfds.folder_dataset.write_metadata` describes them, because the writer
of a TFDS builder keeps up to 1 GB of records in memory (and needs TensorFlow beyond that) to shuffle them.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from tokenrec.data.metadata import Metadata
from tokenrec.data.schema import Columns, Schema, columns
from tokenrec.errors import InputError
from tokenrec.runtime.files import read_json

NAME = "tokenrec"
VERSION = "1.0.0"
INDEX = "chunks"
SHARD_BYTES = 256 << 20
READ_CHUNKS = 128
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


def row_dtype(schema: Schema) -> np.dtype:
    """A row of a chunk: the columns of `log.Log` that belong to rows."""
    row, action = columns(schema.group("row")), columns(schema.group("action"))
    return np.dtype(
        [
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
    )


def user_dtype(schema: Schema) -> np.dtype:
    """A user's features."""
    user: Columns = columns(schema.group("user"))
    return np.dtype(
        [
            ("user_ids", "<i4", (user.ids_width,)),
            ("user_dense", "<f4", (user.dense_width,)),
        ]
    )


class Chunk(NamedTuple):
    """A decoded record; `user` and `rows` are bytes of `user_dtype` and `row_dtype`."""

    user_id: int | str
    user: bytes
    rows: bytes


class Shards(NamedTuple):
    """What a split takes up: the number of records in each of its shards, and their bytes."""

    lengths: list[int]
    num_bytes: int


class SplitWriter:
    """Writes the records of one split to shards of about `SHARD_BYTES`, one at a time."""

    def __init__(self, directory: Path, split: str) -> None:
        self._directory, self._split = directory, split
        self._paths: list[Path] = []
        self._writer: ArrayRecordWriter | None = None
        self.shard_lengths: list[int] = []
        self.num_bytes = 0
        self._shard_bytes = 0

    def write(self, chunk: Chunk) -> None:
        if self._writer is None or self._shard_bytes >= SHARD_BYTES:
            self._next_shard()
        record = encode(chunk)
        assert self._writer is not None
        self._writer.write(record)
        self.shard_lengths[-1] += 1
        self._shard_bytes += len(record)
        self.num_bytes += len(record)

    def finish(self) -> None:
        """Closes the last shard and gives all of them their names, which hold their number."""
        self.close()
        for i, path in enumerate(self._paths):
            path.rename(shard_path(self._directory, self._split, i, len(self._paths)))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _next_shard(self) -> None:
        self.close()
        path = self._directory / f"{NAME}-{self._split}.shard-{len(self._paths):05d}"
        self._writer = ArrayRecordWriter(os.fspath(path), "group_size:1")
        self._paths.append(path)
        self.shard_lengths.append(0)
        self._shard_bytes = 0


def encode(chunk: Chunk) -> bytes:
    """A chunk as a serialised `tf.train.Example`."""
    example = _example_type()()
    feature = example.features.feature
    if isinstance(chunk.user_id, str):
        feature["user_id"].bytes_list.value.append(chunk.user_id.encode())
    else:
        feature["user_id"].int64_list.value.append(chunk.user_id)
    feature["user"].bytes_list.value.append(chunk.user)
    feature["rows"].bytes_list.value.append(chunk.rows)
    return example.SerializeToString(deterministic=True)


def decode(record: bytes) -> Chunk:
    """Inverse of `encode`.

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
            user_id,
            feature["user"].bytes_list.value[0],
            feature["rows"].bytes_list.value[0],
        )
    except (_decode_error(), IndexError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error


@functools.cache
def _example_type() -> Any:
    """`tf.train.Example`. Imported when first needed: tensorflow-datasets takes about a second."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example


@functools.cache
def _decode_error() -> type[Exception]:
    from google.protobuf.message import DecodeError

    return DecodeError


def record_features(schema: Schema, user_id_type: str) -> Any:
    """The features of a record as tensorflow-datasets names them. `user_id_type`: "int64" or "string"."""
    import tensorflow_datasets as tfds

    user, rows = user_dtype(schema), row_dtype(schema)
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
    """Writes `dataset_info.json` and `features.json`, so that `tfds.builder_from_directory(directory)` opens it."""
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
        check_data=False,
        description=f"{metadata.source}, prepared by tokenrec: a record is a chunk of one user's rows.",
        citation=metadata.citation,
        license=metadata.licence,
    )


def shard_path(directory: Path, split: str, shard: int, shards: int) -> Path:
    return directory / f"{NAME}-{split}.array_record-{shard:05d}-of-{shards:05d}"


def shard_lengths(info: Path) -> dict[str, list[int]]:
    """Split -> number of records in each of its shards, as `dataset_info.json` says.

    Raises:
      InputError: the file is missing or not readable, or says something else.
    """
    value = read_json(info, "data:", "prepare the data set again")
    try:
        return {
            str(s["name"]): [int(n) for n in s["shardLengths"]]
            for s in value.get("splits", ())
        }
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"data: '{info}' does not tell the records of each shard ({type(error).__name__}: {error}); prepare the "
            f"data set again"
        ) from error


def read_records(
    directory: Path, split: str, lengths: list[int], start: int, stop: int
) -> Iterator[list[bytes]]:
    """Records [start, stop) of a split, at most `READ_CHUNKS` at a time.

    Raises:
      InputError: a shard is missing, truncated or damaged; names the file.
    """
    first = 0
    for shard, length in enumerate(lengths):
        begin, end = max(start - first, 0), min(stop - first, length)
        first += length
        if begin < end:
            yield from _read_shard(
                shard_path(directory, split, shard, len(lengths)), length, begin, end
            )


def _read_shard(path: Path, length: int, begin: int, end: int) -> Iterator[list[bytes]]:
    if not path.is_file():
        raise InputError(
            f"data: the shard '{path}' is missing; prepare the data set again"
        )
    try:
        with contextlib.closing(
            ArrayRecordReader(os.fspath(path), RANDOM_ACCESS)
        ) as reader:
            held = reader.num_records()
            for at in range(begin, end if held == length else begin, READ_CHUNKS):
                yield reader.read(at, min(at + READ_CHUNKS, end))
    except RuntimeError as error:
        raise InputError(
            f"data: the shard '{path}' is damaged: {error}; prepare the data set again"
        ) from error
    if held != length:
        raise InputError(
            f"data: the shard '{path}' holds {held} records, not {length}; it belongs to another data set, so prepare "
            f"this one again"
        )
