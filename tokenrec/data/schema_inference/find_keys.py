"""Find the keys of a log, with what the user said, and the ids in its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tokenrec.data.schema_inference.column_profile import ColumnProfile
from tokenrec.data.schema_inference.entity_columns import find_key, matched_share
from tokenrec.data.schema_inference.keys import (
    ITEM_WORDS,
    USER_WORDS,
    Key,
    column_named,
    find_id,
)
from tokenrec.data.schema_inference.sample import TableSample
from tokenrec.data.schema_inference.times import describe_time, find_time
from tokenrec.errors import InputError

# Table -> the key of the log that it has as well.
TABLE_KEYS = {"users": "user_id", "items": "item_id"}


@dataclasses.dataclass(frozen=True)
class Flags:
    """What the user said about the columns; empty where it is to be found."""

    user: str = ""
    item: str = ""
    time: str = ""
    labels: tuple[str, ...] = ()


def find_keys(columns: dict[str, list[ColumnProfile]], flags: Flags) -> dict[str, Key]:
    """Find user, item and time in the log.

    Args:
      columns: "log", "users" and "items" to their columns.
      flags: what the user said.

    Raises:
      InputError: one is not found, or has no value on some rows; names the flag.
    """
    log = columns["log"]

    def key(flag: str, value: str, words: Sequence[str], table: str) -> Key:
        if value:
            return Key(column_named(log, value, f"--{flag}"), f"--{flag} says so")
        others = [c.name for c in columns[table]] if table in columns else None
        free = [c for c in log if c.name not in (flags.user, flags.item, flags.time)]
        return find_id(free, words, flag, others)

    keys = {
        "user_id": key("user", flags.user, USER_WORDS, "users"),
        "item_id": key("item", flags.item, ITEM_WORDS, "items"),
    }
    if keys["user_id"].profile.column == keys["item_id"].profile.column:
        raise InputError(
            f"column '{keys['user_id'].profile.column}' would be both the user and the "
            "item; say which is which with --user COLUMN and --item COLUMN"
        )
    ids = [entry.profile.column for entry in keys.values()]
    for name, entry in keys.items():
        if entry.profile.known < entry.profile.rows:
            missing = entry.profile.rows - entry.profile.known
            raise InputError(
                f"column '{entry.profile.column}', taken as {name}, is empty on "
                f"{missing:,} rows; fill it in, remove these rows, or name another "
                f"column with --{name.removesuffix('_id')} COLUMN"
            )
    keys["time_ms"] = (
        describe_time(column_named(log, flags.time, "--time"))
        if flags.time
        else find_time([c for c in log if c.column not in ids])
    )
    return keys


def find_table_keys(
    columns: dict[str, list[ColumnProfile]], keys: dict[str, Key]
) -> dict[str, ColumnProfile]:
    """Find the ids in the tables: "users" and "items" to a column."""
    return {
        table: find_key(columns[table], keys[name].profile, table)
        for table, name in TABLE_KEYS.items()
        if table in columns
    }


def match_remarks(
    samples: dict[str, TableSample],
    keys: dict[str, Key],
    table_keys: dict[str, ColumnProfile],
) -> list[str]:
    """Say how many ids of the log the tables have.

    Raises:
      InputError: none of them.
    """
    remarks = []
    for table, table_key in table_keys.items():
        if not samples[table].complete:
            continue
        key = keys[TABLE_KEYS[table]].profile
        share = matched_share(key, table_key)
        if not share:
            raise InputError(
                f"{table}: holds none of the log's values of '{key.column}' "
                f"({key.examples()}); '{table_key.column}' there holds "
                f"{table_key.examples()}; name the table that belongs to the log"
            )
        remarks.append(
            f"{share:.1%} of the {table} of the log are in the table of {table}"
        )
    return remarks
