"""What was decided about a column, and why."""

from __future__ import annotations

import dataclasses
from typing import Literal

from tokenrec.data.schema import Feature

Role = Literal["user", "item", "time", "request", "label", "feature", "left out"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """A decision about one column of one table.

    Attributes:
      table: "log", "users" or "items".
      column: name of the column in the file.
      role: what the column is used as.
      reason: a sentence, without the name of the column.
      feature: the feature that is read from it; None for other roles.
      key_type: "int64" or "string", for a categorical or multi-valued feature and for
        an id.
      separator: what separates the values of a list in text.
      check: whether the user should look at this decision.
    """

    table: str
    column: str
    role: Role
    reason: str
    feature: Feature | None = None
    key_type: str = ""
    separator: str = ""
    check: bool = False
