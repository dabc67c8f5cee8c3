"""Devices that exchange in a collective, from the text of its instruction.

Every form that XLA writes, for eight devices in pairs that differ in the last place:

    replica_groups={{0,1},{2,3},{4,5},{6,7}}        listed
    replica_groups=[4,2]<=[8]                       arange(8) reshaped to 4 groups of 2
    replica_groups=[4,2]<=[2,2,2]T(0,2,1)           the same of a transposed array
    replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c'}    along axes of a mesh
    replica_groups={}                               all devices in one group
    source_target_pairs={{0,1},{1,0}}               collective-permute
"""

from __future__ import annotations

import math
import re

import numpy as np

from tokenrec.errors import InputError

Groups = tuple[tuple[int, ...], ...]

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{((?:'\w+',?)+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}")


def replica_groups(rest: str, devices: int) -> Groups:
    """Read the groups of a collective.

    Args:
      rest: text of an instruction after its opening parenthesis.
      devices: number of devices, for an instruction without groups.

    Returns:
      Device numbers of each group.

    Raises:
      InputError: the groups have another form.

    >>> replica_groups("%p), replica_groups=[2,2]<=[2,2]T(1,0)", 4)
    ((0, 2), (1, 3))
    """
    if mesh := _MESH.search(rest):
        return _mesh_groups(mesh[1], mesh[2])
    if iota := _IOTA.search(rest):
        shape, source = (_numbers(iota[part]) for part in (1, 2))
        axes = _numbers(iota[3]) if iota[3] else None
        ids = np.arange(math.prod(source)).reshape(source).transpose(axes)
        return _as_tuples(ids.reshape(shape))
    if listed := _LISTED.search(rest):
        groups = re.findall(r"\{([\d,]+)\}", listed[1])
        return tuple(tuple(_numbers(group)) for group in groups)
    if "replica_groups=" in rest and "replica_groups={}" not in rest:
        form = rest.partition("replica_groups=")[2][:80]
        raise InputError(
            f"replica groups have an unknown form: {form}; add it to "
            "tokenrec/planner/hlo_groups.py"
        )
    return (tuple(range(devices)),)


def source_target_pairs(rest: str) -> Groups:
    """Read the (source, target) pairs of a collective-permute.

    >>> source_target_pairs("%p), source_target_pairs={{0,1},{1,0}}")
    ((0, 1), (1, 0))
    """
    text = rest.partition("source_target_pairs=")[2]
    pairs = re.findall(r"\{(\d+),(\d+)\}", text)
    return tuple((int(source), int(target)) for source, target in pairs)


def _mesh_groups(axes: str, along: str) -> Groups:
    """Groups along some axes of a mesh, `'a'=2,'b'=2` and `'b'`."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    grouped = re.findall(r"'(\w+)'", along)
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    # The axes of a group last: the rows of the matrix are then the groups.
    order = [name for name in sizes if name not in grouped] + grouped
    ids = ids.transpose([list(sizes).index(name) for name in order])
    return _as_tuples(ids.reshape(-1, math.prod(sizes[name] for name in grouped)))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _as_tuples(ids: np.ndarray) -> Groups:
    return tuple(tuple(int(number) for number in group) for group in ids)
