"""Schedules, AdamW for the dense weights, and the joint clip norm.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) updates the dense weights; row-wise
AdaGrad, in `ops/tables/lookup.py`, the embedding tables. Both follow one schedule: linear
warm-up to the peak rate r, then a cosine to a fraction f of it; `table_rates` multiply
that of the tables, epoch by epoch. Its clock t is
`TrainState.step`, the batches consumed: a skipped step moves the rates on as it does the
data, and both rates end at `optim.steps`. Adam's bias correction alone counts the updates
that were made, because its moments are sums over these.

    t < warmup:  r * (t + 1) / warmup
    else:        r * (f + (1 - f) / 2 * (1 + cos(pi * (t - warmup) / (steps - warmup))))
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from tokenrec.config import OptimConfig
from tokenrec.errors import InputError
from tokenrec.ops.tables.exchange import CollectedGradients

# Last part of the names of weights that are excluded from weight decay, besides all
# names that end in "bias": norm scales, separator tokens and the generative start token.
NO_DECAY_NAMES = ("scale", "separators", "start")


def schedule(config: OptimConfig, peak: float) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then a cosine that ends at `steps`.

    Args:
      config: `steps`, `warmup_steps` and `final_fraction`.
      peak: the rate at the end of the warm-up.

    Returns:
      A function of the step number, a Python integer or a traced array.

    Raises:
      InputError: the steps of `epochs` have not been counted (run_length.py).

    >>> rate = schedule(OptimConfig(steps=100, warmup_steps=10), 1.0)
    >>> [round(float(rate(step)), 3) for step in (0, 5, 10, 55, 100)]
    [0.1, 0.6, 1.0, 0.5, 0.0]
    """
    if config.steps < 1:
        raise InputError(
            f"optim.epochs={config.epochs:g} is no number of steps yet, which a "
            "schedule needs; count them with tokenrec.run_length.with_steps, or set "
            "optim.steps"
        )
    warmup = config.warmup_steps
    decay_steps = max(config.steps - warmup, 1)
    final = config.final_fraction

    def rate(step: jax.Array | int) -> jax.Array:
        rising = (jnp.asarray(step, jnp.float32) + 1) / max(warmup, 1)
        share = (jnp.asarray(step, jnp.float32) - warmup) / decay_steps
        share = jnp.clip(share, 0, 1)
        cosine = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        return peak * jnp.where(share > 0, cosine, jnp.minimum(rising, 1.0))

    return rate


def table_rate(
    config: OptimConfig, epoch_steps: int, step: jax.Array | int
) -> jax.Array:
    """Compute the learning rate of the embedding tables.

    Args:
      config: schedule, peak and `table_rates`.
      epoch_steps: steps of an epoch; read with `table_rates` only.
      step: the step number.

    Returns:
      `[] float32`.

    Raises:
      InputError: `table_rates` is set and the steps of an epoch are not known.

    >>> config = OptimConfig(steps=100, warmup_steps=0, table_rates=(1.0, 0.5, 0.0))
    >>> config.table_learning_rate, config.final_fraction = 1.0, 1.0
    >>> [float(table_rate(config, 10, step)) for step in (0, 9, 10, 19, 20, 99)]
    [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    """
    rate = schedule(config, config.table_learning_rate)(step)
    if not config.table_rates:
        return rate
    if epoch_steps < 1:
        raise InputError(
            f"optim.table_rates={config.table_rates} follow epochs, and the model does "
            "not know their steps; build it with epoch_steps"
        )
    epoch = jnp.asarray(step, jnp.int32) // epoch_steps
    factors = jnp.asarray(config.table_rates, jnp.float32)
    return rate * factors[jnp.minimum(epoch, len(config.table_rates) - 1)]


def decays(params: dict[str, jax.Array]) -> dict[str, bool]:
    """Mask of the weights that decay: all but biases, norm scales and separators."""
    return {
        name: not name.endswith("bias")
        and name.rsplit("/", 1)[-1] not in NO_DECAY_NAMES
        for name in params
    }


def dense_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """AdamW on a flat dict of weights.

    Gradients arrive clipped: the clip norm covers dense weights and table rows together.
    Pass the state through `with_schedule_step` before an update.
    """
    return optax.adamw(
        schedule(config, config.learning_rate),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decays,
    )


def with_schedule_step(state: Any, step: jax.Array) -> Any:
    """Set the clock of the schedule in a state of `dense_optimizer`.

    Optax counts the updates that were made, and so falls behind by each skipped step.
    Its count stays in the state, because checkpoints hold it, but it is never read: a
    checkpoint whose count has fallen behind continues at the rate of its step.

    Args:
      state: state of the optimizer.
      step: `[] int32`, `TrainState.step`.

    Returns:
      The state with the same structure. Adam's own count is as it was.
    """

    def set_count(node: Any) -> Any:
        return node._replace(count=step) if is_schedule(node) else node

    def is_schedule(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    return jax.tree.map(set_count, state, is_leaf=is_schedule)


def global_norm(
    gradients: dict[str, jax.Array], rows: dict[str, CollectedGradients]
) -> jax.Array:
    """Compute the Euclidean norm of all gradients together.

    Args:
      gradients: of the dense weights, by name.
      rows: of the table rows, by stack; each distinct row counts once, however often it
        occurs in the batch.

    Returns:
      `[] float32`.
    """
    leaves = [*gradients.values(), *(stack.gradients for stack in rows.values())]
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves]
    # Rows of spread tables are summed where they are collected.
    return jnp.sqrt(sum(squares) + sum(stack.squares for stack in rows.values()))


def clip_scale(norm: jax.Array, limit: float) -> jax.Array:
    """Factor that scales gradients of norm `norm` to at most `limit`; 1 if it is 0."""
    if not limit:
        return jnp.ones_like(norm)
    return jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
