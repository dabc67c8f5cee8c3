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

The error falls in steps: it may hardly change for a few iterations and then go on to
fall, where a centroid crosses a gap between clusters. It has therefore converged only if
it is the same over `WINDOW` iterations. Where it ends depends on the first centroids:
of `STARTS` draws of these, the one with the least error is kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The most iterations of Lloyd's algorithm. Fits of 200 small mixtures took 128 at most.
ITERATIONS = 300
# It ends earlier when the last `WINDOW` iterations changed the error by less than this
# share. With a window of 1 the error was up to 10 % above what further iterations reach,
# with 10 at most 0.01 %.
TOLERANCE = 1e-4
WINDOW = 10
# Draws of the first centroids.
STARTS = 4
# Vectors that are compared with all centroids at once, which bounds memory.
CHUNK_ROWS = 4096


class Quantized(NamedTuple):
    """Codes of N items on L levels, and how well they stand for the vectors.

    Attributes:
      codes: `[N, L] int32`.
      errors: `[L] float64`; entry l is the mean squared distance between a vector and
        what its first l + 1 codes rebuild.
      converged: whether the k-means of each level converged; empty without k-means.
    """

    codes: np.ndarray
    errors: np.ndarray
    converged: tuple[bool, ...] = ()


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
    converged = []
    for level, size in enumerate(sizes):
        key = jax.random.fold_in(jax.random.key(seed), level)
        clusters = fit_kmeans(residual, size, key)
        residual = residual - clusters.centroids[clusters.assigned]
        codes.append(clusters.assigned)
        converged.append(clusters.converged)
        errors.append(float(np.square(residual).sum(axis=1).mean()))
    return Quantized(np.stack(codes, axis=1), np.array(errors), tuple(converged))


class Clusters(NamedTuple):
    """Clusters of N vectors.

    Attributes:
      centroids: `[K, D] float32`.
      assigned: `[N] int32`, the nearest centroid of each vector.
      error: summed squared distance of the vectors from these.
      iterations: iterations of the chosen start.
      converged: False if `ITERATIONS` were not enough.
    """

    centroids: np.ndarray
    assigned: np.ndarray
    error: float
    iterations: int
    converged: bool


def fit_kmeans(
    values: np.ndarray, clusters: int, key: jax.Array, *, starts: int = STARTS
) -> Clusters:
    """Cluster vectors by Lloyd's algorithm.

    The first centroids are random vectors. Those of k-means++ lie far out, and on the
    residuals of late levels most items then share one code, at no gain in error
    (docs/guides/semantic_ids.md). A cluster that runs empty restarts at one of the
    vectors that are farthest from their centroids.

    If the error has not converged after `ITERATIONS`, a line on stderr says so.

    Args:
      values: `[N, D] float32`, N >= 1.
      clusters: K. With fewer than K distinct vectors some clusters stay empty.
      key: PRNG key; one key gives one result on one kind of device.
      starts: draws of the first centroids, the best of which is kept.
    """
    rows, width = values.shape
    # 1. Pad to whole chunks.
    chunks = -(-rows // CHUNK_ROWS)
    padded = np.zeros((chunks, CHUNK_ROWS, width), np.float32)
    padded.reshape(-1, width)[:rows] = values
    vectors = jnp.asarray(padded)
    is_row = jnp.asarray(
        (np.arange(chunks * CHUNK_ROWS) < rows).reshape(chunks, CHUNK_ROWS)
    )

    # 2. Iterate from each draw of first centroids, and keep the first one of the best.
    fits = []
    for start in range(starts):
        # The first draw takes the key as it is.
        start_key = jax.random.fold_in(key, start) if start else key
        drawn = np.asarray(jax.random.permutation(start_key, rows))[:clusters]
        # With N < K they repeat.
        first = jnp.asarray(values[np.resize(drawn, clusters)])
        fits.append(_lloyd(vectors, is_row, first, ITERATIONS))
    best = min(fits, key=lambda fit: float(fit.error))
    if not best.converged:
        print(
            f"k-means: {clusters:,} clusters of {rows:,} vectors have not converged "
            f"after {ITERATIONS} iterations; more iterations would lower their error",
            file=sys.stderr,
        )
    return Clusters(
        np.asarray(best.centroids),
        np.asarray(best.assigned).reshape(-1)[:rows],
        float(best.error),
        int(best.iterations),
        bool(best.converged),
    )


class _Fit(NamedTuple):
    """Result of Lloyd's algorithm on chunks of vectors; see `Clusters`.

    Attributes:
      centroids: `[K, D] float32`.
      assigned: `[n, C] int32`.
      error: `float32`.
      iterations: `int32`.
      converged: `bool`.
    """

    centroids: jax.Array
    assigned: jax.Array
    error: jax.Array
    iterations: jax.Array
    converged: jax.Array


class _LloydState(NamedTuple):
    """State of an iteration of Lloyd's algorithm.

    Attributes:
      step: `int32`, iterations made.
      centroids: `[K, D] float32`.
      errors: `[WINDOW] float32`, summed squared distances at the start of the last
        iterations, in a ring.
      converged: `bool`.
    """

    step: jax.Array
    centroids: jax.Array
    errors: jax.Array
    converged: jax.Array


@jax.jit
def _lloyd(values: jax.Array, is_row: jax.Array, start: jax.Array, limit: int) -> _Fit:
    """Iterate until the error settles.

    Args:
      values: `[n, C, D] float32`, n chunks of C vectors.
      is_row: `[n, C] bool`, False for padding.
      start: `[K, D] float32`, the first centroids.
      limit: the most iterations.
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
        # 3. Compare with the error `WINDOW` iterations ago. A restart raises the error
        #    for one step at most, so the absolute change counts: a rise does not end
        #    the loop. Centroids that do not move never will.
        slot = state.step % WINDOW
        change = jnp.abs(state.errors[slot] - totals.error)
        settled = change <= TOLERANCE * totals.error
        fixed = jnp.all(centroids == state.centroids)
        return _LloydState(
            state.step + 1,
            centroids,
            state.errors.at[slot].set(totals.error),
            settled | fixed,
        )

    def goes_on(state: _LloydState) -> jax.Array:
        return (state.step < limit) & ~state.converged

    first = _LloydState(
        step=jnp.zeros((), jnp.int32),
        centroids=start,
        errors=jnp.full(WINDOW, jnp.inf, jnp.float32),
        converged=jnp.zeros((), bool),
    )
    last = jax.lax.while_loop(goes_on, improve, first)
    assigned, distance = jax.lax.map(
        lambda chunk: nearest_code(chunk, last.centroids), values
    )
    error = jnp.sum(jnp.where(is_row, distance, 0))
    return _Fit(last.centroids, assigned, error, last.step, last.converged)


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
