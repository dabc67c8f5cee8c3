"""Item vectors from co-occurrence: items that are near each other in users' histories.

1. Count pairs. Items i and j at most 5 events apart in one user's history add to
   `n_ij`, 1 over their distance in events.
2. Normalise. With degrees `n_i = sum_j n_ij` and t half the mean degree,
   `a_ij = n_ij / sqrt((n_i + t)(n_j + t))`, a regularised graph Laplacian (Qin and Rohe
   2013, section 2). Without t the largest eigenvalues belong to small groups of rare
   items that nothing ties to the others.
3. Factorise `A ~ U S U^T` to the 128 largest eigenvalues by subspace iteration (Halko
   et al. 2011, algorithm 4.4). The vectors are the rows of `U S^(1/2)`, scaled to
   length 1.

On Amazon Beauty these vectors find the next item better than positive pointwise mutual
information does (docs/guides/semantic_ids.md).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.errors import InputError
from tokenrec.semantic_ids.train_events import TrainEvents
from tokenrec.semantic_ids.vectors import ItemVectors, normalize

# The most events between the two of a pair.
WINDOW = 5
# Entries of a vector.
WIDTH = 128
# t, in mean degrees.
REGULARIZER = 0.5
SUBSPACE_ITERATIONS = 5
# Columns beyond WIDTH that the iteration carries: they make it converge faster.
_OVERSAMPLING = 10
# Entries of the sparse matrix that are multiplied at once, which bounds memory.
SPARSE_BLOCK = 1 << 14


class Pairs(NamedTuple):
    """A symmetric sparse matrix with P entries, both triangles, sorted by row.

    Attributes:
      row: `[P] int64`.
      column: `[P] int64`.
      value: `[P]`, float64 of `count_pairs`, float32 of `normalized_counts`.
    """

    row: np.ndarray
    column: np.ndarray
    value: np.ndarray


def cooccurrence_vectors(events: TrainEvents, items: int, seed: int) -> ItemVectors:
    """Compute the vectors of all items; one that no other item is near has none.

    Args:
      events: events of the training split.
      items: N, rows of the catalogue.
      seed: random seed.

    Raises:
      InputError: no user has two different events in train.
    """
    counts = count_pairs(events, items, seed)
    if not len(counts.row):
        raise InputError(
            "vectors='cooccurrence': no two items of the training split lie near each "
            "other in a user's history; use --vectors text, or prepare a data set with "
            "longer histories"
        )
    graph = normalized_counts(counts, items)
    # Items without pairs are left out, so that they cost nothing in the products.
    used, rows = np.unique(graph.row, return_inverse=True)
    inner = Pairs(rows, np.searchsorted(used, graph.column), graph.value)
    values = np.zeros((items, min(WIDTH, len(used))), np.float32)
    values[used] = _factorize(inner, len(used), values.shape[1], seed)
    return normalize(values)


def count_pairs(events: TrainEvents, items: int, seed: int) -> Pairs:
    """Count pairs of different items at most `WINDOW` events apart, by their distance.

    A pair d events apart counts 1 / d, and 1 if both have one time. Events of one time
    have no order, so they are shuffled: otherwise the order in which they are stored
    would decide which of them are near each other.

    Args:
      events: events of the training split.
      items: N, rows of the catalogue.
      seed: random seed of the shuffle.
    """
    random = np.random.default_rng(seed)
    order = np.lexsort((random.random(len(events.item)), events.time, events.user))
    user = events.user[order]
    item = events.item[order].astype(np.int64)
    time = events.time[order]
    # A pair of items (low, high) is the key low * items + high.
    keys = np.zeros(0, np.int64)
    weights = np.zeros(0)
    for distance in range(1, min(WINDOW, max(len(item) - 1, 0)) + 1):
        one, other = item[:-distance], item[distance:]
        near = (user[:-distance] == user[distance:]) & (one != other)
        key = np.minimum(one, other)[near] * items + np.maximum(one, other)[near]
        same_time = time[:-distance] == time[distance:]
        weight = np.where(same_time, 1.0, 1 / distance)[near]
        # Join equal keys at once, so that memory grows with the pairs that differ.
        keys, inverse = np.unique(np.concatenate([keys, key]), return_inverse=True)
        weights = np.bincount(
            inverse, weights=np.concatenate([weights, weight]), minlength=len(keys)
        )
    low, high = keys // items, keys % items
    row = np.concatenate([low, high])
    column = np.concatenate([high, low])
    order = np.lexsort((column, row))
    return Pairs(row[order], column[order], np.concatenate([weights, weights])[order])


def normalized_counts(counts: Pairs, items: int) -> Pairs:
    """Divide counts by the square roots of their regularised degrees (step 2 above).

    Args:
      counts: made by `count_pairs`.
      items: N, rows of the catalogue.
    """
    degree = np.bincount(counts.row, weights=counts.value, minlength=items)
    root = np.sqrt(degree + REGULARIZER * degree[degree > 0].mean())
    value = counts.value / (root[counts.row] * root[counts.column])
    return Pairs(counts.row, counts.column, value.astype(np.float32))


def _factorize(matrix: Pairs, size: int, width: int, seed: int) -> np.ndarray:
    """Compute `Q W |S|^(1/2)` of a symmetric sparse matrix, by subspace iteration.

    Q is an orthonormal basis of the range, and `W S W^T` the eigendecomposition of
    `Q^T A Q`. Negative eigenvalues count as 0.

    Args:
      matrix: A.
      size: rows of A.
      width: number of eigenvalues to keep.
      seed: random seed of the first basis.

    Returns:
      `[size, width] float32`.
    """
    # 1. Pad the entries to whole blocks. Padding has the row `size`, which is out of
    #    range and dropped.
    blocks = -(-len(matrix.row) // SPARSE_BLOCK)
    padding = (0, blocks * SPARSE_BLOCK - len(matrix.row))
    row = np.pad(matrix.row, padding, constant_values=size).reshape(blocks, -1)
    column = np.pad(matrix.column, padding).reshape(blocks, -1)
    value = np.pad(matrix.value, padding).reshape(blocks, -1)
    entries = (
        jnp.asarray(row.astype(np.int32)),
        jnp.asarray(column.astype(np.int32)),
        jnp.asarray(value),
    )

    # 2. Iterate: multiply by A and orthonormalise.
    rank = min(size, width + _OVERSAMPLING)
    basis = np.random.default_rng(seed).normal(size=(size, rank)).astype(np.float32)
    for _ in range(SUBSPACE_ITERATIONS):
        image = np.asarray(_multiply(*entries, jnp.asarray(basis)))
        basis = np.linalg.qr(image)[0]

    # 3. Solve the small eigenproblem in the basis. It is symmetric but for rounding.
    image = np.asarray(_multiply(*entries, jnp.asarray(basis)))
    small = basis.T @ image
    eigenvalues, rotation = np.linalg.eigh((small + small.T) / 2)
    top = np.argsort(-eigenvalues)[:width]
    return basis @ rotation[:, top] * np.sqrt(np.maximum(eigenvalues[top], 0))


@jax.jit
def _multiply(
    row: jax.Array, column: jax.Array, value: jax.Array, x: jax.Array
) -> jax.Array:
    """Multiply a sparse matrix by `x: [N, D]`.

    Args:
      row: `[n, B] int32`, entries in n blocks, ascending.
      column: `[n, B] int32`.
      value: `[n, B] float32`.
      x: `[N, D] float32`.

    Returns:
      `[N, D] float32`.
    """

    def add_block(
        total: jax.Array, block: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        rows, columns, weights = block
        terms = x[columns] * weights[:, None]
        return total.at[rows].add(terms, mode="drop", indices_are_sorted=True), None

    return jax.lax.scan(add_block, jnp.zeros_like(x), (row, column, value))[0]
