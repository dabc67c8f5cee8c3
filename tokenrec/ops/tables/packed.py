"""Rows of narrow tables packed into lines of 128 lanes.

A TPU keeps the last dimension of an array in lanes, 128 at a time. To write some rows
of an array `[rows, w]` with w < 128, XLA first copies all of it to a layout in which a
row fills 128 lanes, 128 / w times its size. If w divides 128, a table is therefore
stored as

    [rows * w / 128, 128]        line r // p, lanes (r % p) w to (r % p + 1) w, of row r

with p = 128 / w rows in a line. In memory this is the same sequence of numbers as
`[rows, w]`, so that one is the reshape of the other: for free on a CPU or GPU, where
rows are read and written as such. On a TPU that reshape would be the copy again; there,
whole lines are gathered and scattered, each with one row of interest.

The functions of this module take a table in either layout, whole or the part of one
device. Every result is equal in both, bit for bit: a row is only ever copied, and
the other rows of its line stay as they are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenrec.ops.attention.platform import current_platform

LANES = 128


def packed_shape(rows: int, width: int, devices: int) -> tuple[int, int]:
    """Choose the shape in which a table is stored.

    Args:
      rows: stored rows of the table.
      width: w, of a row.
      devices: number of devices over which the table is spread.

    Returns:
      `(rows * w / 128, 128)`; or `(rows, w)` where w does not divide 128, or the
      devices cannot have equal numbers of lines.
    """
    lines, rest = divmod(rows * width, LANES)
    if width > LANES or LANES % width or rest or lines % devices:
        return rows, width
    return lines, LANES


def unpack(table: jax.Array, width: int) -> jax.Array:
    """View a table in either layout as `[rows, w]`; on a TPU, this is a copy."""
    return table.reshape(-1, width)


def gather_rows(
    table: jax.Array, ids: jax.Array, width: int, *, distinct: bool = False
) -> jax.Array:
    """Read rows, `[..., w]`; zeros where an id is out of range.

    Args:
      table: `[rows, w]`, or `[rows * w / 128, 128]`.
      ids: `[...] int32`, not negative.
      width: w.
      distinct: the ids are sorted and distinct.
    """
    if not _by_lines(table, width):
        rows = (
            unpack(table, width)
            .at[ids]
            .get(
                mode="fill",
                fill_value=0,
                indices_are_sorted=distinct,
                unique_indices=distinct,
            )
        )
        return _keep_table_precision(rows)
    line, place = _split(ids, width)
    rows = table.at[line].get(mode="fill", fill_value=0, indices_are_sorted=distinct)
    # Halve the lines until a row is left. A bit of the place says which half has it.
    while rows.shape[-1] > width:
        half = rows.shape[-1] // 2
        is_right = (place & (half // width) != 0)[..., None]
        rows = jnp.where(is_right, rows[..., half:], rows[..., :half])
    return _keep_table_precision(rows)


def add_rows(table: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    """Add to distinct rows, in place; ids out of range are dropped.

    Args:
      table: `[rows, w]`, or `[rows * w / 128, 128]`.
      ids: `[n] int32`, sorted and distinct, not negative.
      values: `[n, w]`.

    Returns:
      The new table, in the layout of the old one.
    """
    width = values.shape[1]
    if not _by_lines(table, width):
        rows = unpack(table, width)
        rows = rows.at[ids].add(values, mode="drop", unique_indices=True)
        return rows.reshape(table.shape)
    line, place = _split(ids, width)
    # Rows of one line are added one after another. To the others in its line a row adds
    # -0.0, which leaves every number as it is, also a zero with its sign.
    values = jnp.where(_is_own_lane(place, width), _repeat(values), -0.0)
    return table.at[line].add(values, mode="drop", indices_are_sorted=True)


def set_rows(table: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    """Replace rows, in place; arguments as in `add_rows`, but ids need no order."""
    width = values.shape[1]
    if not _by_lines(table, width):
        rows = unpack(table, width)
        rows = rows.at[ids].set(values, mode="drop", unique_indices=True)
        return rows.reshape(table.shape)
    line, place = _split(ids, width)
    values = _repeat(values)
    # Rows at one place lie in lines of their own, so that lines are written once.
    for each in range(LANES // width):
        own = jnp.where(place == each, line, table.shape[0])
        lines = table.at[own].get(mode="fill", fill_value=0)
        lines = jnp.where(_is_own_lane(place, width), values, lines)
        table = table.at[own].set(lines, mode="drop")
    return table


def _keep_table_precision(rows: jax.Array) -> jax.Array:
    """Have a TPU cast rows, where they are cast to bfloat16 later, and not the table.

    XLA computes in bfloat16 what only bfloat16 is made of. It would follow the rows up
    to the table, through exchange, loops and barriers alike, and convert the whole
    table in every step. It does not follow bits; the barrier keeps them.
    """
    if current_platform() != "tpu":
        return rows
    bits = jax.lax.bitcast_convert_type(rows, jnp.int32)
    bits = jax.lax.optimization_barrier(bits)
    return jax.lax.bitcast_convert_type(bits, rows.dtype)


def _by_lines(table: jax.Array, width: int) -> bool:
    """Whether to access whole lines of a table."""
    return table.shape[1] != width and current_platform() == "tpu"


def _split(ids: jax.Array, width: int) -> tuple[jax.Array, jax.Array]:
    """Line of each row, and its place in the line."""
    per_line = LANES // width
    return ids // per_line, ids % per_line


def _is_own_lane(place: jax.Array, width: int) -> jax.Array:
    """`[n, 128] bool`: the lanes of the row at `place` of each of n lines."""
    return jnp.arange(LANES) // width == place[:, None]


def _repeat(values: jax.Array) -> jax.Array:
    """Repeat rows `[n, w]` along a line, `[n, 128]`."""
    return jnp.tile(values, (1, LANES // values.shape[1]))
