"""Read the text of a compiled program: its collectives, custom calls and loops.

`compiled.as_text()` is HLO after all optimisations, a list of computations. A
computation is a header and one instruction a line:

    %body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
      %r = f32[8]{0:T(128)} all-reduce(%x), replica_groups=[4,2]<=[8], to_apply=%add

The parser splits an instruction into name, shape, opcode and the rest, and starts at
the computation marked `ENTRY`. It follows `calls=`, `body=`, `condition=`, `to_apply=`,
`true_computation=`, `false_computation=` and `branch_computations={...}`, so that each
instruction counts as often as a step runs it. These forms matter besides:

A loop; the trip count is XLA's, or (TPU text has none) the bound in the condition:

    %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, \
backend_config={"known_trip_count":{"n":"6"}}
    %bound = s32[] constant(6)
    %lt = pred[] compare(%count, %bound), direction=LT

A collective, plain or asynchronous (`-start`; its `-done` is not counted again):

    %g = f32[64]{0} all-gather(%p), replica_groups={{0,1},{2,3}}, dimensions={0}
    %s = (f32[32]{0}, f32[64]{0}) all-gather-start(%p), replica_groups={{0,1},{2,3}}

An asynchronous collective fused on a TPU: the fusion that starts it holds a custom call
"AsyncCollectiveStart", and every later fusion on its way repeats the collective with
the same chain id:

    %g.1 = f32[64]{0} all-gather(%p), ..., frontend_attributes={chain_id="0"}
    ROOT %s = (...) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"

A reduce-scatter that XLA wrote as an all-reduce and a slice, in one fusion; the name of
the computation tells:

    %all-reduce-scatter.1 (p: bf16[4,8]) -> bf16[1,8] {
      %a = bf16[4,8]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add

A transfer between slices, into which the compiler splits a collective over several:

    %send.1 = (f32[4,8]{1,0}, u32[], token[]) send(%b, %token), \
frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from tokenrec.errors import InputError
from tokenrec.ops.tables.exchange import OVERFLOW_SCOPE
from tokenrec.planner.collectives import KINDS, Collective
from tokenrec.planner.hlo_bytes import (
    Computations,
    Instruction,
    array_bytes,
    moved_bytes,
)
from tokenrec.planner.hlo_groups import replica_groups, source_target_pairs
from tokenrec.planner.sparse_cores import sparse_core_call

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)"
    r"=%?([\w.-]+)"
)


@dataclasses.dataclass(frozen=True)
class Program:
    """Contents of a compiled program that cost time.

    Attributes:
      collectives: in the order of the program.
      custom_calls: how often each is run, by name.
      sparse_core_calls: how often work is given to the sparse cores, by its kind
        (`sparse_cores.py`): "gather", "scatter", "data formatting".
      loops: trips of every loop; None where the text does not tell.
      memory_bytes: bytes that a device reads from and writes to its memory, by
        `hlo_bytes.py`; nothing inside a custom call.
    """

    collectives: tuple[Collective, ...]
    custom_calls: dict[str, int]
    loops: tuple[int | None, ...]
    memory_bytes: float = 0.0
    sparse_core_calls: dict[str, int] = dataclasses.field(default_factory=dict)


def read_program(hlo: str, devices: int, slices: int = 1) -> Program:
    """Read the text of a compiled program.

    The body of a loop counts as often as it runs. A loop of unknown length counts once;
    one under `OVERFLOW_SCOPE`, further rounds of a table exchange that run on overflow
    only, does not count at all. Of the branches of a conditional the costliest counts.

    Args:
      hlo: `compiled.as_text()`.
      devices: number of devices, all slices together.
      slices: number of slices.

    Raises:
      InputError: the text is not HLO, or has replica groups of an unknown form.
    """
    computations, entry = parse_computations(hlo)
    reader = _Reader(computations, devices // slices, slices)
    reader.walk(entry, 1)
    return Program(
        tuple(reader.collectives),
        dict(sorted(reader.custom_calls.items())),
        tuple(reader.loops),
        reader.memory_bytes,
        dict(sorted(reader.sparse_core_calls.items())),
    )


class _Reader:
    """Walk of a program from its entry computation, which collects its contents."""

    def __init__(
        self, computations: Computations, slice_devices: int, slices: int
    ) -> None:
        self.computations = computations
        self.slice_devices = slice_devices
        self.slices = slices
        self.collectives: list[Collective] = []
        self.custom_calls: Counter[str] = Counter()
        self.sparse_core_calls: Counter[str] = Counter()
        self.loops: list[int | None] = []
        self.memory_bytes = 0.0

    def walk(self, name: str, trips: int, *, fused: bool = False) -> None:
        """Collect a computation and those that it calls.

        Args:
          name: of the computation.
          trips: how often a step runs it.
          fused: it is inside a fusion, a reduction or a sort, whose operands are read
            already.
        """
        lines = self.computations.get(name, [])
        shapes = {line.name: line.shape for line in lines}
        starts_async = any('"AsyncCollectiveStart"' in line.rest for line in lines)
        for line in lines:
            if not fused:
                moved = moved_bytes(line, shapes, self.computations)
                self.memory_bytes += trips * moved
            # An asynchronous collective that started elsewhere: every fusion on its way
            # repeats it.
            if "chain_id=" in line.rest and not starts_async:
                continue
            self._collect(line, name, trips)
            # Rounds on overflow are not counted.
            if line.opcode == "while" and f"/{OVERFLOW_SCOPE}/" in line.rest:
                continue
            inner_trips = trips
            if line.opcode == "while":
                count = trip_count(line.rest, self.computations)
                self.loops.append(count)
                inner_trips *= count or 1
            called = called_computations(line.rest)
            if line.opcode == "conditional" and not fused:
                self._walk_costliest(called, inner_trips)
                continue
            inside = fused or line.opcode not in ("while", "call")
            for other in called:
                self.walk(other, inner_trips, fused=inside)

    def _walk_costliest(self, branches: list[str], trips: int) -> None:
        """Collect the branch of a conditional that moves the most bytes."""
        found = []
        for branch in branches:
            reader = _Reader(self.computations, self.slice_devices, self.slices)
            reader.walk(branch, trips)
            found.append(reader)
        most = max(
            found,
            key=lambda each: (
                each.memory_bytes + sum(one.moved for one in each.collectives)
            ),
        )
        self.collectives += most.collectives
        self.custom_calls += most.custom_calls
        self.sparse_core_calls += most.sparse_core_calls
        self.loops += most.loops
        self.memory_bytes += most.memory_bytes

    def _collect(self, line: Instruction, computation: str, trips: int) -> None:
        """Add an instruction that is a custom call or a collective."""
        label, shape, opcode, rest = line
        if work := sparse_core_call(line):
            self.sparse_core_calls[work] += trips
        if opcode == "custom-call":
            self.custom_calls[custom_call_name(label, rest)] += trips
        elif opcode == "send" and "_xla_megascale_transfer_type" in rest:
            self.collectives.append(read_transfer(shape, rest, trips, self.slices))
        elif opcode.removesuffix("-start") in KINDS:
            # A reduce-scatter in the form of an all-reduce with a slice, fused.
            scatter = computation.startswith("all-reduce-scatter")
            collective = read_collective(shape, opcode, rest, trips, self.slice_devices)
            if scatter:
                collective = dataclasses.replace(collective, kind="reduce-scatter")
            self.collectives.append(collective)


def parse_computations(hlo: str) -> tuple[Computations, str]:
    """Split HLO text into computations; also returns the name of the entry."""
    computations: Computations = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif name and (instruction := _INSTRUCTION.match(line)):
            computations[name].append(Instruction(*instruction.groups()))
    if not entry:
        raise InputError(
            "the text is not HLO: it has no ENTRY computation; "
            "pass what compiled.as_text() returns"
        )
    return computations, entry


def called_computations(rest: str) -> list[str]:
    """Names of the computations that an instruction calls."""
    called = _CALLED.findall(rest)
    branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
    if branches:
        called += re.findall(r"[\w.-]+", branches[1])
    return called


def custom_call_name(label: str, rest: str) -> str:
    """Name of a custom call: its target.

    All Pallas kernels have one target; their name is that of the instruction, without
    the numbers that XLA appends.
    """
    match = re.search(r'custom_call_target="([^"]*)"', rest)
    target = match[1] if match else "unnamed"
    if target == "tpu_custom_call":
        return re.sub(r"(\.\d+|\.clone)+$", "", label)
    return target


def trip_count(rest: str, computations: Computations) -> int | None:
    """Trips of a loop: XLA's count, or else the bound in the condition."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", rest)
    lines = computations.get(condition[1], []) if condition else []
    constants = [line.rest for line in lines if line.opcode == "constant"]
    matches = [re.match(r"(\d+)\)", text) for text in constants]
    bounds = [int(match[1]) for match in matches if match]
    compares = [line.rest for line in lines if line.opcode == "compare"]
    # JAX counts its loops from 0, so that the bound is the number of trips.
    if len(bounds) == len(compares) == 1 and "direction=LT" in compares[0]:
        return bounds[0]
    return None


