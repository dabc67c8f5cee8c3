"""Schedules, AdamW for the dense weights, and the joint clip norm. Row-wise AdaGrad is in `ops/lookup.py`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from tokenrec.config import OptimConfig
from tokenrec.ops.tables.exchange import CollectedGradients

# Last part of the name of weights that decay would only bias, besides those that end in "bias".
UNDECAYED = ("scale", "separators", "start")


def schedule(config: OptimConfig, peak: float) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then cosine to `final_fraction * peak` at `steps`.

    >>> rate = schedule(OptimConfig(steps=100, warmup_steps=10), 1.0)
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 55, 100)]
    [0.1, 0.6, 1.0, 0.5, 0.0]
    """
    warmup, steps = config.warmup_steps, config.steps

    def rate(step: jax.Array | int) -> jax.Array:
        rising = (jnp.asarray(step, jnp.float32) + 1) / max(warmup, 1)
        share = jnp.clip(
            (jnp.asarray(step, jnp.float32) - warmup) / max(steps - warmup, 1), 0, 1
        )
        cosine = config.final_fraction + (1 - config.final_fraction) * 0.5 * (
            1 + jnp.cos(jnp.pi * share)
        )
        return peak * jnp.where(share > 0, cosine, jnp.minimum(rising, 1.0))

    return rate


def decays(params: dict[str, jax.Array]) -> dict[str, bool]:
    """Which weights decay: matrices, less biases (the gate's included), norm scales and separators."""
    return {
        name: not name.endswith("bias") and name.rsplit("/", 1)[-1] not in UNDECAYED
        for name in params
    }


def dense_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, 2019) on a flat dict of weights; clipping happens before, jointly with the rows."""
    return optax.adamw(
        schedule(config, config.learning_rate),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
    )


def global_norm(
    gradients: dict[str, jax.Array], rows: dict[str, CollectedGradients]
) -> jax.Array:
    """Euclidean norm of the dense gradients and of the gradient of each row, together."""
    leaves = [*gradients.values(), *(some.gradients for some in rows.values())]
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves]
    return jnp.sqrt(sum(squares) + sum(some.squares for some in rows.values()))


def clip_scale(norm: jax.Array, limit: float) -> jax.Array:
    """Factor that brings a gradient of this norm to at most `limit`; 1 where `limit` is 0."""
    return (
        jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
        if limit
        else jnp.ones_like(norm)
    )
