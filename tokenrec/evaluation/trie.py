"""A trie of the semantic ids that exist, as arrays for a device.

The codes of an item are one row of `codes: [N, L]`, its semantic id (docs/methods.md
section 2, "Tasks"). The nodes of level l are the distinct prefixes of l + 1 codes, in
lexicographic order, so that the children of a node are a contiguous run of the next
level. For example `codes = [[0, 0], [0, 1], [1, 0]]`:

    root -> level 0: codes 0 1      first_child [0], child_count [2]
            level 1: codes 0 1 0    first_child [0, 2], child_count [2, 1]

The arrays take at most 4 N L int32: memory grows with the catalogue and not with the
number of possible codes.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.errors import InputError
from tokenrec.sharding import RULES

MAX_CODE = np.iinfo(np.int32).max


class Level(NamedTuple):
    """Nodes of a trie that are l + 1 codes deep, and their place below the level above.

    n nodes; n_above nodes of the level above (the root alone above level 0).

    Attributes:
      first_child: `[n_above] int32`, first node of this level that continues each node
        of the level above; its other children follow.
      child_count: `[n_above] int32`, number of those children.
      code: `[n] int32`, last code of each node.
      item: `[n] int32`, lowest item under each node; at the last level its only one.
    """

    first_child: jax.Array
    child_count: jax.Array
    code: jax.Array
    item: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["levels"],
    meta_fields=["most_children", "code_counts"],
)
@dataclasses.dataclass(frozen=True)
class Trie:
    """The semantic ids of a catalogue as a tree of L levels.

    It is a pytree, so that a jitted function takes it as an argument.

    Attributes:
      levels: L of them, of at most 4 N int32 each.
      most_children: at each level, the most nodes that continue one node of the level
        above; static, because it is the length of an axis.
      code_counts: at each level, one more than its highest code.
    """

    levels: tuple[Level, ...]
    most_children: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    code_counts: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def build_trie(codes: np.ndarray) -> Trie:
    """Build the trie of a catalogue's semantic ids.

    Args:
      codes: `[N, L]`, integers >= 0; row n is item n, and no two rows are equal.

    Returns:
      The trie; its arrays are whole on every device of the mesh in use.

    Raises:
      InputError: `codes` has another shape or type, a negative code, or two equal rows.
    """
    codes = np.asarray(codes)
    _check_codes(codes)
    # 1. Sort items by their codes: the items under a node are then a contiguous run.
    order = np.lexsort(codes.T[::-1])
    ordered = codes[order].astype(np.int32)
    # 2. Level by level, a node begins where the codes up to that level change.
    # `begins: [N] bool` marks those items, `above: [N]` is each item's node one level
    # up.
    begins = np.zeros(len(codes), bool)
    begins[0] = True
    above = np.zeros(len(codes), np.int32)
    levels = []
    for level in range(codes.shape[1]):
        begins[1:] |= ordered[1:, level] != ordered[:-1, level]
        first = np.flatnonzero(begins)
        child_count = np.bincount(above[first]).astype(np.int32)
        first_child = (np.cumsum(child_count) - child_count).astype(np.int32)
        lowest_item = np.minimum.reduceat(order, first).astype(np.int32)
        levels.append(
            Level(
                jnp.asarray(first_child),
                jnp.asarray(child_count),
                jnp.asarray(ordered[first, level]),
                jnp.asarray(lowest_item),
            )
        )
        above = (np.cumsum(begins) - 1).astype(np.int32)
    # 3. At the last level every item has a node of its own.
    if not begins.all():
        second = int(np.flatnonzero(~begins)[0])
        a, b = sorted(int(item) for item in order[second - 1 : second + 1])
        raise InputError(
            f"codes: items {a} and {b} both have {ordered[second].tolist()}, and only "
            "one could be found; add a last level that tells them apart"
        )
    most_children = tuple(int(np.max(level.child_count)) for level in levels)
    code_counts = tuple(int(top) + 1 for top in codes.max(axis=0))
    return to_every_device(Trie(tuple(levels), most_children, code_counts))


def to_every_device[T](arrays: T) -> T:
    """Put arrays or a tree of them whole on every device of the mesh in use."""
    mesh = jax.sharding.get_mesh()
    return jax.device_put(
        arrays, None if mesh.empty else jax.NamedSharding(mesh, RULES())
    )


def _check_codes(codes: np.ndarray) -> None:
    """Raise InputError unless `codes` are int32 numbers `[N, L]`, none negative."""
    if (
        codes.ndim != 2
        or 0 in codes.shape
        or not np.issubdtype(codes.dtype, np.integer)
    ):
        raise InputError(
            f"codes is {codes.dtype} {list(codes.shape)}: expected integers [N, L], "
            "one row per item"
        )
    if codes.min() < 0 or codes.max() > MAX_CODE:
        item, level = np.argwhere((codes < 0) | (codes > MAX_CODE))[0]
        raise InputError(
            f"codes[{item}, {level}]={codes[item, level]} must lie between 0 and "
            f"{MAX_CODE}; number codes from 0"
        )
