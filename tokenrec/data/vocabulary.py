"""Collect distinct values while a log streams past, and number them as a vocabulary.

1. While the log streams, each value of an embedding table gets a *code*, in the order
   in which values appear. A code plus `FIRST_KNOWN` is a *provisional id*, with which
   log rows can be written at once.
2. Codes that occur in log rows of the training split are marked.
3. At the end the marked values, sorted, get the ids `FIRST_KNOWN`, ...; all others get
   `UNKNOWN`. The result does not depend on the order of the log rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.data.memory_limit import NO_LIMIT, MemoryLimit, blocks
from tokenrec.data.metadata import checked_file
from tokenrec.data.schema import FIRST_KNOWN, MISSING, UNKNOWN, Feature
from tokenrec.data.value_index import Marks, ValueIndex
from tokenrec.data.value_order import in_order
from tokenrec.errors import InputError
from tokenrec.runtime.files import read_with_retries

# Folder of the vocabularies, a Parquet file per table.
VOCABULARIES = "vocabularies"

_VALUES_AT_ONCE = 2**20


class TableValues:
    """Values of one embedding table: provisional ids first, ids at the end.

    Attributes:
      index: all values.
      trained: codes of the values that training log rows hold.

    Args:
      limit: of the memory that values may take.
    """

    def __init__(self, limit: MemoryLimit = NO_LIMIT) -> None:
        self.index = ValueIndex(limit)
        self.trained = Marks()
        self._limit = limit

    def provisional(self, values: pa.Array, where: str) -> np.ndarray:
        """Look up provisional ids, new values added: `[n] int32`, `MISSING` where null.

        Raises:
          InputError: see `ValueIndex.codes`.
        """
        codes = self.index.codes(values, where)
        return np.where(codes < 0, np.int32(MISSING), codes + np.int32(FIRST_KNOWN))

    def mark(self, provisional: np.ndarray) -> None:
        """Take the values of provisional ids `[n] int32` into the vocabulary."""
        self.trained.add(provisional[provisional >= FIRST_KNOWN] - FIRST_KNOWN)

    def finish(self, save: Callable[[pa.Array], None]) -> np.ndarray:
        """Number the vocabulary.

        Args:
          save: is called with the values of the vocabulary, part after part in the
            order of their ids, which begin with `FIRST_KNOWN`.

        Returns:
          `[size + 2] int32`, provisional id -> id.
        """
        # Sort the marked values, so that ids do not depend on the order of log rows.
        values = self.index.array()
        final = self._limit.zeros((len(values) + FIRST_KNOWN,), np.int32)
        final[:] = UNKNOWN
        final[MISSING] = MISSING
        first = FIRST_KNOWN
        for codes in in_order(values, self.trained.array(len(values)), self._limit):
            save(values.take(pa.array(codes)))
            final[codes + FIRST_KNOWN] = np.arange(first, first + len(codes))
            first += len(codes)
        return final


class FrozenValues(TableValues):
    """Values of the embedding table of an earlier data set, which stays as it is.

    Provisional ids are ids already, `UNKNOWN` for a value that the table lacks.

    Args:
      known: the values, part after part in the order of their ids.
      limit: of the memory that values may take.
    """

    def __init__(
        self, known: Iterable[pa.Array], limit: MemoryLimit = NO_LIMIT
    ) -> None:
        super().__init__(limit)
        for part in known:
            self.index.codes(part, "the vocabulary")
        self._known = self.index.size

    def provisional(self, values: pa.Array, where: str) -> np.ndarray:
        """Look up ids: `[n] int32`, `MISSING` where null, `UNKNOWN` where not known."""
        ids = super().provisional(values, where)
        return np.where(ids < FIRST_KNOWN + self._known, ids, np.int32(UNKNOWN))

    def mark(self, provisional: np.ndarray) -> None:
        """Take no value in."""

    def finish(self, save: Callable[[pa.Array], None]) -> np.ndarray:
        """Save the values, and return `[V + 2] int32`, each id for itself."""
        values = self.index.array()[: self._known]
        for part in blocks(max(len(values), 1), _VALUES_AT_ONCE):
            save(values[part])
        return np.arange(FIRST_KNOWN + self._known, dtype=np.int32)


def value_tables(
    features: Iterable[Feature], limit: MemoryLimit = NO_LIMIT
) -> dict[str, TableValues]:
    """Make an empty `TableValues` for each table that needs a vocabulary.

    Args:
      features: features of a schema.
      limit: of the memory that values may take.

    Raises:
      InputError: a semantic id shares its table with a feature of another kind or
        shape, so that ids would clash.
    """
    # Table -> the first feature with it, and that feature's shape: levels and codes of
    # a semantic id, None of any other.
    shapes: dict[str, tuple[str, tuple[int, int] | None]] = {}
    for feature in features:
        if feature.has_vocabulary or feature.kind == "semantic_id":
            shape = None
            if feature.kind == "semantic_id":
                shape = (feature.length, feature.codes)
            name, known = shapes.setdefault(feature.table_name, (feature.name, shape))
            if known != shape:
                raise InputError(
                    f"features '{name}' and '{feature.name}' share the table "
                    f"'{feature.table_name}', but a semantic id shares one only with "
                    "semantic ids of equal length and codes; give one of them another "
                    "table"
                )
    names = [name for name, (_, shape) in shapes.items() if shape is None]
    return {name: TableValues(limit) for name in names}


def semantic_rows(feature: Feature) -> int:
    """Number of table rows of a semantic id: reserved ids, then each level's codes."""
    return FIRST_KNOWN + feature.length * feature.codes


