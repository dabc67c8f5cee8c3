"""A prepared data set, opened: its schema, its catalogue, and its chunks as flat arrays."""

from __future__ import annotations

import tokenize
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tokenrec.data import records
from tokenrec.data.interaction_log import Catalogue, InteractionLog
from tokenrec.data.metadata import load_manifest
from tokenrec.data.schema import MOST_ROWS, Columns, Feature, Group, Schema, columns
from tokenrec.data.semantic_id_feature import (
    SEMANTIC_ID,
    semantic_columns,
    with_semantic_id,
)
from tokenrec.data.semantic_id_file import align, load_semantic_ids
from tokenrec.data.source import SPLITS
from tokenrec.data.value_checks import check_catalogue, check_log
from tokenrec.errors import InputError, suggest

ITEMS = "items"


class Dataset:
    """A prepared data set on disk. Made by `open_dataset`.

    Attributes:
      metadata: as written, with the schema of all features.
      schema: without the excluded features.
      catalogue: features of the items, columns as in `schema`; memory-mapped where nothing is excluded.
      splits: names of the splits that hold a chunk.
    """

    def __init__(
        self, directory: Path, exclude: Sequence[str], semantic_ids: str = ""
    ) -> None:
        self.directory = Path(directory)
        self._manifest = load_manifest(self.directory)
        self.metadata = self._manifest.metadata
        known = self.metadata.schema
        self._codes = None
        if semantic_ids:
            self._codes = align(
                load_semantic_ids(Path(semantic_ids)), self._items("item_id")
            )
            known = with_semantic_id(known, self._codes)
        self.schema: Schema = known.without(exclude)
        self._manifest.check("features.json")  # it is tensorflow-datasets that reads it
        self._shards = records.shard_lengths(self._manifest.check("dataset_info.json"))
        self.splits: tuple[str, ...] = tuple(
            s for s in SPLITS if sum(self._shards.get(s, ()))
        )
        self.catalogue = self._load_catalogue()
        self._rows: dict[str, np.ndarray] = {}

    def num_chunks(self, split: str) -> int:
        """Number of chunks of a split."""
        return sum(self._lengths(split))

    def chunk_lengths(self, split: str) -> np.ndarray:
        """Rows of each chunk of a split, repeated events included: `[chunks] int64`.

        Raises:
          InputError: the split does not exist or is empty, or the file is missing or damaged.
        """
        expected = self.num_chunks(split)
        if split not in self._rows:
            name = f"{records.INDEX}/{split}.npy"
            rows = self._load_array(name)
            if (
                rows.shape != (expected,)
                or rows.dtype != np.int64
                or not ((rows > 0) & (rows <= MOST_ROWS)).all()
            ):
                raise InputError(
                    f"data: '{self.directory / name}' has the shape {rows.shape} of {rows.dtype}, not a number of rows "
                    f"for each of {expected} chunks; prepare the data set again"
                )
            self._rows[split] = rows
        return self._rows[split]

    def load(
        self, split: str, start: int = 0, stop: int | None = None
    ) -> InteractionLog:
        """Chunks [start, stop) of a split.

        Raises:
          InputError: the split does not exist or is empty, the range is not within it, or a file is missing or damaged.
        """
        chunks = self.num_chunks(split)
        stop = chunks if stop is None else stop
        if not 0 <= start <= stop <= chunks:
            raise InputError(
                f"split '{split}' has chunks 0 to {chunks}; [{start}, {stop}) does not lie within"
            )
        full = self.metadata.schema
        offsets = np.concatenate(
            [[0], np.cumsum(self.chunk_lengths(split)[start:stop])]
        )
        row, user = records.row_dtype(full), records.user_dtype(full)
        picked = {
            group: _kept(full.group(group), self.schema.group(group))
            for group in _GROUPS
        }
        strings = self.metadata.key_types["user_id"] == "string"
        widths = {
            group: (len(ids), len(dense)) for group, (ids, dense) in picked.items()
        }
        try:
            out = _empty_log(
                offsets, widths, len(full.tasks), object if strings else np.int64
            )
        except MemoryError as error:
            raise InputError(
                f"data '{self.directory}', split '{split}': {offsets[-1]} rows do not fit in memory; use a smaller "
                f"data.window_rows, or prepare the data set again if it has no such chunks"
            ) from error
        at = 0
        for block in records.read_records(
            self.directory, split, self._lengths(split), start, stop
        ):
            u, r = (
                slice(at, at + len(block)),
                slice(int(offsets[at]), int(offsets[at + len(block)])),
            )
            where = f"data '{self.directory}', split '{split}', chunks {start + at} to {start + at + len(block) - 1}"
            decoded = _decode(block, str if strings else int, where)
            rows = _from_bytes(
                [c.rows for c in decoded],
                row,
                np.diff(offsets[at : at + len(block) + 1]),
                where,
            )
            users = _from_bytes(
                [c.user for c in decoded], user, np.ones(len(block), np.int64), where
            )
            at += len(block)
            out.user_id[u] = [c.user_id for c in decoded]
            for group, source, into in zip(
                _GROUPS, (users, rows, rows), (u, r, r), strict=True
            ):
                ids, dense = picked[group]
                getattr(out, f"{group}_ids")[into] = source[f"{group}_ids"][:, ids]
                getattr(out, f"{group}_dense")[into] = source[f"{group}_dense"][
                    :, dense
                ]
            for name in ("time", "item", "flags", "request", "labels"):
                getattr(out, name)[r] = rows[name]
        where = (
            f"data '{self.directory}', split '{split}', chunks {start} to {stop - 1}"
        )
        check_log(out, self.schema, len(self.catalogue.item_id), where)
        return out

    def _lengths(self, split: str) -> list[int]:
        if split not in self.splits:
            reason = "is empty" if split in SPLITS else "is unknown"
            raise InputError(
                f"split '{split}' of '{self.directory}' {reason}{suggest(split, self.splits)}"
            )
        return self._shards[split]

    def _load_catalogue(self) -> Catalogue:
        full = self.metadata.schema
        whole = Catalogue(*(self._items(name) for name in ("item_id", "ids", "dense")))
        check_catalogue(whole, full, f"data '{self.directory / ITEMS}'")
        ids, dense = whole.ids, whole.dense
        stored = [
            f
            for f in self.schema.group("catalogue")
            if f.name != SEMANTIC_ID or self._codes is None
        ]
        kept_ids, kept_dense = _kept(full.group("catalogue"), stored)
        if len(kept_ids) < ids.shape[1]:
            ids = ids[:, kept_ids]
        if len(kept_dense) < dense.shape[1]:
            dense = dense[:, kept_dense]
        if self._codes is not None and any(
            f.name == SEMANTIC_ID for f in self.schema.features
        ):
            ids = np.concatenate([ids, semantic_columns(self._codes)], axis=1)
        return Catalogue(whole.item_id, ids, dense, self._codes)

    def _items(self, name: str) -> np.ndarray:
        return self._load_array(f"{ITEMS}/{name}.npy")

    def _load_array(self, name: str) -> np.ndarray:
        path = self._manifest.check(name)
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, EOFError, *_HEADER_ERRORS) as error:
            raise InputError(
                f"data: cannot read '{path}': {error}; prepare the data set again"
            ) from error


