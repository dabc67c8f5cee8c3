"""RQ-KMeans: residual quantisation with a k-means code book per level.

A vector x gets one code per level, coarse to fine. With `r_0 = x` and code books
`e_1, ..., e_L`, each of K code words (docs/methods.md section 2; Chen, Guan and Wang
2010):

    c_l = argmin_k |r_{l-1} - e_l[k]|^2       the code of level l
    r_l = r_{l-1} - e_l[c_l]                  what is left for the next level
    x ~ sum_l e_l[c_l]

The book of level l is fitted by k-means to the residuals `r_{l-1}` of all items (Lloyd
1982): assign each residual to its nearest centroid, move each centroid to the mean of
its residuals, and repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The most iterations of Lloyd's algorithm.
ITERATIONS = 50
# It ends earlier when an iteration lowers the error by less than this share.
TOLERANCE = 1e-4
# Vectors that are compared with all centroids at once, which bounds memory.
CHUNK_ROWS = 4096


class Quantized(NamedTuple):
    """Codes of N items on L levels, and how well they stand for the vectors.

    Attributes:
      codes: `[N, L] int32`.
      errors: `[L] float64`; entry l is the mean squared distance between a vector and
        what its first l + 1 codes rebuild.
    """

    codes: np.ndarray
    errors: np.ndarray


def fit_rq_kmeans(values: np.ndarray, sizes: Sequence[int], seed: int) -> Quantized:
    """Quantise vectors level by level.

    Args:
      values: `[N, D] float32`, one vector per item.
      sizes: K of each level.
      seed: random seed; one seed gives one result on one kind of device.
    """
    residual = np.asarray(values, np.float32)
    codes = []
    errors = []
    for level, size in enumerate(sizes):
        key = jax.random.fold_in(jax.random.key(seed), level)
        centroids, assigned = fit_kmeans(residual, size, key)
        residual = residual - centroids[assigned]
        codes.append(assigned)
        errors.append(float(np.square(residual).sum(axis=1).mean()))
    return Quantized(np.stack(codes, axis=1), np.array(errors))


def fit_kmeans(
    values: np.ndarray, clusters: int, key: jax.Array
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster vectors by Lloyd's algorithm.

    The first centroids are random vectors. Those of k-means++ lie far out, and on the
    residuals of late levels most items then share one code, at no gain in error
    (docs/guides/semantic_ids.md). A cluster that runs empty restarts at one of the
    vectors that are farthest from their centroids.

    Args:
      values: `[N, D] float32`, N >= 1.
      clusters: K. With fewer than K distinct vectors some clusters stay empty.
      key: PRNG key.

    Returns:
      Centroids `[K, D] float32`, and the nearest one of each vector, `[N] int32`.
    """
    rows, width = values.shape
    # 1. Draw the first centroids; with N < K they repeat.
    drawn = np.asarray(jax.random.permutation(key, rows))[:clusters]
    start = values[np.resize(drawn, clusters)]

    # 2. Pad to whole chunks.
    chunks = -(-rows // CHUNK_ROWS)
    padded = np.zeros((chunks, CHUNK_ROWS, width), np.float32)
    padded.reshape(-1, width)[:rows] = values
    is_row = (np.arange(chunks * CHUNK_ROWS) < rows).reshape(chunks, CHUNK_ROWS)

    # 3. Iterate.
    centroids, assigned = _lloyd(
        jnp.asarray(padded), jnp.asarray(is_row), jnp.asarray(start)
    )
    return np.asarray(centroids), np.asarray(assigned).reshape(-1)[:rows]


class _LloydState(NamedTuple):
    """State of an iteration of Lloyd's algorithm.

    Attributes:
      step: `int32`, number of the iteration.
      centroids: `[K, D] float32`.
      error: `float32`, summed squared distance of the last iteration.
      error_before: `float32`, that of the iteration before.
    """

    step: jax.Array
    centroids: jax.Array
    error: jax.Array
    error_before: jax.Array


@jax.jit
def _lloyd(
    values: jax.Array, is_row: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Iterate until the error settles.

    Args:
      values: `[n, C, D] float32`, n chunks of C vectors.
      is_row: `[n, C] bool`, False for padding.
      start: `[K, D] float32`, the first centroids.

    Returns:
      Centroids `[K, D] float32`, and assignments `[n, C] int32`.
    """

    def improve(state: _LloydState) -> _LloydState:
        # 1. Assign, and move each centroid to the mean of its vectors.
        totals = _assign_all(values, is_row, state.centroids)
        means = totals.sums / jnp.maximum(totals.counts, 1)[:, None]
        # 2. Restart empty clusters: the n-th one takes the n-th worst fitted vector,
        #    unless that vector is fitted exactly.
        empty = totals.counts == 0
        number = jnp.cumsum(empty) - 1
        worst = jnp.argsort(-totals.distances)[: len(state.centroids)]
        place = worst[jnp.minimum(jnp.maximum(number, 0), len(worst) - 1)]
        restarts = empty & (number < len(worst)) & (totals.distances[place] > 0)
        moved = jnp.where(empty[:, None], state.centroids, means)
        centroids = jnp.where(restarts[:, None], totals.far[place], moved)
        return _LloydState(state.step + 1, centroids, totals.error, state.error)

    def goes_on(state: _LloydState) -> jax.Array:
        # A restart raises the error for one step at most, so the absolute change
        # counts: a rise does not end the loop.
        change = jnp.abs(state.error_before - state.error)
        unsettled = (state.step < 2) | (change > TOLERANCE * state.error)
        return (state.step < ITERATIONS) & unsettled

    first = _LloydState(
        step=jnp.zeros((), jnp.int32),
        centroids=start,
        error=jnp.float32(jnp.inf),
        error_before=jnp.float32(jnp.inf),
    )
    centroids = jax.lax.while_loop(goes_on, improve, first).centroids
    assigned = jax.lax.map(lambda chunk: nearest_code(chunk, centroids)[0], values)
    return centroids, assigned


class _Totals(NamedTuple):
    """Totals over all vectors, and the worst fitted vectors of each chunk.

    Attributes:
      sums: `[K, D] float32`, sum of each cluster's vectors.
      counts: `[K] float32`, number of them.
      error: `float32`, summed squared distance.
      far: `[F, D] float32`, the worst fitted vectors.
      distances: `[F] float32`, their squared distances; -1 for padding.
    """

    sums: jax.Array
    counts: jax.Array
    error: jax.Array
    far: jax.Array
    distances: jax.Array


def _assign_all(values: jax.Array, is_row: jax.Array, centroids: jax.Array) -> _Totals:
    """Assign all vectors to their nearest centroids, a chunk at a time.

    Args:
      values: `[n, C, D] float32`.
      is_row: `[n, C] bool`, False for padding.
      centroids: `[K, D] float32`.
    """
    clusters = len(centroids)
    kept = min(clusters, values.shape[1])
    type Sums = tuple[jax.Array, jax.Array, jax.Array]
    type Far = tuple[jax.Array, jax.Array]

    def add_chunk(total: Sums, part: tuple[jax.Array, jax.Array]) -> tuple[Sums, Far]:
        sums, counts, error = total
        chunk, real = part
        code, distance = nearest_code(chunk, centroids)
        distance = jnp.where(real, distance, -1.0)
        # A product with one-hot vectors and not a scatter: the order of its sums is
        # fixed on every device, so one seed gives one result.
        one_hot = jax.nn.one_hot(code, clusters, dtype=chunk.dtype) * real[:, None]
        sums = sums + jnp.matmul(one_hot.T, chunk, precision="highest")
        counts = counts + one_hot.sum(axis=0)
        error = error + jnp.maximum(distance, 0).sum()
        far, where = jax.lax.top_k(distance, kept)
        return (sums, counts, error), (chunk[where], far)

    start = (jnp.zeros_like(centroids), jnp.zeros(clusters), jnp.zeros(()))
    totals, (far, distances) = jax.lax.scan(add_chunk, start, (values, is_row))
    return _Totals(*totals, far.reshape(-1, values.shape[2]), distances.reshape(-1))


def nearest_code(x: jax.Array, book: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find the nearest code word of each vector; the first one of equals.

    The product is computed in full float32. The default product of a TPU rounds to
    bfloat16, which the small residuals of late levels do not survive.

    Args:
      x: `[B, D] float32`.
      book: `[K, D] float32`.

    Returns:
      Codes `[B] int32`, and squared distances `[B] float32`.
    """
    # |x - e|^2 without |x|^2, which is the same for all code words.
    scores = jnp.sum(jnp.square(book), axis=1) - 2 * jnp.matmul(
        x, book.T, precision="highest"
    )
    code = jnp.argmin(scores, axis=1).astype(jnp.int32)
    return code, jnp.sum(jnp.square(x - book[code]), axis=1)
