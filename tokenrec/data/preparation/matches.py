"""Count how many users and items of the log have a row in the source's table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from tokenrec.errors import InputError


@dataclasses.dataclass(frozen=True)
class Matches:
    """How the ids of a log meet those of a table.

    Attributes:
      key: `user_id` or `item_id`.
      in_table: ids of the table.
      in_log: ids of the log.
      matched: ids of both.
      table_example: an id of the table that the log lacks; None if there is none.
      log_example: an id of the log that the table lacks; None if there is none.
    """

    key: str
    in_table: int
    in_log: int
    matched: int
    table_example: int | str | None = None
    log_example: int | str | None = None

    @staticmethod
    def sum(parts: Iterable[Matches], key: str) -> Matches:
        """Add up parts that have no id in common."""
        total = Matches(key, 0, 0, 0)
        for part in parts:
            examples = (
                (total.table_example, part.table_example),
                (total.log_example, part.log_example),
            )
            total = Matches(
                key,
                total.in_table + part.in_table,
                total.in_log + part.in_log,
                total.matched + part.matched,
                *(new if old is None else old for old, new in examples),
            )
        return total

    def count(self, counts: Counter[str]) -> None:
        """Count the ids of the log without a row, as `users_without_row`.

        Raises:
          InputError: the table has rows, and none of them is of the log.
        """
        entities = self.key.removesuffix("_id") + "s"
        if self.in_table and self.in_log and not self.matched:
            raise InputError(
                f"none of the {self.in_log:,} {entities} of the log is among the "
                f"{self.in_table:,} of {entities}(): the log has {self.key}="
                f"{self.log_example!r}, the table {self.key}={self.table_example!r}, "
                "so that all their features would be missing; write the ids alike in "
                "both (leading zeros, spaces, 1000.0 for 1000), or give the table of "
                "this log"
            )
        # Without a table nothing is missing that was there.
        counts[f"{entities}_without_row"] = (
            self.in_log - self.matched if self.in_table else 0
        )
