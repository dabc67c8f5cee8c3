"""Embedding tables outside the modules: gather rows once per unique id, update only those rows.

Tables of one width are stacked into one array, so that a step makes one gather and one update per width. A *stack* is
that array; a table is a run of its rows. Short tables are replicated over the mesh, and what is here serves those; the
rows of long ones are spread over it (exchange.py), and stack apart.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tables of one width, one after another: `offsets` maps a table to its first row. `spread`: over all devices."""

    name: str
    width: int
    rows: int
    offsets: dict[str, int]
    spread: bool = False


def build_stacks(
    tables: dict[str, int], widths: dict[str, int], replicate_rows: int
) -> dict[str, Stack]:
    """Stacks the tables (name -> rows) by width (name -> width); those of more than `replicate_rows` rows are spread.

    >>> stacks = build_stacks({"tab": 5, "day": 7, "video": 100}, {"tab": 16, "day": 16, "video": 16}, 50)
    >>> stacks["width_16"].offsets, stacks["width_16_spread"].offsets
    ({'day': 0, 'tab': 7}, {'video': 0})
    """
    stacks: dict[str, Stack] = {}
    for width, spread in sorted(
        {(widths[name], rows > replicate_rows) for name, rows in tables.items()}
    ):
        offsets, rows = {}, 0
        for name in sorted(tables):
            if (widths[name], tables[name] > replicate_rows) == (width, spread):
                offsets[name] = rows
                rows += tables[name]
        name = f"width_{width}" + "_spread" * spread
        stacks[name] = Stack(name, width, rows, offsets, spread)
    return stacks


class Unique(NamedTuple):
    """Distinct ids of a batch. `ids: [u] int32`, padded with `rows` (out of range); `inverse: [n] int32` into `ids`."""

    ids: jax.Array
    inverse: jax.Array


def unique_ids(ids: jax.Array, rows: int) -> Unique:
    """The distinct values of `ids: [n]`, all in [0, rows).

    A stack with fewer rows than the batch has ids is cheaper to touch whole than to sort: there `ids` is every row.
    """
    if rows <= ids.shape[0]:
        return Unique(jnp.arange(rows, dtype=jnp.int32), ids)
    values, inverse = jnp.unique(
        ids, size=ids.shape[0], fill_value=rows, return_inverse=True
    )
    return Unique(values, inverse.astype(jnp.int32))


def gather_rows(stack: jax.Array, ids: jax.Array) -> jax.Array:
    """`[u, width]` rows of the stack; zeros where an id is out of range."""
    return stack.at[ids].get(
        mode="fill", fill_value=0, indices_are_sorted=True, unique_indices=True
    )


def expand_rows(rows: jax.Array, inverse: jax.Array) -> jax.Array:
    """`[..., width]`: the row of every entry of `inverse: [...]`, laid over the mesh like it.

    Its transpose sums the gradients of each unique row.
    """
    spec = PartitionSpec(*jax.typeof(inverse).sharding.spec, None)
    return rows.at[inverse].get(mode="promise_in_bounds", out_sharding=spec)


class RowsState(NamedTuple):
    """Row-wise AdaGrad's memory: `sum: [rows] float32`, the running sum of the mean squared gradient of each row."""

    sum: jax.Array


def update_rows(
    stack: jax.Array,
    state: RowsState,
    ids: jax.Array,
    gradients: jax.Array,
    *,
    rate: jax.Array,
    decay: float,
    apply: jax.Array,
    epsilon: float = 1e-8,
) -> tuple[jax.Array, RowsState]:
    """Row-wise AdaGrad (Duchi et al. 2011, one accumulator per row as in DLRM) on the rows `ids` only.

    Args:
      stack: `[rows, width]`; `ids: [u]` distinct, out of range where padded; `gradients: [u, width]`.
      rate: learning rate; `decay`: pull towards zero of the rows with a gradient, per step and unit of rate.
      apply: bool scalar; False changes nothing: every id is sent out of range, so the stack is never copied.
    """
    squared = jnp.mean(jnp.square(gradients), axis=-1)
    ids = jnp.where(apply, ids, stack.shape[0])
    total = (
        state.sum.at[ids].get(mode="fill", fill_value=0, unique_indices=True) + squared
    )
    step = gradients / (jnp.sqrt(total)[:, None] + epsilon)
    if decay:
        touched = (squared > 0)[:, None]
        step += jnp.where(touched, decay * gather_rows(stack, ids), 0)
    stack = stack.at[ids].add(-rate * step, mode="drop", unique_indices=True)
    # Set, not add: what is written then needs what was read, so that XLA cannot order the write first and keep the old
    # memory in a copy (tried with add: two copies of it a step).
    return stack, RowsState(
        state.sum.at[ids].set(total, mode="drop", unique_indices=True)
    )
