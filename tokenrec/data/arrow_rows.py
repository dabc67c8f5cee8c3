"""Decode the log rows of a prepared data set to a stream of Arrow record batches.

Every log row comes once, with its original ids and values, although chunks repeat the
events before them as history. The train split yields all of its rows; valid and test
yield those that are scored, because what else happened then is stored as history only.

| column | type | value |
|---|---|---|
| user_id, item_id | int64 or string | original ids |
| time_ms | int64 | milliseconds since 1970 UTC |
| request | int64 | -1 for a row on its own |
| event, scored | bool | as the source said |
| label_TASK | int8 | 1, 0 or the index of the class; null where unknown |
| label_TASK | float32 | the same of a task of numbers |
| row_weight | float32 | weight of the row; only where the schema has it |
| one per feature | original value | null where missing |
| unknown | list of strings | features whose value no training row holds |

A prepared data set does not keep the values that the train split lacks. Such a value is
null (within a list, a null element), and the name of its feature is in `unknown`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from tokenrec.data.interaction_log import EVENT, SCORED, InteractionLog
from tokenrec.data.schema import (
    FIRST_KNOWN,
    MISSING,
    UNKNOWN,
    Feature,
    Schema,
    Task,
    columns,
)
from tokenrec.data.source import SPLITS
from tokenrec.data.tokenizer import decode, load_tokenizer
from tokenrec.data.vocabulary import load_vocabulary

if TYPE_CHECKING:
    from tokenrec.data.dataset import Dataset

# Log rows that are read from disk at once, more only where one chunk has more.
WINDOW_ROWS = 250_000

type _Decoder = Callable[[np.ndarray], pa.Array]


def read_rows(dataset: Dataset, split: str) -> pa.RecordBatchReader:
    """Stream the log rows of a split; see the table of columns above.

    Args:
      dataset: the data set; excluded features are left out.
      split: name of the split.

    Raises:
      InputError: the split is unknown or empty, or a file is missing or damaged.
    """
    rows = RowDecoder(dataset)
    # Now and not with the first batch: a wrong split is an error of this call.
    dataset.check_shards(split)

    def batches() -> Iterator[pa.RecordBatch]:
        own = _OwnRows(split)
        for log in _windows(dataset, split):
            kept = np.flatnonzero(own.mask(log))
            if len(kept):
                yield rows.decode(log, kept)

    return pa.RecordBatchReader.from_batches(rows.arrow_schema, batches())


class RowDecoder:
    """Decode log rows to Arrow.

    Args:
      dataset: the data set that they come from.

    Attributes:
      arrow_schema: columns and types of the batches.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._schema = dataset.schema
        self._items = pa.array(
            dataset.catalogue.item_id,
            _key_type(dataset.metadata.key_types["item_id"]),
        )
        self._user_type = _key_type(dataset.metadata.key_types["user_id"])
        self._catalogue = dataset.catalogue
        self._decoders = _make_decoders(dataset)
        # A batch of no rows has all columns and types.
        fields = [
            ("user_id", self._user_type),
            ("item_id", self._items.type),
            ("time_ms", pa.int64()),
            ("request", pa.int64()),
            ("event", pa.bool_()),
            ("scored", pa.bool_()),
            *((f"label_{task.name}", _label_type(task)) for task in self._schema.tasks),
            *((("row_weight", pa.float32()),) if self._schema.weighted else ()),
            *(
                (f.name, self._decoders[f.name](_no_values(f)).type)
                for f in self._features
            ),
            ("unknown", pa.list_(pa.string())),
        ]
        self.arrow_schema = pa.schema(fields)

    @property
    def _features(self) -> tuple[Feature, ...]:
        # The ids are columns of their own already.
        return tuple(
            f for f in self._schema.features if f.name not in ("user_id", "item_id")
        )

    def decode(self, log: InteractionLog, rows: np.ndarray) -> pa.RecordBatch:
        """Decode log rows.

        Args:
          log: whole chunks.
          rows: `[n] int64`, the rows of `log` to decode.
        """
        chunk = np.searchsorted(log.start, rows, side="right") - 1
        arrays = [
            pa.array(log.user_id[chunk], self._user_type),
            self._items.take(pa.array(log.item[rows])),
            pa.array(log.time[rows]),
            pa.array(log.request[rows]),
            pa.array((log.flags[rows] & EVENT) > 0),
            pa.array((log.flags[rows] & SCORED) > 0),
            *_label_arrays(self._schema, log, rows),
            *(() if log.weight is None else (pa.array(log.weight[rows]),)),
        ]
        unknown = []
        for feature in self._features:
            values = self._stored_values(feature, log, rows, chunk)
            arrays.append(self._decoders[feature.name](values))
            if feature.has_vocabulary:
                unknown.append((feature.name, (values == UNKNOWN).any(axis=1)))
        arrays.append(_name_lists(unknown, len(rows)))
        return pa.RecordBatch.from_arrays(arrays, schema=self.arrow_schema)

    def _stored_values(
        self, feature: Feature, log: InteractionLog, rows: np.ndarray, chunk: np.ndarray
    ) -> np.ndarray:
        """Ids or numbers of a feature: `[n, length]`."""
        group = feature.group
        place = columns(self._schema.group(group))
        start, stop = (place.ids if feature.is_integer else place.dense)[feature.name]
        matrix = "ids" if feature.is_integer else "dense"
        if group == "catalogue":
            return getattr(self._catalogue, matrix)[log.item[rows], start:stop]
        at = chunk if group == "user" else rows
        return getattr(log, f"{group}_{matrix}")[at, start:stop]


def _label_type(task: Task) -> pa.DataType:
    return pa.float32() if task.kind == "real" else pa.int8()


