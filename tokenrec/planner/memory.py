"""What of a device's memory a compiled step holds, and what to look at when it is too much."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import source_info_util
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.stages import Compiled

from tokenrec.state import TrainState

STATE_PARTS = ("weights", "tables", "optimizer")
_ROOT = Path(__file__).parents[2]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(
    r"Used ([\d.]+)([KMGT]?)B? of [\d.]+[KMGT]?B? hbm|memory required for HLO temporaries \(([\d.]+)([KMGT]?)B?\)"
)
_ALLOCATION = re.compile(
    r"\d+\. Size: (?P<size>[\d.]+)(?P<unit>[KMGT]?)B?\s*\n"
    r"(?:\s*Operator: (?P<operator>[^\n]*)\n)?"
    r"\s*Shape: (?P<shape>[^\n]*)\n"
)


class Buffer(NamedTuple):
    """An array that a device must hold: bytes, shape as XLA or JAX writes it, operation, and where it was traced."""

    bytes: int
    shape: str
    operation: str
    source: str


def state_parts(state: TrainState) -> dict[str, Any]:
    """The arrays, or what stands for each, by `STATE_PARTS`."""
    return dict(
        zip(STATE_PARTS, (state.params, state.tables, state.opt_state), strict=True)
    )


def state_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of each part on one device by shape and sharding, without what a layout pads."""
    return {
        name: sum(map(_shard_bytes, jax.tree.leaves(part)))
        for name, part in state_parts(state).items()
    }


def padded_state_bytes(state: TrainState, compiled: Compiled) -> dict[str, int]:
    """Bytes of each part on one device as the program lays it out; its first argument is the state."""
    formats = state_parts(compiled.input_formats[0][0])
    return {
        name: sum(jax.tree.leaves(jax.tree.map(_laid_out_bytes, part, formats[name])))
        for name, part in state_parts(state).items()
    }


def _shard_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _laid_out_bytes(leaf: Any, form: Any) -> int:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return (
        tiled_elements(shape, form.layout.major_to_minor, form.layout.tiling or ())
        * leaf.dtype.itemsize
    )


def tiled_elements(
    shape: tuple[int, ...],
    major_to_minor: tuple[int, ...],
    tiling: tuple[tuple[int, ...], ...],
) -> int:
    """Elements that an array takes in tiles: the first tile rounds the minor dimensions up, later ones only reorder.

    A table of 16 columns in tiles of 8 x 128: little is lost with the rows innermost, seven eighths with the columns.

    >>> tiled_elements((1000, 16), (1, 0), ((8, 128),)), tiled_elements((1000, 16), (0, 1), ((8, 128),))
    (16384, 128000)
    """
    sizes = [shape[axis] for axis in major_to_minor]
    tile = tiling[0] if tiling else ()
    for back, side in enumerate(reversed(tile), start=1):
        if back <= len(sizes):
            sizes[-back] = -(-sizes[-back] // side) * side
    return math.prod(sizes)


def refused_bytes(message: str) -> int | None:
    """What XLA says that a program would need when it refuses it: in all, or for temporaries alone.

    >>> refused_bytes("Ran out of memory in memory space hbm. Used 1.5G of 1.0G hbm.")
    1610612736
    """
    found = _USED.search(message)
    if not found:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return int(float(number) * _UNITS[unit])


def listed_buffers(message: str) -> list[Buffer]:
    """The largest allocations that XLA lists when it refuses a program; it does not always list them."""
    buffers = []
    for found in _ALLOCATION.finditer(message):
        operator = found["operator"] or ""
        named, place, line = (
            re.search(rf'{key}="?([^"\s]*)', operator)
            for key in ("op_name", "source_file", "source_line")
        )
        source = ":".join(part[1] for part in (place, line) if part)
        size = int(float(found["size"]) * _UNITS[found["unit"]])
        buffers.append(
            Buffer(size, found["shape"].strip(), named[1] if named else "", source)
        )
    return buffers


def traced_buffers(jaxpr: Jaxpr, state: TrainState, count: int = 8) -> list[Buffer]:
    """The largest arrays of the state and of a traced step by their part on one device, before XLA drops any.

    Equal shapes of one operation and line count once.
    """
    held = [
        _held(jax.tree_util.keystr(path), leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    ]
    found = dict.fromkeys([*held, *_outputs(jaxpr)])
    return sorted(found, key=lambda buffer: -buffer.bytes)[:count]


def _held(name: str, leaf: Any) -> Buffer:
    shape = leaf.sharding.shard_shape(leaf.shape)
    return Buffer(
        _shard_bytes(leaf), _shape_text(leaf.dtype, shape), f"state{name}", ""
    )


def _shape_text(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{dtype.name}[{','.join(map(str, shape))}]"


def _outputs(jaxpr: Jaxpr) -> Iterator[Buffer]:
    for equation in jaxpr.eqns:
        inner = list(_inner(equation.params))
        for one in inner:
            yield from _outputs(one)
        if inner:
            continue  # what it returns is what its body made
        for variable in equation.outvars:
            aval: Any = variable.aval
            if hasattr(aval, "sharding") and hasattr(aval.dtype, "itemsize"):
                shape = _local_shape(aval)
                source = source_info_util.summarize(equation.source_info).partition(
                    " ("
                )[0]
                source = source.removeprefix(f"{_ROOT}/")
                text = _shape_text(aval.dtype, shape)
                yield Buffer(
                    math.prod(shape) * aval.dtype.itemsize,
                    text,
                    equation.primitive.name,
                    source,
                )


def _local_shape(aval: Any) -> tuple[int, ...]:
    """Of explicit shardings, sizes by axis; inside a `shard_map` shapes are local already."""
    mesh = aval.sharding.mesh
    if mesh.empty or mesh.are_all_axes_manual:
        return tuple(aval.shape)
    sizes = []
    for size, axes in zip(aval.shape, aval.sharding.spec, strict=True):
        names = (axes,) if isinstance(axes, str) else axes or ()
        sizes.append(-(-size // math.prod(mesh.shape[name] for name in names)))
    return tuple(sizes)


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one
