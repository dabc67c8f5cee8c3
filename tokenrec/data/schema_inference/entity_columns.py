"""Decide about the columns of the tables of users and of items."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import Entity
from tokenrec.data.schema_inference.column_profile import ColumnProfile
from tokenrec.data.schema_inference.decisions import Decision
from tokenrec.data.schema_inference.feature_kinds import choose_kind
from tokenrec.errors import InputError


def find_key(
    columns: list[ColumnProfile], key: ColumnProfile, table: str
) -> ColumnProfile:
    """Find the column of a table that holds the ids of the log.

    Raises:
      InputError: no column has its name; names the one with its values, if there is one.
    """
    for column in columns:
        if column.name == key.name:
            return column
    values = pc.unique(key.values.combine_chunks())
    for column in columns:
        if column.type == key.type and column.known == column.distinct:
            shared = pc.mean(
                pc.is_in(values, value_set=column.values.combine_chunks()).cast(
                    pa.float64()
                )
            ).as_py()
            if shared > 0.5:
                raise InputError(
                    f"{table}: the column '{column.column}' holds the values of the "
                    f"log's '{key.column}', but a table and the log need one name; "
                    f"rename it to '{key.column}'"
                )
    names = ", ".join(column.column for column in columns)
    raise InputError(
        f"{table}: no column is called '{key.column}', as in the log; the table has "
        f"{names}; rename the one that holds these ids"
    )


def matched_share(key: ColumnProfile, table_key: ColumnProfile) -> float:
    """Share of the log's ids that a table has."""
    values = pc.unique(key.values.combine_chunks())
    # Integers of one table and strings of the other are compared as they are written.
    found = pc.is_in(
        values.cast(pa.string()),
        value_set=table_key.values.combine_chunks().cast(pa.string()),
    )
    return float(np.mean(found.to_numpy(zero_copy_only=False)))


def decide_entity_column(
    column: ColumnProfile, table: str, entity: Entity, name: str
) -> Decision:
    """Decide what one column of a table of users or items is used as.

    Args:
      column: the column.
      table: "users" or "items".
      entity: "user" or "item".
      name: name that its feature would get.
    """
    if not column.known:
        return Decision(table, column.column, "left out", "it is empty on every row")
    if column.distinct == 1:
        reason = f"it has one value, {column.examples(1)}"
        return Decision(table, column.column, "left out", reason)
    choice = choose_kind(column, name, entity)
    if choice.feature is None:
        return Decision(table, column.column, "left out", choice.reason)
    reason = choice.reason
    missing = 1 - column.known / column.rows
    if missing > 0.01:
        reason += f"; missing in {missing:.0%} of the rows"
    return Decision(
        table,
        column.column,
        "feature",
        reason,
        choice.feature,
        choice.key_type,
        choice.separator,
    )
