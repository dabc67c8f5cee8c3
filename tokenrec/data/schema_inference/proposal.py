"""Propose a schema, splits and a config for a log."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tokenrec.data.schema import Entity, Feature, Schema
from tokenrec.data.schema_inference.column_profile import (
    ColumnProfile,
    profile_columns,
)
from tokenrec.data.schema_inference.decisions import Decision, Role
from tokenrec.data.schema_inference.entity_columns import decide_entity_column
from tokenrec.data.schema_inference.feature_kinds import choose_kind
from tokenrec.data.schema_inference.find_keys import (
    TABLE_KEYS,
    Flags,
    find_keys,
    find_table_keys,
    match_remarks,
)
from tokenrec.data.schema_inference.keys import Key, find_request
from tokenrec.data.schema_inference.labels import Label, find_labels
from tokenrec.data.schema_inference.log_columns import LogContext, decide_log_column
from tokenrec.data.schema_inference.sample import TableSample, read_sample
from tokenrec.data.schema_inference.splits import Splits, choose_splits
from tokenrec.data.schema_inference.statistics import (
    ProposedStatistics,
    propose_statistics,
)
from tokenrec.data.schema_inference.times import milliseconds
from tokenrec.errors import InputError

# Names that a feature cannot have (delimited_schema.py).
_RESERVED = (
    *("user_id", "item_id", "time_ms", "request", "event", "scored", "row_weight"),
    "split",
)


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What was found in a log.

    Attributes:
      samples: "log", "users" and "items" to their samples.
      keys: "user_id", "item_id", "time_ms" and perhaps "request" to their columns.
      labels: the tasks.
      decisions: one for each column of each table, in order.
      splits: when valid and test begin.
      remarks: further sentences for the user.
      repeats: share of the rows whose user had their item before.
      rows_per_request: mean rows of a request; 1 without requests.
      statistics: statistics of the past; none without labels.
    """

    samples: dict[str, TableSample]
    keys: dict[str, Key]
    labels: list[Label]
    decisions: list[Decision]
    splits: Splits
    remarks: list[str]
    repeats: float
    rows_per_request: float
    statistics: ProposedStatistics

    @property
    def config(self) -> str:
        """Name of the shipped config: `ranker` with labels of both classes."""
        return "ranker" if self.labels else "retriever"

    @property
    def schema(self) -> Schema:
        """Features and tasks."""
        features = tuple(d.feature for d in self.decisions if d.feature is not None)
        return Schema(features, tuple(label.as_task for label in self.labels))

    @property
    def features(self) -> list[Decision]:
        return [d for d in self.decisions if d.feature is not None]


def propose(
    log: Sequence[Path],
    users: Path | None = None,
    items: Path | None = None,
    flags: Flags | None = None,
) -> Proposal:
    """Look at samples of a log and of its tables, and decide about every column.

    Args:
      log: files of log rows, or folders or globs of them.
      users: file, folder or glob of a row per user.
      items: file, folder or glob of a row per item.
      flags: what the user said; None for nothing.

    Raises:
      InputError: a file cannot be read, or no column looks like a user, an item or a
        time; names the flag that settles it.
    """
    samples = {"log": read_sample(log)}
    if users is not None:
        samples["users"] = read_sample([users])
    if items is not None:
        samples["items"] = read_sample([items])
    return propose_for(samples, flags or Flags())


