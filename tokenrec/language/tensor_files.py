"""Weight files of a checkpoint in the safetensors format, read without copying.

A file is the length of its header, the header as JSON, and the tensors:

    8 bytes           n, little-endian
    n bytes           {"name": {"dtype": "BF16", "shape": [2, 3],
                                "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
    the other bytes   the tensors, row by row, without gaps

A folder holds one file, or shards and an index of which shard has which tensor
(https://huggingface.co/docs/safetensors). A file is memory-mapped: a slice of a tensor
reads the pages of that slice and no others.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from tokenrec.errors import InputError
from tokenrec.runtime.files import (
    RetryingFile,
    is_file,
    read_json,
    read_with_retries,
    reading_error,
)
from tokenrec.runtime.local_copy import local_copy

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Types of weights that can be read.
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bytes of a number of other types; tensors of these are listed, but cannot be read.
_OTHER_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_LENGTH_BYTES = 8
# The limit of the safetensors library.
_LONGEST_HEADER = 100_000_000
_REMEDY = "copy the checkpoint again"


class StoredTensor(NamedTuple):
    """Where a tensor lies.

    Attributes:
      file: its file.
      dtype: its type, in the words of the format.
      shape: its shape.
      begin: first byte in the file.
      end: byte after the last.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFiles:
    """The tensors of a folder, by name.

    Attributes:
      folder: the folder.
      files: the weight files, in order of their names.
      tensors: name -> where the tensor lies.
    """

    def __init__(
        self, folder: Path, files: tuple[Path, ...], tensors: Mapping[str, StoredTensor]
    ) -> None:
        self.folder = folder
        self.files = files
        self.tensors = tensors
        self._maps: dict[Path, mmap.mmap] = {}

    def view(self, name: str) -> np.ndarray:
        """View a tensor in its file, read-only and with nothing read yet.

        The array stays valid when this object is gone. It need not be aligned.

        Raises:
          InputError: it is of a type that is none of `DTYPES`, or its file cannot be
            mapped.
          KeyError: there is no such tensor.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise InputError(
                f"weight file '{tensor.file}': '{name}' is of type {tensor.dtype}, and "
                f"weights must be of {', '.join(DTYPES)}; convert the checkpoint"
            )
        count = math.prod(tensor.shape)
        if not count:
            return np.empty(tensor.shape, DTYPES[tensor.dtype])
        flat = np.frombuffer(
            self._map(tensor.file), DTYPES[tensor.dtype], count, tensor.begin
        )
        return flat.reshape(tensor.shape)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:

            def map_file() -> mmap.mmap:
                with path.open("rb") as file:
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

            self._maps[path] = read_with_retries(
                map_file, path, "weight file", _REMEDY, (ValueError,)
            )
        return self._maps[path]


def open_tensor_files(folder: Path) -> TensorFiles:
    """Read the headers of the weight files of a folder.

    Args:
      folder: a folder with `model.safetensors`, or with `model.safetensors.index.json`
        and the shards that it names; one in an object store is downloaded.

    Raises:
      InputError: a file is missing, damaged or shorter than its header says, or two
        tensors have one name.
      StorageError: the storage is at fault, again and again.
    """
    folder = local_copy(folder)
    files, listed = _weight_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _read_header(file).items():
            if name in tensors:
                raise InputError(
                    f"weight files '{tensors[name].file}' and '{file}' both hold "
                    f"'{name}'; {_REMEDY}"
                )
            tensors[name] = tensor
    for name, file in listed.items():
        if name not in tensors or tensors[name].file != file:
            raise InputError(
                f"weight file '{file}' lacks '{name}', which {INDEX_FILE} says it "
                f"holds; {_REMEDY}"
            )
    return TensorFiles(folder, files, tensors)


def folder_digest(folder: Path) -> str:
    """SHA-256 of the contents of all weight files of a folder, as hexadecimal digits.

    The files follow one another in order of their names, and are read in pieces.

    Raises:
      InputError: a file is missing or cannot be read.
      StorageError: the storage is at fault, again and again.
    """
    files, _ = _weight_files(local_copy(folder))
    digest = hashlib.sha256()
    for path in files:
        # Its reads are repeated where the storage fails: to repeat all of them would
        # add bytes twice.
        try:
            with RetryingFile(path) as file:
                hashlib.file_digest(cast(Any, file), lambda: digest)
        except OSError as error:
            raise reading_error(error, path, "weight file", _REMEDY) from error
    return digest.hexdigest()


def _weight_files(folder: Path) -> tuple[tuple[Path, ...], dict[str, Path]]:
    """The weight files of a folder, and what its index lists, if it has one."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if is_file(single):
        return (single,), {}
    if not is_file(index):
        raise InputError(
            f"folder '{folder}' has neither {SINGLE_FILE} nor {INDEX_FILE}"
            f"{_other_format(folder)}; name the folder of a checkpoint in the "
            "safetensors format"
        )
    value = read_json(index, "index of weight files", _REMEDY)
    names = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(names, dict) or not names:
        raise InputError(
            f"index of weight files '{index}' has no 'weight_map'; {_REMEDY}"
        )
    listed: dict[str, Path] = {}
    for name, file in names.items():
        # A path could lead out of the folder.
        plain = isinstance(file, str) and file == Path(file).name != ".."
        if not plain or not file or "\0" in file:
            raise InputError(
                f"index of weight files '{index}': '{name}' is in {file!r}, which is no "
                f"file name; {_REMEDY}"
            )
        listed[name] = folder / file
    return tuple(sorted(set(listed.values()))), listed


