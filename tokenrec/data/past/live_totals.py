"""Totals per key of a log that still grows, as of any moment of its newest part.

`KeyTotals` adds log rows in the order of time, and answers for the moment after the
last one. A server gets events that are a little out of order, and requests for a moment
before the newest event. So the entries after a *watermark* are kept beside the totals:

    -------------------------| watermark      window      | newest
          base (some keys)                                  head (all keys)

- `head`: the totals of all entries. It answers for a time later than all entries of the
  key, which is the usual case.
- the *window*: the entries later than the watermark, by key and time.
- `base`: the totals at the watermark of the keys that have entries in the window. With
  these, it answers for any time after the watermark.

An entry that comes late is added to the head as it is, unless its key has gone on to
another epoch with a half-life: then the key's totals are computed again from the base.
Everything is computed by `KeyTotals`, so that the bits are those of one log in order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tokenrec.data.past.totals import KeyTotals

# Entries that are not merged with the others yet: at least so many, and this share.
_LEAST_RECENT = 256
_RECENT_SHARE = 8
# Entries of a window that are read one by one.
_MANY = 256


class LiveTotals(KeyTotals):
    """Totals per key, to which late entries may be added.

    Args:
      head: the totals at the watermark, which are changed from now on.
    """

    def __init__(self, head: KeyTotals) -> None:
        super().__init__(head._scales, head._half_lives)
        self._head = head
        self._base = head.without_keys()
        self._window = _Window(len(self._scales))

    def count(self, key: np.ndarray, time: np.ndarray, values: np.ndarray) -> None:
        """Add entries, all later than the watermark, also before others.

        Args:
          key: `[E] uint64`.
          time: `[E] int64`, milliseconds, ascending.
          values: `[E, width] float64`.

        Raises:
          TotalOverflowError: a total is too large; the totals are of no use then.
        """
        adds = values.any(axis=1)
        key, time, values = key[adds], time[adds], values[adds]
        if not len(key):
            return
        self._base.take_over(self._head, key)
        self._window.add(_Entries(key, time, values))
        past = self._head.is_past_epoch(key, time)
        if past.any():
            again = np.unique(key[past])
            self._head.replace(self._computed(again), again)
            other = ~np.isin(key, again)
            key, time, values = key[other], time[other], values[other]
        self._head.count(key, time, values)

    def update(
        self, key: np.ndarray, time: np.ndarray, values: np.ndarray
    ) -> list[np.ndarray]:
        """Sum the strictly earlier entries, as that of `KeyTotals`; add nothing.

        Args:
          key: `[E] uint64`.
          time: `[E] int64`, milliseconds, later than the watermark.
          values: not used: `count` has added what counts.

        Returns:
          For each horizon `[E, width] float64`.
        """
        inside = self._window.newest(key) >= time
        if not inside.any():
            return self._head.before(key, time)
        results = [np.empty((len(key), len(self._scales))) for _ in self._half_lives]
        after = ~inside
        for result, part in zip(
            results, self._head.before(key[after], time[after]), strict=True
        ):
            result[after] = part
        for result, part in zip(
            results, self._before(key[inside], time[inside]), strict=True
        ):
            result[inside] = part
        return results

    def forget(self, watermark: int) -> None:
        """Move the watermark: times until then are neither added nor asked for."""
        old, rest = self._window.split(watermark)
        self._base.count(*old.in_time_order())
        self._base = self._base.of_keys(np.unique(rest.key))
        self._window = _Window(len(self._scales))
        self._window.add(rest)

    def state(self, keys: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return the totals at the watermark, as that of `KeyTotals`."""
        arrays = self._head.state(keys)
        changed = self._base.state(keys)
        place = np.searchsorted(arrays["keys"], changed["keys"])
        for name, array in changed.items():
            arrays[name][place] = array
        return arrays

    def _computed(self, keys: np.ndarray) -> KeyTotals:
        """Totals of `keys: [n]`, distinct, from the base and the window."""
        totals = self._base.of_keys(keys)
        totals.count(*self._window.of(keys).in_time_order())
        return totals

    def _before(self, key: np.ndarray, time: np.ndarray) -> list[np.ndarray]:
        """Totals of keys at times before their newest entries."""
        keys = np.unique(key)
        totals, entries = self._at(keys, int(time.min()))
        # What is asked for stands among the entries, and adds nothing.
        asked = _Entries(key, time, np.zeros((len(key), len(self._scales))))
        together = _Entries.join([entries, asked])
        order = np.argsort(together.time, kind="stable")
        where = np.empty(len(order), np.int64)
        where[order] = np.arange(len(order))
        sums = totals.update(*together.take(order))
        return [part[where[len(entries.key) :]] for part in sums]

    def _at(self, keys: np.ndarray, time: int) -> tuple[KeyTotals, _Entries]:
        """Totals of keys at a time or before, and their entries since then.

        Args:
          keys: `[n] uint64`, ascending and distinct.
          time: milliseconds, after the watermark.
        """
        # The newest entries are few beside all of a large window: they are taken away
        # from the head, as integers, unless an epoch has ended since the time.
        if (
            self._window.size_of(keys) > _MANY
            and not self._head.is_past_epoch(keys, np.full(len(keys), time)).any()
        ):
            later = self._window.of(keys, time).in_time_order()
            totals = self._head.of_keys(keys)
            totals.count(later.key, later.time, -later.values)
            return totals, later
        return self._base.of_keys(keys), self._window.of(keys)