def propose_for(
    samples: dict[str, TableSample], flags: Flags, *, wide: bool = False
) -> Proposal:
    """Decide about every column of samples.

    Args:
      samples: "log", and perhaps "users" and "items".
      flags: what the user said.
      wide: whether the source makes the tables of users and items itself, from columns
        of the log that say the same on every row of a user or an item.

    Raises:
      InputError: as `propose`.
    """
    columns = {name: profile_columns(sample) for name, sample in samples.items()}
    keys = find_keys(columns, flags)
    time = keys["time_ms"]
    times = milliseconds(time.profile, time.unit)
    request = find_request(columns["log"], keys["user_id"].profile, times)
    if request is not None:
        keys["request"] = request
    taken = {key.profile.column for key in keys.values()}
    rest = [c for c in columns["log"] if c.column not in taken]
    found = find_labels(rest, flags.labels)
    labels = [label for label in found if label.has_both_classes]
    remarks = _one_class_remarks(found, flags)
    context = LogContext(
        keys["user_id"].profile, keys["item_id"].profile, times, labels, wide
    )
    names = _Names(label.task for label in labels)
    table_keys = find_table_keys(columns, keys)
    remarks += match_remarks(samples, keys, table_keys)
    decisions = _key_decisions(keys, table_keys)
    decisions += _log_decisions(rest, labels, context, names)
    decisions += _table_decisions(columns, table_keys, names)
    repeats = _repeat_share(context)
    profiles = {
        (table, c.column): c for table, of_table in columns.items() for c in of_table
    }
    statistics = ProposedStatistics()
    if labels:
        statistics = propose_statistics(
            decisions,
            lambda decision: profiles[decision.table, decision.column].distinct,
            keys["item_id"].profile.distinct,
            times,
            repeats,
        )
        taken_names = {d.feature.name for d in decisions if d.feature is not None}
        if clash := taken_names & statistics.feature_names(labels):
            remarks.append(
                f"no statistics of the past are proposed, because '{min(clash)}' is a "
                "column already"
            )
            statistics = ProposedStatistics()
    return Proposal(
        samples=samples,
        keys=keys,
        labels=labels,
        decisions=decisions,
        splits=choose_splits(times),
        remarks=remarks,
        repeats=repeats,
        rows_per_request=request.profile.rows / request.profile.distinct
        if request
        else 1.0,
        statistics=statistics,
    )


def _one_class_remarks(found: Sequence[Label], flags: Flags) -> list[str]:
    remarks = []
    for label in found:
        if label.has_both_classes:
            continue
        text = f"label '{label.task}' has one class in the sample, and is no task"
        if flags.labels:
            raise InputError(
                f"--label: {text}; choose another column or threshold, or leave the "
                "flag out for a retriever, which needs no negatives"
            )
        remarks.append(text)
    return remarks


class _Names:
    """Names of features, each given once."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._taken = {*_RESERVED, *taken}

    def take(self, name: str, prefix: str) -> str:
        """Take a name, with a prefix in front of it if it is taken."""
        while name in self._taken:
            name = f"{prefix}_{name}"
        self._taken.add(name)
        return name


def _key_decisions(
    keys: dict[str, Key], table_keys: dict[str, ColumnProfile]
) -> list[Decision]:
    roles: dict[str, Role] = {
        "user_id": "user",
        "item_id": "item",
        "time_ms": "time",
        "request": "request",
    }
    table_of = {name: table for table, name in TABLE_KEYS.items()}
    decisions = []
    for name, key in keys.items():
        column = key.profile
        key_type = ""
        if name in table_of:
            other = table_keys.get(table_of[name], column)
            whole = column.type == other.type == "int"
            key_type = "int64" if whole else "string"
        # Every item gets a vector of its own; users are known by their history.
        feature = (
            Feature("item_id", "categorical", "item") if name == "item_id" else None
        )
        decisions.append(
            Decision("log", column.column, roles[name], key.reason, feature, key_type)
        )
    return decisions


def _log_decisions(
    rest: Sequence[ColumnProfile],
    labels: Sequence[Label],
    context: LogContext,
    names: _Names,
) -> list[Decision]:
    decisions = []
    of_column: dict[str, list[Label]] = {}
    for label in labels:
        of_column.setdefault(label.profile.column, []).append(label)
    for column in rest:
        if column.column not in of_column:
            name = names.take(column.name, "log")
            decisions.append(decide_log_column(column, context, name))
            continue
        decisions += [
            Decision("log", column.column, "label", label.reason, check=True)
            for label in of_column[column.column]
        ]
        # The reactions to earlier items are the best that is known of a user.
        choice = choose_kind(column, names.take(column.name, "past"), "action")
        if choice.feature is not None:
            decisions.append(
                Decision(
                    "log",
                    column.column,
                    "feature",
                    "the model sees it for earlier rows only",
                    choice.feature,
                    choice.key_type,
                )
            )
    return decisions


def _table_decisions(
    columns: dict[str, list[ColumnProfile]],
    table_keys: dict[str, ColumnProfile],
    names: _Names,
) -> list[Decision]:
    entities: dict[str, Entity] = {"users": "user", "items": "item"}
    return [
        decide_entity_column(
            column, table, entities[table], names.take(column.name, entities[table])
        )
        for table, key in table_keys.items()
        for column in columns[table]
        if column is not key
    ]


def _repeat_share(context: LogContext) -> float:
    """Share of the rows whose user has the same item on another row."""
    pairs = context.user.codes * (context.item.distinct + 1) + context.item.codes
    return 1 - len(np.unique(pairs)) / max(len(pairs), 1)
