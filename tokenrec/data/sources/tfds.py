"""Read a TensorFlow Datasets data set of interactions that is already on disk.

TensorFlow is not needed: the data set is opened as a `tfds.data_source`, which reads
ArrayRecord files. Build it in that format, on a machine with a network:

    tfds build movielens/1m-ratings --file_format=array_record

An example is a log row, and holds what is known of its user and its item too. What says
the same on every row of a user or an item becomes a feature of it; the meaning of all
other columns is inferred as `tokenrec init` does (`schema_inference/`), from a sample
at equal distances. Splits are made by time, 80/10/10, out of the one split of the data
set that is read: the splits of the data set itself are not by time.

Licence and citation are those of the data set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Feature
from tokenrec.data.schema_inference.column_profile import profile_columns
from tokenrec.data.schema_inference.find_keys import Flags
from tokenrec.data.schema_inference.labels import Label, stored_labels
from tokenrec.data.schema_inference.proposal import Proposal, propose_for
from tokenrec.data.schema_inference.sample import TableSample
from tokenrec.data.schema_inference.times import milliseconds
from tokenrec.data.schema_inference.write import summary_lines
from tokenrec.data.source import Provenance
from tokenrec.data.sources.delimited_times import split_time
from tokenrec.data.sources.tfds_columns import TfdsColumn, list_columns
from tokenrec.errors import InputError, suggest

SAMPLE_EXAMPLES = 200_000
BATCH_EXAMPLES = 10_000


class TfdsSource:
    """Examples of a TensorFlow Datasets data set as a `Source`.

    Every example is an event and an impression.

    Args:
      name: name of the data set, such as `movielens/1m-ratings`.
      data_dir: folder of TFDS data sets; None for TFDS's own default.
      split: split of the data set that is read.
      labels: tasks, as `tokenrec init --label` takes them: a column of 1 and 0, or
        `liked: user_rating >= 4`. Empty: what is found.
      user: column of users; empty to find it.
      item: column of items.
      time: column of times.
      valid_from: start of the valid split: ISO date or time (UTC), or milliseconds;
        None splits 80/10/10.
      test_from: start of the test split.

    Attributes:
      summary: what was found in the data set, and why, in sentences.

    Raises:
      InputError: the data set is not there or not in a format that can be read, or a
        column is not found; names the flag that settles it.
    """

    def __init__(
        self,
        name: str,
        data_dir: Path | None = None,
        split: str = "train",
        labels: Sequence[str] = (),
        *,
        user: str = "",
        item: str = "",
        time: str = "",
        valid_from: str | None = None,
        test_from: str | None = None,
    ) -> None:
        builder = _open_builder(name, data_dir)
        self._examples = _open_split(builder, split)
        columns, skipped = list_columns(builder.info.features)
        self._columns = {column.name: column for column in columns}
        proposal = propose_for(
            self._sample(Path(builder.data_dir)),
            Flags(user, item, time, tuple(labels)),
            wide=True,
        )
        self._set_schema(proposal)
        self._starts = _split_starts(proposal, valid_from, test_from)
        lines = summary_lines(proposal)
        if skipped:
            lines.append(f"left out, as no feature can hold them: {', '.join(skipped)}")
        self.summary = tuple(lines)
        self.provenance = Provenance(
            name=f"tfds {builder.info.full_name}",
            licence=builder.info.redistribution_info.license
            or "that of the data set's authors",
            citation=builder.info.citation or "the data set's authors",
            files=tuple(sorted(Path(builder.data_dir).glob(f"*-{split}.*"))),
        )

    def users(self) -> pa.Table:
        return self._owner_table("user_id", self.schema.group("user"))

    def items(self) -> pa.Table:
        features = [f for f in self.schema.group("catalogue") if f.name != "item_id"]
        return self._owner_table("item_id", features)

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield the examples in the order of the files."""
        features = (*self.schema.group("row"), *self.schema.group("action"))
        for batch in self._batches(self._row_columns(features)):
            time = self._read_times(batch)
            always = np.ones(len(time), bool)
            columns: dict[str, Any] = {
                "user_id": self._read("user_id", batch),
                "item_id": self._read("item_id", batch),
                "time_ms": time,
                "split": np.searchsorted(self._starts, time, "right").astype(np.int8),
                "event": always,
                "scored": always,
                "request": (
                    self._read("request", batch)
                    if "request" in self._column_of
                    else np.full(len(time), -1)
                ),
            }
            for label in self._labels:
                (profile,) = profile_columns(
                    _as_sample(batch.select([label.profile.column]))
                )
                columns[f"label_{label.task}"] = stored_labels(
                    dataclasses.replace(label, profile=profile)
                )
            for feature in features:
                columns[feature.name] = self._read(feature.name, batch)
            yield pa.RecordBatch.from_pydict(columns)

    def _sample(self, directory: Path) -> dict[str, TableSample]:
        """Read examples at equal distances."""
        count = len(self._examples)
        if not count:
            raise InputError(f"{directory}: the split has no examples; name another")
        places = np.unique(
            np.linspace(0, count - 1, min(count, SAMPLE_EXAMPLES)).astype(int)
        )
        table = pa.Table.from_batches(
            [
                self._read_examples(places[i : i + BATCH_EXAMPLES], self._columns)
                for i in range(0, len(places), BATCH_EXAMPLES)
            ]
        )
        complete = len(places) == count
        return {"log": TableSample((directory,), table, False, complete, count)}

    def _set_schema(self, proposal: Proposal) -> None:
        self.schema = proposal.schema
        self._labels: list[Label] = proposal.labels
        self._unit = proposal.keys["time_ms"].unit
        # Name that is yielded -> name in the data set; and the type of its values.
        self._column_of = {
            name: key.profile.column for name, key in proposal.keys.items()
        }
        self._whole: set[str] = set()
        for decision in proposal.decisions:
            name = f"{decision.role}_id"
            if decision.role == "feature" and decision.feature is not None:
                name = decision.feature.name
                self._column_of[name] = decision.column
            if decision.key_type == "int64":
                self._whole.add(name)

    def _row_columns(self, features: Sequence[Feature]) -> list[str]:
        names = ["user_id", "item_id", "time_ms", *(f.name for f in features)]
        wanted = [self._column_of[name] for name in names]
        if "request" in self._column_of:
            wanted.append(self._column_of["request"])
        wanted += [label.profile.column for label in self._labels]
        return list(dict.fromkeys(wanted))

    def _owner_table(self, key: str, features: Sequence[Feature]) -> pa.Table:
        """A row for each user or item that the log has, from its first example."""
        names = [key, *(feature.name for feature in features)]
        columns = list(dict.fromkeys(self._column_of[name] for name in names))
        seen: set[Any] = set()
        parts = []
        for batch in self._batches(columns) if features else ():
            keys = self._read(key, batch).to_pylist()
            # Backwards, so that the first example of a batch stays.
            first = {value: i for i, value in reversed(list(enumerate(keys)))}
            new = sorted(i for value, i in first.items() if value not in seen)
            seen.update(first)
            rows = batch.take(pa.array(new, pa.int64()))
            parts.append(pa.table({name: self._read(name, rows) for name in names}))
        if not parts:
            return pa.table({key: pa.array([], self._key_type(key))})
        return pa.concat_tables(parts)

    def _key_type(self, key: str) -> pa.DataType:
        return pa.int64() if key in self._whole else pa.string()

    def _read(self, name: str, batch: pa.RecordBatch) -> pa.Array:
        """The values of a key or a feature, in the type that it declares."""
        values = batch.column(self._column_of[name])
        if name == "request":
            return values.fill_null(-1)
        if name in ("user_id", "item_id"):
            return values.cast(self._key_type(name))
        feature = self.schema.feature(name)
        if feature.kind == "categorical" and pa.types.is_floating(values.type):
            return values.cast(self._key_type(name))
        return values

    def _read_times(self, batch: pa.RecordBatch) -> np.ndarray:
        column = self._column_of["time_ms"]
        (profile,) = profile_columns(_as_sample(batch.select([column])))
        return milliseconds(profile, self._unit)

    def _batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        selected = {name: self._columns[name] for name in columns}
        for start in range(0, len(self._examples), BATCH_EXAMPLES):
            stop = min(start + BATCH_EXAMPLES, len(self._examples))
            yield self._read_examples(np.arange(start, stop), selected)

    def _read_examples(
        self, places: np.ndarray, columns: Mapping[str, TfdsColumn]
    ) -> pa.RecordBatch:
        examples = self._examples.__getitems__([int(place) for place in places])
        return pa.RecordBatch.from_pydict(
            {name: column.convert(examples) for name, column in columns.items()}
        )


