"""Bytes between a device's memory and its chip, by the text of a compiled program: what instructions read and write.

An array that the compiler has put on the chip ("S(1)" in its layout) costs nothing; a gather, a slice, or an update in
place costs the rows that it touches, not the array that they lie in. Padding is not counted. Each array is counted once
an instruction, so that the sum is the least that the program moves.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
# Names for other arrays, control flow whose bodies are counted themselves, and ends of what counts where it starts.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "custom-call", "send", "recv"}
_READS_PART = {"dynamic-slice", "gather", "slice"}
_WRITES_PART = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is written


class Instruction(NamedTuple):
    """A line of HLO: name, shape, opcode, and what follows its opening parenthesis."""

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])


Computations = dict[str, list[Instruction]]


def array_bytes(shape: str) -> list[float]:
    """Bytes of the arrays of a shape.

    >>> array_bytes("(f32[2,3]{1,0}, s32[])")
    [24.0, 4.0]
    """
    return [size for size, _ in _arrays(shape)]


def _arrays(shape: str) -> Iterator[tuple[float, bool]]:
    """Bytes of each array, and whether it lies in the device's memory."""
    for kind, dims, layout in _ARRAY.findall(shape):
        bits = (
            _ITEM_BITS[kind] if kind in _ITEM_BITS else int(re.findall(r"\d+", kind)[0])
        )
        size = bits / 8 * math.prod(int(n) for n in dims.split(",") if n)
        yield size, not re.search(r"S\([1-9]", layout)


def memory_bytes(shape: str) -> float:
    """Bytes of those arrays of a shape that lie in the device's memory.

    >>> memory_bytes("(f32[2,3]{1,0:T(8,128)S(1)}, f32[4]{0:T(1024)})")
    16.0
    """
    return sum(size for size, in_memory in _arrays(shape) if in_memory)


def moved_bytes(
    one: Instruction, shapes: dict[str, str], computations: Computations
) -> float:
    """What an instruction that is not inside a fusion reads and writes; `shapes` are those of its computation."""
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0.0
    if one.opcode == "slice-start":  # ((source), part, counter)
        part = list(_arrays(one.shape))[1]
        return part[0] + (part[0] if part[1] else 0.0)
    if one.opcode.endswith(
        "-start"
    ):  # operands and results, and counters that do not lie there
        return memory_bytes(one.shape)
    operands = [shapes.get(name, "") for name in one.operands]
    if one.opcode in _READS_PART:
        return 2 * memory_bytes(one.shape) + sum(map(memory_bytes, operands[1:]))
    if one.opcode in _WRITES_PART:
        written = _WRITES_PART[one.opcode]
        return memory_bytes(operands[written]) + sum(map(memory_bytes, operands[1:]))
    if one.opcode == "fusion":
        return _fusion_bytes(one, operands, computations)
    return memory_bytes(one.shape) + sum(map(memory_bytes, operands))


def _fusion_bytes(
    one: Instruction, operands: list[str], computations: Computations
) -> float:
    body = _body(one, computations)
    shapes = {inner.name: inner.shape for inner in body}
    total, in_place = 0.0, 0.0
    for parameter in body:
        whole = (
            memory_bytes(operands[_number(parameter)])
            if parameter.opcode == "parameter"
            else 0.0
        )
        if not whole:
            continue
        uses = list(_uses(parameter.name, body))
        if uses and all(use.opcode in _WRITES_PART and at == 0 for use, at in uses):
            total += sum(
                sum(array_bytes(shapes[use.operands[_WRITES_PART[use.opcode]]]))
                for use, _ in uses
            )
            in_place += whole
        else:
            part = _part_read(parameter.name, body, computations)
            total += whole if part is None else min(part, whole)
    # What is updated in place is the operand itself, of which the other rows are not written.
    return total + max(memory_bytes(one.shape) - in_place, 0.0)


def _part_read(
    name: str, body: list[Instruction], computations: Computations
) -> float | None:
    """Bytes of the parts that are read of an array inside a fusion; None: all of it."""
    total = 0.0
    for use, at in _uses(name, body):
        if use.opcode in _READS_PART and at == 0:
            total += sum(array_bytes(use.shape))
            continue
        inner = _body(use, computations) if use.opcode == "fusion" else []
        numbered = [
            each for each in inner if each.opcode == "parameter" and _number(each) == at
        ]
        part = _part_read(numbered[0].name, inner, computations) if numbered else None
        if part is None:
            return None
        total += part
    return total


def _uses(name: str, body: list[Instruction]) -> Iterator[tuple[Instruction, int]]:
    """Instructions that take an array, or another shape of it, and the place among their operands."""
    for user in body:
        for at, operand in enumerate(user.operands):
            if operand == name and user.opcode == "bitcast":
                yield from _uses(user.name, body)
            elif operand == name:
                yield user, at


def _body(fusion: Instruction, computations: Computations) -> list[Instruction]:
    called = re.search(r"\bcalls=%?([\w.-]+)", fusion.rest)
    return computations.get(called[1], []) if called else []


def _number(parameter: Instruction) -> int:
    return int(parameter.rest.partition(")")[0])
