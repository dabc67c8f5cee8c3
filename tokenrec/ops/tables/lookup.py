"""Embedding tables outside the modules: gather distinct rows, update only those rows.

Tables of one width are stacked into one array, a *stack*, so that a step makes one
gather and one update per width; a table is a run of the stack's rows. Short tables are
replicated over the mesh, and this module serves them. The rows of long tables are
spread over the devices, in stacks of their own (`tokenrec.ops.tables.exchange`).

How it works, for n ids of a batch and at most u distinct ones:

1. `unique_ids` finds the distinct ids, and for every id which of them it is
   (`inverse`).
2. `packed.gather_rows` reads each distinct row once, `[u, width]`.
3. `expand_rows` gives every id its row, `[..., width]`. Its transpose, in the backward
   pass, sums the gradients of each distinct row.
4. `update_rows` updates the distinct rows in place, by row-wise AdaGrad.

Row-wise AdaGrad keeps one number A_r per row r of width w, in place of w numbers (Duchi
et al. 2011, JMLR 12, with the accumulator shared by the row as in DLRM, Naumov et al.
2019, arXiv 1906.00091). With g_r the gradient of row E_r, rate eta, decay lambda:

    A_r <- A_r + mean_c(g_rc^2)
    E_r <- E_r - eta (g_r / (sqrt(A_r) + epsilon) + lambda E_r)     if g_r is not zero

A row that no id reads has no gradient, and keeps both A_r and E_r: nothing of the size
of a table is formed in a step.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.ops.tables import packed
from tokenrec.ops.tables.storage import stored_rows
from tokenrec.sharding import on_mesh


@dataclasses.dataclass(frozen=True)
class Stack:
    """Tables of one width, one after another in one array.

    Attributes:
      name: name of the stack, from its width.
      width: entries of a row.
      rows: rows of all its tables.
      offsets: table -> its first row in the stack.
      spread: True if the rows lie spread over all devices, False if every device holds
        all of them.
    """

    name: str
    width: int
    rows: int
    offsets: dict[str, int]
    spread: bool = False

    @property
    def stored_rows(self) -> int:
        """Rows of its array, with the padding of a spread stack."""
        return stored_rows(self.rows) if self.spread else self.rows


def build_stacks(
    tables: dict[str, int], widths: dict[str, int], replicate_rows: int
) -> dict[str, Stack]:
    """Stack tables by width and by placement.

    >>> tables = {"tab": 5, "day": 7, "video": 100}
    >>> stacks = build_stacks(tables, dict.fromkeys(tables, 16), replicate_rows=50)
    >>> stacks["width_16"].offsets, stacks["width_16_spread"].offsets
    ({'day': 0, 'tab': 7}, {'video': 0})

    Args:
      tables: table -> rows.
      widths: table -> width of its rows.
      replicate_rows: tables of more rows than this are spread.

    Returns:
      Stacks by name. Within one, tables stand in the order of their names.
    """
    stacks: dict[str, Stack] = {}
    for width, spread in sorted(
        {(widths[name], rows > replicate_rows) for name, rows in tables.items()}
    ):
        offsets: dict[str, int] = {}
        total_rows = 0
        for table in sorted(tables):
            if (widths[table], tables[table] > replicate_rows) == (width, spread):
                offsets[table] = total_rows
                total_rows += tables[table]
        name = f"width_{width}" + "_spread" * spread
        stacks[name] = Stack(name, width, total_rows, offsets, spread)
    return stacks


class UniqueIds(NamedTuple):
    """The distinct ids of a batch.

    Attributes:
      ids: `[u] int32`, distinct; padded with the number of rows, which is out of range.
      inverse: `[n] int32`, which entry of `ids` each id of the batch is.
    """

    ids: jax.Array
    inverse: jax.Array


def unique_ids(ids: jax.Array, rows: int) -> UniqueIds:
    """Find the distinct ids.

    A stack with no more rows than the batch has ids is cheaper to touch whole than the
    ids are to sort: there `UniqueIds.ids` is every row.

    Args:
      ids: `[n] int32`, all in [0, rows).
      rows: rows of the stack.
    """
    if rows <= ids.shape[0]:
        return UniqueIds(jnp.arange(rows, dtype=jnp.int32), ids)
    values, inverse = jnp.unique(
        ids, size=ids.shape[0], fill_value=rows, return_inverse=True
    )
    return UniqueIds(values, inverse.astype(jnp.int32))


def expand_rows(rows: jax.Array, inverse: jax.Array) -> jax.Array:
    """Give every id its row, `[..., width]`, with the sharding of `inverse`.

    The transpose sums the gradients of each distinct row.

    Args:
      rows: `[u, width]`, distinct rows.
      inverse: `[...] int32`, which of them each id reads.
    """
    spec = PartitionSpec(*jax.typeof(inverse).sharding.spec, None)
    return rows.at[inverse].get(mode="promise_in_bounds", out_sharding=on_mesh(spec))


class RowsState(NamedTuple):
    """State of row-wise AdaGrad.

    Attributes:
      sum: `[rows] float32`, A: running sum of the mean squared gradient of each row.
    """

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
    """Update rows by row-wise AdaGrad (equations in the module's docstring).

    Args:
      stack: `[rows, width] float32`, or packed (`tokenrec.ops.tables.packed`).
      state: sums of the rows.
      ids: `[u] int32`, sorted distinct rows; out of range where padded.
      gradients: `[u, width] float32`, gradient of each row.
      rate: `[]`, learning rate eta.
      decay: lambda, pull towards zero per step and unit of rate, of the rows with a
        gradient.
      apply: `[] bool`; False changes nothing.
      epsilon: added to the root of A.

    Returns:
      The new stack and state.
    """
    mean_squares = jnp.mean(jnp.square(gradients), axis=-1)
    # A refused update sends every id out of range. `where` over the stack would copy
    # it.
    ids = jnp.where(apply, ids, state.sum.shape[0])
    sums = state.sum.at[ids].get(mode="fill", fill_value=0, unique_indices=True)
    sums = sums + mean_squares
    step = gradients / (jnp.sqrt(sums)[:, None] + epsilon)
    if decay:
        # Where a stack is touched whole, some of its rows have no gradient.
        has_gradient = (mean_squares > 0)[:, None]
        rows = packed.gather_rows(stack, ids, step.shape[1], distinct=True)
        step += jnp.where(has_gradient, decay * rows, 0)
    stack = packed.add_rows(stack, ids, -rate * step)
    # Set, not add: the write then depends on the read, so that XLA cannot order the
    # write first and keep the old sums in a copy (tried with add: two copies a step).
    new_sums = state.sum.at[ids].set(sums, mode="drop", unique_indices=True)
    return stack, RowsState(new_sums)
