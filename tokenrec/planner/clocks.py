"""Clocks of what can be busy in a device while it runs a compiled program."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

# What the core may wait for. Each has a clock of its own.
WAITS = ("network", "slices", "memory", "sparse cores")


def _zeros() -> defaultdict[Any, float]:
    return defaultdict(float)


@dataclasses.dataclass
class Clocks:
    """Clocks and sums at one place of a schedule, in seconds.

    Attributes:
      now: clock of the core.
      free: when each thing of `WAITS` has done all that it was given.
      finish: when each asynchronous instruction is done, and what it is.
      work: as `Schedule.work`.
      exposed: as `Schedule.exposed`.
      network_seconds: as `Schedule.network_seconds`.
      costs: of every instruction (name, kind, text).
    """

    now: float = 0.0
    free: defaultdict[str, float] = dataclasses.field(default_factory=_zeros)
    finish: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)
    work: defaultdict[str, float] = dataclasses.field(default_factory=_zeros)
    exposed: defaultdict[str, float] = dataclasses.field(default_factory=_zeros)
    network_seconds: float = 0.0
    costs: defaultdict[tuple[str, str, str], float] = dataclasses.field(
        default_factory=_zeros
    )

    def begin(self, name: str, clock: str, seconds: float) -> None:
        """Give an asynchronous instruction to one of `WAITS`."""
        self.free[clock] = max(self.now, self.free[clock]) + seconds
        self.finish[name] = self.free[clock], clock
        if clock == "network":
            self.network_seconds += seconds

    def wait(self, name: str) -> None:
        """Stop the core until an asynchronous instruction is done."""
        finish, clock = self.finish.get(name, (0.0, ""))
        if finish > self.now:
            self.exposed[clock] += finish - self.now
            self.now = finish

    def run(self, name: str, kind: str, text: str, seconds: float) -> None:
        """Run an instruction on the core."""
        self.now += seconds
        self.work[kind] += seconds
        self.costs[name, kind, text] += seconds

    def copied(self) -> Clocks:
        """Copy the sums, so that a branch or a trip changes its own."""
        return dataclasses.replace(
            self,
            free=self.free.copy(),
            finish=self.finish.copy(),
            work=self.work.copy(),
            exposed=self.exposed.copy(),
            costs=self.costs.copy(),
        )

    def repeat(self, before: Clocks, times: int) -> None:
        """Add what happened since `before` so many times again."""
        passed = times * (self.now - before.now)
        self.network_seconds += times * (self.network_seconds - before.network_seconds)
        sums: list[tuple[dict[Any, float], dict[Any, float]]] = [
            (self.work, before.work),
            (self.exposed, before.exposed),
            (self.costs, before.costs),
        ]
        for counter, old in sums:
            for key in counter:
                counter[key] += times * (counter[key] - old[key])
        self.now += passed
        # What began before the last trip is done when it was.
        for clock, time in self.free.items():
            if time != before.free[clock]:
                self.free[clock] = time + passed
        for name, (time, kind) in self.finish.items():
            if before.finish.get(name) != (time, kind):
                self.finish[name] = time + passed, kind
