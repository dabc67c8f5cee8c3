"""What the text of a compiled program tells: its collectives, its custom calls, and how often its loops run."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

import numpy as np

from tokenrec.errors import InputError
from tokenrec.ops.tables.exchange import OVERFLOW_SCOPE
from tokenrec.planner.hlo_bytes import (
    Computations,
    Instruction,
    array_bytes,
    moved_bytes,
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)"
)
_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program.

    Attributes:
      kind: one of "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute".
      size: bytes on a device of the longer side: the result of an all-gather, the operand of the others.
      groups: places in the mesh, flattened, that exchange; of one slice where `slices` is above 1.
      trips: how often a step runs it.
      slices: above 1: between the slices, device by device, over the data-centre network.
    """

    kind: str
    size: float
    groups: tuple[tuple[int, ...], ...]
    trips: int = 1
    slices: int = 1

    @property
    def moved(self) -> float:
        """Bytes into every device, all trips, by the ring algorithm: (g - 1) / g of the size, twice for all-reduce."""
        return self.trips * ring_bytes(
            self.kind,
            self.size,
            self.slices if self.slices > 1 else len(self.groups[0]),
        )


def ring_bytes(kind: str, size: float, group: int) -> float:
    """Bytes into every device of a group.

    >>> ring_bytes("all-reduce", 800.0, 4)
    1200.0
    """
    if kind == "collective-permute":
        return float(size)
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) / group


@dataclasses.dataclass(frozen=True)
class Program:
    """What HLO text tells: collectives, custom calls by name (times run), and trips of every loop (None: unknown).

    `memory_bytes` is what the program reads from and writes to the device's memory, by `traffic.py`; nothing inside a
    custom call.
    """

    collectives: tuple[Collective, ...]
    custom_calls: dict[str, int]
    loops: tuple[int | None, ...]
    memory_bytes: float = 0.0


def read_program(hlo: str, devices: int, slices: int = 1) -> Program:
    """Reads `compiled.as_text()` of a program for `devices` devices, all slices together.

    Loop bodies count as often as they run: by XLA's `known_trip_count`, or else (TPU text has none) by the bound that
    the condition compares the counter with. A loop of unknown length counts once, one under `OVERFLOW_SCOPE` not.
    """
    computations, entry = _computations(hlo)
    collectives: list[Collective] = []
    calls: Counter[str] = Counter()
    loops: list[int | None] = []
    memory = 0.0

    def walk(name: str, trips: int, *, fused: bool = False) -> None:
        nonlocal memory
        lines = computations.get(name, [])
        shapes = {line.name: line.shape for line in lines}
        starts = any('"AsyncCollectiveStart"' in rest for *_, rest in lines)
        for line in lines:
            label, shape, opcode, rest = line
            memory += 0.0 if fused else trips * moved_bytes(line, shapes, computations)
            if "chain_id=" in rest and not starts:
                continue  # an asynchronous one that started elsewhere: every fusion on its way repeats it
            if opcode == "custom-call":
                calls[_custom_name(label, rest)] += trips
            elif opcode == "send" and "_xla_megascale_transfer_type" in rest:
                collectives.append(_between_slices(shape, rest, trips, slices))
            elif opcode.removesuffix("-start") in _KINDS:
                # XLA writes some a reduce-scatter as an all-reduce with a slice, fused; the fusion's name tells.
                scatter = name.startswith("all-reduce-scatter")
                collectives.append(
                    _collective(
                        shape, opcode, rest, trips, devices // slices, scatter=scatter
                    )
                )
            if opcode == "while" and f"/{OVERFLOW_SCOPE}/" in rest:
                continue
            inner = trips
            if opcode == "while":
                count = _trip_count(rest, computations)
                loops.append(count)
                inner *= count or 1
            branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
            called = _CALLED.findall(rest) + (
                re.findall(r"[\w.-]+", branches[1]) if branches else []
            )
            # What a fusion, a reduction or a sort calls works on what it has read already.
            inside = fused or opcode not in ("while", "conditional", "call")
            for other in called:
                walk(other, inner, fused=inside)

    walk(entry, 1)
    return Program(
        tuple(collectives), dict(sorted(calls.items())), tuple(loops), memory
    )


