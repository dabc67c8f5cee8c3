"""Times since the earlier events of a log row's user, and its session."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tokenrec.data.past.key_index import KeyIndex
from tokenrec.data.past.runs import run_starts


class TimesOfUsers:
    """The last events of each user, which turn log rows into gaps and sessions.

    Args:
      session_ms: gap that ends a session; None: sessions are not counted.
    """

    NAMES = ("time", "length", "events")

    def __init__(self, session_ms: int | None = None) -> None:
        self._session_ms = np.inf if session_ms is None else session_ms
        self._users = KeyIndex()
        # Of each user: time of the last event, -1 for none; its length in milliseconds;
        # events of its session.
        self._arrays = _nothing(0)

    def update(
        self,
        user: np.ndarray,
        time: np.ndarray,
        event: np.ndarray,
        length_ms: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """Compute the features of R log rows, and then keep their events.

        Args:
          user: `[R] uint64`.
          time: `[R] int64`, milliseconds, ascending, and all later than those of the
            call before.
          event: `[R] bool`, the row is an event that counts.
          length_ms: `[R] float64`, how long the event took, NaN where it is unknown.

        Returns:
          `[R] float64` each, NaN where the user has no earlier event: `past_gap` and
          `past_idle`, seconds, and `past_session`, a number of events, 0 where the last
          one is too long ago. Of several last events at one time, the longest counts.
        """
        order = np.argsort(user, kind="stable")
        user, time, event = user[order], time[order], event[order]
        user_start = run_starts(user)

        # 1. Moments: the rows of one user and one time.
        starts = np.flatnonzero(user_start | run_starts(time))
        row_moment = np.cumsum(user_start | run_starts(time)) - 1
        at = time[starts]
        events = np.add.reduceat(event.astype(np.int64), starts)
        lengths = np.where(event, length_ms[order], np.nan)
        longest = np.fmax.reduceat(lengths, starts)

        # 2. What is kept of each moment's user.
        first = user_start[starts]
        place = self._users.add(user[user_start])
        self._grow(len(self._users))
        owner = np.cumsum(first) - 1
        kept = {name: array[place][owner] for name, array in self._arrays.items()}

        # 3. The last moment with events before each one: in this block, or kept.
        number = np.arange(len(starts))
        with_events = np.where(events > 0, number, -1)
        before = np.maximum.accumulate(np.append(-1, with_events))[:-1]
        in_block = before >= np.flatnonzero(first)[owner]
        last_time = np.where(in_block, at[before], kept["time"])
        last_length = np.where(in_block, longest[before], kept["length"])
        gap = np.where(last_time == _NEVER, np.nan, at - last_time.astype(np.float64))

        # 4. Events of the session until before each moment. A session that was kept
        #    begins with its events, a new one with none.
        goes_on = gap < self._session_ms
        begins = first | ((events > 0) & ~goes_on)
        # The first moment of a session that goes on from what is kept may be one
        # without events: the kept events stand at the user's first moment.
        base = np.where(first & goes_on, kept["events"], 0)
        total = np.cumsum(events) - events
        start = np.maximum.accumulate(np.where(begins, number, 0))
        inside = total - total[start] + base[start]
        session = np.where(np.isnan(gap), np.nan, np.where(goes_on, inside, 0))

        # 5. Keep the last events of each user.
        last = np.append(np.flatnonzero(first)[1:], len(starts)) - 1
        latest = np.maximum.accumulate(with_events)[last]
        has_new = latest >= np.flatnonzero(first)
        where, new = place[has_new], latest[has_new]
        self._arrays["time"][where] = at[new]
        self._arrays["length"][where] = longest[new]
        self._arrays["events"][where] = inside[new] + events[new]

        features = {
            "past_gap": gap / 1000,
            "past_idle": (gap - last_length) / 1000,
            "past_session": session,
        }
        out = {}
        for name, values in features.items():
            out[name] = np.empty(len(order))
            out[name][order] = values[row_moment]
        return out

    def take_over(self, other: TimesOfUsers, user: np.ndarray) -> None:
        """Begin with what another keeps of the users that did not come yet.

        Args:
          other: times with the same gap that ends a session.
          user: `[R] uint64`.
        """
        here, there = self._users.add_from(other._users, user)
        self._grow(len(self._users))
        for name, array in other._arrays.items():
            self._arrays[name][here] = array[there]

    def state(self) -> dict[str, np.ndarray]:
        """Return what is kept of each user, from which `resume` goes on."""
        ids, places = self._users.items()
        return {
            "users": ids,
            **{name: array[places] for name, array in self._arrays.items()},
        }

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` returned."""
        self._users = KeyIndex(np.array(state["users"]))
        self._arrays = {name: np.array(state[name]) for name in self.NAMES}

    def _grow(self, size: int) -> None:
        """Make room for users up to a number, twice as much as needed."""
        if size > len(self._arrays["time"]):
            for name, more in _nothing(2 * size).items():
                more[: len(self._arrays[name])] = self._arrays[name]
                self._arrays[name] = more


_NEVER = np.iinfo(np.int64).min


def _nothing(users: int) -> dict[str, np.ndarray]:
    return {
        "time": np.full(users, _NEVER),
        "length": np.full(users, np.nan),
        "events": np.zeros(users, np.int64),
    }
