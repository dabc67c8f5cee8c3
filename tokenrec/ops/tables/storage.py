"""Storage order of the rows of a spread table: a permutation that no mesh enters.

Neighbouring row numbers are often the most popular rows, so they should lie on
different devices. Row r of a table of R stored rows, R a multiple of `CYCLE`, lies at
the *storage index*

    s(r) = (r * STRIDE mod CYCLE) * (R / CYCLE) + floor(r / CYCLE)

Read as: row numbers are dealt out over `CYCLE` virtual shards, a stride apart, and each
virtual shard stores its rows one after another. Device d of D stores the run of storage
indices `[d R / D, (d + 1) R / D)`, which is a whole number of virtual shards, as D must
divide `CYCLE`. So how a table is stored does not depend on the mesh, and a checkpoint
of one mesh can be read on another.
"""

from __future__ import annotations

import jax
import numpy as np

from tokenrec.errors import InputError

# Virtual shards, 3 x 2^12: a multiple of the number of chips of most pods.
CYCLE = 12_288
# Near the golden section of the cycle, and coprime to it: any run of row numbers is
# dealt out evenly.
STRIDE = 7597
_INVERSE_STRIDE = pow(STRIDE, -1, CYCLE)


def stored_rows(rows: int) -> int:
    """Round the rows of a spread table up to what is stored.

    Raises:
      InputError: 32-bit ids cannot tell so many rows apart.
    """
    stored = -(-rows // CYCLE) * CYCLE
    if stored >= 2**31:
        raise InputError(
            f"tables of one width have {rows:,} rows together, more than 32-bit ids "
            "tell apart; use another width for some of them (tokens.embedding_dims)"
        )
    return stored


def check_owners(devices: int) -> None:
    """Check that the rows of a spread table divide evenly over the devices.

    Raises:
      InputError: the number of devices does not divide `CYCLE`.
    """
    if CYCLE % devices:
        raise InputError(
            f"a mesh of {devices} devices does not divide the {CYCLE:,} shards of "
            "tables that are spread by rows; use a number of devices that does, or "
            "raise tokens.replicate_rows above the rows of every table"
        )


def to_storage_index[T: (jax.Array, np.ndarray)](ids: T, rows: int) -> T:
    """Map row numbers to storage indices.

    Args:
      ids: row numbers, any shape.
      rows: stored rows of the table.

    Returns:
      Storage indices in the shape of `ids`; over all rows, a permutation.
    """
    # Within int32: CYCLE * STRIDE is below 2^27.
    return ids % CYCLE * STRIDE % CYCLE * (rows // CYCLE) + ids // CYCLE


def from_storage_index[T: (jax.Array, np.ndarray)](indices: T, rows: int) -> T:
    """Map storage indices to row numbers, the inverse of `to_storage_index`.

    Args:
      indices: storage indices, any shape.
      rows: stored rows of the table.

    Returns:
      Row numbers in the shape of `indices`.
    """
    per_shard = rows // CYCLE
    return indices % per_shard * CYCLE + indices // per_shard * _INVERSE_STRIDE % CYCLE