# What NumPy lets through when the header of a .npy file is no Python dictionary of the right entries.
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    OverflowError,
    MemoryError,
    RecursionError,
)
_GROUPS: tuple[Group, ...] = ("user", "row", "action")


def open_dataset(
    directory: Path, exclude: Sequence[str] = (), semantic_ids: str = ""
) -> Dataset:
    """Opens a prepared data set; columns of the features in `exclude` are dropped everywhere.

    `semantic_ids`, a file or folder that `tokenrec semantic-ids` wrote, adds the item feature `semantic_id` and the
    codes of the catalogue.

    Raises:
      InputError: the folder is not a prepared data set, a file of it is missing or damaged, a feature is unknown, or
        the semantic ids are not those of its items.
    """
    return Dataset(directory, exclude, semantic_ids)


def _kept(
    features: Sequence[Feature], kept: Sequence[Feature]
) -> tuple[np.ndarray, np.ndarray]:
    """Columns of `kept` in the `ids` and `dense` matrices of `features`."""
    layout: Columns = columns(features)
    ids = [np.arange(*layout.ids[f.name]) for f in kept if f.is_integer]
    dense = [np.arange(*layout.dense[f.name]) for f in kept if not f.is_integer]
    none = np.zeros(0, np.int64)
    return np.concatenate([none, *ids]), np.concatenate([none, *dense])


def _empty_log(
    start: np.ndarray,
    widths: Mapping[Group, tuple[int, int]],
    tasks: int,
    user_id: type,
) -> InteractionLog:
    """Arrays to be filled; `widths` are the columns of `ids` and `dense` of each group."""
    chunks, rows = len(start) - 1, int(start[-1])
    matrices = {}
    for group, count in (("user", chunks), ("row", rows), ("action", rows)):
        ids, dense = widths[group]  # type: ignore[index]
        matrices[f"{group}_ids"] = np.empty((count, ids), np.int32)
        matrices[f"{group}_dense"] = np.empty((count, dense), np.float32)
    return InteractionLog(
        start=start,
        user_id=np.empty(chunks, user_id),
        time=np.empty(rows, np.int64),
        item=np.empty(rows, np.int32),
        flags=np.empty(rows, np.uint8),
        request=np.empty(rows, np.int64),
        labels=np.empty((rows, tasks), np.int8),
        **matrices,
    )


def _decode(block: list[bytes], id_type: type, where: str) -> list[records.Chunk]:
    try:
        decoded = [records.decode(record) for record in block]
    except ValueError as error:
        raise InputError(
            f"{where}: a record is not a chunk of rows: {error}; prepare the data set again"
        ) from error
    for chunk in decoded:
        if not isinstance(chunk.user_id, id_type):
            raise InputError(
                f"{where}: user_id={chunk.user_id!r} is no {id_type.__name__}, as key_types says; prepare the data set "
                f"again"
            )
    return decoded


def _from_bytes(
    parts: list[bytes], dtype: np.dtype, counts: np.ndarray, where: str
) -> np.ndarray:
    """The rows of all parts; `counts: [parts]`, how many each one holds."""
    found = np.fromiter(map(len, parts), np.int64, len(parts))
    if (found != counts * dtype.itemsize).any():
        raise InputError(
            f"{where}: a record does not fit the schema or the index of chunks; prepare the data set again"
        )
    return (
        np.frombuffer(b"".join(parts), dtype)
        if dtype.itemsize
        else np.zeros(int(counts.sum()), dtype)
    )
