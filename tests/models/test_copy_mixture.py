"""The mixture of copied and generated items, against plain loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.models.test_copying import (
    EVENTS,
    HISTORY,
    WIDTH,
    draw_readouts,
    event_vectors,
    make_copy,
    put,
    slow_bonus,
)
from tests.worlds import one_device
from tokenrec.models.copy_mixture import GATE_START, NEVER, CopyGate, CopyMixture
from tokenrec.models.heads import SemanticIdHead

# Two codes of two for each of 4 items; the histories name 7, of which 3 have no codes
# here and can only be copied.
LEVELS = (2, 2)
CODES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], np.int32)
CODED = len(CODES)


def make_gate(seed: int = 0) -> CopyGate:
    gate = CopyGate(WIDTH, rngs=nnx.Rngs(seed))
    gate.bonus = make_copy(seed)
    draw = np.random.default_rng(seed + 7)
    gate.kernel[...] = jnp.asarray(draw.normal(size=(WIDTH, 1)), jnp.float32)
    gate.bias[...] = jnp.asarray([0.3], jnp.float32)
    return gate


def apply(gate: CopyGate, h: jax.Array) -> CopyMixture:
    return gate(h, put(HISTORY), put(event_vectors(HISTORY)))


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x.astype(float) ** 2).mean(axis=-1, keepdims=True) + 1e-6)


def slow_mixture(
    gate: CopyGate, h: np.ndarray, events: np.ndarray, generated: np.ndarray
) -> np.ndarray:
    """Probabilities of the items at a read-out `h: [d]`, of `generated` ones."""
    bonuses = [
        slow_bonus(gate.bonus, h, events, item, lambda e: unit(event_vectors(e)))
        for item in range(len(generated))
    ]
    weights = np.expm1(bonuses)
    if not weights.any():
        return generated
    logit = unit(h) @ np.asarray(gate.kernel[...])[:, 0] + gate.bias[...][0]
    share = 1 / (1 + np.exp(-logit - GATE_START))
    return share * weights / weights.sum() + (1 - share) * generated


@pytest.mark.parametrize("readouts", [1, EVENTS])
def test_probabilities_are_those_of_a_loop(readouts):
    h = draw_readouts(readouts)
    shape = (*h.shape[:2], HISTORY.max() + 1)
    generated = np.random.default_rng(8).dirichlet(np.ones(shape[2]), shape[:2])
    with jax.set_mesh(one_device()):
        gate = make_gate()
        every = put(np.broadcast_to(np.arange(shape[2]), shape))
        found = apply(gate, put(h)).log_probs(
            every, put(np.log(generated).astype(np.float32))
        )
    expected = np.zeros(shape)
    for b, r in np.ndindex(shape[:2]):
        end = EVENTS if readouts == 1 else r + 1
        expected[b, r] = slow_mixture(gate, h[b, r], HISTORY[b, :end], generated[b, r])
    # The distribution is normalised, and nothing is copied from an empty history.
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(expected[2], generated[2])
    np.testing.assert_allclose(found, np.log(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("readouts", [1, EVENTS])
def test_losses_and_gradients_are_those_of_the_probabilities_of_all_items(readouts):
    """Goals in the history and not, an empty history, and fills."""
    draw = np.random.default_rng(3)
    goals = draw.integers(-1, CODED, (len(HISTORY), readouts, 2)).astype(np.int32)
    codes = np.where(goals[..., None] >= 0, CODES[np.maximum(goals, 0)], -1)
    outputs = draw.normal(size=(*goals.shape, WIDTH)).astype(np.float32)
    with jax.set_mesh(one_device()):
        head = SemanticIdHead(LEVELS, WIDTH, tied=True, copy=True, rngs=nnx.Rngs(1))
        head.copy = make_gate()
        graph, weights = nnx.split(head)
        put_goals, put_codes = put(goals), put(codes)

        def fast(weights, h, outputs):
            head = nnx.merge(graph, weights)
            # Outputs at the first codes of the goals follow the read-outs.
            flat = outputs.reshape(len(HISTORY), -1, WIDTH)
            both = jnp.concatenate([h, flat], axis=1)
            losses = head.copy_losses(both, put_codes, put_goals, apply(head.copy, h))
            return jnp.sum(losses)

        def plain(weights, h, outputs):
            """-log of lambda P_copy + (1 - lambda) P_gen, without logarithms inside."""
            head = nnx.merge(graph, weights)
            copied = apply(head.copy, h)
            here = jnp.asarray(goals[..., None] == HISTORY[:, None, None, :])
            shares = jnp.exp(copied.log_copied)[:, :, None, :]
            probabilities = jnp.sum(jnp.where(here, shares, 0), axis=-1)
            first = jax.nn.softmax(h @ head.outputs[...][:2].T)[:, :, None, :]
            second = jax.nn.softmax(outputs @ head.outputs[...][2:].T)
            for k in range(CODED):
                generated = first[..., CODES[k, 0]] * second[..., CODES[k, 1]]
                generated *= jnp.exp(copied.log_generated)[..., None]
                probabilities += jnp.where(jnp.asarray(goals == k), generated, 0)
            return -jnp.sum(jnp.log(jnp.where(goals >= 0, probabilities, 1)))

        h, outputs = put(draw_readouts(readouts)), put(outputs)
        found = jax.jit(jax.value_and_grad(fast, argnums=(0, 1, 2)))(
            weights, h, outputs
        )
        expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1, 2)))(
            weights, h, outputs
        )
    # Goals in the history, others, and fills.
    is_copied = (goals[..., None] == HISTORY[:, None, None]).any(axis=-1)
    assert {*is_copied[goals >= 0]} == {True, False}
    assert (goals < 0).any()
    assert float(expected[0]) > 1
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_losses_and_gradients_are_finite():
    """Whatever the gate says, and where weights of events underflow or are huge."""
    goals = np.stack([HISTORY[:, -1:], np.full((4, 1), 2)], axis=-1)
    with jax.set_mesh(one_device()):
        gate = make_gate()
        graph, _ = nnx.split(gate)

        def loss(weights, h, log_generated):
            copied = apply(nnx.merge(graph, weights), h)
            mixed = copied.log_probs(put(goals), log_generated)
            return -jnp.sum(jnp.where(put(goals) >= 0, mixed, 0)), copied

        compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
        h, log_generated = put(draw_readouts(1)), put(np.full(goals.shape, -300.0))
        for gate_bias, event in itertools.product((-200.0, 200.0), (-150, -60, 200)):
            gate.bias[...] = jnp.full(1, gate_bias)
            gate.bonus.bias[...] = jnp.array([event, 0.0, 5.0])
            (value, copied), slopes = compute(nnx.state(gate), h, log_generated)
            assert np.isfinite(value)
            assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
            # Without an event lambda is 0, whatever the gate says.
            assert copied.log_generated[2, 0] == 0
            assert (copied.log_copied[2] == NEVER).all()
