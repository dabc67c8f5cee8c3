"""Bytes between a device's memory and its cores, from the text of a compiled program.

For each instruction the bytes that it reads and writes, each array once, so that the
sum is the least that the program moves. Padding is not counted. Rules, with the form of
the text that each reads:

An array that the compiler keeps on the chip ("S(1)" in its layout) costs nothing:

    %x = f32[2,8]{1,0:T(8,128)S(1)} add(%a, %b)
    %y = f32[2,8]{1,0:T(8,128)} add(%a, %b)          costs its 64 bytes

A gather, a slice or an update in place costs the table rows that it touches, not the
array that they lie in:

    %r = f32[3,16]{1,0} gather(%t, %ids), offset_dims={1}, slice_sizes={1,16}
    %s = f32[100,16]{1,0} scatter(%t, %ids, %g), to_apply=%add

A fusion costs its operands and its result. An operand that its body only slices costs
the slice; one that it updates in place costs the update:

    %w = f32[8,8]{1,0} fusion(%stack, %i), kind=kLoop, calls=%pick.1
    %cut = f32[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero)     in %pick.1

An asynchronous pair counts at its start, whose shape holds operand, result and
counters:

    %start = (f32[2,8]{1,0:S(1)}, f32[2,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
    %done = f32[2,8]{1,0:S(1)} copy-done(%start)

A call that runs beside the program, as on the sparse cores, costs at its start what its
computation moves, and not its operands, which a `call-update` may bring later:

    %start = ((), (), (s32[1])) call-start(), to_apply=%gather.1
    %update = ((f32[100,16], s32[3]), f32[3,16]) call-update(%start, %t, %ids)
    %done = f32[3,16] call-done(%update)
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\](\{[^}]*\})?")
# Names for other arrays, control flow whose bodies are counted themselves, and custom
# calls and transfers, whose bytes are counted elsewhere.
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
_FREE |= {
    "call-update",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "custom-call",
    "send",
    "recv",
}
_READS_PART = {"dynamic-slice", "gather", "slice"}
# Position of the operand that is written.
_WRITES_PART = {"dynamic-update-slice": 1, "scatter": 2}


class Instruction(NamedTuple):
    """A line of HLO.

    Attributes:
      name: without "%".
      shape: of the result, with layouts; a tuple is in parentheses.
      opcode: "fusion", "all-reduce", ...
      rest: text after the opening parenthesis: operands, then attributes.
    """

    name: str
    shape: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])


Computations = dict[str, list[Instruction]]


def array_bytes(shape: str) -> list[float]:
    """Compute the bytes of each array of a shape.

    >>> array_bytes("(f32[2,3]{1,0}, s32[])")
    [24.0, 4.0]
    """
    return [size for size, _ in _arrays(shape)]


def memory_bytes(shape: str) -> float:
    """Compute the bytes of those arrays of a shape that lie in the device's memory.

    >>> memory_bytes("(f32[2,3]{1,0:T(8,128)S(1)}, f32[4]{0:T(1024)})")
    16.0
    """
    return sum(size for size, in_memory in _arrays(shape) if in_memory)


def _arrays(shape: str) -> Iterator[tuple[float, bool]]:
    """Yield the bytes of each array, and whether it lies in the device's memory."""
    for kind, dims, layout in _ARRAY.findall(shape):
        # The width of a number is in its name: f32, bf16, s8, f8e4m3fn.
        bits = (
            _ITEM_BITS[kind] if kind in _ITEM_BITS else int(re.findall(r"\d+", kind)[0])
        )
        size = bits / 8 * math.prod(int(n) for n in dims.split(",") if n)
        yield size, not re.search(r"S\([1-9]", layout)


