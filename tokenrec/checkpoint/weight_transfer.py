"""Copy matched weights of one run into the freshly initialised state of another.

Table rows move between devices in pieces. In each piece every device contributes the
rows that it stores and zeros for all others, and a sum over the devices gives all of
them. So no table is ever whole on a host, nor on a device that stores a shard of it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.checkpoint.run_weights import RunWeights, stack_of
from tokenrec.checkpoint.weight_matching import MatchedRows
from tokenrec.ops.tables.lookup import Stack
from tokenrec.ops.tables.packed import gather_rows, set_rows
from tokenrec.ops.tables.storage import to_storage_index
from tokenrec.sharding import AXES, RULES

# Table rows that move at once: 64 MiB of float32 at a width of 64.
PIECE_ROWS = 1 << 18


def carry_weights(
    fresh: Mapping[str, jax.Array],
    loaded: Mapping[str, jax.Array],
    source: RunWeights,
    target: RunWeights,
    matches: Mapping[str, MatchedRows | str | None],
) -> dict[str, jax.Array]:
    """Replace the dense weights that match.

    Args:
      fresh: arrays of the target, by array name: `[...]`, or `[layers, ...]` stacked.
      loaded: arrays of the source, by array name.
      source: the run that has been trained.
      target: the run that starts from it.
      matches: results of `match_weight`, by weight name.

    Returns:
      The arrays of the target, by array name.
    """
    params = dict(fresh)
    # Layers of arrays that stack several of them: array name -> layer -> weight.
    layers: dict[str, dict[int, jax.Array]] = {}
    for name, match in matches.items():
        if isinstance(match, str):
            continue
        old, new = source.places[name], target.places[name]
        # A layer that is alone in one run can be part of a stack in the other.
        weight = loaded[old.array]
        if old.layer is not None:
            weight = weight[old.layer]
        if match is not None:
            axis = target.keys[name].axis
            weight = _carry_entries(fresh[new.array], weight, match, axis)
        if new.layer is None:
            params[new.array] = weight
        else:
            layers.setdefault(new.array, {})[new.layer] = weight
    for name, carried in layers.items():
        params[name] = jnp.stack(
            [
                carried.get(layer, fresh[name][layer])
                for layer in range(len(fresh[name]))
            ]
        )
    return params


def _carry_entries(
    fresh: jax.Array, loaded: jax.Array, match: MatchedRows, axis: int
) -> jax.Array:
    """Replace the matched entries along `axis`, which no mesh axis splits."""
    source_index = np.full(fresh.shape[axis], -1)
    source_index[match.target] = match.source
    # Entries without a match read entry 0, which the mask below discards.
    indices = (slice(None),) * axis + (np.maximum(source_index, 0),)
    entries = loaded.at[indices].get(out_sharding=jax.typeof(fresh).sharding.spec)
    matched = (source_index >= 0).reshape((-1,) + (1,) * (fresh.ndim - axis - 1))
    return jnp.where(matched, entries, fresh)


def stack_matches(
    stack: Stack,
    source: RunWeights,
    target: RunWeights,
    matches: Mapping[str, MatchedRows | str],
) -> list[tuple[Stack, MatchedRows]]:
    """List the rows of a source stack that move to stacks of the target.

    Args:
      stack: a stack of the source.
      source: the run that has been trained.
      target: the run that starts from it.
      matches: results of `match_table`, by table name.

    Returns:
      For each table that the source stack holds: the stack of the target, and the
      matched rows as row numbers of the two stacks.
    """
    moves = []
    for name, match in matches.items():
        # Both sides of a move are parts of stacks, at offsets of their own.
        if isinstance(match, MatchedRows) and stack_of(source.model, name) is stack:
            target_stack = stack_of(target.model, name)
            rows = MatchedRows(
                stack.offsets[name] + match.source,
                target_stack.offsets[name] + match.target,
                match.known,
            )
            moves.append((target_stack, rows))
    return moves


def move_rows(
    table: jax.Array,
    source_table: jax.Array,
    target: Stack,
    source: Stack,
    rows: MatchedRows,
) -> jax.Array:
    """Copy rows of one stack into another.

    Args:
      table: the array of `target`; its buffer is donated.
      source_table: the array of `source`.
      target: the stack that gets the rows.
      source: the stack that has them.
      rows: row numbers in the two stacks.

    Returns:
      The array of `target` with the copied rows.
    """
    target_index = _storage_index(target, rows.target)
    source_index = _storage_index(source, rows.source)
    size = min(PIECE_ROWS, len(target_index))
    for start in range(0, len(target_index), size):
        # The last piece is padded with -1: all pieces use one compiled program.
        piece = [
            np.pad(
                index[start : start + size],
                (0, max(0, start + size - len(index))),
                constant_values=-1,
            )
            for index in (target_index, source_index)
        ]
        table = _move_piece(
            table, source_table, *piece, target.spread, source.spread, source.width
        )
    return table


def _storage_index(stack: Stack, rows: np.ndarray) -> np.ndarray:
    """`[n] int32`: where the rows of a stack are stored in its array."""
    if stack.spread:
        rows = to_storage_index(rows, stack.stored_rows)
    return np.asarray(rows, np.int32)


# The table is donated: a second copy of a long table may not fit.
@functools.partial(jax.jit, static_argnums=(4, 5, 6), donate_argnums=0)
def _move_piece(
    table: jax.Array,
    source_table: jax.Array,
    target_index: jax.Array,
    source_index: jax.Array,
    target_spread: bool,
    source_spread: bool,
    width: int,
) -> jax.Array:
    """Copy row `source_index[i]` to row `target_index[i]`; nothing where it is -1."""

    def local_index(array: jax.Array, index: jax.Array, spread: bool) -> jax.Array:
        """`[n] int32`: index into the local shard; out of range for rows elsewhere."""
        rows = array.size // width
        if spread:
            index = index - jax.lax.axis_index(AXES) * rows
        return jnp.where((index >= 0) & (index < rows), index, rows)

    def move_local(
        table: jax.Array,
        source_table: jax.Array,
        target_index: jax.Array,
        source_index: jax.Array,
    ) -> jax.Array:
        # Rows of other devices are out of range here, and read as zeros.
        index = local_index(source_table, source_index, source_spread)
        rows = gather_rows(source_table, index, width)
        if source_spread:
            # Exactly one device has each row, so the sum is that row, bit for bit.
            rows = jax.lax.psum(rows, AXES)
        # Rows of other devices are out of range here, and dropped.
        index = local_index(table, target_index, target_spread)
        return set_rows(table, index, rows)

    table_spec, source_spec = (
        RULES("rows" if spread else None, None)
        for spread in (target_spread, source_spread)
    )
    move = jax.shard_map(
        move_local,
        in_specs=(table_spec, source_spec, RULES(None), RULES(None)),
        out_specs=table_spec,
        # The sum over all axes makes the rows equal everywhere; JAX cannot infer that.
        check_vma=False,
    )
    return move(table, source_table, target_index, source_index)