def read_collective(
    shape: str, opcode: str, rest: str, trips: int, devices: int
) -> Collective:
    """Read a collective inside a slice of `devices` devices."""
    kind = opcode.removesuffix("-start")
    groups = (
        source_target_pairs(rest)
        if kind == "collective-permute"
        else replica_groups(rest, devices)
    )
    parts = array_bytes(shape)
    size, group = sum(parts), len(groups[0])
    # The shape of a start has the operand beside the result: 1 / g of it, for a gather.
    if opcode == "all-gather-start":
        size *= group / (group + 1)
    # Operand, result and two counters.
    elif opcode == "collective-permute-start":
        size = parts[0]
    # The shape is that of the result, 1 / g of the operand.
    if kind == "reduce-scatter":
        size *= group
    return Collective(kind, size, groups, trips)


def read_transfer(shape: str, rest: str, trips: int, slices: int) -> Collective:
    """Read a transfer between slices.

    The compiler splits a collective over several slices into parts inside each, and a
    transfer between them.
    """
    match = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', rest)
    kind = match[1].lower().replace("_", "-") if match else ""
    size = array_bytes(shape)[0] * (slices if kind == "all-gather" else 1)
    if kind not in KINDS:
        kind = "collective-permute"
    return Collective(kind, size, ((0,),), trips, slices)