def moved_bytes(
    line: Instruction, shapes: dict[str, str], computations: Computations
) -> float:
    """Compute the bytes that an instruction reads and writes.

    Args:
      line: an instruction that is not inside a fusion.
      shapes: shape of every instruction of its computation, by name.
      computations: of the program, for the bodies of fusions.
    """
    if line.opcode in _FREE or line.opcode.endswith("-done"):
        return 0.0
    if line.opcode == "call-start":
        return _call_bytes(line, computations)
    # ((source), part, counter): only the part of the source is read.
    if line.opcode == "slice-start":
        size, in_memory = list(_arrays(line.shape))[1]
        return size + (size if in_memory else 0.0)
    # Operands and results, and counters that are not in memory.
    if line.opcode.endswith("-start"):
        return memory_bytes(line.shape)
    operands = [shapes.get(name, "") for name in line.operands]
    if line.opcode in _READS_PART:
        return 2 * memory_bytes(line.shape) + sum(map(memory_bytes, operands[1:]))
    if line.opcode in _WRITES_PART:
        written = operands[_WRITES_PART[line.opcode]]
        return memory_bytes(written) + sum(map(memory_bytes, operands[1:]))
    if line.opcode == "fusion":
        return _fusion_bytes(line, operands, computations)
    return memory_bytes(line.shape) + sum(map(memory_bytes, operands))


def _call_bytes(call: Instruction, computations: Computations) -> float:
    """Bytes that the computation of a call moves."""
    body = _body(call, computations)
    shapes = {inner.name: inner.shape for inner in body}
    return sum(moved_bytes(inner, shapes, computations) for inner in body)


def _fusion_bytes(
    fusion: Instruction, operands: list[str], computations: Computations
) -> float:
    """Bytes of a fusion; `operands` are the shapes of its operands."""
    body = _body(fusion, computations)
    shapes = {inner.name: inner.shape for inner in body}
    total, in_place = 0.0, 0.0
    for parameter in body:
        if parameter.opcode != "parameter":
            continue
        whole = memory_bytes(operands[_number(parameter)])
        if not whole:
            continue
        uses = list(_uses(parameter.name, body))
        if uses and all(use.opcode in _WRITES_PART and at == 0 for use, at in uses):
            # Updated in place: the rows that are written are read too.
            for use, _ in uses:
                written = shapes[use.operands[_WRITES_PART[use.opcode]]]
                total += sum(array_bytes(written))
            in_place += whole
        else:
            part = _part_read(parameter.name, body, computations)
            total += whole if part is None else min(part, whole)
    # What is updated in place is the operand itself, whose other rows are not written.
    return total + max(memory_bytes(fusion.shape) - in_place, 0.0)


def _part_read(
    name: str, body: list[Instruction], computations: Computations
) -> float | None:
    """Bytes of the parts that a fusion reads of an array; None is all of it."""
    total = 0.0
    for use, at in _uses(name, body):
        if use.opcode in _READS_PART and at == 0:
            total += sum(array_bytes(use.shape))
            continue
        # A fusion inside this one may slice the array in its own body.
        inner = _body(use, computations) if use.opcode == "fusion" else []
        parameters = [
            each for each in inner if each.opcode == "parameter" and _number(each) == at
        ]
        part = None
        if parameters:
            part = _part_read(parameters[0].name, inner, computations)
        if part is None:
            return None
        total += part
    return total


def _uses(name: str, body: list[Instruction]) -> Iterator[tuple[Instruction, int]]:
    """Yield the instructions that take an array, and its position among their operands.

    A bitcast is the same array in another shape.
    """
    for user in body:
        for at, operand in enumerate(user.operands):
            if operand == name and user.opcode == "bitcast":
                yield from _uses(user.name, body)
            elif operand == name:
                yield user, at


def _body(caller: Instruction, computations: Computations) -> list[Instruction]:
    """Instructions of the computation of a fusion or a call."""
    called = re.search(r"\b(?:calls|to_apply)=%?([\w.-]+)", caller.rest)
    return computations.get(called[1], []) if called else []


def _number(parameter: Instruction) -> int:
    return int(parameter.rest.partition(")")[0])