class _Entries(NamedTuple):
    """What log rows add to the totals of a key. E entries.

    Attributes:
      key: `[E] uint64`.
      time: `[E] int64`, milliseconds.
      values: `[E, width] float64`.
    """

    key: np.ndarray
    time: np.ndarray
    values: np.ndarray

    @classmethod
    def join(cls, parts: list[_Entries]) -> _Entries:
        """Join entries."""
        return cls(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def take(self, rows: np.ndarray) -> _Entries:
        """Select entries: `[n] int64` or `[E] bool`."""
        return _Entries(self.key[rows], self.time[rows], self.values[rows])

    def in_time_order(self) -> _Entries:
        """Sort by time."""
        return self.take(np.argsort(self.time, kind="stable"))

    def in_key_order(self) -> _Entries:
        """Sort by key, and by time within a key."""
        return self.take(np.lexsort((self.time, self.key)))


class _Window:
    """Entries by key and time, to which some are added now and then.

    New ones go to a small sorted part that is merged into the large one when it has
    grown, so that the large one is not moved for each event.

    Args:
      width: columns of the values.
    """

    def __init__(self, width: int) -> None:
        none = _Entries(
            np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros((0, width))
        )
        self._parts = [none, none]

    def add(self, entries: _Entries) -> None:
        """Add entries in any order."""
        merged, recent = self._parts
        recent = _Entries.join([recent, entries]).in_key_order()
        if len(recent.key) > _LEAST_RECENT + len(merged.key) // _RECENT_SHARE:
            merged = _Entries.join([merged, recent]).in_key_order()
            recent = recent.take(np.zeros(0, np.int64))
        self._parts = [merged, recent]

    def newest(self, keys: np.ndarray) -> np.ndarray:
        """Time of the newest entry of each of `keys: [n]`, the least int64 for none."""
        newest = np.full(len(keys), np.iinfo(np.int64).min)
        for part in self._parts:
            if len(part.key):
                last = np.searchsorted(part.key, keys, side="right") - 1
                same = part.key[last] == keys
                # -1, the last one, is wrong where the key is less than all others.
                same &= last >= 0
                newest = np.where(same, np.maximum(newest, part.time[last]), newest)
        return newest

    def size_of(self, keys: np.ndarray) -> int:
        """Number of entries of `keys: [n]`, distinct."""
        return sum(int(np.sum(end - begin)) for begin, end in self._ranges(keys))

    def of(self, keys: np.ndarray, since: int | None = None) -> _Entries:
        """The entries of `keys: [n]`, distinct, from a time on if one is given."""
        found = []
        for part, (first, end) in zip(self._parts, self._ranges(keys), strict=True):
            if since is not None:
                # Those of a key are in the order of time.
                for i in np.flatnonzero(end > first).tolist():
                    times = part.time[first[i] : end[i]]
                    first[i] += np.searchsorted(times, since)
            lengths = end - first
            starts = np.cumsum(lengths) - lengths
            rows = np.arange(lengths.sum()) + (first - starts).repeat(lengths)
            found.append(part.take(rows))
        return _Entries.join(found)

    def _ranges(self, keys: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Where the entries of each key begin and end in each part."""
        return [
            (part.key.searchsorted(keys), part.key.searchsorted(keys, side="right"))
            for part in self._parts
        ]

    def split(self, time: int) -> tuple[_Entries, _Entries]:
        """The entries until a time, and those after it."""
        entries = _Entries.join(self._parts)
        late = entries.time > time
        return entries.take(~late), entries.take(late)
