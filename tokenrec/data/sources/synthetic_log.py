"""Generate the events and labels of the synthetic log, with known probabilities.

The label y of task k in a row with user segment s, item genre g, and genre g' and
reaction r of the user's latest earlier event is drawn with

    P(y = 1) = sigmoid(c_k + a_k sign(s + g) + b_k sign(g' + g) (2 r - 1))

where sign(n) is 1 for n mod 4 in {0, 1} and -1 for {2, 3}; a term whose segment, genre
or latest event is missing is 0. Segment and genre are uniform on 0..3, so that sign(s +
g) is independent of s and of g alone: each of the four fields is worth nothing without
its partner, and a model needs both the static fields and the history.

Rows come in *visits*. A visit is one row, or a request of several scored rows and then
one purchase. Users take turns: visit v is one of user v mod U. Letters: n rows.
"""

from __future__ import annotations

import numpy as np

from tokenrec.data.source import SPLITS
from tokenrec.data.sources.synthetic_draws import Draws
from tokenrec.errors import InputError, suggest
from tokenrec.metrics.binary import auc

START_MS = 1_640_995_200_000  # 2022-01-01 UTC
HOUR_MS = 3_600_000
SEGMENTS = GENRES = 4

# Per task: constant c, weight a of segment x genre, weight b of latest genre x reaction
# x genre, share of labels that are known.
TASKS = {"click": (-0.2, 1.2, 1.2, 0.97), "buy": (-1.5, 0.5, 1.5, 0.8)}


