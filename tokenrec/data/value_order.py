"""Sort distinct values a range at a time, in memory that a limit bounds."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.memory_limit import MemoryLimit, blocks

_SAMPLED = 64  # values of a range that are looked at to place its bounds
_AT_ONCE = 2**20


def in_order(
    values: pa.Array, chosen: np.ndarray, limit: MemoryLimit
) -> Iterator[np.ndarray]:
    """Yield the codes of chosen values, in the order of the values.

    Strings are in the order of their code points.

    Args:
      values: `[n]`, int64 or large strings without nulls, by code.
      chosen: `[n] bool`.
      limit: `limit.sorted_rows` values, about, are sorted at a time.

    Yields:
      `[m] int64`, ascending in value from one array to the next as well.
    """
    count = int(np.count_nonzero(chosen))
    if count <= limit.sorted_rows:
        yield _sorted(values, np.flatnonzero(chosen))
        return
    ranges = min(-(-count // limit.sorted_rows), np.iinfo(np.uint16).max)
    range_of = _ranges(values, _bounds(values, ranges))
    for number in range(ranges):
        yield _sorted(values, np.flatnonzero(chosen & (range_of == number)))


def _sorted(values: pa.Array, codes: np.ndarray) -> np.ndarray:
    order = pc.sort_indices(values.take(pa.array(codes)))
    return codes[order.to_numpy()]


def _bounds(values: pa.Array, ranges: int) -> list[pa.Scalar]:
    """Choose values that cut all of them into ranges of about equal size."""
    # Codes have the order of appearance: evenly spaced ones are a fair sample.
    sampled = np.linspace(0, len(values) - 1, ranges * _SAMPLED).astype(np.int64)
    sample = values.take(pa.array(_sorted(values, np.unique(sampled))))
    places = np.arange(1, ranges) * len(sample) // ranges
    return [sample[int(place)] for place in places]


def _ranges(values: pa.Array, bounds: list[pa.Scalar]) -> np.ndarray:
    """Number of the range of each value, those of its bounds that are not above it."""
    out = np.zeros(len(values), np.uint16)
    for part in blocks(len(values), _AT_ONCE):
        for bound in bounds:
            not_less = pc.greater_equal(values[part], bound)
            out[part] += not_less.to_numpy(zero_copy_only=False)
    return out
