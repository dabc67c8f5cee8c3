"""Which rows of a stream may see which: the equation `see` of methods.md section 3, for every implementation alike."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

# Name (`jax.ad_checkpoint.checkpoint_name`) of what a backward pass of attention needs besides q, k and v.
ATTENTION_RESULT = "attention"


class Rows(NamedTuple):
    """What `sees` needs to know of some rows; NumPy or JAX arrays of one shape.

    Attributes:
      row: number in the stream.
      index: order; windows count it. The highest that the row may see of its own candidate.
      reach: highest index that the row may see of rows without candidate.
      static: rows that sliding layers hide from all but each other.
      candidate: candidate that the row belongs to, -1 for none.
    """

    row: Any
    index: Any
    reach: Any
    static: Any
    candidate: Any


def sees(query: Rows, key: Rows, window: int | None) -> Any:
    """`see` without `valid_j` and without the diagonal, elementwise over arrays that broadcast."""
    own = (key.candidate == query.candidate) & (key.index <= query.index)
    seen = ((key.candidate == -1) & (key.index <= query.reach)) | own
    if window is not None:
        seen &= (query.index - key.index < window) & (query.static | ~key.static)
    return seen


# Rows that fill up a tile: they see nothing, and nothing sees them.
NO_QUERY = Rows(row=-1, index=-1, reach=-1, static=False, candidate=-2)
NO_KEY = Rows(
    row=-2, index=np.iinfo(np.int32).max, reach=-1, static=False, candidate=-1
)


def take_or(rows: Rows, at: np.ndarray, otherwise: Rows) -> Rows:
    """`rows[at]`, and `otherwise` where `at` points outside of them; integers become int32."""
    count = len(rows.row)
    inside = (at >= 0) & (at < count)
    taken = [
        np.where(inside, part[np.clip(at, 0, count - 1)], other)
        for part, other in zip(rows, otherwise, strict=True)
    ]
    return Rows(
        *(part if part.dtype == bool else part.astype(np.int32) for part in taken)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """Which rows may see which, less padding: static NumPy arrays over the query rows and the key rows.

    Attributes:
      query_rows: `[Q]`, row number of each query in the stream, ascending; `key_rows: [K]` likewise.
      index: `[S]`, order of every row of the stream: a row sees rows of no higher index, and windows count indices.
      static: `[S] bool`, rows that sliding layers hide from all but each other.
      candidate: `[S]`, candidate that a row belongs to, -1 for none; candidates do not see each other.
      prefix: rows with an index below this see each other both ways in full layers (methods.md section 2, "Prompt").
      reach: `[S]`, highest index that a row sees of rows without candidate, where that is not its own index: a
        candidate may continue a row in the middle of the stream, and the rows after that are its future.
      discard: sliding layers hide static rows from other rows. Otherwise they show them, however far back.
    """

    query_rows: np.ndarray
    key_rows: np.ndarray
    index: np.ndarray
    static: np.ndarray
    candidate: np.ndarray
    prefix: int = 0
    reach: np.ndarray | None = None
    discard: bool = True

    def rows(self, rows: np.ndarray, window: int | None) -> Rows:
        """The attributes of some rows of the stream."""
        index = self.index[rows]
        reach = index if self.reach is None else self.reach[rows]
        if window is None:
            reach = np.where(index < self.prefix, self.prefix - 1, reach)
        return Rows(rows, index, reach, self.static[rows], self.candidate[rows])

    def visible(self, window: int | None) -> np.ndarray:
        """`[Q, K] bool`: `see` without `valid_j` and the diagonal."""
        query, key = (
            self.rows(self.query_rows, window),
            self.rows(self.key_rows, window),
        )
        query, key = (
            Rows(*(part[:, None] for part in query)),
            Rows(*(part[None, :] for part in key)),
        )
        seen = sees(query, key, window)
        return (
            seen | (key.static & sees(query, key, None))
            if self.keeps_static(window)
            else seen
        )

    def keeps_static(self, window: int | None) -> bool:
        """Whether a layer shows static rows beside its window."""
        return (
            not self.discard
            and window is not None
            and bool(self.static[self.key_rows].any())
        )

    def diagonal(self) -> np.ndarray:
        """`[Q, K] bool`: a row sees itself even when it is padding, so that no softmax is empty."""
        return self.query_rows[:, None] == self.key_rows[None, :]


def causal_pattern(queries: int, keys: int) -> Pattern:
    """Plain causal order over `keys` rows; the queries are the last of them."""
    rows = np.arange(keys)
    return Pattern(
        rows[keys - queries :], rows, rows, np.zeros(keys, bool), np.full(keys, -1)
    )
