"""RQ-VAE: it learns, uses its codes, and has straight-through gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.semantic_ids.test_rq_kmeans import blobs
from tokenrec.semantic_ids import rq_vae


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "HIDDEN": (32,),
        "LATENT": 8,
        "BATCH": 64,
        "RESTART_STEPS": 20,
        "LEARNING_RATE": 3e-3,
    }.items():
        monkeypatch.setattr(rq_vae, name, value)


def test_training_separates_clusters_and_lowers_the_error() -> None:
    values, label = blobs(16, 12, width=6)
    untrained = rq_vae.fit_rq_vae(values, (8, 8), seed=0, steps=1)
    trained = rq_vae.fit_rq_vae(values, (8, 8), seed=0, steps=600)
    variance = np.square(values - values.mean(axis=0)).sum(axis=1).mean()
    # Measured 0.025 of the variance after training and 4.7 before, on AVX2, AVX-512 and
    # SSE4.2: training is chaotic in its rounding, so the bound is four times as large.
    assert trained.errors[-1] < 0.1 * variance < untrained.errors[-1]
    assert trained.errors[1] < trained.errors[0]
    first_of = {
        tuple(codes): cluster
        for codes, cluster in zip(trained.codes.tolist(), label.tolist(), strict=True)
    }
    owners = [first_of[tuple(codes)] for codes in trained.codes.tolist()]
    # Measured 1.0; a few of 192 points may share the codes of another cluster where
    # rounding leads training elsewhere.
    assert np.mean(np.array(owners) == label) > 0.9


def test_one_seed_gives_one_result() -> None:
    values, _ = blobs(6, 8)
    one, same, other = (
        rq_vae.fit_rq_vae(values, (4, 4), seed, steps=20) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(one.codes, same.codes)
    np.testing.assert_array_equal(one.errors, same.errors)
    assert (one.errors != other.errors).any()


def test_gradients_pass_straight_through_to_encoder_decoder_and_books() -> None:
    values, _ = blobs(6, 20)
    x = jnp.asarray(values)
    weights = rq_vae._start(x, (4, 5), jax.random.key(0))
    gradients, _ = jax.grad(rq_vae._loss, has_aux=True)(weights, x)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))
    # Without the reconstruction error, a code word moves towards the mean of the
    # residuals that chose it.
    z = rq_vae._apply(weights.encoder, x)
    book = weights.books[0]

    def loss(book: jax.Array) -> jax.Array:
        return rq_vae._quantize([book], z).loss

    code = np.asarray(rq_vae._quantize([book], z).codes[0])
    expected = np.stack(
        [
            2 * (np.asarray(book)[k] - np.asarray(z)[code == k]).sum(axis=0) / z.size
            for k in range(len(book))
        ]
    )
    # Two orders of float32 sums over 120 vectors. Measured 1.8e-7; the bound leaves
    # fifty times as much for another processor.
    np.testing.assert_allclose(jax.grad(loss)(book), expected, atol=1e-5)


def test_commitment_pulls_the_encoder_a_quarter_as_hard() -> None:
    z, book = jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 0.0], [9.0, 9.0]])
    to_encoder = jax.grad(lambda z: rq_vae._quantize([book], z).loss)(z)
    to_book = jax.grad(lambda b: rq_vae._quantize([b], z).loss)(book)
    # Measured 0: the values are powers of two. One unit in the last place is allowed.
    np.testing.assert_allclose(to_encoder, -rq_vae.BETA * to_book[:1], atol=1e-7)


def test_dead_codes_restart_at_residuals_of_the_batch() -> None:
    values, _ = blobs(8, 16)
    table = jnp.asarray(values / values.std())
    weights = rq_vae._start(table, (8,), jax.random.key(0))
    dead = weights._replace(books=[weights.books[0].at[4:].set(1e3)])
    optimizer = optax.adam(1e-3)
    for restarts, used in ((False, 4), (True, 8)):
        draws = (jax.random.key(1), jnp.asarray(restarts))
        trained, _ = rq_vae._train_block(
            optimizer, dead, optimizer.init(dead), table, draws, 5
        )
        near = np.abs(np.asarray(trained.books[0])).max(axis=1) < 100
        assert near.sum() == used
