"""Totals over the last n events of a log row's user, those that share its key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tokenrec.data.past.key_index import KeyIndex
from tokenrec.data.past.keys import Hashes
from tokenrec.data.past.runs import run_starts


class LastEvents:
    """The last events of each user, by one key.

    Memory: `n (most_keys + width)` numbers of 8 bytes a user, n the largest of `counts`.

    Args:
      counts: numbers of events, one for each horizon.
      most_keys: the most keys of a log row, more than 1 with multi-valued features.
      scales: `[width]`, steps per unit of each column, to which values are rounded, so
        that sums are exact.
    """

    def __init__(
        self, counts: Sequence[int], most_keys: int, scales: np.ndarray
    ) -> None:
        self._counts = counts
        self._scales = scales
        self._users = KeyIndex()
        # The last events of each user, at the right end of n slots; 0 is no key.
        n = max(counts)
        self._arrays = {
            "filled": np.zeros(0, np.int64),
            "keys": np.zeros((0, n, most_keys), np.uint64),
            "values": np.zeros((0, n, len(scales))),
        }

    def update(
        self,
        order: np.ndarray,
        user: np.ndarray,
        time: np.ndarray,
        event: np.ndarray,
        keys: Hashes,
        values: np.ndarray,
    ) -> list[np.ndarray]:
        """Sum over the strictly earlier last events of R log rows; then keep theirs.

        Args:
          order: `[R] int64`, the rows by user, time, and among equal times in an order
            that decides which events are the last.
          user: `[R] uint64`.
          time: `[R] int64`, all later than those of the call before.
          event: `[R] bool`, the row is an event that counts.
          keys: keys of each row, of which each that an event shares counts.
          values: `[R, width] float64`, what an event adds.

        Returns:
          For each of `counts`, `[R, width] float64`.
        """
        user, time, event = user[order], time[order], event[order]
        row_keys = self._padded(keys.take(order))
        values = np.rint(values[order] * self._scales) / self._scales

        # 1. The rows of each user, and what is kept of it.
        user_start = run_starts(user)
        first = np.flatnonzero(user_start)
        owner = np.cumsum(user_start) - 1
        place = self._users.add(user[first])
        self._grow(len(self._users))
        kept = self._arrays["filled"][place]

        # 2. All events, user after user: those that are kept, and those of the block.
        own = np.add.reduceat(event.astype(np.int64), first)
        begin = np.cumsum(kept + own) - kept - own
        before = np.cumsum(event) - event
        before -= before[first][owner]
        all_keys = np.zeros((int((kept + own).sum()), row_keys.shape[1]), np.uint64)
        all_values = np.zeros((len(all_keys), values.shape[1]))
        slots = self._arrays["keys"].shape[1]
        of_user, number = _each(kept)
        slot = slots - kept[of_user] + number
        all_keys[begin[of_user] + number] = self._arrays["keys"][place[of_user], slot]
        all_values[begin[of_user] + number] = self._arrays["values"][
            place[of_user], slot
        ]
        at = (begin + kept)[owner[event]] + before[event]
        all_keys[at], all_values[at] = row_keys[event], values[event]

        # 3. Sums over the last events before each moment, one lag after another.
        index = np.arange(len(user))
        tie_start = user_start | run_starts(time)
        moment = np.maximum.accumulate(np.where(tie_start, index, 0))
        end = (begin + kept)[owner] + before[moment]
        sums = np.zeros(values.shape)
        rows, results = index, {}
        for lag in range(1, slots + 1):
            rows = rows[end[rows] - lag >= begin[owner[rows]]]
            earlier = end[rows] - lag
            mine, theirs = row_keys[rows], all_keys[earlier]
            same = (mine[:, :, None] == theirs[:, None, :]) & (mine != 0)[:, :, None]
            shared = same.sum(axis=(1, 2))
            sums[rows] += shared[:, None] * all_values[earlier]
            if lag in self._counts:
                results[lag] = np.empty(sums.shape)
                results[lag][order] = sums

        # 4. Keep the last events of each user.
        filled = np.minimum(kept + own, slots)
        of_user, number = _each(filled)
        last = (begin + kept + own - filled)[of_user] + number
        slot = slots - filled[of_user] + number
        self._arrays["filled"][place] = filled
        self._arrays["keys"][place[of_user], slot] = all_keys[last]
        self._arrays["values"][place[of_user], slot] = all_values[last]
        return [results[count] for count in self._counts]

    def take_over(self, other: LastEvents, user: np.ndarray) -> None:
        """Begin with the events that another has of the users that did not come yet.

        Args:
          other: of the same numbers of events and keys.
          user: `[R] uint64`.
        """
        here, there = self._users.add_from(other._users, user)
        self._grow(len(self._users))
        for name, array in other._arrays.items():
            self._arrays[name][here] = array[there]

    def state(self) -> dict[str, np.ndarray]:
        """Return what is kept of each user, from which `resume` goes on."""
        ids, places = self._users.items()
        kept = {name: array[places] for name, array in self._arrays.items()}
        return {"users": ids, **kept}

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` returned, of the same numbers of events and keys."""
        self._users = KeyIndex(np.array(state["users"]))
        self._arrays = {name: np.array(state[name]) for name in self._arrays}

    def _padded(self, keys: Hashes) -> np.ndarray:
        """Keys of each row side by side, 0 where there are fewer: `[R, most_keys]`."""
        padded = np.zeros((len(keys), self._arrays["keys"].shape[2]), np.uint64)
        row, number = _each(np.diff(keys.offsets))
        padded[row, number] = keys.values
        return padded

    def _grow(self, size: int) -> None:
        """Make room for users up to a number, half as many again as needed."""
        if size > len(self._arrays["filled"]):
            for name, array in self._arrays.items():
                shape = (size + size // 2, *array.shape[1:])
                larger = np.zeros(shape, array.dtype)
                larger[: len(array)] = array
                self._arrays[name] = larger


def _each(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Group and number within it of each of `sum(lengths)` places.

    >>> [part.tolist() for part in _each(np.array([2, 0, 1]))]
    [[0, 0, 2], [0, 1, 0]]
    """
    group = np.arange(len(lengths)).repeat(lengths)
    starts = np.cumsum(lengths) - lengths
    return group, np.arange(len(group)) - starts[group]