def _as_sample(batch: pa.RecordBatch) -> TableSample:
    table = pa.Table.from_batches([batch])
    return TableSample((), table, False, True, table.num_rows)


def _open_builder(name: str, data_dir: Path | None) -> Any:
    """Open a data set that is on disk.

    Raises:
      InputError: it is not there.
    """
    import tensorflow_datasets as tfds

    folder = str(data_dir) if data_dir is not None else tfds.core.constants.DATA_DIR
    # Without `try_gcs`, and without the code of the data set, nothing is downloaded.
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
    except (tfds.core.registered.DatasetNotFoundError, FileNotFoundError) as error:
        raise InputError(
            f"name='{name}': '{folder}' holds no such data set; give its folder with "
            f"--data-dir, or build it there: tfds build {name} "
            "--file_format=array_record"
        ) from error


def _open_split(builder: Any, split: str) -> Any:
    """Open a split for random access.

    Raises:
      InputError: there is no such split, or its files are not ArrayRecord.
    """
    if split not in builder.info.splits:
        known = list(builder.info.splits)
        raise InputError(
            f"split='{split}' is not one of {builder.info.full_name}"
            f"{suggest(split, known)}"
        )
    if builder.info.file_format.value != "array_record":
        raise InputError(
            f"{builder.data_dir}: is stored as {builder.info.file_format.value}, which "
            "needs TensorFlow to be read; build it again with "
            "--file_format=array_record"
        )
    return builder.as_data_source(split)


def _split_starts(
    proposal: Proposal, valid_from: str | None, test_from: str | None
) -> list[int]:
    """First times of valid and test, in milliseconds.

    Raises:
      InputError: a time cannot be read, or test begins before valid.
    """
    if valid_from is None:
        valid_from = proposal.splits.valid_from
        test_from = test_from or proposal.splits.test_from
    starts = [split_time("valid_from", valid_from, "UTC")]
    if test_from is not None:
        starts.append(split_time("test_from", test_from, "UTC"))
    if starts != sorted(set(starts)):
        raise InputError(
            f"test_from={test_from} must be later than valid_from={valid_from}; move "
            "one of them"
        )
    return starts
