"""Divide a log by time into train, valid and test, and check its times."""

from __future__ import annotations

import numpy as np

from tokenrec.data.sources.delimited_schema import SchemaFile
from tokenrec.data.sources.delimited_times import (
    UNIT_NAMES,
    are_days,
    likely_unit,
    split_time,
)
from tokenrec.errors import InputError


class TimeSplits:
    """Rows before `valid_from` are train, rows before `test_from` valid, others test.

    Args:
      schema_file: gives the unit and the zone of times, and their column.
      valid_from: ISO date or time, or integer milliseconds; None where rows have no
        split (`prepare --like`).
      test_from: the same; None for no test split.

    Raises:
      InputError: a time cannot be read, or the second is not later than the first.
    """

    def __init__(
        self, schema_file: SchemaFile, valid_from: str | None, test_from: str | None
    ) -> None:
        self._schema_file = schema_file
        self._valid_from = self._read("valid_from", valid_from)
        self._test_from = self._read("test_from", test_from)
        if (
            self._valid_from is not None
            and self._test_from is not None
            and self._test_from <= self._valid_from
        ):
            raise InputError(
                f"test_from={test_from} must be later than valid_from={valid_from}; "
                "move one of them"
            )

    def split_of(self, time: np.ndarray) -> np.ndarray:
        """Split of each `time: [n] int64`: index into `SPLITS`, `[n] int8`."""
        split = np.zeros(len(time), np.int8)
        for start in (self._valid_from, self._test_from):
            if start is not None:
                split += time >= start
        return split

    def check(self, earliest: int, latest: int) -> None:
        """Check the range of times, milliseconds, and that train and valid have rows.

        Raises:
          InputError: the unit of time is wrong, or one of the splits is empty.
        """
        column = self._schema_file.column("time_ms")
        form = self._schema_file.time
        runs = (
            f"column '{column}' runs from {_iso_time(earliest)} to "
            f"{_iso_time(latest)}, with numbers read as {UNIT_NAMES[form.unit]} since 1970 "
            "UTC"
        )
        if are_days(earliest, latest, form):
            raise InputError(
                f"{runs}; the numbers are days, such as 20220503; write them as "
                "2022-05-03"
            )
        unit = likely_unit(earliest, latest, form)
        if unit is not None:
            raise InputError(
                f"{runs}; they are sensible as {UNIT_NAMES[unit]}: say so in the schema, "
                f'"time": {{"unit": "{unit}"}}'
            )
        if self._valid_from is None:
            return
        empty = ""
        if earliest >= self._valid_from:
            empty = "train"
        elif latest < self._valid_from:
            empty = "valid"
        if empty:
            raise InputError(
                f"valid_from={_iso_time(self._valid_from)} leaves {empty} empty: "
                f"{runs}; move valid_from or correct the times"
            )

    def _read(self, field: str, value: str | None) -> int | None:
        if value is None:
            return None
        return split_time(field, value, self._schema_file.time.zone)


def _iso_time(milliseconds: int) -> str:
    """Format milliseconds as ISO time; a number beyond the calendar stays a number."""
    try:
        return str(np.datetime64(milliseconds, "ms").astype("datetime64[s]")) + "Z"
    except (ValueError, OverflowError):
        return str(milliseconds)
