"""The two probes of `signal_probe.py`: ridge regression and a small MLP.

n entities, e numbers read of an entity, k outputs.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Penalties of the ridge regression, per entity and unit of a feature's variance.
RIDGES = np.array([1e-6, 1e-4, 1e-2, 1e-1, 1.0, 10.0])

# The MLP: width of its hidden layer, and its training in rounds of steps. After each
# round it is judged on the entities that choose the best round.
HIDDEN = 128
ROUNDS = 20
STEPS = 50
BATCH = 512
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-2

type _Weights = dict[str, jax.Array]


def fit_ridges(inputs: np.ndarray, targets: np.ndarray) -> list[np.ndarray]:
    """Fit a ridge regression for each penalty, in closed form.

    With `X: [n, e]` and `Y: [n, k]`, both centred:

        W(ridge) = (X^T X / n + ridge I)^-1 X^T Y / n

    Args:
      inputs: `[n, e]`, centred.
      targets: `[n, k]`, centred.

    Returns:
      `[e, k]` for each of `RIDGES`.
    """
    # One eigendecomposition serves all penalties: they only shift the eigenvalues.
    roots, axes = np.linalg.eigh(inputs.T @ inputs / len(inputs))
    projected = axes.T @ (inputs.T @ targets) / len(inputs)
    return [
        axes @ (projected / (np.maximum(roots, 0) + ridge)[:, None]) for ridge in RIDGES
    ]


def predict_mlp(
    inputs: np.ndarray,
    target: np.ndarray,
    present: np.ndarray,
    start: np.ndarray,
    fit: np.ndarray,
    choose: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Train an MLP on some entities and return its outputs for all.

    With one output the loss is the squared error, with several the cross-entropy.

    Args:
      inputs: `[n, e]`, standardised.
      target: `[n]`, float32 values or integer classes.
      present: `[n] bool`, False where the target is missing.
      start: `[k]`, the output before training.
      fit: indices of the entities to train on.
      choose: indices of the entities that choose the best round.
      seed: seed of weights and batches.

    Returns:
      `[n, k] float64`.
    """
    outputs = _fit_mlp(
        jax.random.key(seed),
        jnp.asarray(inputs, jnp.float32),
        jnp.asarray(target),
        jnp.asarray(present, jnp.float32),
        jnp.asarray(start, jnp.float32),
        jnp.asarray(fit),
        jnp.asarray(choose),
    )
    return np.asarray(outputs).astype(np.float64)


def _mlp(weights: _Weights, inputs: jax.Array) -> jax.Array:
    hidden = jax.nn.gelu(inputs @ weights["inner"] + weights["inner_bias"])
    return hidden @ weights["outer"] + weights["outer_bias"]


def _loss(
    weights: _Weights, inputs: jax.Array, target: jax.Array, present: jax.Array
) -> jax.Array:
    """Mean loss over the entities whose target is present."""
    out = _mlp(weights, inputs)
    if out.shape[1] == 1:
        losses = jnp.square(out[:, 0] - target)
    else:
        losses = optax.softmax_cross_entropy_with_integer_labels(out, target)
    return jnp.sum(losses * present) / jnp.maximum(jnp.sum(present), 1)


@jax.jit
def _fit_mlp(
    key: jax.Array,
    inputs: jax.Array,
    target: jax.Array,
    present: jax.Array,
    start: jax.Array,
    fit: jax.Array,
    choose: jax.Array,
) -> jax.Array:
    """Train with AdamW and a cosine schedule; see `predict_mlp` for the arguments.

    The result is that of the weights of the round with the least loss on `choose`, or
    of the initial weights if no round is better.
    """
    weights_key, batches_key = jax.random.split(key)
    width = inputs.shape[1]
    # An outer layer of zeros makes `start` the output before training.
    weights: _Weights = {
        "inner": jax.random.normal(weights_key, (width, HIDDEN)) * width**-0.5,
        "inner_bias": jnp.zeros(HIDDEN),
        "outer": jnp.zeros((HIDDEN, len(start))),
        "outer_bias": start,
    }
    schedule = optax.cosine_decay_schedule(LEARNING_RATE, ROUNDS * STEPS)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    chooser_loss = functools.partial(
        _loss, inputs=inputs[choose], target=target[choose], present=present[choose]
    )

    def train_step(
        carry: tuple[_Weights, optax.OptState], key: jax.Array
    ) -> tuple[tuple[_Weights, optax.OptState], None]:
        weights, state = carry
        # Batches are drawn with replacement from the entities to train on.
        batch = fit[jax.random.randint(key, (min(BATCH, len(fit)),), 0, len(fit))]
        gradient = jax.grad(_loss)(
            weights, inputs[batch], target[batch], present[batch]
        )
        updates, state = optimizer.update(gradient, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    def train_round(
        carry: tuple[_Weights, optax.OptState, _Weights, jax.Array], keys: jax.Array
    ) -> tuple[tuple[_Weights, optax.OptState, _Weights, jax.Array], None]:
        weights, state, best, least = carry
        (weights, state), _ = jax.lax.scan(train_step, (weights, state), keys)
        loss = chooser_loss(weights)
        best = jax.tree.map(
            lambda new, old: jnp.where(loss < least, new, old), weights, best
        )
        return (weights, state, best, jnp.minimum(loss, least)), None

    keys = jax.random.split(batches_key, (ROUNDS, STEPS))
    carry = (weights, optimizer.init(weights), weights, chooser_loss(weights))
    (_, _, best, _), _ = jax.lax.scan(train_round, carry, keys)
    return _mlp(best, inputs)
