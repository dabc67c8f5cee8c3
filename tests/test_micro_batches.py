"""Micro-batches: how many a platform takes, and that they change nothing but rounding."""

import functools

import jax
import numpy as np
import pytest

from tests import worlds
from tests.worlds import FEW_FEATURES, TASKS, mesh_of, one_device, place, tiny
from tokenrec import micro_batches
from tokenrec.micro_batches import micro_batch_count
from tokenrec.state import build_model, init_state
from tokenrec.step import eval_step, train_step


def model_of(**optim):
    config = tiny(
        batch_size=16,
        optim=optim,
        tokens={"maker": "linear"},
        model={"layers": 1, "windows": (), "dropout": 0.3},
    )
    return build_model(config, FEW_FEATURES, TASKS)


def random_batch():
    """Labels are unevenly known, so that a mean of the parts' means would differ."""
    batch = worlds.random_batch(tiny(), batch=16, schema=FEW_FEATURES)
    batch.labels[::4] = -1
    return batch


def tokens_at_a_time(monkeypatch, count):
    """Let a CPU compute so many tokens at a time."""
    monkeypatch.setattr(micro_batches, "CACHED_NUMBERS", 0)
    monkeypatch.setattr(micro_batches, "LEAST_TOKENS", count)


def run(model, mesh, batch):
    """Two steps and a prediction, by programs of their own."""
    with jax.set_mesh(mesh):
        state, placed = init_state(model, 0), place(batch, mesh)
        step = jax.jit(train_step, static_argnums=0)
        for _ in range(2):
            state, metrics = step(model, state, placed)
        scores = jax.jit(eval_step, static_argnums=0)(model, state, placed)
        return jax.device_get((state.params, state.tables, metrics.loss, scores))


@functools.cache
def run_of_whole_batches():
    """What `run` gives where a platform takes a batch as one part."""
    return run(model_of(), one_device(), random_batch())


@pytest.mark.parametrize(
    "shape", [pytest.param((1, 1, 1), marks=pytest.mark.slow), (2, 2, 1)]
)
def test_parts_that_keep_to_the_caches_change_nothing_but_rounding(monkeypatch, shape):
    """With dropout: every sample has draws of its own, on any mesh and in any part."""
    batch, mesh = random_batch(), mesh_of(*shape)
    model = model_of()
    tokens_at_a_time(monkeypatch, 10**9)
    with jax.set_mesh(mesh):
        assert micro_batch_count(model, batch) == 1
    whole = run_of_whole_batches()
    tokens_at_a_time(monkeypatch, 1)
    with jax.set_mesh(mesh):
        assert micro_batch_count(model, batch) == 16 // (shape[0] * shape[1])
    parts = run(model, mesh, batch)
    # AdamW's first steps divide a gradient by itself, which magnifies rounding:
    # measured 6e-6.
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5)


# Parts that keep to the caches are drawn for likewise, above; accumulation multiplies their number, below.
@pytest.mark.slow
def test_accumulation_draws_the_dropout_of_the_whole_batch(monkeypatch):
    tokens_at_a_time(monkeypatch, 10**9)
    batch, mesh = random_batch(), one_device()
    whole = run_of_whole_batches()
    parts = run(model_of(accumulate=4), mesh, batch)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-5)


def test_parts_hold_the_tokens_that_fit_and_multiply_with_accumulation(monkeypatch):
    model, batch = model_of(), random_batch()
    length = model.layout(batch.valid.shape[1], candidates=1).length
    with jax.set_mesh(one_device()):
        for streams, count in ((16, 1), (15, 2), (8, 2), (5, 4), (1, 16)):
            tokens_at_a_time(monkeypatch, streams * length)
            assert micro_batch_count(model, batch) == count
        tokens_at_a_time(monkeypatch, 2 * length)
        assert micro_batch_count(model_of(accumulate=4), batch) == 8


def test_accelerators_compute_the_whole_batch(monkeypatch):
    tokens_at_a_time(monkeypatch, 1)
    batch = random_batch()
    for platform in ("tpu", "gpu"):
        monkeypatch.setattr(
            micro_batches, "current_platform", lambda name=platform: name
        )
        with jax.set_mesh(one_device()):
            assert micro_batch_count(model_of(), batch) == 1
            assert micro_batch_count(model_of(accumulate=4), batch) == 4
