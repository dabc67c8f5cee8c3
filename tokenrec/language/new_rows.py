"""First values of the rows that a recommender adds to a language model's words.

Separators and semantic-id codes are words that the model has never seen. They are drawn
from a normal distribution with the mean m and the covariance C of its word vectors
(Hewitt, *Initializing New Word Embeddings for Pretrained Language Models*, 2021), so
that the model gives them no more probability than its other words:

    row = m + L z,    L L^T = C,    z ~ N(0, 1)

Letters: V words, n new rows, d model width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from tokenrec.ops.contract import gather_over_fsdp
from tokenrec.sharding import on_mesh

# Added to the variances, as a share of their mean: fewer words than d have a covariance
# that is singular.
JITTER = 1e-6


def draw_rows(
    key: jax.Array, words: jax.Array, count: int, like: jax.Array
) -> jax.Array:
    """Draw rows that look like words.

    Args:
      key: PRNG key.
      words: `[V', d]`, word vectors.
      count: V; the rows behind are none.
      like: an array `[n, d]` whose type and layout the result has.
    """
    spec = jax.typeof(like).sharding.spec
    rows = _draw(key, words, count, like.shape[0])
    return jax.jit(lambda x: x.astype(like.dtype), out_shardings=on_mesh(spec))(rows)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(key: jax.Array, words: jax.Array, count: int, rows: int) -> jax.Array:
    """`[n, d] float32`, on every device."""
    known = gather_over_fsdp(words)[:count].astype(jnp.float32)
    mean = jnp.mean(known, axis=0)
    centred = known - mean
    covariance = centred.T @ centred / count
    width = covariance.shape[0]
    jitter = JITTER * jnp.trace(covariance) / width
    factor = jnp.linalg.cholesky(covariance + jitter * jnp.eye(width))
    return mean + jax.random.normal(key, (rows, width)) @ factor.T


def root_mean_square(words: jax.Array, count: int) -> jax.Array:
    """Root mean square of the entries of word vectors `[V', d]`, `[] float32`."""
    known = gather_over_fsdp(words)[:count].astype(jnp.float32)
    return jnp.sqrt(jnp.mean(jnp.square(known)))
