"""Apply the gradients of an update: decide whether it is made, and update dense weights.

Table rows are updated in `ops/tables`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tokenrec.optim import dense_optimizer, with_schedule_step
from tokenrec.state import ModelSpec, TrainState

# Rate of the running mean of gradient norms: it remembers about 100 steps.
NORM_RATE = 0.01

# With `tokens.random_tokens`, only weights with these prefixes are trained.
TRAINED_WITH_RANDOM_TOKENS = ("backbone/", "branch/", "head/")


def check_norm(
    model: ModelSpec, state: TrainState, loss: jax.Array, norm: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Decide whether to apply the update; keep the running mean of gradient norms.

    Returns:
      `[] bool`; and the new `"norm"` of the optimizer state, empty without
      `optim.spike_norm`.
    """
    spike_norm = model.config.optim.spike_norm
    applied = jnp.isfinite(loss) & jnp.isfinite(norm)
    if not spike_norm:
        return applied, {}
    mean = state.opt_state["norm"]
    # The mean is 0 before the first step, which cannot be a spike.
    applied &= (mean == 0) | (norm <= spike_norm * mean)
    rate = NORM_RATE / model.updates
    updated = jnp.where(mean == 0, norm, mean + rate * (norm - mean))
    return applied, {"norm": jnp.where(applied, updated, mean)}


def update_params(
    model: ModelSpec,
    state: TrainState,
    dense: dict[str, jax.Array],
    applied: jax.Array,
    number: jax.Array,
) -> tuple[dict[str, jax.Array], Any]:
    """Apply AdamW, or keep weights and optimizer state where `applied` is False.

    Args:
      model: the model.
      state: the state before the update.
      dense: clipped gradients of the dense weights.
      applied: `[] bool`.
      number: `[] int32`, updates before this one, by which the schedule goes.
    """
    old_state = state.opt_state["dense"]
    # One clock for both rates: the tables follow it too.
    updates, new_state = dense_optimizer(model.config.optim, model.updates).update(
        dense, with_schedule_step(old_state, number), state.params
    )
    if model.config.tokens.random_tokens:
        # Weight decay would move weights that have no gradient.
        updates = {
            name: u
            if name.startswith(TRAINED_WITH_RANDOM_TOKENS)
            else jnp.zeros_like(u)
            for name, u in updates.items()
        }
    params = jax.tree.map(
        lambda w, u: jnp.where(applied, w + u, w), state.params, updates
    )
    kept_state = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old), new_state, old_state
    )
    return params, kept_state
