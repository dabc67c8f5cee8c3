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

**Updates on a share of the batch.** With `train.elastic="scale"` a step may make k updates,
each on 1/k of its samples (elastic.py). The clock is then a fraction, t + i / k in update
i, so that the schedules end after the same number of samples. Rates follow the
square-root rule of Adam (Malladi et al., arXiv 2205.10287, section 5): with B / k samples,
the noise of a gradient, which decides Adam's denominator, grows by sqrt(k), and k updates
at r / sqrt(k) move as far as one at r. In full, with G the gradient of the mean loss of a
share, divided by sqrt(k):

    dense weights   AdamW on G, rate r / sqrt(k), betas to the power 1 / k, decay / sqrt(k)
    table rows      row-wise AdaGrad on G / sqrt(k), rate r

G has the noise of the whole batch's gradient, so that the clip norm, `spike_norm`, epsilon
and the second moments keep their meaning over a change of devices. Betas to the power
1 / k remember as many samples as before (Busbridge et al., arXiv 2307.13813), which is the
1 - (1 - beta) / k of Malladi et al. to first order, and the decay of a weight over k
updates is that of one. For rows, G / sqrt(k) weighs each sample as the whole batch would:
a row that occurs in one sample of a step, as nearly all rows of a large table do, gets
the update and the AdaGrad sum that it had; for a row in every share AdaGrad adds up
squares that are k times smaller each, and moves as far, where noise outweighs the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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


def schedule(config: OptimConfig, peak: float, updates: int = 1) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, then a cosine that ends at `steps`.

    Args:
      config: `steps`, `warmup_steps` and `final_fraction`.
      peak: the rate at the end of the warm-up.
      updates: updates of a step, k.

    Returns:
      A function of the number of updates before, a Python integer or a traced array:
      with one update a step, of the step number.

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
        if updates > 1:
            step = jnp.asarray(step, jnp.float32) / updates
        rising = (jnp.asarray(step, jnp.float32) + 1) / max(warmup, 1)
        share = (jnp.asarray(step, jnp.float32) - warmup) / decay_steps
        share = jnp.clip(share, 0, 1)
        cosine = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * share))
        return peak * jnp.where(share > 0, cosine, jnp.minimum(rising, 1.0))

    return rate


def table_rate(
    config: OptimConfig, epoch_steps: int, step: jax.Array | int, updates: int = 1
) -> jax.Array:
    """Compute the learning rate of the embedding tables.

    Args:
      config: schedule, peak and `table_rates`.
      epoch_steps: steps of an epoch; read with `table_rates` only.
      step: number of updates before: with one update a step, the step number.
      updates: updates of a step, k.

    Returns:
      `[] float32`.

    Raises:
      InputError: `table_rates` is set and the steps of an epoch are not known.

    >>> config = OptimConfig(steps=100, warmup_steps=0, table_rates=(1.0, 0.5, 0.0))
    >>> config.table_learning_rate, config.final_fraction = 1.0, 1.0
    >>> [float(table_rate(config, 10, step)) for step in (0, 9, 10, 19, 20, 99)]
    [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    """
    rate = schedule(config, config.table_learning_rate, updates)(step)
    if not config.table_rates:
        return rate
    if epoch_steps < 1:
        raise InputError(
            f"optim.table_rates={config.table_rates} follow epochs, and the model does "
            "not know their steps; build it with epoch_steps"
        )
    epoch = jnp.asarray(step, jnp.int32) // (epoch_steps * updates)
    factors = jnp.asarray(config.table_rates, jnp.float32)
    return rate * factors[jnp.minimum(epoch, len(config.table_rates) - 1)]


def decays(params: dict[str, jax.Array]) -> dict[str, bool]:
    """Mask of the weights that decay: all but biases, norm scales and separators."""
    return {
        name: not name.endswith("bias")
        and name.rsplit("/", 1)[-1] not in NO_DECAY_NAMES
        for name in params
    }


def dense_rate(config: OptimConfig, updates: int = 1) -> optax.Schedule:
    """`schedule` of the dense weights, whose peak falls with the square root of k."""
    return schedule(config, config.learning_rate / math.sqrt(updates), updates)


def dense_optimizer(
    config: OptimConfig, updates: int = 1
) -> optax.GradientTransformation:
    """AdamW on a flat dict of weights.

    Gradients arrive clipped: the clip norm covers dense weights and table rows together.
    Pass the state through `with_schedule_step` before an update.

    Args:
      config: rates, betas and decay of one update a step.
      updates: updates of a step, k; its gradients arrive divided by sqrt(k).
    """
    return optax.adamw(
        dense_rate(config, updates),
        b1=config.beta1 ** (1 / updates),
        b2=config.beta2 ** (1 / updates),
        eps=config.epsilon,
        weight_decay=config.weight_decay / math.sqrt(updates),
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


def count_updates(state: Any, updates: int) -> Any:
    """Turn the counts of a state of `dense_optimizer` from steps into updates.

    A checkpoint counts steps, so that Adam's bias correction, 1 - beta^count, is the
    same before and after a change of k: (beta^(1/k))^(k count) = beta^count.
    """
    return _map_counts(state, lambda count: count * updates)


def count_steps(state: Any, updates: int) -> Any:
    """Undo `count_updates`, after the updates of a step."""
    return _map_counts(state, lambda count: count // updates)


def _map_counts(state: Any, function: Callable[[jax.Array], jax.Array]) -> Any:
    kinds = (optax.ScaleByScheduleState, optax.ScaleByAdamState)

    def map_count(node: Any) -> Any:
        if not isinstance(node, kinds):
            return node
        return node._replace(count=function(node.count))

    return jax.tree.map(map_count, state, is_leaf=lambda node: isinstance(node, kinds))


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
