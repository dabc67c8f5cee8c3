"""Residual quantisation learned together with an encoder and a decoder: RQ-VAE."""

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

HIDDEN = (
    512,
    256,
    128,
)  # of the encoder; the decoder mirrors it (Rajput et al. 2023, section 4.1)
LATENT = 32
BETA = 0.25  # weight of the commitment loss
STEPS = 4000
BATCH = 256
LEARNING_RATE = 1e-3
RESTART_STEPS = 50  # a code that no vector chose for so long restarts
RESTART_SHARE = 0.8  # of training; codes settle after that
FIRST_BATCH_ROWS = 16  # rows per code of the batch that the books start from

type Layers = list[dict[str, jax.Array]]


class Weights(NamedTuple):
    """`books[l]: [K_l, LATENT]`."""

    encoder: Layers
    decoder: Layers
    books: list[jax.Array]


class _Residual(NamedTuple):
    """What quantising `z: [B, Z]` gives: codes `[B]` and inputs `[B, Z]` of each level, sums of code words up to each
    level `[B, Z]`, and the loss."""

    codes: list[jax.Array]
    inputs: list[jax.Array]
    sums: list[jax.Array]
    loss: jax.Array


def fit_rq_vae(
    values: np.ndarray, sizes: Sequence[int], seed: int, steps: int = STEPS
) -> Quantized:
    """Trains an RQ-VAE on `values: [N, D] float32` and quantises them with it.

    `loss = |x - x'|^2 + sum_l |sg(r_l) - e_l|^2 + beta |r_l - sg(e_l)|^2`, each a mean over entries, with a
    straight-through gradient from decoder to encoder (Lee et al. 2022, section 3.2; Rajput et al. 2023, section 3.1).
    Books start from k-means of the first batch, level by level; codes that no vector chooses restart at residuals of
    the batch (Zeghidour et al. 2021, section III-C). Adam, cosine schedule.

    Args:
      values: one vector per item.
      sizes: codes of each level.
      seed: of all draws; one seed gives one result on one kind of device.
      steps: updates, of `BATCH` items each.
    """
    scale = max(float(np.sqrt(np.square(values).mean())), 1e-12)
    table = jnp.asarray(values / scale, jnp.float32)
    key = jax.random.key(seed)
    weights = _start(table, sizes, jax.random.fold_in(key, 0))
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))
    train = jax.jit(functools.partial(_train_block, optimizer), static_argnums=4)
    opt_state = optimizer.init(weights)
    for first in range(0, steps, RESTART_STEPS):
        count = min(RESTART_STEPS, steps - first)
        restarts = jnp.asarray(first + count <= RESTART_SHARE * steps)
        weights, opt_state = train(
            weights,
            opt_state,
            table,
            (jax.random.fold_in(key, first + 1), restarts),
            count,
        )
    codes, errors = [], np.zeros(len(sizes))
    for at in range(0, len(table), CHUNK_ROWS):
        part_codes, part_errors = _quantize_chunk(weights, table[at : at + CHUNK_ROWS])
        codes.append(np.asarray(part_codes))
        errors += np.asarray(part_errors, np.float64)
    return Quantized(np.concatenate(codes), errors * scale**2 / len(table))


def _start(table: jax.Array, sizes: Sequence[int], key: jax.Array) -> Weights:
    widths = (table.shape[1], *HIDDEN, LATENT)
    encoder_key, decoder_key, batch_key, book_key = jax.random.split(key, 4)
    encoder, decoder = _layers(widths, encoder_key), _layers(widths[::-1], decoder_key)
    first_batch = jax.random.permutation(batch_key, len(table))[
        : max(BATCH, FIRST_BATCH_ROWS * max(sizes))
    ]
    residual = np.asarray(_apply(encoder, table[first_batch]))
    books = []
    for level, size in enumerate(sizes):
        book, assigned = fit_kmeans(residual, size, jax.random.fold_in(book_key, level))
        residual = residual - book[assigned]
        books.append(jnp.asarray(book))
    return Weights(encoder, decoder, books)


def _layers(widths: Sequence[int], key: jax.Array) -> Layers:
    """Linear maps between the widths; He-initialised, biases zero."""
    return [
        {
            "kernel": jax.random.normal(jax.random.fold_in(key, n), (inputs, outputs))
            * (2 / inputs) ** 0.5,
            "bias": jnp.zeros(outputs),
        }
        for n, (inputs, outputs) in enumerate(itertools.pairwise(widths))
    ]


def _apply(layers: Layers, x: jax.Array) -> jax.Array:
    """Linear maps with ReLU between them: `[B, D] -> [B, Z]`."""
    for number, layer in enumerate(layers):
        x = (jax.nn.relu(x) if number else x) @ layer["kernel"] + layer["bias"]
    return x


def _quantize(books: Sequence[jax.Array], z: jax.Array) -> _Residual:
    codes, inputs, sums = [], [], []
    residual, total, loss = z, jnp.zeros_like(z), jnp.zeros(())
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
        residual, total = residual - fixed, total + fixed
        sums.append(total)
    return _Residual(codes, inputs, sums, loss)


def _loss(
    weights: Weights, x: jax.Array
) -> tuple[jax.Array, tuple[list[jax.Array], list[jax.Array]]]:
    z = _apply(weights.encoder, x)
    quantized = _quantize(weights.books, z)
    rebuilt = _apply(weights.decoder, z + jax.lax.stop_gradient(quantized.sums[-1] - z))
    used = [
        jnp.zeros(len(b), bool).at[c].set(True)
        for b, c in zip(weights.books, quantized.codes, strict=True)
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
    """Some updates, then restarts of the codes that none of them used, if `draws = (key, restarts)` says so."""
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

    unused = [jnp.zeros(len(book), bool) for book in weights.books]
    keys = jax.random.split(key, steps + 1)
    (weights, opt_state, used), _ = jax.lax.scan(
        update, (weights, opt_state, unused), keys[:-1]
    )
    batch = table[jax.random.randint(keys[-1], (BATCH,), 0, len(table))]
    _, (_, inputs) = _loss(weights, batch)
    books = []
    for level, (book, chosen, residual) in enumerate(
        zip(weights.books, used, inputs, strict=True)
    ):
        rows = jax.random.randint(
            jax.random.fold_in(keys[-1], level), (len(book),), 0, BATCH
        )
        books.append(jnp.where((restarts & ~chosen)[:, None], residual[rows], book))
    return weights._replace(books=books), opt_state


@jax.jit
def _quantize_chunk(weights: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Codes `[B, L]`, and the summed squared error of what the first l codes rebuild, `[L]`."""
    quantized = _quantize(weights.books, _apply(weights.encoder, x))
    errors = [
        jnp.sum(jnp.square(x - _apply(weights.decoder, total)))
        for total in quantized.sums
    ]
    return jnp.stack(quantized.codes, axis=1), jnp.stack(errors)
