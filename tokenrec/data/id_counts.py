"""Count how often training sees each id, and let rare ids share rows.

`prepare` gives an id to every value that the training split holds, however rarely. With
`tokens.min_count` a run lets ids with fewer log rows read the row of *unknown*: the
counts are made once, when the run starts, and kept in its folder, so that evaluation
and scoring of any data set map the same ids. The data set itself is not changed.
With `tokens.rare_buckets` = k, rare ids are dealt over k rows by a hash of the id: that
of *unknown*, so that it is trained for what comes later, and those of k - 1 rare ids.

A log row is counted if it is scored or carries a label, so that the events that chunks
repeat do not count twice. An item's ids count once for each such row of the item, a
user's for each such row of the user.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tokenrec.config import TokensConfig
from tokenrec.data.interaction_log import LEARNED, SCORED, Catalogue, InteractionLog
from tokenrec.data.past.keys import mix
from tokenrec.data.schema import (
    FIRST_KNOWN,
    UNKNOWN,
    VALUE_KINDS,
    Group,
    Schema,
    columns,
)
from tokenrec.errors import InputError
from tokenrec.runtime.files import atomic_replace, read_with_retries
from tokenrec.runtime.retry import retry

COUNTS_FILE = "id_counts.npz"
# Log rows that are in memory at a time.
_ROWS_AT_ONCE = 4_000_000
_PREFIX = "table_"

type IdCounts = Mapping[str, np.ndarray]
type RareIds = Mapping[str, np.ndarray]


class CountedData(Protocol):
    """A prepared data set whose ids can be counted."""

    @property
    def schema(self) -> Schema: ...

    @property
    def catalogue(self) -> Catalogue: ...

    def chunk_lengths(self, split: str) -> np.ndarray: ...

    def load(
        self, split: str, start: int = 0, stop: int | None = None
    ) -> InteractionLog: ...


def asks_for_counts(config: TokensConfig) -> bool:
    """Whether a run needs the counts of ids."""
    return config.min_count > 0 or any(config.min_counts.values())


def count_ids(dataset: CountedData, split: str = "train") -> dict[str, np.ndarray]:
    """Count the log rows of each id of categorical and multi-valued features.

    Args:
      dataset: the prepared data set, without the excluded features.
      split: split to read, part by part.

    Returns:
      Table -> `[rows] int64`. Features that share a table are added up.
    """
    schema = dataset.schema
    counts = {
        f.table_name: np.zeros(schema.tables[f.table_name], np.int64)
        for f in schema.features
        if f.kind in VALUE_KINDS
    }
    per_item = np.zeros(len(dataset.catalogue.item_id), np.int64)
    for log in load_parts(dataset, split):
        counted = (log.flags & (SCORED | LEARNED)) != 0
        once = counted.astype(np.int64)
        rows_before = np.concatenate([[0], np.cumsum(once)])
        per_chunk = rows_before[log.start[1:]] - rows_before[log.start[:-1]]
        per_item += np.bincount(log.item[counted], minlength=len(per_item))
        _add(counts, schema, "user", log.user_ids, per_chunk)
        _add(counts, schema, "row", log.row_ids, once)
        _add(counts, schema, "action", log.action_ids, once)
    _add(counts, schema, "catalogue", dataset.catalogue.ids, per_item)
    return counts


def load_parts(dataset: CountedData, split: str) -> Iterator[InteractionLog]:
    """Load a split, some chunks at a time."""
    ends = np.cumsum(dataset.chunk_lengths(split))
    parts = np.searchsorted(ends, np.arange(0, ends[-1], _ROWS_AT_ONCE), side="right")
    edges = np.unique([*parts, len(ends)]).tolist()
    for start, stop in itertools.pairwise(edges):
        yield dataset.load(split, start, stop)


def _add(
    counts: dict[str, np.ndarray],
    schema: Schema,
    group: Group,
    ids: np.ndarray,
    times: np.ndarray,
) -> None:
    """Add `times: [n]` to the counts of the ids of each of n rows, `ids: [n, I]`."""
    place = columns(schema.group(group))
    for f in schema.group(group):
        if f.kind in VALUE_KINDS:
            of_feature = np.asarray(ids[:, slice(*place.ids[f.name])])
            # An id that a row holds twice counts twice.
            total = counts[f.table_name]
            for column in of_feature.T:
                # Sums of whole numbers are exact in float64.
                sums = np.bincount(column, weights=times, minlength=len(total))
                total += sums.astype(np.int64)


def rare_ids(counts: IdCounts, config: TokensConfig) -> dict[str, np.ndarray]:
    """Find the row that each id reads, where some have none of their own.

    Args:
      counts: of `count_ids`.
      config: `tokens` of the run's config.

    Returns:
      Table -> `[rows] int32`, the id whose row an id reads, for the tables with a rare
      id. The reserved ids are none.
    """
    rare = {}
    for table, of_table in counts.items():
        least = config.min_counts.get(table, config.min_count)
        is_rare = of_table < least
        is_rare[:FIRST_KNOWN] = False
        if is_rare.any():
            rare[table] = _shared_rows(is_rare, config.rare_buckets)
    return rare


def _shared_rows(is_rare: np.ndarray, buckets: int) -> np.ndarray:
    """The row that each id reads, `[rows] int32`, with `is_rare: [rows] bool`.

    >>> _shared_rows(np.array([False, False, True, False, True]), 1).tolist()
    [0, 1, 1, 3, 1]
    """
    read = np.arange(len(is_rare), dtype=np.int32)
    ids = read[is_rare]
    # The rows of rare ids are free. A table that has fewer of them has fewer buckets.
    rows = np.append(np.int32(UNKNOWN), ids[: buckets - 1])
    read[is_rare] = rows[mix(ids.astype(np.uint64)) % np.uint64(len(rows))]
    return read


def map_rare_rows(log: InteractionLog, schema: Schema, rare: RareIds) -> InteractionLog:
    """Copy a log with rare ids replaced (`rare_ids`); the same log if there are none."""
    groups: tuple[Group, ...] = ("user", "row", "action")
    changed = {
        f"{group}_ids": _mapped(getattr(log, f"{group}_ids"), schema, group, rare)
        for group in groups
    }
    return dataclasses.replace(log, **changed)


def map_rare_items(catalogue: Catalogue, schema: Schema, rare: RareIds) -> Catalogue:
    """Copy a catalogue with rare ids replaced by those whose rows they read."""
    ids = _mapped(catalogue.ids, schema, "catalogue", rare)
    return dataclasses.replace(catalogue, ids=ids)


def _mapped(ids: np.ndarray, schema: Schema, group: Group, rare: RareIds) -> np.ndarray:
    """Replace rare ids in `ids: [n, I]`; the same array if no column has a table."""
    features = [
        f for f in schema.group(group) if f.kind in VALUE_KINDS and f.table_name in rare
    ]
    if not features:
        return ids
    ids = np.array(ids)
    place = columns(schema.group(group))
    for f in features:
        columns_of = ids[:, slice(*place.ids[f.name])]
        columns_of[:] = rare[f.table_name][columns_of]
    return ids


def save_counts(counts: IdCounts, workdir: Path) -> None:
    """Write the counts into the folder of a run."""
    path = workdir / COUNTS_FILE
    # With a prefix, because `file` is a parameter of NumPy's function.
    arrays: dict[str, Any] = {_PREFIX + name: counts[name] for name in sorted(counts)}

    def write() -> None:
        with atomic_replace(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    retry(write, path)


def load_counts(workdir: Path, schema: Schema) -> dict[str, np.ndarray]:
    """Read the counts of a run.

    Args:
      workdir: folder of the run.
      schema: schema that the run was trained on.

    Raises:
      InputError: the file is missing or damaged, or not of this schema.
    """
    path = workdir / COUNTS_FILE
    remedy = "restore the file, or train with tokens.min_count=0"

    def read() -> dict[str, np.ndarray]:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name.removeprefix(_PREFIX): arrays[name] for name in arrays.files}

    counts = read_with_retries(
        read,
        path,
        "the run's",
        remedy,
        damage=(EOFError, ValueError, KeyError, zipfile.BadZipFile),
    )
    for f in schema.features:
        rows = schema.tables.get(f.table_name)
        found = counts.get(f.table_name)
        if f.kind in VALUE_KINDS and (found is None or found.shape != (rows,)):
            shape = None if found is None else found.shape
            raise InputError(
                f"the run's '{path}' has counts {shape} of table '{f.table_name}', "
                f"which has {rows} rows; {remedy}"
            )
    return counts
