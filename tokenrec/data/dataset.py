"""Open a prepared data set: its schema, its catalogue and its chunks as flat arrays."""

from __future__ import annotations

import hashlib
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data import records
from tokenrec.data.frozen_rows import FrozenStatistics
from tokenrec.data.id_counts import IdCounts, RareIds
from tokenrec.data.interaction_log import Catalogue, InteractionLog
from tokenrec.data.log_decoder import LogDecoder, select_columns
from tokenrec.data.metadata import load_manifest
from tokenrec.data.row_marks import MARKS, marks_dtype
from tokenrec.data.schema import MOST_ROWS, Schema
from tokenrec.data.semantic_id_feature import (
    SEMANTIC_ID,
    semantic_columns,
    with_semantic_id,
)
from tokenrec.data.semantic_id_file import align, load_semantic_ids
from tokenrec.data.source import SPLITS
from tokenrec.data.value_checks import check_catalogue, check_log
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import read_with_retries

# Folder of the catalogue, a .npy file per array.
ITEMS = "items"
_REMEDY = "prepare the data set again"
# What `np.load` raises where the header of a .npy file is damaged: NumPy evaluates it
# as a Python literal and passes most errors of that on.
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    OverflowError,
    MemoryError,
    RecursionError,
)


def open_dataset(
    directory: Path, exclude: Sequence[str] = (), semantic_ids: str = ""
) -> Dataset:
    """Open a prepared data set.

    Args:
      directory: folder of the data set.
      exclude: features whose columns are dropped everywhere.
      semantic_ids: file or folder that `tokenrec semantic-ids` wrote; it adds the item
        feature `semantic_id`, and the codes of the catalogue. Empty: none.

    Raises:
      InputError: the folder is not a prepared data set, a file of it is missing or
        damaged, a feature is unknown, or the semantic ids are not those of its items.
    """
    return Dataset(directory, exclude, semantic_ids)


class RowIdentity(NamedTuple):
    """The log rows of a split, in their order.

    Attributes:
      rows: number of log rows, those that chunks repeat included.
      chunks: number of chunks.
      lengths_digest: SHA-256 of the number of log rows of each chunk.
      rows_digest: SHA-256 of users, times, items, requests, flags and labels; None for
        a data set from before there was one.
    """

    rows: int
    chunks: int
    lengths_digest: str
    rows_digest: str | None


