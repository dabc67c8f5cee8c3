"""Running totals per key over the strictly earlier log rows, with or without decay.

With a half-life h, the total of a key at time T is

    sum_i v_i 2^(-(T - t_i) / h)        over log rows i of the key with t_i < T

and without one the plain sum. Float sums would depend on the order of the additions, and
so on where a log is cut. Here every addition is one of integers:

- Time is cut into *epochs* of `EPOCH_HALF_LIVES` half-lives, on a grid that begins in
  1970. Within an epoch that begins at L, a log row adds the integer
  `round(v_i 2^((t_i - L) / h) scale)`, at most 2^4 times larger than at the epoch's
  begin. So no weight overflows, however long the log (forward decay; Cormode et al.,
  Forward Decay, ICDE 2009).
- At the end of an epoch the total is multiplied by a power of two, which is exact, and
  goes on as the *carry* of the key. A key without log rows costs nothing meanwhile.

The total at T is `(carry + sum / scale) / 2^((T - L) / h)`: the same bits however the
log is cut, and whatever the order of log rows of equal time. The weights are rounded
to 2^-24 (`SCALE`), less than a float32 feature resolves. What is older than 100
half-lives is dropped, so that a key that was last seen before is like one never seen.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from tokenrec.data.past.key_index import KeyIndex
from tokenrec.data.past.runs import Runs, check_sums, run_starts, sum_earlier

EPOCH_HALF_LIVES = 4
# Steps of the totals: 2^-24 of a count.
SCALE = 2.0**24
# A total below it is dropped.
_LEAST = 2.0**-100


class KeyTotals:
    """Totals per key, over several horizons.

    Memory grows with the number of distinct keys, not with the number of log rows.

    Args:
      scales: `[width]`, steps per unit of each column.
      half_lives: half-life of each horizon in milliseconds; None for all the past.
    """

    def __init__(self, scales: np.ndarray, half_lives: Sequence[int | None]) -> None:
        self._scales = scales
        self._half_lives = half_lives
        self._keys = KeyIndex()
        self._horizons = [
            _AllPast(scales) if h is None else _Decayed(scales, h) for h in half_lives
        ]

    def without_keys(self) -> KeyTotals:
        """Return totals of the same columns and horizons with nothing counted."""
        return KeyTotals(self._scales, self._half_lives)

    def of_keys(self, keys: np.ndarray) -> KeyTotals:
        """Return a copy of the totals of some keys, which may be changed.

        Args:
          keys: `[n] uint64`, ascending and distinct; a key that did not come has none.
        """
        place = self._keys.find(keys)
        known = np.flatnonzero(place >= 0)
        copy = self.without_keys()
        copy._keys = KeyIndex(keys)
        copy._copy(self, known, place[known])
        return copy

    def before(self, key: np.ndarray, time: np.ndarray) -> list[np.ndarray]:
        """Read the totals of keys at given times, and change nothing.

        Args:
          key: `[E] uint64`, in any order; a key that did not come has totals of 0.
          time: `[E] int64`, milliseconds, later than all entries of the key.

        Returns:
          For each horizon `[E, width] float64`, with the bits that `update` returns.
        """
        place = self._keys.find(key)
        known = np.flatnonzero(place >= 0)
        results = []
        for horizon in self._horizons:
            totals = np.zeros((len(key), len(self._scales)))
            totals[known] = horizon.before(place[known], time[known])
            results.append(totals)
        return results

    def is_past_epoch(self, key: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Whether an epoch later than that of an entry has begun for its key.

        If none has, integers are all that the entry adds, so it may be added after
        entries of later times.

        Args:
          key: `[E] uint64`.
          time: `[E] int64`, milliseconds.

        Returns:
          `[E] bool`.
        """
        place = self._keys.find(key)
        known = np.flatnonzero(place >= 0)
        past = np.zeros(len(key), bool)
        for horizon in self._horizons:
            past[known] |= horizon.is_past_epoch(place[known], time[known])
        return past

    def update(
        self, key: np.ndarray, time: np.ndarray, values: np.ndarray
    ) -> list[np.ndarray]:
        """Sum the strictly earlier entries of each entry's key, and then add these.

        Args:
          key: `[E] uint64`.
          time: `[E] int64`, milliseconds, ascending, and all later than those of the
            call before.
          values: `[E, width] float64`, what an entry adds to the totals of its key.

        Returns:
          For each horizon `[E, width] float64`.

        Raises:
          TotalOverflowError: a total is too large.
        """
        if not len(key):
            return [np.zeros(values.shape) for _ in self._horizons]
        # Sort by key, stably: the entries of a key are a run in the order of time.
        order = np.argsort(key, kind="stable")
        key, time, values = key[order], time[order], values[order]
        group_start = run_starts(key)
        place = self._keys.add(key[group_start])
        results = []
        for horizon in self._horizons:
            before = np.empty(values.shape)
            before[order] = horizon.update(group_start, place, time, values)
            results.append(before)
        return results

    def count(self, key: np.ndarray, time: np.ndarray, values: np.ndarray) -> None:
        """Add entries as `update` does, without the sums of the earlier ones."""
        if not len(key):
            return
        order = np.argsort(key, kind="stable")
        key, time, values = key[order], time[order], values[order]
        group_start = run_starts(key)
        place = self._keys.add(key[group_start])
        for horizon in self._horizons:
            epoch, parts = horizon.parts(time, values)
            run_start = group_start | run_starts(epoch)
            runs = np.flatnonzero(run_start)
            sums = np.add.reduceat(parts, runs)
            horizon.add(group_start[runs], place, epoch[runs], sums)

    def runs(
        self, key: np.ndarray, time: np.ndarray, values: np.ndarray, span: np.ndarray
    ) -> list[Runs]:
        """Sum entries by span of time and key, for the `add` of another.

        Args:
          key: `[E] uint64`.
          time: `[E] int64`, milliseconds.
          values: `[E, width] float64`.
          span: `[E] int64`, number of the span of each.

        Returns:
          The runs of each horizon, of the same spans and keys.
        """
        return [
            Runs.merge([Runs(span, key, *horizon.parts(time, values))])
            for horizon in self._horizons
        ]

    def add(self, runs: Sequence[Runs]) -> None:
        """Add the entries of one span, later than all that were added before.

        Args:
          runs: the runs of each horizon, sorted by key.

        Raises:
          TotalOverflowError: a total is too large.
        """
        for number, (horizon, of_horizon) in enumerate(
            zip(self._horizons, runs, strict=True)
        ):
            group_start = run_starts(of_horizon.key)
            # All horizons have the same keys.
            if number == 0:
                place = self._keys.add(of_horizon.key[group_start])
            check_sums(of_horizon.sums)
            horizon.add(group_start, place, of_horizon.epoch, of_horizon.sums)

    def state(self, keys: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return all totals, from which `resume` goes on, keys in ascending order.

        Args:
          keys: `[n] uint64`, ascending: only those of them that have come.
        """
        if keys is None:
            ids, places = self._keys.items()
        else:
            places = self._keys.find(keys)
            ids, places = keys[places >= 0], places[places >= 0]
        arrays = {"keys": ids}
        for number, horizon in enumerate(self._horizons):
            for name, array in horizon.arrays(places).items():
                arrays[f"{name}_{number}"] = array
        return arrays

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` returned, of the same columns and horizons."""
        self._keys = KeyIndex(np.array(state["keys"]))
        for number, horizon in enumerate(self._horizons):
            horizon.resume(
                {name: np.array(state[f"{name}_{number}"]) for name in horizon.NAMES}
            )

    def take_over(self, other: KeyTotals, key: np.ndarray) -> None:
        """Begin with the totals that another has of the keys that did not come yet.

        Args:
          other: of the same columns and horizons.
          key: `[E] uint64`; a key that the other does not have begins with none.
        """
        here, there = self._keys.add_from(other._keys, key)
        self._copy(other, here, there)

    def replace(self, other: KeyTotals, key: np.ndarray) -> None:
        """Replace the totals of keys that both have by those of another.

        Args:
          other: of the same columns and horizons.
          key: `[n] uint64`, distinct.
        """
        self._copy(other, self._keys.find(key), other._keys.find(key))

    def _copy(self, other: KeyTotals, here: np.ndarray, there: np.ndarray) -> None:
        """Copy the totals of the keys with the numbers `there` to those `here`."""
        for mine, theirs in zip(self._horizons, other._horizons, strict=True):
            mine.take_over(here, theirs.arrays(there), len(self._keys))


class _AllPast:
    """Totals of all the past, by the number of the key: integer sums."""

    NAMES: tuple[str, ...] = ("sums",)

    def __init__(self, scales: np.ndarray) -> None:
        self._scales = scales
        self._arrays: dict[str, np.ndarray] = {
            "sums": np.zeros((0, len(scales)), np.int64)
        }

    def arrays(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of the keys with these numbers."""
        return {name: array[places] for name, array in self._arrays.items()}

    def take_over(
        self, places: np.ndarray, arrays: Mapping[str, np.ndarray], size: int
    ) -> None:
        """Put arrays of keys at their numbers `places`; there are `size` keys."""
        self._grow(size)
        for name, array in arrays.items():
            self._arrays[name][places] = array

    def resume(self, arrays: dict[str, np.ndarray]) -> None:
        """Go on from arrays of the keys 0, 1, ..."""
        self._arrays = arrays

    def update(
        self,
        group_start: np.ndarray,
        place: np.ndarray,
        time: np.ndarray,
        values: np.ndarray,
    ) -> np.ndarray:
        """Sum the earlier entries of each group, and add the groups to their keys.

        Args:
          group_start: `[E] bool`, True where the entries of a key begin.
          place: `[G] int64`, number of each group's key.
          time: `[E] int64`, ascending within a group.
          values: `[E, width] float64`.

        Returns:
          `[E, width] float64`.
        """
        self._grow(int(place.max()) + 1)
        epoch, parts = self.parts(time, values)
        before = self._arrays["sums"][place][np.cumsum(group_start) - 1]
        before += sum_earlier(parts, group_start, time)
        self.add(group_start, place, epoch, parts)
        return before / self._scales

    def before(self, place: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Totals at `time: [E]` of the keys with the numbers `place: [E]`.

        Returns:
          `[E, width] float64`.
        """
        return self._arrays["sums"][place] / self._scales

    def is_past_epoch(self, place: np.ndarray, time: np.ndarray) -> np.ndarray:
        """As that of `KeyTotals`, by the numbers of the keys: all past is one epoch."""
        return np.zeros(len(place), bool)

    def parts(
        self, time: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What entries add: their epochs `[E] int64`, and `[E, width] int64`."""
        parts = np.rint(values * self._scales).astype(np.int64)
        return np.zeros(len(time), np.int64), parts

    def add(
        self,
        group_start: np.ndarray,
        place: np.ndarray,
        epoch: np.ndarray,
        sums: np.ndarray,
    ) -> None:
        """Add runs, or entries, to the totals of their keys.

        Args:
          group_start: `[K] bool`, True where the runs of a key begin.
          place: `[G] int64`, number of each group's key.
          epoch: `[K] int64`, ascending within a group.
          sums: `[K, width] int64`.
        """
        self._grow(int(place.max()) + 1)
        ended = self._arrays["sums"][place]
        ended += np.add.reduceat(sums, np.flatnonzero(group_start))
        check_sums(ended)
        self._arrays["sums"][place] = ended

    def _grow(self, size: int) -> None:
        """Make room for keys up to a number, half as much again as needed."""
        if size > len(self._arrays["sums"]):
            for name, array in self._arrays.items():
                shape = (size + size // 2, *array.shape[1:])
                larger = np.zeros(shape, array.dtype)
                larger[: len(array)] = array
                self._arrays[name] = larger


class _Decayed(_AllPast):
    """Totals with a half-life, by the number of the key.

    A key has the number of its last epoch, the carry from the epochs before, and the
    integer sums of this one.
    """

    NAMES = ("sums", "carry", "epoch")

    def __init__(self, scales: np.ndarray, half_life: int) -> None:
        super().__init__(scales)
        self._half_life = half_life
        self._arrays["carry"] = np.zeros((0, len(scales)))
        self._arrays["epoch"] = np.zeros(0, np.int64)

    def update(
        self,
        group_start: np.ndarray,
        place: np.ndarray,
        time: np.ndarray,
        values: np.ndarray,
    ) -> np.ndarray:
        """As that of `_AllPast`."""
        self._grow(int(place.max()) + 1)

        # 1. What each entry adds to the sums of its epoch.
        epoch, weight = self._weigh(time)
        parts = np.rint(values * weight * self._scales).astype(np.int64)

        # 2. Sums of the earlier entries of the same key and epoch: a run.
        run_start = group_start | run_starts(epoch)
        within = sum_earlier(parts, run_start, time)

        # 3. What each run begins with.
        runs = np.flatnonzero(run_start)
        run_sums = np.add.reduceat(parts, runs)
        carry, sums = self._begins(group_start[runs], place, epoch[runs], run_sums)
        number = np.cumsum(run_start) - 1
        return (carry[number] + (sums[number] + within) / self._scales) / weight

    def before(self, place: np.ndarray, time: np.ndarray) -> np.ndarray:
        """As that of `_AllPast`."""
        epoch, weight = self._weigh(time)
        carry, sums = self._at_epoch(place, epoch)
        return (carry + sums / self._scales) / weight

    def is_past_epoch(self, place: np.ndarray, time: np.ndarray) -> np.ndarray:
        """As that of `KeyTotals`, by the numbers of the keys."""
        epoch, _ = self._weigh(time)
        return self._arrays["epoch"][place] > epoch

    def parts(
        self, time: np.ndarray, values: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """As that of `_AllPast`."""
        epoch, weight = self._weigh(time)
        return epoch, np.rint(values * weight * self._scales).astype(np.int64)

    def add(
        self,
        group_start: np.ndarray,
        place: np.ndarray,
        epoch: np.ndarray,
        sums: np.ndarray,
    ) -> None:
        """Add runs of different epochs to the totals of their keys."""
        self._grow(int(place.max()) + 1)
        self._begins(group_start, place, epoch, sums)

    def _weigh(self, time: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Epochs `[E] int64`, and weights within them `[E, 1] float64`."""
        span = EPOCH_HALF_LIVES * self._half_life
        epoch = time // span
        return epoch, np.exp2((time - epoch * span) / self._half_life)[:, None]

    def _begins(
        self,
        is_first: np.ndarray,
        place: np.ndarray,
        epoch: np.ndarray,
        run_sums: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Carry and sums with which each run begins; keep those of the last runs.

        Args:
          is_first: `[K] bool`, whether a run is the first of its key.
          place: `[G] int64`, number of each key.
          epoch: `[K] int64`.
          run_sums: `[K, width] int64`, sums of each run.

        Returns:
          `[K, width] float64` and `[K, width] int64`.
        """
        carry = np.zeros(run_sums.shape)
        sums = np.zeros(run_sums.shape, np.int64)
        first = np.flatnonzero(is_first)
        carry[first], sums[first] = self._at_epoch(place, epoch[first])
        # The runs of a key one after another, those of all keys at once. A block of six
        # hours has few epochs, unless the half-life is one of seconds.
        rank = np.arange(len(is_first)) - first[np.cumsum(is_first) - 1]
        by_rank = np.argsort(rank, kind="stable")
        bounds = np.searchsorted(rank[by_rank], np.arange(1, rank.max() + 2))
        for low, high in itertools.pairwise(bounds.tolist()):
            run = by_rank[low:high]
            carry[run] = self._advance(
                carry[run - 1],
                sums[run - 1] + run_sums[run - 1],
                epoch[run] - epoch[run - 1],
            )
        last = np.append(first[1:], len(is_first)) - 1
        ended = sums[last] + run_sums[last]
        check_sums(ended)
        self._arrays["epoch"][place] = epoch[last]
        self._arrays["carry"][place] = carry[last]
        self._arrays["sums"][place] = ended
        return carry, sums

    def _at_epoch(
        self, place: np.ndarray, epoch: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Carry and sums of keys in an epoch, before what is added in it from now on.

        Args:
          place: `[n] int64`, number of each key.
          epoch: `[n] int64`, not earlier than that of the key.

        Returns:
          `[n, width] float64` and `[n, width] int64`.
        """
        kept = self.arrays(place)
        same = (kept["epoch"] == epoch)[:, None]
        passed = self._advance(kept["carry"], kept["sums"], epoch - kept["epoch"])
        return np.where(same, kept["carry"], passed), np.where(same, kept["sums"], 0)

    def _advance(
        self, carry: np.ndarray, sums: np.ndarray, epochs: np.ndarray
    ) -> np.ndarray:
        """The carry after a number of epochs, `[n]`, of a carry and sums `[n, width]`."""
        # Beyond 100 epochs nothing is left; a larger power would not fit into int32.
        power = -EPOCH_HALF_LIVES * np.minimum(epochs, 100)
        passed = np.ldexp(carry + sums / self._scales, power[:, None].astype(np.int32))
        passed[np.abs(passed) < _LEAST] = 0.0
        return passed
