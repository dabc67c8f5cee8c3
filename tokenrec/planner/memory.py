"""Device memory of a compiled step, and the largest arrays where it does not fit.

All figures are bytes of one device. Three accounts are read, each where it exists:

- the layout of the arguments of a compiled program (`padded_state_bytes`): the bytes of
  the state with the padding of their tiles;
- the message with which XLA refuses a program (`refused_bytes`, `listed_buffers`);
- the traced program (`traced_buffers`): arrays before XLA fuses or drops any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import source_info_util
from jax.extend.core import Jaxpr
from jax.stages import Compiled

from tokenrec.planner.jaxprs import inner_jaxprs
from tokenrec.state import TrainState

STATE_PARTS = ("weights", "tables", "optimizer")
# The folder above the package, which source paths are shown relative to.
_ROOT = Path(__file__).parents[2]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# "Used 21.50G of 15.75G hbm", or "memory required for HLO temporaries (31.25G)".
_USED = re.compile(
    r"Used ([\d.]+)([KMGT]?)B? of [\d.]+[KMGT]?B? hbm"
    r"|memory required for HLO temporaries \(([\d.]+)([KMGT]?)B?\)"
)
# An entry of XLA's list:
#   1. Size: 2.00G
#      Operator: op_name="jit(f)/dot_general" source_file="/a/block.py" source_line=81
#      Shape: bf16[1024,1024]{1,0:T(8,128)(2,1)}
_ALLOCATION = re.compile(
    r"\d+\. Size: (?P<size>[\d.]+)(?P<unit>[KMGT]?)B?\s*\n"
    r"(?:\s*Operator: (?P<operator>[^\n]*)\n)?"
    r"\s*Shape: (?P<shape>[^\n]*)\n"
)


class Buffer(NamedTuple):
    """An array that a device must hold.

    Attributes:
      bytes: of one device.
      shape: as XLA or JAX writes it.
      operation: that makes it; "state..." for a leaf of the state.
      source: file and line where it was traced; "" if not known.
    """

    bytes: int
    shape: str
    operation: str
    source: str


def state_parts(state: TrainState) -> dict[str, Any]:
    """Split a state, or a tree of its form, by `STATE_PARTS`."""
    parts = (state.params, state.tables, state.opt_state)
    return dict(zip(STATE_PARTS, parts, strict=True))


def state_bytes(state: TrainState) -> dict[str, int]:
    """Compute the bytes of each part on one device, by shape and sharding.

    The padding of a layout is not included.
    """
    return {
        name: sum(map(_shard_bytes, jax.tree.leaves(part)))
        for name, part in state_parts(state).items()
    }


def padded_state_bytes(state: TrainState, compiled: Compiled) -> dict[str, int]:
    """Compute the bytes of each part on one device, as a program lays it out.

    Args:
      state: abstract state with shardings.
      compiled: program whose first argument is the state.
    """
    formats = state_parts(compiled.input_formats[0][0])
    return {
        name: sum(jax.tree.leaves(jax.tree.map(_padded_bytes, part, formats[name])))
        for name, part in state_parts(state).items()
    }


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _padded_bytes(leaf: Any, form: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    layout = form.layout
    elements = tiled_elements(shape, layout.major_to_minor, layout.tiling or ())
    return elements * leaf.dtype.itemsize


def tiled_elements(
    shape: tuple[int, ...],
    major_to_minor: tuple[int, ...],
    tiling: tuple[tuple[int, ...], ...],
) -> int:
    """Count the elements that an array takes in tiles, padding included.

    The first tile rounds the minor dimensions up; later ones only reorder. A table of
    16 columns in tiles of 8 x 128: little is lost with its rows as the minor dimension,
    seven eighths with its columns.

    Args:
      shape: of the array on one device.
      major_to_minor: order of the dimensions in memory.
      tiling: tiles, as `jax.experimental.layout.Layout.tiling`.

    >>> tiled_elements((1000, 16), (1, 0), ((8, 128),))
    16384
    >>> tiled_elements((1000, 16), (0, 1), ((8, 128),))
    128000
    """
    sizes = [shape[axis] for axis in major_to_minor]
    tile = tiling[0] if tiling else ()
    for back, side in enumerate(reversed(tile), start=1):
        if back <= len(sizes):
            sizes[-back] = -(-sizes[-back] // side) * side
    return math.prod(sizes)


def refused_bytes(message: str) -> int | None:
    """Read the bytes that a program would need from XLA's refusal.

    Depending on the message they are those in all, or of temporaries alone; None if it
    names neither.

    >>> refused_bytes("Ran out of memory in memory space hbm. Used 1.5G of 1.0G hbm.")
    1610612736
    """
    match = _USED.search(message)
    if not match:
        return None
    number, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return int(float(number) * _UNITS[unit])


def listed_buffers(message: str) -> list[Buffer]:
    """Read the largest allocations from XLA's refusal, if it lists them."""
    buffers = []
    for entry in _ALLOCATION.finditer(message):
        operator = entry["operator"] or ""
        name, path, line = (
            re.search(rf'{key}="?([^"\s]*)', operator)
            for key in ("op_name", "source_file", "source_line")
        )
        source = ":".join(part[1] for part in (path, line) if part)
        size = int(float(entry["size"]) * _UNITS[entry["unit"]])
        shape = entry["shape"].strip()
        buffers.append(Buffer(size, shape, name[1] if name else "", source))
    return buffers


