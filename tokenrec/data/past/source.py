"""A source with statistics of the past added to its log rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from tokenrec.data.past.declaration import PastStatistics
from tokenrec.data.past.declaration_json import check_statistics, parse_statistics
from tokenrec.data.past.features import PastFeatures
from tokenrec.data.schema import Schema
from tokenrec.data.source import Frozen, Source, StatefulSource
from tokenrec.errors import InputError
from tokenrec.runtime.files import read_json

_OWN, _INNER = "past_", "source_"


class SourceWithStatistics(Source, Protocol):
    """A source that may declare statistics of the past, which `rows` adds.

    Attributes:
      statistics: the declaration; None if there is none.
      state_head: what the names of their arrays in `state` begin with.
    """

    statistics: PastStatistics | None
    state_head: str

    def without_statistics(self) -> Source:
        """Return the source with neither the features nor the order of time."""
        ...


class WithStatistics:
    """Any source with declared statistics of the past, as a `StatefulSource`.

    The log rows come in the order of time. That needs room for a copy of the log in the
    folder for temporary files, and memory for the totals of each distinct key.

        statistics = PastStatistics(keys=(KeyStatistics(("item_id",)),))
        prepare(WithStatistics(source, statistics), Path("data/mine"))

    Args:
      source: the source.
      statistics: what is counted.

    Raises:
      InputError: the declaration does not fit the schema of the source, or the source
        declares statistics itself.
    """

    state_head = _OWN

    def __init__(self, source: Source, statistics: PastStatistics) -> None:
        refuse_second(source)
        check_statistics(statistics, source.schema, "statistics")
        self.statistics: PastStatistics | None = statistics
        self._source = source
        self.provenance = source.provenance
        self._past = PastFeatures(statistics, source.schema)
        self.schema = with_features(source.schema, self._past)

    def users(self) -> pa.Table:
        return self._describe("user_id", self._source.users())

    def items(self) -> pa.Table:
        return self._describe("item_id", self._source.items())

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield the log rows in the order of time, with the statistics."""
        self._past.require_tables(self)
        yield from self._past.add_to(self._source.rows())

    def state(self) -> Mapping[str, np.ndarray]:
        """Return the totals, and those of the source, as `StatefulSource`."""
        arrays = {_OWN + name: array for name, array in self._past.state().items()}
        if isinstance(self._source, StatefulSource):
            for name, array in self._source.state().items():
                arrays[_INNER + name] = array
        return arrays

    def frozen(self) -> Frozen:
        """Describe the frozen statistics, as `FreezingSource`."""
        return self._past.describe_frozen()

    def resume(self, state: Mapping[str, np.ndarray], last_time_ms: int) -> None:
        """Go on from the totals of an earlier log, as `StatefulSource`."""
        self._past.resume(_those(state, _OWN), last_time_ms)
        if isinstance(self._source, StatefulSource):
            self._source.resume(_those(state, _INNER), last_time_ms)

    def without_statistics(self) -> Source:
        """Return the source as it was, as `SourceWithStatistics`."""
        return self._source

    def _describe(self, key: str, table: pa.Table) -> pa.Table:
        self._past.describe(key, table)
        return table


def declaring(source: Source) -> SourceWithStatistics | None:
    """Return a source that declares statistics as one; None of the others."""
    if getattr(source, "statistics", None) is None:
        return None
    return source  # type: ignore[return-value]


def with_features(schema: Schema, past: PastFeatures) -> Schema:
    """Add the features of statistics to a schema."""
    return Schema((*schema.features, *past.features), schema.tasks)


def refuse_second(source: Source) -> None:
    """Refuse a source that declares statistics itself.

    Raises:
      InputError: it does.
    """
    if declaring(source) is not None:
        raise InputError(
            f"source '{source.provenance.name}' declares statistics too; leave one of "
            "them out"
        )


def read_statistics(path: Path, schema: Schema) -> PastStatistics:
    """Read a JSON file that declares statistics.

    Args:
      path: the file.
      schema: schema of the source.

    Raises:
      InputError: the file cannot be read, or does not fit the schema.
    """
    value = read_json(path, "statistics", "correct the file")
    return parse_statistics(value, schema, str(path))


def _those(state: Mapping[str, np.ndarray], head: str) -> dict[str, np.ndarray]:
    """The arrays whose name begins with `head`, without it."""
    return {
        name.removeprefix(head): array
        for name, array in state.items()
        if name.startswith(head)
    }
