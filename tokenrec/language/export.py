"""Write a language model as a checkpoint in the format of Hugging Face.

model.safetensors               the weights; or shards, model-00001-of-00002.safetensors
model.safetensors.index.json    with shards: which of them has which tensor
config.json                     sizes
tokenizer.json, ...             copied from the checkpoint that the run started from
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tokenrec.config import Config
from tokenrec.errors import InputError
from tokenrec.language.architecture import CONFIG_FILE
from tokenrec.language.config_object import ConfigObject
from tokenrec.language.export_config import adapted_config, new_config
from tokenrec.language.export_weights import Array, ExportedTensor, ModelWeights
from tokenrec.language.tensor_files import (
    DTYPES,
    INDEX_FILE,
    SINGLE_FILE,
    open_tensor_files,
)
from tokenrec.language.tensor_writer import TensorSpec, write_tensor_file
from tokenrec.runtime.files import read_json, write_json
from tokenrec.runtime.local_copy import local_copy

SHARD_BYTES = 4 * 10**9
_REMEDY = "give the checkpoint that the run started from"
# Files of a checkpoint that hold its tokenizer and how it is used.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class ExportedCheckpoint(NamedTuple):
    """What `write_checkpoint` wrote.

    Attributes:
      files: names of the files.
      weights: number of weights.
      vocabulary: rows of the word vectors.
      left_out: tensors of the source that were not written, such as those of a vision
        tower.
    """

    files: tuple[str, ...]
    weights: int
    vocabulary: int
    left_out: tuple[str, ...]


def write_checkpoint(
    out: Path,
    config: Config,
    params: Mapping[str, Array],
    *,
    source: Path | None = None,
    extra_rows: Mapping[str, Array] | None = None,
    dtype: str = "",
    shard_bytes: int = SHARD_BYTES,
    add_files: Callable[[Path], None] | None = None,
) -> ExportedCheckpoint:
    """Write a language model as a checkpoint, its adapters merged.

    Nothing is half-written: the folder appears when it is whole. `model.windows` is no
    part of the format, which has the sliding windows of the family only.

    Args:
      out: local folder to write; it must not exist.
      config: the config of the run, whose sizes are filled in.
      params: name -> weight, NumPy or JAX arrays of which this process holds every
        part. Names that are no part of a language model, such as makers and heads, are
        left out. So are word vectors behind row V, which fill a table up.
      source: folder of the checkpoint that the run started from. Its config and
        tokenizer are taken over, and weights that `params` lacks.
      extra_rows: `words/inputs`, and `words/outputs` where words are not tied -> rows
        `[n, d]` that follow the V words.
      dtype: type of the weights, `float32`, `float16` or `bfloat16`; empty for that of
        the tensor in `source`, or else that of the weight.
      shard_bytes: largest file of weights in bytes, unless a tensor is larger.
      add_files: writes further files into the folder before it appears.

    Raises:
      InputError: `out` exists, `source` is damaged or of other sizes, weights are
        missing.
      OSError: the folder cannot be written; a StorageError if `source` cannot be read
        because the storage is at fault.
      ValueError: a weight or `extra_rows` do not fit the model.
    """
    # 1. Everything that can be refused, before anything is written.
    if out.exists():
        raise InputError(f"folder '{out}' exists; name a new folder, or remove it")
    types = {str(known): known for known in DTYPES.values()}
    if dtype and dtype not in types:
        raise InputError(f"dtype='{dtype}' is none of {', '.join(types)}; choose one")
    source = None if source is None else local_copy(source)
    weights = ModelWeights(
        config,
        params,
        None if source is None else open_tensor_files(source),
        extra_rows or {},
    )
    tensors = weights.plan(types.get(dtype))
    # The first weight is the word embedding.
    first = tensors[0].spec
    vocabulary, stored_type = first.shape[0], str(first.dtype)
    if source is None:
        values = new_config(config.model, vocabulary, stored_type)
    else:
        path = source / CONFIG_FILE
        given = ConfigObject(read_json(path, "model config", _REMEDY), f"'{path}'")
        values = adapted_config(given.values, config.model, vocabulary, stored_type)
    # 2. The folder, under another name until it is whole.
    partial = out.with_name(f".{out.name}.incomplete-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial.mkdir()
    try:
        _write_weights(partial, weights, tensors, shard_bytes)
        write_json(partial / CONFIG_FILE, values)
        if source is not None:
            for name in TOKENIZER_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, partial / name)
        if add_files is not None:
            add_files(partial)
        names = _flush_to_disk(partial)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    count = sum(math.prod(tensor.spec.shape) for tensor in tensors)
    return ExportedCheckpoint(names, count, vocabulary, weights.left_out())


def _write_weights(
    folder: Path,
    weights: ModelWeights,
    tensors: Sequence[ExportedTensor],
    shard_bytes: int,
) -> None:
    """Write the weight files, and the index of more than one."""
    shards = _split([tensor.spec for tensor in tensors], shard_bytes)
    count = len(shards)
    names = [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]
    names = [SINGLE_FILE] if count == 1 else names
    arrays = weights.compute(tensors)
    for file, shard in zip(names, shards, strict=True):
        write_tensor_file(folder / file, shard, islice(arrays, len(shard)))
    if count > 1:
        places = {
            spec.name: file
            for file, shard in zip(names, shards, strict=True)
            for spec in shard
        }
        total = sum(tensor.spec.bytes for tensor in tensors)
        write_json(
            folder / INDEX_FILE,
            {"metadata": {"total_size": total}, "weight_map": places},
        )


def _split(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Group tensors into files of at most `shard_bytes`, in order."""
    shards: list[list[TensorSpec]] = []
    filled = 0
    for spec in specs:
        if not shards or filled + spec.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.bytes
    return shards


def _flush_to_disk(folder: Path) -> tuple[str, ...]:
    """Wait until the files of a folder are on the disk; return their names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return tuple(path.relative_to(folder).as_posix() for path in files)
