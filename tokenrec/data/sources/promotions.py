"""Read what the stores of Complete Journey promoted in each week.

The file has 20.9 million lines, so each promotion is one packed integer, and all of
them are one sorted array: a store's week is a contiguous range, found by binary search.
Bits of a key, from high to low:

    store_id (16) | week (6) | product_id (25)

While the file is read, 8 bits for each of two places (on display, in the mailer)
follow, so that sorting the integers sorts the lines.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.data.sources.tabular import read_parquet
from tokenrec.errors import InputError

BITS = {"store_id": 16, "week": 6, "product_id": 25}
PRODUCT_BITS = BITS["product_id"]
_PLACE_BITS = 8


@dataclasses.dataclass(frozen=True)
class Promotions:
    """Each promoted (store, week, product) once; P promotions.

    Attributes:
      key: `[P] int64`, packed and sorted, so that a store's week is a range of it.
      display: `[P] uint8`, place on display as an ASCII character.
      mailer: `[P] uint8`, place in the mailer as an ASCII character.
      repeats: lines of the file beyond the first of their key.
    """

    key: np.ndarray
    display: np.ndarray
    mailer: np.ndarray
    repeats: int

    @property
    def product(self) -> np.ndarray:
        """`[P] int64`, product of each promotion."""
        return self.key & ((1 << PRODUCT_BITS) - 1)

    def find(
        self, store: np.ndarray, week: np.ndarray, product: np.ndarray
    ) -> np.ndarray:
        """Find promotions by store, week and product.

        Args:
          store: `[N] int64`.
          week: `[N] int64`.
          product: `[N] int64`.

        Returns:
          `[N] int64`, index of the promotion; -1 where the product is not promoted.
        """
        wanted = pack_key(store, week, product)
        if not len(self.key):
            return np.full(len(wanted), -1)
        # Neighbours in the search are then neighbours in memory, which is faster.
        order = np.argsort(wanted)
        index = np.empty(len(wanted), np.int64)
        index[order] = np.searchsorted(self.key, wanted[order])
        # A key beyond the last gets index P, which would be out of range.
        index[index == len(self.key)] = 0
        return np.where(self.key[index] == wanted, index, -1)


def pack_key(store: np.ndarray, week: np.ndarray, product: np.ndarray) -> np.ndarray:
    """Pack ids into the key of a promotion.

    Args:
      store: `[N] int64`, within its bits (`check_key_range`), as the other two.
      week: `[N] int64`.
      product: `[N] int64`.

    Returns:
      `[N] int64`.
    """
    return (store << BITS["week"] | week) << PRODUCT_BITS | product


def check_key_range(path: Path, name: str, values: np.ndarray) -> None:
    """Check that ids fit the bits that a packed key has for them.

    Args:
      path: file of the ids, for messages.
      name: column of the ids.
      values: `[N] int64`.

    Raises:
      InputError: an id is negative or too large.
    """
    wrong = values[(values < 0) | (values >= 1 << BITS[name])]
    if len(wrong):
        raise InputError(
            f"{path}: {name}={wrong[0]} is outside 0..{(1 << BITS[name]) - 1}; check "
            "that it is the file of Complete Journey"
        )


def read_promotions(path: Path) -> Promotions:
    """Read the file into packed integers, and sort these in place.

    It takes 8 bytes a line: no strings are kept, and nothing is joined. Lines of one
    (store, week, product) become one with the highest place of each kind, so that a
    place on display or in the mailer wins over "0", which is none.

    Raises:
      InputError: the file is not readable, a value is missing, an id is out of range,
        or a place is no single letter.
    """
    types = dict.fromkeys(BITS, pa.int64())
    types |= dict.fromkeys(("display_location", "mailer_location"), pa.string())
    # 1. Pack each line: the key in the high bits, then the place on display and in the
    #    mailer.
    parts = [np.empty(0, np.int64)]
    for batch in read_parquet(path, types):
        for name in types:
            if batch.column(name).null_count:
                raise InputError(
                    f"{path}: {name} is null in a line; every promotion needs its "
                    f"{', '.join(types)}; fetch the file again"
                )
        ids = [batch.column(name).to_numpy() for name in BITS]
        for name, values in zip(BITS, ids, strict=True):
            check_key_range(path, name, values)
        display, mailer = (
            _letters(path, name, batch.column(name))
            for name in ("display_location", "mailer_location")
        )
        parts.append((pack_key(*ids) << _PLACE_BITS | display) << _PLACE_BITS | mailer)
    lines = np.concatenate(parts)
    del parts  # half of the memory
    lines.sort()

    # 2. Of lines with one key the last stays, which has the highest display place; it
    #    takes over the highest mailer place of the lines that are dropped.
    dropped = np.flatnonzero((lines[1:] ^ lines[:-1]) < 1 << 2 * _PLACE_BITS)
    mailer = (lines & 255).astype(np.uint8)
    dropped_mailer = mailer[dropped]
    mailer = np.delete(mailer, dropped)
    # The i-th dropped line is merged into the line that follows it, whose index without
    # the dropped lines before it is `dropped[i] - i`.
    np.maximum.at(mailer, dropped - np.arange(len(dropped)), dropped_mailer)
    display = np.delete((lines >> _PLACE_BITS & 255).astype(np.uint8), dropped)

    # 3. Without the places, lines are keys.
    lines >>= 2 * _PLACE_BITS
    return Promotions(np.delete(lines, dropped), display, mailer, len(dropped))


def _letters(path: Path, name: str, column: pa.StringArray) -> np.ndarray:
    """Return the bytes of one-letter strings, `[N] int64`, from the buffer itself."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[
        column.offset : column.offset + len(column) + 1
    ]
    if not (np.diff(ends) == 1).all():
        wrong = next(value for value in column.to_pylist() if len(value.encode()) != 1)
        raise InputError(
            f"{path}: {name}='{wrong}' is not one letter or digit; check that it is "
            "the file of Complete Journey"
        )
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].astype(np.int64)
