"""Additive positions: learned vectors of position and role, added to the tokens.

    X_0 = tokens + E_position[p] + E_role[role]           p: `Layout.rope_positions`

TokenFormer has neither and rotates queries and keys instead (docs/methods.md section 3,
"Positions"); its paper compares the two. `model.positions="additive"` chooses this
form, with one table for positions, as in BERT (Devlin et al., arXiv 1810.04805, 2018).
"""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from tokenrec.ops.layers import weight
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.tokens.layout import Layout


class AdditivePositions(nnx.Module):
    """Learned vectors of positions and roles.

    Args:
      width: d.
      longest: layout of the longest stream, which has the highest position.
    """

    def __init__(self, width: int, longest: Layout, *, rngs: nnx.Rngs):
        # One vector per role that occurs, not per possible role: the number of weights
        # is that of the config's stream.
        self.roles = tuple(np.unique(longest.roles).tolist())
        count = longest.highest_rope_position + 1
        self.positions = weight(rngs, (count, width), None, None, inputs=width)
        self.types = weight(rngs, (len(self.roles), width), None, None, inputs=width)

    def __call__(self, positions: jax.Array, roles: np.ndarray) -> jax.Array:
        """Look up the vectors of n tokens.

        Args:
          positions: `[B, n] int32`.
          roles: `[n]`, index into `ROLES`.

        Returns:
          `[B, n, d]`.
        """
        # Roles are static, so this gather has constant indices.
        types = self.types[...][np.searchsorted(self.roles, roles)]
        return expand_rows(self.positions[...], positions) + types