def _other_format(folder: Path) -> str:
    """What a folder without safetensors has instead, for a message."""
    for pattern in ("*.safetensors", "*.bin", "*.gguf", "*.pth"):
        if found := sorted(folder.glob(pattern)):
            return f", but '{found[0].name}'"
    return ""


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Read where the tensors of a file lie, and check that they fill it."""

    def read() -> tuple[int, bytes]:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise ValueError("it ends within its header")
            if length > _LONGEST_HEADER:
                raise ValueError(f"its header would be of {length} bytes")
            return size, file.read(length)

    def parse() -> dict[str, StoredTensor]:
        size, header = read()
        try:
            values = json.loads(header, object_pairs_hook=_without_repeats)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"its header is not JSON: {error}") from error
        return dict(_parse_header(path, values, size, _LENGTH_BYTES + len(header)))

    return read_with_retries(parse, path, "weight file", _REMEDY, (ValueError,))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"its header has '{name}' twice")
        values[name] = value
    return values


def _parse_header(
    path: Path, values: Any, size: int, start: int
) -> Iterator[tuple[str, StoredTensor]]:
    """Yield the tensors of a header.

    Args:
      path: the file.
      values: its header.
      size: bytes of the file.
      start: first byte behind the header.

    Raises:
      ValueError: the header is wrong, or the file shorter or longer than it says.
    """
    if not isinstance(values, dict):
        raise ValueError("its header is no JSON object")
    tensors = []
    for name, entry in values.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"its entry of '{name}' is damaged") from None
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or any(
            type(number) is not int or number < 0 for number in numbers
        ):
            raise ValueError(f"its entry of '{name}' is damaged")
        width = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_SIZES.get(dtype)
        if width is not None and end - begin != width * math.prod(shape):
            raise ValueError(
                f"'{name}' of shape {list(shape)} and type {dtype} has "
                f"{end - begin} bytes"
            )
        tensors.append((begin, end, name, dtype, shape))
    position = 0
    for begin, end, name, dtype, shape in sorted(tensors):
        if begin != position or end < begin:
            raise ValueError(f"'{name}' does not follow the tensor before it")
        position = end
        yield name, StoredTensor(path, dtype, shape, start + begin, start + end)
    if start + position != size:
        raise ValueError(f"it has {size} bytes, and its header says {start + position}")
