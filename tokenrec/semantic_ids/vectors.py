"""Hold item vectors, scale them, and find nearest neighbours among them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

# Queries that are compared with all vectors at once: bounds memory at 512 x N scores.
_QUERY_BATCH = 512
# A shorter vector counts as zero.
_LEAST_NORM = 1e-6


@dataclasses.dataclass(frozen=True)
class ItemVectors:
    """A vector for each of N items, in the order of the catalogue.

    Attributes:
      values: `[N, D] float32`, of length 1, or zero where there is no vector.
      known: `[N] bool`, False where there is no vector.
    """

    values: np.ndarray
    known: np.ndarray


def normalize(values: np.ndarray) -> ItemVectors:
    """Scale vectors `[N, D]` to length 1; those that are zero are not known."""
    norm = np.linalg.norm(values, axis=1)
    known = norm > _LEAST_NORM
    scale = np.where(known, 1 / np.maximum(norm, _LEAST_NORM), 0)
    return ItemVectors((values * scale[:, None]).astype(np.float32), known)


def nearest_rows(queries: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Find the vectors with the largest inner product with each query.

    Args:
      queries: `[Q, D] float32`.
      values: `[N, D] float32`.
      count: neighbours per query; N at most.

    Returns:
      `[Q, count] int32`, indices into `values`, the nearest first.
    """
    count = min(count, len(values))
    table = jnp.asarray(values)
    parts = []
    for start in range(0, len(queries), _QUERY_BATCH):
        batch = jnp.asarray(queries[start : start + _QUERY_BATCH])
        parts.append(np.asarray(_top(batch, table, count)))
    return np.concatenate(parts) if parts else np.zeros((0, count), np.int32)


@functools.partial(jax.jit, static_argnums=2)
def _top(queries: jax.Array, values: jax.Array, count: int) -> jax.Array:
    return jax.lax.top_k(queries @ values.T, count)[1]
