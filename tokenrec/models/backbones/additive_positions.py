"""Additive positions: a learned vector of a row's position and one of its role, added to its token.

TokenFormer has neither, and rotates queries and keys (methods.md section 3, "Positions"); its paper compares the two.
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from tokenrec.ops.layers import weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.tokens.layout import Layout


class AdditivePositions(nnx.Module):
    """Vectors for the positions of `longest`, the longest stream of a config, and for its roles. S rows, width d."""

    def __init__(self, width: int, longest: Layout, *, rngs: nnx.Rngs):
        self.roles = tuple(np.unique(longest.roles).tolist())
        self.positions = weight(
            rngs, (longest.highest_position + 1, width), None, None, inputs=width
        )
        self.types = weight(rngs, (len(self.roles), width), None, None, inputs=width)

    def __call__(self, positions: jax.Array, roles: np.ndarray) -> jax.Array:
        """`positions: [B, S] int32`, `roles: [S]`, index into `ROLES`, to `[B, S, d]`."""
        types = self.types[...][np.searchsorted(self.roles, roles)]
        return expand_rows(self.positions[...], positions) + types
