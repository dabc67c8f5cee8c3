"""Attention: the one entry. Implementations share its signature; `dense` is the reference."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from tokenrec.errors import InputError, suggest
from tokenrec.ops.dense import dense_attention

IMPLEMENTATIONS = {"dense": dense_attention}


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """Which rows may see which, less padding: static NumPy arrays over the query rows and the key rows.

    Attributes:
      query_rows: `[Q]`, row number of each query in the stream; `key_rows: [K]` likewise.
      index: `[S]`, order of every row of the stream: a row sees rows of no higher index, and windows count indices.
      static: `[S] bool`, rows that sliding layers hide from all but each other.
      candidate: `[S]`, candidate that a row belongs to, -1 for none; candidates do not see each other.
    """

    query_rows: np.ndarray
    key_rows: np.ndarray
    index: np.ndarray
    static: np.ndarray
    candidate: np.ndarray

    def visible(self, window: int | None) -> np.ndarray:
        """`[Q, K] bool`: the equation `see` of methods.md section 3, without `valid_j` and the diagonal."""
        i, j = self.query_rows[:, None], self.key_rows[None, :]
        distance = self.index[i] - self.index[j]
        seen = (distance >= 0) & ((self.candidate[j] == -1) | (self.candidate[j] == self.candidate[i]))
        if window is not None:
            seen &= (distance < window) & (self.static[i] | ~self.static[j])
        return seen

    def diagonal(self) -> np.ndarray:
        """`[Q, K] bool`: a row sees itself even when it is padding, so that no softmax is empty."""
        return self.query_rows[:, None] == self.key_rows[None, :]


def causal_pattern(queries: int, keys: int) -> Pattern:
    """Plain causal order over `keys` rows; the queries are the last of them."""
    rows = np.arange(keys)
    return Pattern(rows[keys - queries :], rows, rows, np.zeros(keys, bool), np.full(keys, -1))


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    implementation: str | None = None,
    pattern: Pattern | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with scale `1 / sqrt(h)`, causal unless `pattern` says otherwise.

    Args:
      q: `[B, Q, H, h]`; `k, v: [B, K, H, h]`, with Q <= K where only some rows are needed.
      window: keys that a query sees, itself included; None sees every earlier one.
      implementation: one of `IMPLEMENTATIONS`; None chooses.
      pattern: order, static rows and candidates; None is plain causal order, queries last.
      valid: `[B, K] bool`, keys that are not padding; None: all. A row always sees itself.

    Returns:
      `[B, Q, H, h]` in the dtype of `q`; the softmax is float32.

    Raises:
      InputError: an unknown implementation, a window below 1, or shapes that do not agree.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise InputError(f"implementation={implementation!r} is not known{suggest(implementation, IMPLEMENTATIONS)}")
    if window is not None and window < 1:
        raise InputError(f"window={window}: a window counts the row itself, so it is at least 1")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or q.shape[1] > k.shape[1]:
        raise InputError(f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, Q, H, h], [B, K, H, h] twice, Q <= K")
    pattern = causal_pattern(q.shape[1], k.shape[1]) if pattern is None else pattern
    if (len(pattern.query_rows), len(pattern.key_rows)) != (q.shape[1], k.shape[1]):
        raise InputError(
            f"pattern is for {len(pattern.query_rows)} x {len(pattern.key_rows)} rows, q {q.shape} k {k.shape}"
        )
    return IMPLEMENTATIONS[implementation or "dense"](q, k, v, pattern.visible(window), pattern.diagonal(), valid)
