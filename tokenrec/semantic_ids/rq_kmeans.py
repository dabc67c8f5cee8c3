"""Residual quantisation by k-means: a code book per level, each fitted to what the levels before it left over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

ITERATIONS = 50
TOLERANCE = (
    1e-4  # Lloyd ends when a step lowers the error by less than this share of it
)
CHUNK_ROWS = 4096

type State = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array
]  # step, centroids, error, error before


class Quantized(NamedTuple):
    """Codes of N items on L levels, and how well they stand for the vectors.

    Attributes:
      codes: `[N, L] int32`.
      errors: `[L]`, mean squared distance between a vector and what its first l codes rebuild.
    """

    codes: np.ndarray
    errors: np.ndarray


def fit_rq_kmeans(values: np.ndarray, sizes: Sequence[int], seed: int) -> Quantized:
    """Quantises `values: [N, D] float32` level by level on residuals.

    Args:
      values: one vector per item.
      sizes: codes of each level.
      seed: of all draws; one seed gives one result on one kind of device.
    """
    residual = np.asarray(values, np.float32)
    codes, errors = [], []
    for level, size in enumerate(sizes):
        centroids, assigned = fit_kmeans(
            residual, size, jax.random.fold_in(jax.random.key(seed), level)
        )
        residual = residual - centroids[assigned]
        codes.append(assigned)
        errors.append(float(np.square(residual).sum(axis=1).mean()))
    return Quantized(np.stack(codes, axis=1), np.array(errors))


def fit_kmeans(
    values: np.ndarray, clusters: int, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """K-means by Lloyd's algorithm.

    Random points are the seeds: those of k-means++ lie far out, and on the residuals of late levels most items then
    share one code, at no gain in error (docs/semantic_ids.md). A cluster that runs empty restarts at one of the points
    that lie farthest from their centroids.

    Args:
      values: `[N, D] float32`, N >= 1.
      clusters: K. With fewer than K distinct points some clusters stay empty.
      key: of all draws.

    Returns:
      Centroids `[K, D] float32`, and the nearest one of each point, `[N] int32`.
    """
    rows, width = values.shape
    start = values[
        np.resize(np.asarray(jax.random.permutation(key, rows))[:clusters], clusters)
    ]
    chunks = -(-rows // CHUNK_ROWS)
    padded = np.zeros((chunks, CHUNK_ROWS, width), np.float32)
    padded.reshape(-1, width)[:rows] = values
    is_row = (np.arange(chunks * CHUNK_ROWS) < rows).reshape(chunks, CHUNK_ROWS)
    centroids, assigned = _lloyd(
        jnp.asarray(padded), jnp.asarray(is_row), jnp.asarray(start)
    )
    return np.asarray(centroids), np.asarray(assigned).reshape(-1)[:rows]


@jax.jit
def _lloyd(
    values: jax.Array, is_row: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`values: [n, C, D]`, `is_row: [n, C]`, `start: [K, D]` -> centroids, and assignments `[n, C]`."""

    def improve(state: State) -> State:
        step, centroids, error, _ = state
        sums, counts, new_error, far, distances = _visit(values, is_row, centroids)
        means = sums / jnp.maximum(counts, 1)[:, None]
        # The n-th empty cluster takes the n-th worst fitted point, unless that point is fitted exactly.
        empty = counts == 0
        worst = jnp.cumsum(empty) - 1
        order = jnp.argsort(-distances)[: len(centroids)]
        place = order[jnp.minimum(jnp.maximum(worst, 0), len(order) - 1)]
        restarts = empty & (worst < len(order)) & (distances[place] > 0)
        centroids = jnp.where(
            restarts[:, None], far[place], jnp.where(empty[:, None], centroids, means)
        )
        return step + 1, centroids, new_error, error

    def goes_on(state: State) -> jax.Array:
        step, _, error, before = state
        # A restart raises the error for a step at most, so a rise does not end the loop.
        return (step < ITERATIONS) & (
            (step < 2) | (jnp.abs(before - error) > TOLERANCE * error)
        )

    state = (
        jnp.zeros((), jnp.int32),
        start,
        jnp.float32(jnp.inf),
        jnp.float32(jnp.inf),
    )
    centroids = jax.lax.while_loop(goes_on, improve, state)[1]
    assigned = jax.lax.map(lambda chunk: nearest_code(chunk, centroids)[0], values)
    return centroids, assigned


def _visit(
    values: jax.Array, is_row: jax.Array, centroids: jax.Array
) -> tuple[jax.Array, ...]:
    """Sums and counts of each cluster, the summed error, and the worst fitted points of every chunk."""
    clusters, kept = len(centroids), min(len(centroids), values.shape[1])

    def add(
        total: tuple[jax.Array, jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        chunk, real = part
        code, distance = nearest_code(chunk, centroids)
        distance = jnp.where(real, distance, -1.0)
        # A product with one-hot rows, not a scatter: its order of summation is fixed on every device.
        one_hot = jax.nn.one_hot(code, clusters, dtype=chunk.dtype) * real[:, None]
        sums = total[0] + jnp.matmul(one_hot.T, chunk, precision="highest")
        far, where = jax.lax.top_k(distance, kept)
        return (
            sums,
            total[1] + one_hot.sum(axis=0),
            total[2] + jnp.maximum(distance, 0).sum(),
        ), (chunk[where], far)

    start = (jnp.zeros_like(centroids), jnp.zeros(clusters), jnp.zeros(()))
    (sums, counts, error), (far, distances) = jax.lax.scan(add, start, (values, is_row))
    return sums, counts, error, far.reshape(-1, values.shape[2]), distances.reshape(-1)


def nearest_code(x: jax.Array, book: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Nearest row of `book: [K, D]` to each of `x: [B, D]`, the first of equals: `[B] int32`; squared distance `[B]`.

    In full float32: a TPU's default product rounds to bfloat16, which the residuals of late levels do not survive.
    """
    scores = jnp.sum(jnp.square(book), axis=1) - 2 * jnp.matmul(
        x, book.T, precision="highest"
    )
    code = jnp.argmin(scores, axis=1).astype(jnp.int32)
    return code, jnp.sum(jnp.square(x - book[code]), axis=1)