class SyntheticLog:
    """Rows 0, 1, ... of a log; each is a function of its number.

    Args:
      rows: length of the log.
      users: number of users.
      items: number of items.
      seed: seed of all draws.
      requests: scored rows of a visit; above 1 a purchase follows them.
      batch_rows: rows to generate at a time.

    Raises:
      InputError: a size is too small.
    """

    def __init__(
        self,
        rows: int,
        users: int,
        items: int,
        seed: int,
        requests: int,
        batch_rows: int,
    ) -> None:
        _check_sizes(rows, users, items, requests, batch_rows)
        self._rows = rows
        self._users = users
        self._items = items
        self._requests = requests
        self._batch_rows = batch_rows
        self._draws = Draws(seed)
        self._visit_rows = requests + (requests > 1)
        # The last user and item have no segment and no genre (-1): they are in no
        # table.
        user, item = np.arange(users), np.arange(items)
        segment = self._draws.integers("segment", user, SEGMENTS)
        genre = self._draws.integers("genre", item, GENRES)
        self._segment = np.where(user == users - 1, -1, segment)
        self._genre = np.where(item == items - 1, -1, genre)
        # Valid begins after 80 % of the time, test after 90 %. `-(-a // b)` rounds up.
        visits = -(-rows // self._visit_rows)
        length = -(-visits // users) * HOUR_MS
        self._starts = np.array(
            [START_MS + length * 8 // 10, START_MS + length * 9 // 10]
        )

    def probabilities(self, index: np.ndarray) -> np.ndarray:
        """Compute the true probability of each task's label.

        Args:
          index: `[n] int64`, row numbers.

        Returns:
          `[n, tasks] float64`.
        """
        visit = index // self._visit_rows
        genre = self._genre[self._item(index)]
        segment = self._segment[visit % self._users]
        has_static = (segment >= 0) & (genre >= 0)
        static = np.where(has_static, _sign(segment + genre), 0)
        latest_genre, reaction = self._latest_event(visit)
        has_history = (latest_genre >= 0) & (genre >= 0)
        history = _sign(latest_genre + genre) * (2 * reaction - 1)
        history = np.where(has_history, history, 0)
        logits = [
            constant + a * static + b * history for constant, a, b, _ in TASKS.values()
        ]
        return 1 / (1 + np.exp(-np.stack(logits, axis=-1)))

    def labels(self, index: np.ndarray) -> np.ndarray:
        """Draw the labels.

        Args:
          index: `[n] int64`, row numbers.

        Returns:
          `[n, tasks] int8`, -1 where unknown.
        """
        probability = self.probabilities(index)
        labels = np.empty(probability.shape, np.int8)
        for k, (task, (_, _, _, share)) in enumerate(TASKS.items()):
            is_known = self._draws.uniform(f"{task} known", index) < share
            is_known &= self._is_scored(index)
            is_positive = self._draws.uniform(task, index) < probability[:, k]
            labels[:, k] = np.where(is_known, is_positive, -1)
        return labels

    def best_auc(self, task: str = "click", split: str = "valid") -> float:
        """Compute the AUC of the true probability against the drawn labels of a split.

        A model can exceed it only by luck.

        Raises:
          InputError: no such task or split, or the split lacks one of the classes.
        """
        for name, known in ((task, list(TASKS)), (split, SPLITS)):
            if name not in known:
                raise InputError(f"best_auc: '{name}' is unknown{suggest(name, known)}")
        column = list(TASKS).index(task)
        scores: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        for first in range(0, self._rows, self._batch_rows):
            index = np.arange(first, min(first + self._batch_rows, self._rows))
            label = self.labels(index)[:, column]
            kept = (label >= 0) & (self._split(index) == SPLITS.index(split))
            labels.append(label[kept])
            scores.append(self.probabilities(index[kept])[:, column])
        value = auc(np.concatenate(labels), np.concatenate(scores))
        if value is None:
            raise InputError(
                f"rows={self._rows}: split '{split}' lacks a class of '{task}'; use "
                "more rows"
            )
        return value

    def _is_scored(self, index: np.ndarray) -> np.ndarray:
        return index % self._visit_rows < self._requests

    def _is_tied(self, visit: np.ndarray) -> np.ndarray:
        """Find visits at the time of the user's visit before them.

        Only odd visits of a user can be: there are never three at one time.
        """
        is_odd = visit // self._users % 2 == 1
        return is_odd & (self._draws.integers("tied", visit, 8) == 0)

    def _time(self, index: np.ndarray) -> np.ndarray:
        """Time of each row, `[n] int64`, milliseconds: about an hour between visits."""
        visit = index // self._visit_rows
        visit = visit - np.where(self._is_tied(visit), self._users, 0)
        hour = START_MS + visit // self._users * HOUR_MS
        return hour + self._draws.integers("minute", visit, HOUR_MS)

    def _split(self, index: np.ndarray) -> np.ndarray:
        time = self._time(index)
        return np.searchsorted(self._starts, time, side="right").astype(np.int8)

    def _item(self, index: np.ndarray) -> np.ndarray:
        """Number of each row's item, `[n] int64`.

        The items of a visit differ, and from those of a visit at the same time, so that
        no scored row repeats another.
        """
        visit, place = index // self._visit_rows, index % self._visit_rows
        # The row after the requests is the purchase of one of them.
        bought = self._draws.integers("bought", visit, self._requests)
        place = np.where(place < self._requests, place, bought)
        is_tied = self._is_tied(visit)
        first = self._draws.integers(
            "item", visit - np.where(is_tied, self._users, 0), self._items
        )
        offset = place + np.where(is_tied, self._requests, 0)
        return (first + offset) % self._items

    def _reaction(self, visit: np.ndarray) -> np.ndarray:
        return self._draws.integers("reaction", visit, 2)

    def _latest_event(self, visit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Genre of the event at the user's latest earlier time, and its reaction.

        The genre is -1 if there is no event, or if there are two at that time: they
        have no order between them.
        """
        # The visit before a tied one has the same time, so that the earlier one is two
        # visits before.
        latest = visit - self._users * (1 + self._is_tied(visit))
        event = np.maximum(latest, 0)
        last_row = event * self._visit_rows + self._visit_rows - 1
        genre = self._genre[self._item(last_row)]
        is_missing = (latest < 0) | self._is_tied(event)
        return np.where(is_missing, -1, genre), self._reaction(event)


def _check_sizes(
    rows: int, users: int, items: int, requests: int, batch_rows: int
) -> None:
    for name, value, least in (
        ("rows", rows, 1),
        ("users", users, 2),
        # Two visits at one time need different items.
        ("items", items, max(2 * requests, 2)),
        ("requests", requests, 1),
        ("batch_rows", batch_rows, 1),
    ):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}; raise it")


def _sign(value: np.ndarray) -> np.ndarray:
    """Return 1 or -1, each for half of the residues modulo 4."""
    return np.where(value % 4 < 2, 1, -1)