def traced_buffers(jaxpr: Jaxpr, state: TrainState, count: int = 8) -> list[Buffer]:
    """List the largest arrays of the state and of a traced step.

    Args:
      jaxpr: the step as traced, before XLA fuses or drops any array.
      state: abstract state with shardings.
      count: arrays to list. Equal shapes of one operation and line count once.

    Returns:
      Buffers with the bytes of their part on one device, largest first.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    state_buffers = [
        _state_buffer(jax.tree_util.keystr(path), leaf) for path, leaf in leaves
    ]
    distinct = dict.fromkeys([*state_buffers, *_outputs(jaxpr)])
    return sorted(distinct, key=lambda buffer: -buffer.bytes)[:count]


def _state_buffer(name: str, leaf: Any) -> Buffer:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return Buffer(
        _shard_bytes(leaf), _shape_text(leaf.dtype, shape), f"state{name}", ""
    )


def _shape_text(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{dtype.name}[{','.join(map(str, shape))}]"


def _outputs(jaxpr: Jaxpr) -> Iterator[Buffer]:
    """Yield every array that a traced program makes."""
    for equation in jaxpr.eqns:
        inner = list(inner_jaxprs(equation.params.values()))
        for program in inner:
            yield from _outputs(program)
        # What an equation with a body returns is what its body made.
        if inner:
            continue
        source = source_info_util.summarize(equation.source_info).partition(" (")[0]
        for variable in equation.outvars:
            aval: Any = variable.aval
            # Tokens and effects are no arrays.
            if hasattr(aval, "sharding") and hasattr(aval.dtype, "itemsize"):
                shape = _local_shape(aval)
                yield Buffer(
                    math.prod(shape) * aval.dtype.itemsize,
                    _shape_text(aval.dtype, shape),
                    equation.primitive.name,
                    source.removeprefix(f"{_ROOT}/"),
                )


def _local_shape(aval: Any) -> tuple[int, ...]:
    """Shape on one device, by the explicit sharding of a traced array.

    Inside a `shard_map` shapes are those of one device already.
    """
    mesh = aval.sharding.mesh
    if mesh.empty or mesh.are_all_axes_manual:
        return tuple(aval.shape)
    sizes = []
    for size, axes in zip(aval.shape, aval.sharding.spec, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        sizes.append(-(-size // math.prod(mesh.shape[name] for name in names)))
    return tuple(sizes)
