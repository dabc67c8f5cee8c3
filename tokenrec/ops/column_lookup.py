"""Look rows up in a dense weight whose columns lie in shards over `fsdp`.

The vectors of a language model's words are such a weight, V rows by d columns. To gather
it whole for a look-up, and to sum its gradient whole, moves V d numbers, some 300 million
for Gemma, to read a few thousand rows of them. Here every device reads its own columns
for the ids of all devices along `fsdp`, and these exchange the parts:

    ids      [B / fsdp]      gathered over fsdp      [B]
    columns                  read                    [B, d / fsdp]
    rows     [B / fsdp, d]   exchanged               (all-to-all)

Gradients go the same way back, and are summed over `data` shard by shard.

Letters: B ids, V rows, d columns.
"""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES, reshard


def look_up_columns(
    table: jax.Array, ids: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Look up rows of a weight, as `expand_rows` does, without gathering it.

    Args:
      table: `[V, d]`; its columns may lie in shards over `fsdp`. Its gradient is summed
        in its own dtype.
      ids: `[...] int32`, all in [0, V).
      dtype: of the result, in which it is exchanged.

    Returns:
      `[..., d]`, with the sharding of `ids`.
    """
    columns = jax.typeof(table).sharding.spec
    if RULES.embed not in columns:
        return expand_rows(table, ids).astype(dtype)
    own = jax.typeof(ids).sharding.spec
    shared = PartitionSpec(*(_without_fsdp(axes) for axes in own))
    # Not `expand_rows`: the columns of the result stay in shards.
    rows = table.at[reshard(ids, shared)].get(
        mode="promise_in_bounds", out_sharding=PartitionSpec(*shared, RULES.embed)
    )
    return reshard(rows.astype(dtype), PartitionSpec(*own, None))


def _without_fsdp(
    axes: tuple[str, ...] | str | None,
) -> tuple[str, ...] | str | None:
    """Mesh axes of a dimension, without `fsdp`."""
    if isinstance(axes, tuple):
        return tuple(axis for axis in axes if axis != RULES.embed) or None
    return None if axes == RULES.embed else axes
