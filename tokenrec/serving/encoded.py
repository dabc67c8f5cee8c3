"""A request as arrays, and what of it the model does not know.

Letters: C candidates, V items, I and D columns of `ids` and `dense` (schema.py).
"""

from __future__ import annotations

import dataclasses

import numpy as np

type Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Unknown:
    """What of a request the model does not know.

    Attributes:
      items: candidates that the catalogue lacks.
      history_items: events of the history whose items it lacks.
      rows: positions of these candidates.
      values: feature -> values that training has not seen.
      missing: feature -> values that are null.
    """

    items: int
    history_items: int
    rows: tuple[int, ...]
    values: dict[str, int]
    missing: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A request as arrays.

    Attributes:
      prefix: what the prefix depends on: user, history and, if the prompt has one, the
        query. No batch dimension.
      target_ids: `[C, I] int32`, item and context of each candidate.
      target_dense: `[C, D] float32`, the same.
      prefix_key: digest of `prefix`.
      events: events of the history that the model reads.
      unknown: what it does not know.
    """

    prefix: Arrays
    target_ids: np.ndarray
    target_dense: np.ndarray
    prefix_key: bytes
    events: int
    unknown: Unknown

    @property
    def candidates(self) -> int:
        """C, number of candidates."""
        return len(self.target_ids)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        arrays = (*self.prefix.values(), self.target_ids, self.target_dense)
        return sum(array.nbytes for array in arrays)

    def part(self, start: int, stop: int) -> Encoded:
        """The same request with some of its candidates."""
        return dataclasses.replace(
            self,
            target_ids=self.target_ids[start:stop],
            target_dense=self.target_dense[start:stop],
        )


@dataclasses.dataclass(frozen=True)
class EncodedRetrieval:
    """A request for items as arrays.

    Attributes:
      prefix: what the prefix depends on: user, history and, if the prompt has one, the
        query. No batch dimension.
      prefix_key: digest of `prefix`; it depends neither on `k` nor on `allowed`.
      events: events of the history that the model reads.
      unknown: what the model does not know; it counts no candidate.
      k: length of the answer.
      allowed: `[V] bool`, items that the answer may hold; None for all.
    """

    prefix: Arrays
    prefix_key: bytes
    events: int
    unknown: Unknown
    k: int
    allowed: np.ndarray | None

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        allowed = 0 if self.allowed is None else self.allowed.nbytes
        return sum(array.nbytes for array in self.prefix.values()) + allowed
