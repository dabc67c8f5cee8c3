"""What each log row adds to the totals of its keys; a repeated row adds nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.past.declaration import Unscored
from tokenrec.data.past.keys import Hashes, combine, mix
from tokenrec.data.past.totals import SCALE
from tokenrec.data.schema import Feature
from tokenrec.errors import InputError

# Steps per unit of a mean's values: sums of up to 2^42 units fit into an int64.
_VALUE_SCALE = 2.0**20
_LARGEST_VALUE = 2.0**20

ROWS = "rows"
EVENTS = "events"


def known(task: str) -> str:
    """Measure: the label is known."""
    return f"known {task}"


def positive(task: str) -> str:
    """Measure: the label is 1."""
    return f"positive {task}"


def positive_events(task: str) -> str:
    """Measure: the row is an event and the label is 1."""
    return f"positive events {task}"


def valued(feature: str) -> str:
    """Measure: the feature is not missing."""
    return f"valued {feature}"


def value_of(feature: str) -> str:
    """Measure: the value of a feature, transformed."""
    return f"value {feature}"


def scale_of(measure: str) -> float:
    """Steps per unit of a measure in the totals."""
    return _VALUE_SCALE if measure.startswith("value ") else SCALE


def measures(
    table: pa.Table,
    columns: Mapping[str, Hashes],
    tasks: Sequence[str],
    means: Sequence[Feature],
    unscored: Unscored,
) -> dict[str, np.ndarray]:
    """Compute what each log row adds to the totals.

    Args:
      table: log rows; those that repeat one another are all there.
      columns: hashes of ids and key columns.
      tasks: labels that are counted.
      means: dense features whose means are features.
      unscored: what rows that are no impressions do.

    Returns:
      Measure -> `[n] float64`, 0 for rows that do not count.
    """
    labels = {task: _labels(table, task) for task in tasks}
    values = {f.name: transformed(table, f) for f in means}
    event, scored = (flags(table, name) for name in ("event", "scored"))
    counted = _join_repeats(table, columns, labels, values)
    # A row that was not shown yet, to be ranked, tells nothing.
    has_label = np.zeros(len(event), bool)
    for label in labels.values():
        has_label |= label >= 0
    counted &= event | has_label
    if unscored == "skip":
        counted &= scored
    out: dict[str, np.ndarray] = {ROWS: counted, EVENTS: counted & event}
    for task, label in labels.items():
        out[known(task)] = counted & (label >= 0)
        out[positive(task)] = counted & (label == 1)
        out[positive_events(task)] = counted & event & (label == 1)
    for name, value in values.items():
        out[valued(name)] = counted & ~np.isnan(value)
        out[value_of(name)] = np.where(out[valued(name)], value, 0.0)
    return {name: array.astype(np.float64) for name, array in out.items()}


def transformed(table: pa.Table, feature: Feature) -> np.ndarray:
    """Values of a dense feature after its transform, NaN where missing.

    Raises:
      InputError: a value is too large for exact sums.
    """
    values = numbers(table, feature.name)
    if feature.transform == "log1p":
        values = np.sign(values) * np.log1p(np.abs(values))
    too_large = np.abs(values) > _LARGEST_VALUE
    if too_large.any():
        raise InputError(
            f"feature '{feature.name}' is {values[too_large][0]:g} in a row, beyond "
            f"{_LARGEST_VALUE:g}, the largest value of a mean of the past; give the "
            'feature "transform": "log1p"'
        )
    return values


def numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column of numbers, NaN where missing: `[n] float64`."""
    column = table[name].cast(pa.float64())
    return column.fill_null(np.nan).to_numpy()


def flags(table: pa.Table, name: str) -> np.ndarray:
    """A column of booleans: `[n] bool`."""
    column: np.ndarray = table[name].to_numpy()
    return column.astype(bool)


def _labels(table: pa.Table, task: str) -> np.ndarray:
    """Labels 1, 0, and -1 where unknown: `[n] int8`."""
    return pc.fill_null(table[f"label_{task}"].cast(pa.int8()), -1).to_numpy()


def _join_repeats(
    table: pa.Table,
    columns: Mapping[str, Hashes],
    labels: dict[str, np.ndarray],
    values: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Find the rows that count, one of each group that `prepare` makes one row.

    As there (tokenrec/data/preparation/repeats.py), rows repeat one another that share
    user, item and time and are both impressions or both not. The label is 1 if any says
    1, else 0 if any says 0. The row that counts is one with the fewest missing values,
    among equals that of the greatest hash, so that no order of files matters.

    Args:
      table: the log rows.
      columns: hashes of ids and key columns.
      labels: task -> `[n] int8`; the row that counts gets the joined labels.
      values: feature -> `[n] float64`.

    Returns:
      `[n] bool`.
    """
    time = table["time_ms"].to_numpy().view(np.uint64)
    scored = flags(table, "scored").astype(np.uint64)
    group = columns["user_id"].first_of_each()
    for part in (columns["item_id"].first_of_each(), time, scored):
        group = mix(mix(group) + part)
    counted = np.ones(len(group), bool)
    distinct, inverse, size = np.unique(group, return_inverse=True, return_counts=True)
    if len(distinct) == len(group):
        return counted
    rows = np.flatnonzero(size[inverse] > 1)
    missing, digest = _missing_and_digest(table, columns, values, rows)
    order = np.lexsort((~digest, missing, inverse[rows]))
    starts = np.diff(inverse[rows][order], prepend=-1) != 0
    best = rows[order][starts]
    counted[rows] = False
    counted[best] = True
    for name, label in labels.items():
        joined = np.maximum.reduceat(label[rows][order], np.flatnonzero(starts))
        labels[name] = label.copy()
        labels[name][best] = joined
    return counted


def _missing_and_digest(
    table: pa.Table,
    columns: Mapping[str, Hashes],
    values: Mapping[str, np.ndarray],
    rows: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Missing features of `rows: [m]`, and a hash of what their statistics use."""
    missing = np.zeros(len(rows), np.int64)
    skipped = ("user_id", "item_id", "time_ms", "split", "request")
    for name in table.column_names:
        if name not in skipped and not name.startswith("label_"):
            missing += table[name].is_null().to_numpy()[rows]
    digest = np.zeros(len(rows), np.uint64)
    for hashes in columns.values():
        at, keys = combine([hashes.take(rows)], len(rows))
        own = np.zeros(len(rows), np.uint64)
        np.add.at(own, at, mix(keys))
        digest = mix(digest + own)
    for value in values.values():
        # -0.0 and 0.0 have other bits, as has NaN in the file.
        bits = (np.nan_to_num(value[rows]) + 0.0).view(np.uint64)
        digest = mix(digest + bits)
    return missing, digest