class VocabularyWriter:
    """Write `vocabularies/<table>.parquet` with the columns `id` and `value`.

    The file does not depend on how the values are cut into parts.

    Attributes:
      size: values that it was given.

    Args:
      directory: folder of the data set.
      table: name of the table.
    """

    def __init__(self, directory: Path, table: str) -> None:
        folder = directory / VOCABULARIES
        folder.mkdir(exist_ok=True)
        self.size = 0
        self._path = folder / f"{quote(table, safe='')}.parquet"
        self._file: pq.ParquetWriter | None = None
        # Values that do not fill a row group yet.
        self._waiting: list[pa.Array] = []
        self._written = 0

    def write(self, values: pa.Array) -> None:
        """Append values `[n]`, int64 or strings, in the order of their ids."""
        self._waiting.append(values)
        self.size += len(values)
        while self.size - self._written >= _VALUES_AT_ONCE:
            waiting = _concatenate(self._waiting)
            self._write_group(waiting[:_VALUES_AT_ONCE])
            self._waiting = [waiting[_VALUES_AT_ONCE:]]

    def _write_group(self, values: pa.Array) -> None:
        # Ids follow from the order; they are written for readers other than tokenrec.
        first = FIRST_KNOWN + self._written
        ids = np.arange(first, first + len(values), dtype=np.int32)
        group = pa.table({"id": ids, "value": values})
        if self._file is None:
            self._file = pq.ParquetWriter(self._path, group.schema)
        self._file.write_table(group)
        self._written += len(values)

    def __enter__(self) -> VocabularyWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and (self._written < self.size or self._file is None):
            self._write_group(_concatenate(self._waiting))
        if self._file is not None:
            self._file.close()


def _concatenate(arrays: list[pa.Array]) -> pa.Array:
    # Arrow would copy a single array too.
    return arrays[0] if len(arrays) == 1 else pa.concat_arrays(arrays)


def load_vocabulary(directory: Path, table: str) -> np.ndarray:
    """Read the known values of a table of a prepared data set.

    Returns:
      `[V] int64 or object`; the value at position i has id `FIRST_KNOWN + i`.

    Raises:
      InputError: the data set has no vocabulary of that name (a semantic id's codes are
        its ids), or its file is missing or damaged.
    """
    path = _vocabulary_file(directory, table)

    def read() -> np.ndarray:
        values = pq.read_table(path)["value"]
        values.validate(full=True)
        return values.to_numpy()

    return _read(read, path)


class Vocabulary:
    """The values of a table of a prepared data set, which need not fit into memory.

    Attributes:
      type: "int64" or "string".
      size: number of values.

    Raises:
      InputError: see `load_vocabulary`.
    """

    def __init__(self, directory: Path, table: str) -> None:
        self._path = _vocabulary_file(directory, table)
        metadata = _read(lambda: pq.read_metadata(self._path), self._path)
        self._kind = metadata.schema.to_arrow_schema().field("value").type
        self.type = "int64" if pa.types.is_int64(self._kind) else "string"
        self.size = metadata.num_rows
        self._groups = metadata.num_row_groups

    def parts(self) -> Iterator[pa.Array]:
        """Yield the values in the order of their ids, some at a time.

        The first part tells the type, and is empty if there are no values.

        Raises:
          InputError: the file is damaged.
        """
        if not self._groups:
            yield pa.array([], self._kind)
        for group in range(self._groups):
            read = functools.partial(_read_row_group, self._path, group)
            yield _read(read, self._path)


def _read_row_group(path: Path, group: int) -> pa.Array:
    with pq.ParquetFile(path) as file:
        values = file.read_row_group(group)["value"]
    values.validate(full=True)
    return values.combine_chunks()


def _read[T](read: Callable[[], T], path: Path) -> T:
    return read_with_retries(
        read,
        path,
        "data:",
        "prepare the data set again",
        damage=(pa.ArrowException, KeyError, ValueError, OverflowError),
    )


def _vocabulary_file(directory: Path, table: str) -> Path:
    path = checked_file(directory, f"{VOCABULARIES}/{quote(table, safe='')}.parquet")
    if path is None:
        raise InputError(
            f"table '{table}' has no vocabulary in '{directory}'; name a table of a "
            "categorical or multi-valued feature"
        )
    return path