def _computations(hlo: str) -> tuple[Computations, str]:
    found: Computations = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name and (instruction := _INSTRUCTION.match(line)):
            found[name].append(Instruction(*instruction.groups()))
    if not entry:
        raise InputError(
            "the text is not HLO: it has no ENTRY computation; pass what compiled.as_text() returns"
        )
    return found, entry


def _custom_name(label: str, rest: str) -> str:
    """The target, or of a Pallas kernel, whose target is one for all, the name that it gave its instruction."""
    found = re.search(r'custom_call_target="([^"]*)"', rest)
    target = found[1] if found else "unnamed"
    return (
        re.sub(r"(\.\d+|\.clone)+$", "", label)
        if target == "tpu_custom_call"
        else target
    )


def _trip_count(rest: str, computations: Computations) -> int | None:
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", rest)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [
        int(value[1])
        for *_, opcode, text in lines
        if opcode == "constant" and (value := re.match(r"(\d+)\)", text))
    ]
    compares = [text for *_, opcode, text in lines if opcode == "compare"]
    if len(bounds) == len(compares) == 1 and "direction=LT" in compares[0]:
        return bounds[0]  # JAX counts its loops from 0
    return None


def _collective(
    shape: str, opcode: str, rest: str, trips: int, devices: int, *, scatter: bool
) -> Collective:
    kind = opcode.removesuffix("-start")
    groups = _pairs(rest) if kind == "collective-permute" else _groups(rest, devices)
    parts = array_bytes(shape)
    size, group = sum(parts), len(groups[0])
    if (
        opcode == "all-gather-start"
    ):  # operand and result, and the operand is 1 / g of the result
        size *= group / (group + 1)
    elif opcode == "collective-permute-start":  # operand, result and two counters
        size = parts[0]
    if kind == "reduce-scatter":
        size *= group
    return Collective("reduce-scatter" if scatter else kind, size, groups, trips)


def _between_slices(shape: str, rest: str, trips: int, slices: int) -> Collective:
    """The compiler splits a collective over several slices into parts inside each and a transfer between them."""
    found = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', rest)
    kind = found[1].lower().replace("_", "-") if found else ""
    size = array_bytes(shape)[0] * (slices if kind == "all-gather" else 1)
    return Collective(
        kind if kind in _KINDS else "collective-permute", size, ((0,),), trips, slices
    )


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The three forms of `replica_groups`: lists, an iota with a transpose, and axes of a mesh."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{((?:'\w+',?)+)\}", rest):
        sizes = {
            name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])
        }
        grouped = re.findall(r"'(\w+)'", mesh[2])
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        order = [name for name in sizes if name not in grouped] + grouped
        ids = places.transpose([list(sizes).index(name) for name in order])
        return _tuples(ids.reshape(-1, math.prod(sizes[name] for name in grouped)))
    if iota := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
    ):
        shape, source = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        axes = [int(n) for n in iota[3].split(",")] if iota[3] else None
        return _tuples(
            np.arange(math.prod(source)).reshape(source).transpose(axes).reshape(shape)
        )
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", rest)
    if listed:
        return tuple(
            tuple(int(n) for n in one.split(","))
            for one in re.findall(r"\{([\d,]+)\}", listed[1])
        )
    if "replica_groups=" in rest and "replica_groups={}" not in rest:
        raise InputError(
            f"replica groups in a form that is not known: {rest.partition('replica_groups=')[2][:80]}"
        )
    return (tuple(range(devices)),)


def _pairs(rest: str) -> tuple[tuple[int, ...], ...]:
    return tuple(
        (int(a), int(b))
        for a, b in re.findall(
            r"\{(\d+),(\d+)\}", rest.partition("source_target_pairs=")[2]
        )
    )


def _tuples(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in group) for group in ids)
