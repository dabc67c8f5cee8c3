"""What kind of work an instruction of a compiled program is."""

from __future__ import annotations

from tokenrec.planner.hlo import called_computations
from tokenrec.planner.hlo_bytes import Computations, Instruction

# Names for other arrays, and places: they take no time.
FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "opt-barrier",
        "add-dependency",
    )
)
_MATRIX = {"convolution", "dot"}
_MOVES = {
    "copy",
    "transpose",
    "reshape",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "concatenate",
    "reverse",
    "broadcast",
    "iota",
}


def instruction_class(line: Instruction, computations: Computations) -> str:
    """Classify an instruction that runs on the core.

    Args:
      line: the instruction.
      computations: of the program, for the bodies of fusions.

    Returns:
      - "kernels": a custom call;
      - "matrix": holds a matrix product, with whatever is fused to it;
      - "padding": only moves numbers, a `pad` among them;
      - "copies": only moves numbers;
      - "vector": anything else.
    """
    opcodes = _opcodes(line, computations)
    if line.opcode == "custom-call":
        return "kernels"
    if opcodes & _MATRIX:
        return "matrix"
    if opcodes <= _MOVES | {"pad"}:
        return "padding" if "pad" in opcodes else "copies"
    return "vector"


def _opcodes(line: Instruction, computations: Computations) -> set[str]:
    """Opcodes of an instruction, or of the body of a fusion."""
    if line.opcode != "fusion":
        return {line.opcode}
    found: set[str] = set()
    for called in called_computations(line.rest):
        for inner in computations.get(called, []):
            if inner.opcode not in FREE:
                found |= _opcodes(inner, computations)
    return found
