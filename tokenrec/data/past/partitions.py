"""Statistics of a log that lies in partitions of users, on many machines.

Totals of a key that has `user_id` in it, the last events and the times of a user follow
from the rows of its partition alone. All other keys are *shared*: a partition gives
their entries away, and gets the totals before each of them back, however they were
computed (tokenrec/data/beam/statistics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from tokenrec.data.past.declaration import PastStatistics
from tokenrec.data.past.features import PastFeatures, named_state
from tokenrec.data.past.keys import KeyTable
from tokenrec.data.past.plan import Key, KeyPlan
from tokenrec.data.past.totals import KeyTotals
from tokenrec.data.schema import Schema

# Part of the state with the tables of users and items.
COLUMNS = "columns"


class PartitionFeatures(PastFeatures):
    """Statistics of the past of the rows of one partition.

    Args:
      statistics: the declaration, which was checked.
      schema: schema of the source, without the statistics.

    Attributes:
      shared: the shared keys.
    """

    def __init__(self, statistics: PastStatistics, schema: Schema) -> None:
        super().__init__(statistics, schema)
        self.shared: list[Key] = [key for key in self._plans if "user_id" not in key]

    def hash_table(self, key: str, table: pa.Table) -> KeyTable:
        """Hash what keys need of a table of users (`user_id`) or items (`item_id`)."""
        return self._columns.hash_table(key, table)

    def use_table(self, key: str, table: KeyTable) -> None:
        """Describe users or items by a table from `hash_table`."""
        self._columns.use_table(key, table)

    def needs_table(self, key: str) -> bool:
        """Whether keys have columns of users (`user_id`) or of items (`item_id`)."""
        return self._columns.needs_table(key)

    def no_table(self, key: str) -> KeyTable:
        """A table without users or items."""
        return self._columns.no_table(key)

    def plan(self, key: Key) -> KeyPlan:
        """What is counted by a key."""
        return self._plans[key]

    def totals(self, key: Key) -> KeyTotals:
        """The totals of a key."""
        return self._totals[key]

    def no_totals(self, key: Key) -> list[np.ndarray]:
        """Totals before each of no entries, for each horizon."""
        plan = self._plans[key]
        return [np.zeros((0, len(plan.measures))) for _ in plan.running()]

    def shared_entries(
        self, table: pa.Table
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Return keys, times and values of the entries, one shared key after another.

        A declaration has many keys, and the entries of each are as large as the log
        rows, so that those of one are made at a time.

        Args:
          table: all rows of the partition, in the order of time.

        Raises:
          InputError: a value is too large, or those of a key cannot be hashed.
        """
        blocks = []
        for block in self._blocks([table]):
            columns = self._columns.of_rows(block)
            blocks.append((block, columns, self._measures(block, columns)))
        parts = ([self._entries(key, *b) for b in blocks] for key in self.shared)
        return (
            (
                np.concatenate([part.keys for part in of_key]),
                np.concatenate([part.time for part in of_key]),
                np.concatenate([part.values for part in of_key]),
            )
            for of_key in parts
        )

    def add_to_partition(
        self, table: pa.Table, totals: Mapping[Key, Sequence[np.ndarray]]
    ) -> pa.Table:
        """Add the features to the rows of the partition, in the order of time.

        Args:
          table: all rows of the partition.
          totals: shared key -> totals before each of its `shared_entries`, for each
            horizon `[E, width] float64`.
        """
        for key, before in totals.items():
            self._totals[key] = KnownTotals(before)
        blocks = self._blocks([table])
        return pa.concat_tables([self.add_to_block(block) for block in blocks])

    def state_by_part(self) -> dict[str, dict[str, np.ndarray]]:
        """The state that the users of the partition have, part by part."""
        others = {COLUMNS, *map(self.name_of, self.shared)}
        parts = self._parts().items()
        return {name: part.state() for name, part in parts if name not in others}

    def name_of(self, key: Key) -> str:
        """The part of the state that has the totals of a key."""
        return f"key_{list(self._plans).index(key)}"

    def whole_state(
        self, states_of: Callable[[str], Iterable[Mapping[str, np.ndarray]]]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Join what the partitions ended with; yield names and arrays as of `state`.

        The tables of users and items are those of this one.

        Args:
          states_of: returns the states of a part, of disjoint keys or users; one part
            after another is asked for.
        """
        yield "declaration", self._digest()
        for name, part in self._parts().items():
            # Without a log row this one has the arrays of a state without keys.
            own = part.state()
            state = own if name == COLUMNS else join_states([own, *states_of(name)])
            yield from named_state(name, state).items()


class KnownTotals(KeyTotals):
    """Totals that were computed elsewhere, in the order in which they are asked for.

    Args:
      before: for each horizon `[E, width] float64`.
    """

    def __init__(self, before: Sequence[np.ndarray]) -> None:
        super().__init__(np.zeros(0), ())
        self._before = before
        self._next = 0

    def update(
        self, key: np.ndarray, time: np.ndarray, values: np.ndarray
    ) -> list[np.ndarray]:
        """Return the totals before the next entries, as that of `KeyTotals`."""
        entries = slice(self._next, self._next + len(key))
        self._next = entries.stop
        return [before[entries] for before in self._before]


def join_states(states: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Join states of disjoint keys, or users, as if one had all of them.

    Args:
      states: what `state` of `KeyTotals` and its siblings returned; the first array has
        the keys, in ascending order, and the others follow it.
    """
    arrays = {
        name: np.concatenate([state[name] for state in states]) for name in states[0]
    }
    order = np.argsort(next(iter(arrays.values())))
    return {name: array[order] for name, array in arrays.items()}
