"""Time of a step by the compiler's own schedule: a walk of a compiled TPU program.

libtpu writes the order in which a device runs its instructions (`is_scheduled=true`)
and what it expects most of them to cost:

    %f = bf16[8,128]{1,0} fusion(%p), ..., backend_config={... "estimated_cycles":"2353"

The walk goes through that order with a clock for each thing that can be busy:

- the core: an instruction costs its cycles over the chip's clock; a kernel, for which
  the compiler has no estimate, what `kernel_cost.py` says; one without either, the
  bytes that it moves over the memory bandwidth;
- the links to other devices: a collective costs its ring time (`roofline.py`). The core
  waits for a synchronous one. An asynchronous one begins at its `-start`, its
  `call-update`, or the fusion that holds "AsyncCollectiveStart", and the core waits for
  it at its `-done`;
- the network between slices: transfers begin at `send`; `recv-done` waits for them;
- copies between memories (`copy-start`) and work of the sparse cores (`call-update`,
  whose `call-start` names the computation), in the same way.

Loops run as often as they run, of the branches of a conditional the longest is taken,
and further rounds of a table exchange that run on overflow only cost nothing.

These are the compiler's estimates and ring arithmetic, never a measurement: contention
for memory between the core and copies, latency of the network, jitter and the host are
not in them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenrec.ops.tables.exchange import OVERFLOW_SCOPE
from tokenrec.planner.clocks import WAITS, Clocks
from tokenrec.planner.collectives import KINDS, Collective
from tokenrec.planner.hlo import (
    called_computations,
    custom_call_name,
    parse_computations,
    read_collective,
    read_transfer,
    trip_count,
)
from tokenrec.planner.hlo_bytes import Instruction, moved_bytes
from tokenrec.planner.hlo_sources import SourceLines
from tokenrec.planner.instruction_class import FREE, instruction_class
from tokenrec.planner.roofline import Chip, collective_seconds

COSTLIEST = 10
# Trips of a loop that are walked; by then its asynchronous instructions repeat, and the
# last trip stands for the rest.
_WALKED_TRIPS = 4
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHAIN = re.compile(r"chain_id\D*(\d+)")
# Custom calls that give an array a place and run nothing.
_NO_WORK = {"AllocateBuffer", "AssumeGatherIndicesInBound"}


@dataclasses.dataclass(frozen=True)
class Cost:
    """An instruction of a program and its time.

    Attributes:
      name: of the instruction.
      kind: as the keys of `Schedule.work`, or "network".
      seconds: of all its runs in a step.
      source: line of this package that made it, as "tokenrec/step.py:41"; "" if none.
    """

    name: str
    kind: str
    seconds: float
    source: str


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Seconds of a step on one device, by the compiler's schedule.

    Attributes:
      seconds: of the step: the sum of `work` and `exposed`.
      work: of the core, by kind: "matrix", "vector", "padding", "copies", "kernels".
      exposed: that the core waits, by what it waits for: "network", "slices", "memory",
        "sparse cores".
      network_seconds: that the links are busy.
      costliest: instructions of the highest cost, highest first.
      unpriced: custom calls that nothing says the cost of, taken as free.
    """

    seconds: float
    work: dict[str, float]
    exposed: dict[str, float]
    network_seconds: float
    costliest: tuple[Cost, ...]
    unpriced: tuple[str, ...]

    @property
    def network_hidden(self) -> float:
        """Seconds that the links are busy beside work of the core."""
        return max(self.network_seconds - self.exposed["network"], 0.0)


def walk_schedule(
    hlo: str,
    devices: Sequence[Any],
    spec: Chip,
    kernel_seconds: Mapping[str, float] | None = None,
) -> Schedule:
    """Walk the schedule of a compiled TPU program.

    Args:
      hlo: `compiled.as_text()`.
      devices: in the mesh's order, as in `roofline.network_seconds`.
      spec: figures of the devices.
      kernel_seconds: seconds of a run of each custom call, by name or by the
        instruction's own name.

    Raises:
      InputError: the text is not HLO.
    """
    walk = _Walk(hlo, devices, spec, kernel_seconds or {})
    walk.computation(walk.entry)
    state = walk.state
    by_cost = sorted(state.costs.items(), key=lambda each: -each[1])
    costliest = [
        Cost(name, kind, seconds, walk.sources(rest))
        for (name, kind, rest), seconds in by_cost[:COSTLIEST]
    ]
    return Schedule(
        seconds=state.now,
        work={kind: state.work[kind] for kind in _WORK},
        exposed={kind: state.exposed[kind] for kind in WAITS},
        network_seconds=state.network_seconds,
        costliest=tuple(costliest),
        unpriced=tuple(sorted(walk.unpriced)),
    )


