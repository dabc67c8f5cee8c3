"""RQ-VAE: residual quantisation learned together with an encoder and a decoder.

An encoder maps a vector x to a latent z, which is quantised on L levels as in
rq_kmeans.py, and a decoder rebuilds x from the sum of the code words:

    z = encoder(x);  r_0 = z
    c_l = argmin_k |r_{l-1} - e_l[k]|^2;  r_l = r_{l-1} - e_l[c_l]
    x' = decoder(z + sg(sum_l e_l[c_l] - z))
    loss = |x - x'|^2 + sum_l |sg(r_{l-1}) - e_l[c_l]|^2
                      + sum_l beta |r_{l-1} - sg(e_l[c_l])|^2

`sg` stops the gradient, so that the gradient of the decoder's input goes straight to
the encoder. Each `|.|^2` is a mean over entries. The first sum moves the code words to
their residuals, the second ("commitment") moves the encoder to the code words.

Sources: Lee et al. 2022 (arXiv 2203.01941), section 3.2, for the quantisation and the
loss; Rajput et al. 2023 (TIGER, arXiv 2305.05065), sections 3.1 and 4.1, for semantic
ids and sizes; Zeghidour et al. 2021 (SoundStream, arXiv 2107.03312), section III-C, for
k-means as a start and for restarts of unused codes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tokenrec.semantic_ids.rq_kmeans import (
    CHUNK_ROWS,
    Quantized,
    fit_kmeans,
    nearest_code,
)

# Hidden widths of the encoder; the decoder mirrors it (Rajput et al., section 4.1).
HIDDEN = (512, 256, 128)
# Z, the width of the latent.
LATENT = 32
# Weight of the commitment loss.
BETA = 0.25
STEPS = 4000
BATCH = 256
LEARNING_RATE = 1e-3
# A code that no vector chose in so many steps restarts.
RESTART_STEPS = 50
# Share of training in which codes restart; they settle after it.
RESTART_SHARE = 0.8
# Vectors per code in the batch that the first code books are fitted to.
FIRST_BATCH_ROWS = 16

type Layers = list[dict[str, jax.Array]]


class Weights(NamedTuple):
    """Weights of an RQ-VAE with L levels.

    Attributes:
      encoder: linear layers, D to Z.
      decoder: linear layers, Z to D.
      books: L code books; entry l is `[K_l, Z] float32`.
    """

    encoder: Layers
    decoder: Layers
    books: list[jax.Array]


class _Residual(NamedTuple):
    """Result of quantising `z: [B, Z]`. All lists have an entry per level.

    Attributes:
      codes: `[B] int32`.
      inputs: `[B, Z]`, the residual that was quantised.
      sums: `[B, Z]`, sum of the code words up to this level.
      loss: scalar, codebook and commitment losses.
    """

    codes: list[jax.Array]
    inputs: list[jax.Array]
    sums: list[jax.Array]
    loss: jax.Array


def fit_rq_vae(
    values: np.ndarray, sizes: Sequence[int], seed: int, steps: int = STEPS
) -> Quantized:
    """Train an RQ-VAE on vectors, and quantise them with it.

    Adam with a cosine schedule. The vectors are scaled to a root mean square of 1 for
    training; the errors are those of the vectors as given.

    Args:
      values: `[N, D] float32`, one vector per item.
      sizes: K of each level.
      seed: random seed; one seed gives one result on one kind of device.
      steps: updates, of `BATCH` items each.
    """
    # 1. Initialise.
    scale = max(float(np.sqrt(np.square(values).mean())), 1e-12)
    table = jnp.asarray(values / scale, jnp.float32)
    key = jax.random.key(seed)
    weights = _start(table, sizes, jax.random.fold_in(key, 0))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    opt_state = optimizer.init(weights)

    # 2. Train in blocks, with restarts of unused codes after each block.
    train = jax.jit(functools.partial(_train_block, optimizer), static_argnums=4)
    for first in range(0, steps, RESTART_STEPS):
        count = min(RESTART_STEPS, steps - first)
        restarts = jnp.asarray(first + count <= RESTART_SHARE * steps)
        draws = (jax.random.fold_in(key, first + 1), restarts)
        weights, opt_state = train(weights, opt_state, table, draws, count)

    # 3. Quantise all vectors.
    codes = []
    errors = np.zeros(len(sizes))
    for start in range(0, len(table), CHUNK_ROWS):
        chunk = table[start : start + CHUNK_ROWS]
        chunk_codes, chunk_errors = _quantize_chunk(weights, chunk)
        codes.append(np.asarray(chunk_codes))
        errors += np.asarray(chunk_errors, np.float64)
    return Quantized(np.concatenate(codes), errors * scale**2 / len(table))


def _start(table: jax.Array, sizes: Sequence[int], key: jax.Array) -> Weights:
    """Initialise the weights.

    Args:
      table: `[N, D] float32`, all vectors.
      sizes: K of each level.
      key: PRNG key.
    """
    widths = (table.shape[1], *HIDDEN, LATENT)
    encoder_key, decoder_key, batch_key, book_key = jax.random.split(key, 4)
    encoder = _layers(widths, encoder_key)
    decoder = _layers(widths[::-1], decoder_key)
    # Code books from k-means of the first latents, level by level: random code words
    # would mostly stay unused.
    count = max(BATCH, FIRST_BATCH_ROWS * max(sizes))
    first_batch = jax.random.permutation(batch_key, len(table))[:count]
    residual = np.asarray(_apply(encoder, table[first_batch]))
    books = []
    for level, size in enumerate(sizes):
        level_key = jax.random.fold_in(book_key, level)
        # One draw of first centroids: training moves the code words anyway.
        clusters = fit_kmeans(residual, size, level_key, starts=1)
        residual = residual - clusters.centroids[clusters.assigned]
        books.append(jnp.asarray(clusters.centroids))
    return Weights(encoder, decoder, books)


def _layers(widths: Sequence[int], key: jax.Array) -> Layers:
    """Initialise linear layers between the widths (He et al. 2015), biases zero."""
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        layer_key = jax.random.fold_in(key, number)
        kernel = jax.random.normal(layer_key, (inputs, outputs)) * (2 / inputs) ** 0.5
        layers.append({"kernel": kernel, "bias": jnp.zeros(outputs)})
    return layers


def _apply(layers: Layers, x: jax.Array) -> jax.Array:
    """Apply linear layers with ReLU between them: `[B, D] -> [B, Z]`."""
    for number, layer in enumerate(layers):
        x = (jax.nn.relu(x) if number else x) @ layer["kernel"] + layer["bias"]
    return x


def _quantize(books: Sequence[jax.Array], z: jax.Array) -> _Residual:
    """Quantise `z: [B, Z]` on all levels, with the losses of code books and encoder."""
    codes, inputs, sums = [], [], []
    residual = z
    total = jnp.zeros_like(z)
    loss = jnp.zeros(())
    for book in books:
        code, _ = nearest_code(
            jax.lax.stop_gradient(residual), jax.lax.stop_gradient(book)
        )
        word = book[code]
        fixed = jax.lax.stop_gradient(word)
        loss += jnp.mean(jnp.square(jax.lax.stop_gradient(residual) - word))
        loss += BETA * jnp.mean(jnp.square(residual - fixed))
        inputs.append(residual)
        codes.append(code)
        residual = residual - fixed
        total = total + fixed
        sums.append(total)
    return _Residual(codes, inputs, sums, loss)


def _loss(
    weights: Weights, x: jax.Array
) -> tuple[jax.Array, tuple[list[jax.Array], list[jax.Array]]]:
    """Compute the loss of `x: [B, D]`.

    Returns:
      The loss, and per level: which codes were used, `[K_l] bool`, and the residuals
      that were quantised, `[B, Z]`.
    """
    z = _apply(weights.encoder, x)
    quantized = _quantize(weights.books, z)
    straight_through = z + jax.lax.stop_gradient(quantized.sums[-1] - z)
    rebuilt = _apply(weights.decoder, straight_through)
    used = [
        jnp.zeros(len(book), bool).at[code].set(True)
        for book, code in zip(weights.books, quantized.codes, strict=True)
    ]
    return jnp.mean(jnp.square(x - rebuilt)) + quantized.loss, (used, quantized.inputs)


def _train_block(
    optimizer: optax.GradientTransformation,
    weights: Weights,
    opt_state: Any,
    table: jax.Array,
    draws: tuple[jax.Array, jax.Array],
    steps: int,
) -> tuple[Weights, Any]:
    """Take some steps, and then restart the codes that none of them used.

    Args:
      optimizer: the optimizer.
      weights: the weights.
      opt_state: state of the optimizer.
      table: `[N, D] float32`, all vectors.
      draws: PRNG key, and `bool`, whether codes restart.
      steps: number of steps.

    Returns:
      Weights and state of the optimizer.
    """
    key, restarts = draws

    def update(
        carry: tuple[Any, ...], step_key: jax.Array
    ) -> tuple[tuple[Any, ...], None]:
        weights, opt_state, used = carry
        batch = table[jax.random.randint(step_key, (BATCH,), 0, len(table))]
        gradients, (chosen, _) = jax.grad(_loss, has_aux=True)(weights, batch)
        updates, opt_state = optimizer.update(gradients, opt_state, weights)
        used = [u | c for u, c in zip(used, chosen, strict=True)]
        return (optax.apply_updates(weights, updates), opt_state, used), None

    # 1. Train, and collect which codes were used.
    unused = [jnp.zeros(len(book), bool) for book in weights.books]
    keys = jax.random.split(key, steps + 1)
    (weights, opt_state, used), _ = jax.lax.scan(
        update, (weights, opt_state, unused), keys[:-1]
    )

    # 2. Restart the others at residuals of a random batch.
    batch = table[jax.random.randint(keys[-1], (BATCH,), 0, len(table))]
    _, (_, inputs) = _loss(weights, batch)
    books = []
    for level, (book, chosen, residual) in enumerate(
        zip(weights.books, used, inputs, strict=True)
    ):
        level_key = jax.random.fold_in(keys[-1], level)
        rows = jax.random.randint(level_key, (len(book),), 0, BATCH)
        books.append(jnp.where((restarts & ~chosen)[:, None], residual[rows], book))
    return weights._replace(books=books), opt_state


@jax.jit
def _quantize_chunk(weights: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantise `x: [B, D]`.

    Returns:
      Codes `[B, L] int32`, and the summed squared error of what the codes up to each
      level rebuild, `[L] float32`.
    """
    quantized = _quantize(weights.books, _apply(weights.encoder, x))
    errors = [
        jnp.sum(jnp.square(x - _apply(weights.decoder, total)))
        for total in quantized.sums
    ]
    return jnp.stack(quantized.codes, axis=1), jnp.stack(errors)