def _label_arrays(
    schema: Schema, log: InteractionLog, rows: np.ndarray
) -> Iterator[pa.Array]:
    """Yield the labels of log rows `[n]`, an array of each task."""
    real = 0
    for k, task in enumerate(schema.tasks):
        values = log.labels[rows, k]
        mask = values < 0
        if task.kind == "real":
            assert log.targets is not None
            values = log.targets[rows, real]
            real += 1
        yield pa.array(values, mask=mask)


def _key_type(name: str) -> pa.DataType:
    return pa.string() if name == "string" else pa.int64()


def _no_values(feature: Feature) -> np.ndarray:
    return np.empty((0, feature.length), np.int32 if feature.is_integer else np.float32)


def _make_decoders(dataset: Dataset) -> dict[str, _Decoder]:
    """Make the decoder of each feature: stored values `[n, length]` to an array."""
    vocabularies: dict[str, pa.Array] = {}
    decoders: dict[str, _Decoder] = {}
    for feature in dataset.schema.features:
        if feature.has_vocabulary:
            table = feature.table_name
            if table not in vocabularies:
                vocabularies[table] = pa.array(
                    load_vocabulary(dataset.directory, table)
                )
            decoders[feature.name] = _vocabulary_decoder(feature, vocabularies[table])
        elif feature.kind == "semantic_id":
            decoders[feature.name] = _semantic_id_decoder(feature)
        elif feature.kind == "text":
            decoders[feature.name] = _text_decoder(dataset)
        else:
            decoders[feature.name] = _number_decoder(feature)
    return decoders


def _vocabulary_decoder(feature: Feature, known: pa.Array) -> _Decoder:
    # A vocabulary without a value has the type null, and no row needs it.
    def look_up(ids: np.ndarray) -> pa.Array:
        return known.take(pa.array(ids - FIRST_KNOWN, mask=ids < FIRST_KNOWN))

    if feature.kind == "categorical":
        return lambda ids: look_up(ids[:, 0])
    return lambda ids: _lists(look_up(ids[ids != MISSING]), ids != MISSING)


def _semantic_id_decoder(feature: Feature) -> _Decoder:
    # Each level has a range of ids of its own.
    first = FIRST_KNOWN + np.arange(feature.length) * feature.codes
    return lambda ids: _lists(
        pa.array((ids - first)[ids != MISSING].astype(np.int64)), ids != MISSING
    )


def _text_decoder(dataset: Dataset) -> _Decoder:
    tokenizer = load_tokenizer(dataset.directory)

    def read(ids: np.ndarray) -> pa.Array:
        distinct, place = np.unique(ids, axis=0, return_inverse=True)
        texts = pa.array(
            [decode(tokenizer, row) if row.any() else None for row in distinct],
            pa.string(),
        )
        return texts.take(pa.array(place.reshape(-1)))

    return read


def _number_decoder(feature: Feature) -> _Decoder:
    if feature.kind == "dense":
        return lambda numbers: pa.array(numbers[:, 0], mask=np.isnan(numbers[:, 0]))
    return lambda numbers: _lists(
        pa.array(numbers[~np.isnan(numbers)]), ~np.isnan(numbers)
    )


def _lists(values: pa.Array, present: np.ndarray) -> pa.Array:
    """Cut values into lists, one for each row of `present: [n, length] bool`.

    A row without a value is null.
    """
    offsets = np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32)
    missing = pa.array(~present.any(axis=1))
    return pa.ListArray.from_arrays(pa.array(offsets), values, mask=missing)


def _name_lists(masks: list[tuple[str, np.ndarray]], rows: int) -> pa.Array:
    """For each row, the names whose mask `[rows] bool` is True; an empty list for none.

    Returns:
      `[rows]`, lists of strings.
    """
    names = pa.array([name for name, _ in masks], pa.string())
    flags = np.stack([mask for _, mask in masks], axis=1) if masks else None
    if flags is None:
        flags = np.zeros((rows, 0), bool)
    offsets = np.concatenate([[0], np.cumsum(flags.sum(axis=1))]).astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), names.take(pa.array(np.nonzero(flags)[1]))
    )


def _windows(dataset: Dataset, split: str) -> Iterator[InteractionLog]:
    """Read the chunks of a split, about `WINDOW_ROWS` log rows at a time."""
    ends = np.cumsum(dataset.chunk_lengths(split))
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        stop = int(np.searchsorted(ends, before + WINDOW_ROWS, side="right"))
        stop = max(stop, start + 1)
        yield dataset.load(split, start, stop)
        start = stop


class _OwnRows:
    """Tell the log rows of a split from those that its chunks hold as history.

    - A user's chunk after the first one begins with a head, whose times the chunk
      before it has. Chunks end only where the time changes.
    - In chunks of valid and test, a row with `EVENT` as its only flag may be of an
      earlier split. Rows of the split itself are scored.

    Args:
      split: name of the split.
    """

    def __init__(self, split: str) -> None:
        self._is_train = split == SPLITS[0]
        self._last_user: object = None
        self._last_time = 0

    def mask(self, log: InteractionLog) -> np.ndarray:
        """Mark the own rows of the next window: `[R] bool`."""
        own = np.ones(log.num_rows, bool) if self._is_train else log.flags & SCORED > 0
        # Times up to this one are in the user's chunk before: none of a first chunk.
        repeated = np.full(log.num_chunks, np.iinfo(np.int64).min)
        for chunk, user in enumerate(log.user_id):
            if user == self._last_user:
                repeated[chunk] = self._last_time
            self._last_user = user
            self._last_time = int(log.time[log.start[chunk + 1] - 1])
        return own & (log.time > np.repeat(repeated, np.diff(log.start)))