_WORK = ("matrix", "vector", "padding", "copies", "kernels")


class _Walk:
    """A walk of one program."""

    def __init__(
        self,
        hlo: str,
        devices: Sequence[Any],
        spec: Chip,
        kernel_seconds: Mapping[str, float],
    ) -> None:
        self.computations, self.entry = parse_computations(hlo)
        self.sources = SourceLines(hlo)
        self.devices = devices
        self.spec = spec
        self.kernel_seconds = kernel_seconds
        self.slices = len({getattr(d, "slice_index", None) or 0 for d in devices})
        # What every `call-start` calls, which its `call-update` runs.
        self.starts = {
            line.name: line
            for lines in self.computations.values()
            for line in lines
            if line.opcode == "call-start"
        }
        self.unpriced: set[str] = set()
        self.state = Clocks()

    def computation(self, name: str) -> None:
        """Run the instructions of a computation in their order."""
        lines = self.computations.get(name, [])
        shapes = {line.name: line.shape for line in lines}
        for line in lines:
            if line.opcode not in FREE:
                self._instruction(line, shapes, name)

    def _instruction(
        self, line: Instruction, shapes: dict[str, str], computation: str
    ) -> None:
        opcode, rest = line.opcode, line.rest
        base = opcode.removesuffix("-start")
        if opcode == "while":
            self._loop(rest)
        elif opcode == "conditional":
            self._longest(called_computations(rest))
        elif opcode == "call":
            for called in called_computations(rest):
                self.computation(called)
        # Asynchronous instructions wait where they are done.
        elif opcode.endswith("-done"):
            self._wait_for(line)
        elif base in KINDS:
            seconds = self._ring_seconds(line, computation)
            self._send(line, seconds, waits=opcode == base)
        elif opcode == "send" and "_xla_megascale_transfer_type" in rest:
            collective = read_transfer(line.shape, rest, 1, self.slices)
            self.state.begin(line.name, "slices", self._seconds_of(collective))
        elif opcode in ("copy-start", "slice-start"):
            seconds = moved_bytes(line, shapes, self.computations)
            self.state.begin(line.name, "memory", seconds / self.spec.hbm_bandwidth)
        elif opcode in ("async-start", "call-update"):
            self._offloaded(line, shapes)
        elif opcode in ("send", "recv", "async-update", "call-start"):
            self._continue(line)
        elif opcode == "fusion" and (inside := self._collectives_inside(line)):
            self._fused(line, shapes, inside)
        else:
            self._work(line, shapes)

    def _loop(self, rest: str) -> None:
        # Further rounds on overflow are not counted.
        if f"/{OVERFLOW_SCOPE}/" in rest:
            return
        body = re.search(r"body=%?([\w.-]+)", rest)
        trips = trip_count(rest, self.computations) or 1
        before = self.state
        for _ in range(min(trips, _WALKED_TRIPS)):
            before = self.state.copied()
            self.computation(body[1] if body else "")
        if trips > _WALKED_TRIPS:
            self.state.repeat(before, trips - _WALKED_TRIPS)

    def _longest(self, branches: list[str]) -> None:
        start, ends = self.state, []
        for branch in branches:
            self.state = start.copied()
            self.computation(branch)
            ends.append(self.state)
        self.state = max(ends, key=lambda end: end.now, default=start)

    def _work(self, line: Instruction, shapes: dict[str, str]) -> None:
        """Run an instruction on the core."""
        kind = instruction_class(line, self.computations)
        seconds = self._core_seconds(line, shapes)
        self.state.run(line.name, kind, line.rest, seconds)

    def _core_seconds(self, line: Instruction, shapes: dict[str, str]) -> float:
        if cycles := _CYCLES.search(line.rest):
            return int(cycles[1]) / self.spec.clock
        if line.opcode != "custom-call":
            moved = moved_bytes(line, shapes, self.computations)
            return moved / self.spec.hbm_bandwidth
        called = custom_call_name(line.name, line.rest)
        for name in (line.name, called):
            if name in self.kernel_seconds:
                return self.kernel_seconds[name]
        if called not in _NO_WORK:
            self.unpriced.add(called)
        return 0.0

    def _send(self, line: Instruction, seconds: float, *, waits: bool) -> None:
        """Begin a collective, and wait for it if it is synchronous."""
        self.state.begin(line.name, "network", seconds)
        if waits:
            self.state.wait(line.name)
        self.state.costs[line.name, "network", line.rest] += seconds

    def _continue(self, line: Instruction) -> None:
        """Hand the time of an asynchronous instruction on to the next of its line."""
        for name in line.operands:
            if name in self.state.finish:
                self.state.finish[line.name] = self.state.finish[name]

    def _wait_for(self, line: Instruction) -> None:
        if line.opcode == "recv-done":
            # Nothing in the text joins it to its send.
            self.state.finish[line.name] = self.state.free["slices"], "slices"
            self.state.wait(line.name)
        for name in line.operands:
            self.state.wait(name)

    def _offloaded(self, line: Instruction, shapes: dict[str, str]) -> None:
        """Begin a computation that runs beside the core: `async-start`, `call-update`.

        The sparse cores run it; a collective in it is bound by the links.
        """
        starts = [self.starts[name] for name in line.operands if name in self.starts]
        called = [
            name for each in (line, *starts) for name in called_computations(each.rest)
        ]
        inside = _distinct(each for name in called for each in self._search(name))
        if inside:
            seconds = sum(self._ring_seconds(*each) for each in inside)
            self._send(line, seconds, waits=False)
            return
        # A `call-start` stands for all that its computation moves.
        cycles = _CYCLES.search(line.rest)
        if cycles:
            seconds = int(cycles[1]) / self.spec.clock
        else:
            moved = sum(
                moved_bytes(each, shapes, self.computations) for each in (line, *starts)
            )
            seconds = moved / self.spec.hbm_bandwidth
        self.state.begin(line.name, "sparse cores", seconds)

    def _fused(
        self,
        line: Instruction,
        shapes: dict[str, str],
        inside: list[tuple[Instruction, str]],
    ) -> None:
        """Run a fusion that holds a collective."""
        called = called_computations(line.rest)
        text = line.rest + "".join(
            each.rest for name in called for each in self.computations.get(name, [])
        )
        chain = _CHAIN.search(text)
        starts, ends = (f'"AsyncCollective{end}"' in text for end in ("Start", "Done"))
        if chain is None and not starts and not ends:
            seconds = sum(self._ring_seconds(*each) for each in _distinct(inside))
            self._send(line, seconds, waits=True)
            return
        # A collective on its way beside the matrix product of this fusion.
        name = f"chain {chain[1] if chain else ''}"
        if starts:
            seconds = self._ring_seconds(*inside[0])
            self._send(line, seconds, waits=False)
            self.state.finish[name] = self.state.finish[line.name]
        self._work(line, shapes)
        if ends:
            self.state.wait(name)

    def _collectives_inside(self, line: Instruction) -> list[tuple[Instruction, str]]:
        return [
            each
            for called in called_computations(line.rest)
            for each in self._search(called)
        ]

    def _search(self, name: str) -> list[tuple[Instruction, str]]:
        """Find the collectives of a computation and of those that it calls."""
        found = []
        for line in self.computations.get(name, []):
            if line.opcode.removesuffix("-start") in KINDS:
                found.append((line, name))
            for other in called_computations(line.rest):
                found += self._search(other)
        return found

    def _ring_seconds(self, line: Instruction, computation: str) -> float:
        _, shape, opcode, rest = line
        devices = len(self.devices) // self.slices
        collective = read_collective(shape, opcode, rest, 1, devices)
        # An all-reduce and a slice in one fusion.
        if computation.startswith("all-reduce-scatter"):
            collective = dataclasses.replace(collective, kind="reduce-scatter")
        return self._seconds_of(collective)

    def _seconds_of(self, collective: Collective) -> float:
        return collective_seconds(collective, self.devices, self.spec)


def _distinct(
    found: Iterable[tuple[Instruction, str]],
) -> list[tuple[Instruction, str]]:
    """Leave out clones, which the text has of a collective that is handed on."""
    by_name = {
        re.sub(r"(\.\d+|\.clone|\.cloned.*)+$", "", each.name): (each, computation)
        for each, computation in found
    }
    return list(by_name.values())
