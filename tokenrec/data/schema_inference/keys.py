"""Find the columns that say who, what and when, and which rows were shown together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from tokenrec.data.schema_inference.column_profile import ColumnProfile
from tokenrec.errors import InputError, suggest


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Words that name the column of users and of items, the surest first. A name is compared
# in lower case, without `_id`, `id` and separators.
USER_WORDS = _words(
    "user uid member customer client visitor household reader viewer listener shopper "
    "account person buyer reviewer subscriber session"
)
ITEM_WORDS = _words(
    "item iid video movie product sku asin article news song track book business show "
    "episode game ad content post document doc recipe listing hotel photo creative "
    "offer goods material note artist page anime joke poi venue"
)
REQUEST_WORDS = _words(
    "request impression basket order transaction page feed slate query search list "
    "cart invoice receipt exposure"
)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key column, and why it was taken.

    Attributes:
      profile: the column.
      reason: a sentence.
      unit: unit of a time that is a number; empty otherwise.
    """

    profile: ColumnProfile
    reason: str
    unit: str = ""


def stem(name: str) -> str:
    """Name of an id without what only says that it is one.

    >>> stem("userId"), stem("video_id"), stem("ID_CUSTOMER")
    ('user', 'video', 'customer')
    """
    words = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", name).lower()
    parts = [part for part in re.split(r"[^a-z0-9]+", words) if part]
    kept = [part for part in parts if part not in ("id", "ids", "key", "no", "num")]
    joined = "".join(kept)
    return re.sub(r"(?<=[a-z]{4})id$", "", joined) or joined


def column_named(
    columns: Sequence[ColumnProfile], name: str, flag: str
) -> ColumnProfile:
    """Find the column that a flag names.

    Raises:
      InputError: there is none.
    """
    for column in columns:
        if name in (column.column, column.name):
            return column
    names = [column.column for column in columns]
    raise InputError(f"{flag}={name}: the log has no such column{suggest(name, names)}")


def find_id(
    columns: Sequence[ColumnProfile],
    words: Sequence[str],
    flag: str,
    others: Sequence[str] | None,
) -> Key:
    """Find the column of users or of items.

    Args:
      columns: columns of the log.
      words: what such a column is called.
      flag: the flag that names it, for messages.
      others: columns of the table of users or items; None without one. The key is in
        both tables.

    Raises:
      InputError: no column looks like one.
    """
    shared = [c for c in columns if others is None or c.name in others]
    if not shared:
        # `find_key` says which column of the table to rename.
        shared, others = list(columns), None
    usable = [c for c in shared if c.type in ("int", "string") and c.distinct > 1]
    for word in words:
        for column in usable:
            if stem(column.name) in (word, word + "s"):
                reason = f"its name says so, and it has {column.distinct:,} values"
                if others is not None:
                    reason += f"; the table of {flag}s has it too"
                return Key(column, reason)
    if others is not None and len(usable) == 1:
        (column,) = usable
        return Key(column, f"it is the only column that the table of {flag}s has too")
    names = ", ".join(column.column for column in columns)
    where = "" if others is None else f" that the table of {flag}s has too"
    raise InputError(
        f"no column of the log{where} has a name such as {', '.join(words[:4])}; the "
        f"log has {names}; say which one names the {flag} with --{flag} COLUMN"
    )


def find_request(
    columns: Sequence[ColumnProfile], user: ColumnProfile, times: np.ndarray
) -> Key | None:
    """Find a column that numbers the rows that were shown together.

    All rows of a value have one user and one time, and there is more than one on
    average.
    """
    for column in columns:
        if stem(column.name) not in REQUEST_WORDS or column.known < column.rows:
            continue
        # Text becomes a number by a hash.
        numbers = column.type == "int" and column.numbers.min() >= 0
        if not (numbers or column.type == "string"):
            continue
        if same_within(column.codes, user.codes) < 1:
            continue
        if same_within(column.codes, times) < 1:
            continue
        mean = column.rows / column.distinct
        if mean >= 1.5:
            reason = (
                f"rows of one value share a user and a time, {mean:.1f} rows on average"
            )
            return Key(column, reason)
    return None


def same_within(groups: np.ndarray, values: np.ndarray) -> float:
    """Share of the rows whose value is the first one of their group.

    >>> same_within(np.array([0, 0, 1]), np.array([5, 5, 7]))
    1.0
    """
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return float(np.mean(values == values[first][inverse]))