class Dataset:
    """A prepared data set on disk, opened by `open_dataset`.

    Attributes:
      directory: folder of the data set.
      metadata: as written, with the schema of all features.
      schema: without the excluded features, and with the semantic ids.
      catalogue: features of the items, columns as in `schema`; memory-mapped where no
        column is dropped or added.
      splits: names of the splits that hold a chunk.
      id_counts: how often training sees each id, where a run asks for it; set by
        `tokenrec.checkpoint.run_folder.use_id_counts`.
      rare_ids: by which ids batches replace rare ones, which follows from them.
        Neither `load` nor `catalogue` replaces them.
    """

    def __init__(
        self, directory: Path, exclude: Sequence[str], semantic_ids: str = ""
    ) -> None:
        self.directory = Path(directory)
        self._manifest = load_manifest(self.directory)
        self.metadata = self._manifest.metadata
        schema = self.metadata.schema
        self._codes = None
        if semantic_ids:
            known = align(
                load_semantic_ids(Path(semantic_ids)),
                self._load_items("item_id")[: self.known_items],
            )
            schema = with_semantic_id(schema, known)
            # Items that are new since then have none.
            new = schema.items - len(known)
            self._codes = np.pad(known, ((0, new), (0, 0)), constant_values=-1)
        self.schema: Schema = schema.without(exclude)
        # Only tensorflow-datasets reads this file, but a damaged one is named here.
        self._manifest.check("features.json")
        self._shards = records.shard_lengths(self._manifest.check("dataset_info.json"))
        self.splits: tuple[str, ...] = tuple(
            split for split in SPLITS if sum(self._shards.get(split, ()))
        )
        self.catalogue = self._load_catalogue()
        self._decoder = LogDecoder(self.metadata, self.schema)
        self._chunk_lengths: dict[str, np.ndarray] = {}
        self._row_marks: dict[str, np.ndarray] = {}
        self._frozen: dict[str, FrozenStatistics] = {}
        self.id_counts: IdCounts | None = None
        self.rare_ids: RareIds = {}

    @property
    def known_items(self) -> int:
        """Items of the data set that this one was prepared like: the first ones here.

        All items if there is none.
        """
        like = self.metadata.options.get("like")
        return int(like["items"]) if like else self.metadata.schema.items

    @property
    def like_ids_digest(self) -> str:
        """`Schema.ids_digest` of the data set that this one was prepared like, or ""."""
        like = self.metadata.options.get("like")
        return str(like["ids_digest"]) if like else ""

    def choose_split(self, split: str | None) -> str:
        """Return `split`, or the only split of the data set.

        Raises:
          InputError: none is given and the data set has several.
        """
        if split is not None:
            return split
        if len(self.splits) != 1:
            raise InputError(
                f"data '{self.directory}' has the splits {', '.join(self.splits)}; "
                "name one with --split"
            )
        return self.splits[0]

    def num_chunks(self, split: str) -> int:
        """Number of chunks of a split."""
        return sum(self._shard_lengths(split))

    def chunk_lengths(self, split: str) -> np.ndarray:
        """Log rows of each chunk of a split, its head included: `[chunks] int64`.

        Raises:
          InputError: the split is unknown or empty, or the file is missing or damaged.
        """
        chunks = self.num_chunks(split)
        if split not in self._chunk_lengths:
            name = f"{records.INDEX}/{split}.npy"
            lengths = self.read_array(name)
            if (
                lengths.shape != (chunks,)
                or lengths.dtype != np.int64
                or not ((lengths > 0) & (lengths <= MOST_ROWS)).all()
            ):
                raise InputError(
                    f"data: '{self.directory / name}' has the shape {lengths.shape} of "
                    f"{lengths.dtype}, not a number of rows for each of {chunks} "
                    f"chunks; {_REMEDY}"
                )
            self._chunk_lengths[split] = lengths
        return self._chunk_lengths[split]

    def row_marks(self, split: str) -> np.ndarray | None:
        """Marks of the log rows of a split: `[R]` of `row_marks.marks_dtype`, on disk.

        Returns:
          None for a data set from before there were marks.

        Raises:
          InputError: the split is unknown or empty, or the file is missing or damaged.
        """
        rows = int(self.chunk_lengths(split).sum())
        name = f"{MARKS}/{split}.npy"
        # Unlike the other files, marks without a digest are not used: a wrong mark
        # would not be noticed.
        if name not in self._manifest.files:
            return None
        # Kept: an evaluation plans its split every time, and its digest would be
        # computed again.
        if split in self._row_marks:
            return self._row_marks[split]
        marks = self.read_array(name)
        dtype = marks_dtype(len(self.metadata.schema.tasks))
        if marks.shape != (rows,) or marks.dtype != dtype:
            raise InputError(
                f"data: '{self.directory / name}' has the shape {marks.shape} of "
                f"{marks.dtype}, not marks of {rows} rows; {_REMEDY}"
            )
        self._row_marks[split] = marks
        return marks

    def row_identity(self, split: str) -> RowIdentity:
        """Describe the log rows of a split, to compare them with those of another time.

        Neither excluded features nor semantic ids change it, nor where the data set is.
        """
        lengths = self.chunk_lengths(split)
        return RowIdentity(
            rows=int(lengths.sum()),
            chunks=len(lengths),
            lengths_digest=hashlib.sha256(lengths.astype("<i8").tobytes()).hexdigest(),
            rows_digest=self.metadata.row_digests.get(split),
        )

    def check_shards(self, split: str) -> None:
        """Check that the shards of a split are there and whole, without reading them.

        Raises:
          InputError: the split is unknown or empty, or a shard is missing, truncated or
            of another data set.
        """
        records.check_shard_lengths(self.directory, split, self._shard_lengths(split))

    def records(self, split: str) -> Iterator[list[bytes]]:
        """Yield the records of a split as they are stored, some at a time.

        Raises:
          InputError: the split is unknown or empty, or a shard is missing or damaged.
        """
        lengths = self._shard_lengths(split)
        yield from records.read_records(self.directory, split, lengths, 0, sum(lengths))

    def load(
        self,
        split: str,
        start: int = 0,
        stop: int | None = None,
        *,
        frozen: bool = False,
    ) -> InteractionLog:
        """Read the chunks [start, stop) of a split.

        Args:
          split: name of the split.
          start: first chunk.
          stop: chunk after the last one; None: all chunks to the end.
          frozen: scored rows have their statistics of the past as of the start of the
            split (frozen_rows.py).

        Raises:
          InputError: the split is unknown or empty, the range does not lie within it,
            a file is missing or damaged, or the log does not fit in memory.
        """
        chunks = self.num_chunks(split)
        stop = chunks if stop is None else stop
        if not 0 <= start <= stop <= chunks:
            raise InputError(
                f"split '{split}' has chunks 0 to {chunks}; [{start}, {stop}) does not "
                "lie within"
            )
        # 1. Make room for all chunks: the index says how many log rows each one has.
        lengths = self.chunk_lengths(split)[start:stop]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        try:
            log = self._decoder.allocate(offsets)
        except MemoryError as error:
            raise InputError(
                f"data '{self.directory}', split '{split}': {offsets[-1]} rows do not "
                "fit in memory; use a smaller data.window_rows, or prepare the data "
                "set again if it has no such chunks"
            ) from error

        # 2. Fill it, block by block.
        first = 0
        for block in records.read_records(
            self.directory, split, self._shard_lengths(split), start, stop
        ):
            last = first + len(block)
            where = self._where(split, start + first, start + last)
            self._decoder.fill(log, first, block, where)
            first = last

        if frozen:
            self._frozen_statistics(split).put(log, start)

        # 3. Check the values.
        where = self._where(split, start, stop)
        check_log(log, self.schema, len(self.catalogue.item_id), where)
        return log

    def to_arrow(self, split: str) -> pa.RecordBatchReader:
        """Stream the log rows of a split with their original ids and values.

        Each log row comes once, without the history that chunks repeat. `arrow_rows.py`
        describes the columns. `read_all()` of the result is a table in memory.

        Args:
          split: name of the split.

        Raises:
          InputError: the split is unknown or empty, or a file is missing or damaged.
        """
        from tokenrec.data.arrow_rows import read_rows

        return read_rows(self, split)

    def _frozen_statistics(self, split: str) -> FrozenStatistics:
        """Frozen statistics of a split, opened once."""
        if split not in self._frozen:
            self._frozen[split] = FrozenStatistics(self, split)
        return self._frozen[split]

    def _where(self, split: str, start: int, stop: int) -> str:
        """Name the chunks [start, stop), for messages."""
        return f"data '{self.directory}', split '{split}', chunks {start} to {stop - 1}"

    def _shard_lengths(self, split: str) -> list[int]:
        if split not in self.splits:
            reason = "is empty" if split in SPLITS else "is unknown"
            raise InputError(
                f"split '{split}' of '{self.directory}' {reason}"
                f"{suggest(split, self.splits)}"
            )
        return self._shards[split]

    def _load_catalogue(self) -> Catalogue:
        full = self.metadata.schema
        whole = Catalogue(
            item_id=self._load_items("item_id"),
            ids=self._load_items("ids"),
            dense=self._load_items("dense"),
        )
        check_catalogue(whole, full, f"data '{self.directory / ITEMS}'")
        ids, dense = whole.ids, whole.dense
        # The semantic ids of the config are not on disk. A data set may have a feature
        # of that name of its own, but then not those of a config as well.
        stored = [
            f
            for f in self.schema.group("catalogue")
            if f.name != SEMANTIC_ID or self._codes is None
        ]
        kept_ids, kept_dense = select_columns(full.group("catalogue"), stored)
        # Indexing copies; without excluded columns the arrays stay memory-mapped.
        if len(kept_ids) < ids.shape[1]:
            ids = ids[:, kept_ids]
        if len(kept_dense) < dense.shape[1]:
            dense = dense[:, kept_dense]
        has_semantic_id = any(f.name == SEMANTIC_ID for f in self.schema.features)
        if self._codes is not None and has_semantic_id:
            # The last columns, as the feature is the last one of the schema.
            ids = np.concatenate([ids, semantic_columns(self._codes)], axis=1)
        known = self.known_items if self.known_items < full.items else None
        return Catalogue(whole.item_id, ids, dense, self._codes, known)

    def _load_items(self, name: str) -> np.ndarray:
        return self.read_array(f"{ITEMS}/{name}.npy")

    def read_array(self, name: str) -> np.ndarray:
        """Open a .npy file of the folder, its digest checked.

        Raises:
          InputError: it is missing or damaged.
        """
        path = self._manifest.check(name)
        return read_with_retries(
            lambda: np.load(path, mmap_mode="r", allow_pickle=False),
            path,
            "data:",
            _REMEDY,
            damage=(EOFError, *_HEADER_ERRORS),
        )
