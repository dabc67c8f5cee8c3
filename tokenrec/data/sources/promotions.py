"""What Complete Journey's stores promoted in each week, as sorted packed integers, and negatives drawn from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from tokenrec.data.sources.tabular import read_parquet
from tokenrec.errors import InputError

# A promotion is one integer: store, week and product, then display and mailer place, from the high bits to the low.
BITS = {"store_id": 16, "week": 6, "product_id": 25}
PRODUCT = BITS["product_id"]
PLACE = 8
REDRAWS = 16  # rounds of rejection before the few baskets that still lack negatives are drawn exactly


@dataclasses.dataclass(frozen=True)
class Promotions:
    """Each promoted (store, week, product) once.

    Attributes:
      key: `[P] int64`, packed and sorted, so that a store's week is a run of rows.
      display, mailer: `[P] uint8`, the places as ASCII characters.
      repeats: lines of the file beyond the first of their key.
    """

    key: np.ndarray
    display: np.ndarray
    mailer: np.ndarray
    repeats: int

    @property
    def product(self) -> np.ndarray:
        return self.key & ((1 << PRODUCT) - 1)

    def find(
        self, store: np.ndarray, week: np.ndarray, product: np.ndarray
    ) -> np.ndarray:
        """Row of each (store, week, product): `[N] int64`, -1 where it is not promoted."""
        wanted = pack(store, week, product)
        if not len(self.key):
            return np.full(len(wanted), -1)
        order = np.argsort(
            wanted
        )  # neighbours in the search are then neighbours in memory
        at = np.empty(len(wanted), np.int64)
        at[order] = np.searchsorted(self.key, wanted[order])
        at[at == len(self.key)] = 0
        return np.where(self.key[at] == wanted, at, -1)


def pack(store: np.ndarray, week: np.ndarray, product: np.ndarray) -> np.ndarray:
    return (store << BITS["week"] | week) << PRODUCT | product


def check_packs(path: Path, name: str, values: np.ndarray) -> None:
    """Raises an InputError unless the ids fit the bits that a packed key has for them."""
    wrong = values[(values < 0) | (values >= 1 << BITS[name])]
    if len(wrong):
        raise InputError(
            f"{path}: {name}={wrong[0]} is outside 0..{(1 << BITS[name]) - 1}; is this Complete Journey?"
        )


def read_promotions(path: Path) -> Promotions:
    """Streams the file into packed integers and sorts these in place: 8 bytes a line, no strings kept, no joins.

    Lines of one (store, week, product) become one with the highest place of each kind, so that a place on display or
    in the mailer wins over "0", which is none.

    Raises:
      InputError: the file is not readable, a value is missing, an id is out of range, or a place is no single letter.
    """
    types = dict.fromkeys(("store_id", "week", "product_id"), pa.int64())
    types |= dict.fromkeys(("display_location", "mailer_location"), pa.string())
    parts = [np.empty(0, np.int64)]
    for batch in read_parquet(path, types):
        for name in types:
            if batch.column(name).null_count:
                raise InputError(
                    f"{path}: {name} is null in a line; every promotion needs its {', '.join(types)}"
                )
        ids = [batch.column(name).to_numpy() for name in BITS]
        for name, values in zip(BITS, ids, strict=True):
            check_packs(path, name, values)
        display, mailer = (
            _letters(path, name, batch.column(name))
            for name in ("display_location", "mailer_location")
        )
        parts.append((pack(*ids) << PLACE | display) << PLACE | mailer)
    keys = np.concatenate(parts)
    del parts
    keys.sort()
    # Of equal keys the last stays, which has the highest display place; it takes over the highest mailer place.
    dropped = np.flatnonzero((keys[1:] ^ keys[:-1]) < 1 << 2 * PLACE)
    mailer = (keys & 255).astype(np.uint8)
    lost = mailer[dropped]
    mailer = np.delete(mailer, dropped)
    np.maximum.at(mailer, dropped - np.arange(len(dropped)), lost)
    display = np.delete((keys >> PLACE & 255).astype(np.uint8), dropped)
    keys >>= 2 * PLACE
    return Promotions(np.delete(keys, dropped), display, mailer, len(dropped))


def _letters(path: Path, name: str, column: pa.StringArray) -> np.ndarray:
    """The bytes of one-letter strings, read from the buffer itself: `[N] int64`."""
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[
        column.offset : column.offset + len(column) + 1
    ]
    if not (np.diff(ends) == 1).all():
        wrong = next(value for value in column.to_pylist() if len(value.encode()) != 1)
        raise InputError(
            f"{path}: {name}='{wrong}' is not one letter or digit; is this Complete Journey?"
        )
    return np.frombuffer(data, np.uint8)[ends[0] : ends[-1]].astype(np.int64)


def draw_negatives(
    promotions: Promotions,
    basket: np.ndarray,
    at: np.ndarray,
    sales: np.ndarray,
    negatives: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws `negatives` per positive from what its store promoted in its week and its basket does not hold.

    Half of a basket's negatives are drawn in proportion to `sales`, the others uniformly, all without replacement. A
    half that runs out is filled up by the uniform one; a shelf with too few products gives what it has.

    Args:
      basket: `[N]` number of the basket of each positive; every number of 0..B - 1 occurs.
      at: `[N]` row of each positive in `promotions`.
      sales: `[P]` weight of each promotion, integers.

    Returns: basket and row in `promotions` of each negative, sorted.
    """
    rows, baskets = len(promotions.key), int(basket.max(initial=-1)) + 1
    count = np.bincount(basket, minlength=baskets)
    shelf = np.empty(baskets, np.int64)
    shelf[basket] = promotions.key[at] >> PRODUCT
    start, stop = (
        np.searchsorted(promotions.key, key << PRODUCT) for key in (shelf, shelf + 1)
    )
    cumulative = np.zeros(rows + 1, np.int64)
    np.cumsum(sales, out=cumulative[1:])
    mass = cumulative[stop] - cumulative[start]
    rng = np.random.default_rng(seed)

    def by_sales(owner: np.ndarray) -> np.ndarray:
        drawn = cumulative[start[owner]] + (
            rng.random(len(owner)) * mass[owner]
        ).astype(np.int64)
        return np.searchsorted(cumulative, drawn, side="right") - 1

    def uniform(owner: np.ndarray) -> np.ndarray:
        return start[owner] + (rng.random(len(owner)) * (stop - start)[owner]).astype(
            np.int64
        )

    def fill(
        taken: np.ndarray,
        need: np.ndarray,
        draw: Callable[[np.ndarray], np.ndarray],
        even: bool,
    ) -> np.ndarray:
        """Adds what is needed to the sorted `basket * rows + row`. Rejecting repeats draws without replacement."""
        for _ in range(REDRAWS):
            if not need.any():
                break
            owner = np.repeat(np.arange(baskets), need)
            drawn = np.sort(owner * rows + draw(owner))
            new = drawn[(np.diff(drawn, prepend=-1) > 0) & ~_holds(taken, drawn)]
            need = need - np.bincount(new // rows, minlength=baskets)
            taken = np.sort(np.concatenate([taken, new]))
        rest = [taken]
        for number in np.flatnonzero(need):
            free = np.arange(start[number], stop[number])
            weight = np.ones(len(free)) if even else sales[free]
            free = free[(weight > 0) & ~_holds(taken, number * rows + free)]
            # The smallest of exponentials with these rates are a weighted draw without replacement.
            late = rng.exponential(size=len(free)) / (1 if even else sales[free])
            rest.append(number * rows + free[np.argsort(late)[: need[number]]])
        return np.sort(np.concatenate(rest))

    positives = np.sort(basket * rows + at)
    taken = fill(
        positives, np.where(mass > 0, negatives * count // 2, 0), by_sales, even=False
    )
    missing = (negatives + 1) * count - np.bincount(taken // rows, minlength=baskets)
    taken = fill(taken, missing, uniform, even=True)
    owner, row = np.divmod(taken[~_holds(positives, taken)], rows)
    return owner, row


def _holds(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Whether each value is in `ordered`, which is sorted. (`np.unique` and the set functions built on it hash, and
    hash packed keys badly: 0.7 s where a sort takes 0.02.)"""
    if not len(ordered):
        return np.zeros(len(values), bool)
    return (
        ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)]
        == values
    )
