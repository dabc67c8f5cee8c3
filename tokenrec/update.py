"""Apply the gradients of an update: clip them, and update dense weights and table rows."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from tokenrec.ops.tables.api import UniqueRows, collect_gradients, update_rows
from tokenrec.optim import (
    clip_scale,
    dense_optimizer,
    global_norm,
    table_rate,
    with_schedule_step,
)
from tokenrec.state import ModelSpec, TrainState
from tokenrec.tuning import rate_factor, split_frozen

# Rate of the running mean of gradient norms: it remembers about 100 steps.
NORM_RATE = 0.01

# With `tokens.random_tokens`, only weights with these prefixes are trained.
TRAINED_WITH_RANDOM_TOKENS = ("backbone/", "branch/", "head/")


def apply_gradients(
    model: ModelSpec,
    state: TrainState,
    unique: dict[str, UniqueRows],
    loss: jax.Array,
    dense: dict[str, jax.Array],
    by_row: dict[str, jax.Array],
    number: jax.Array,
) -> tuple[TrainState, jax.Array, jax.Array]:
    """Clip gradients by their joint norm, and update weights and table rows with them.

    Args:
      model: the model.
      state: the state before the update.
      unique: which rows of each stack of tables the batch reads.
      loss: `[] float32`; the update is not made if it is not finite.
      dense: gradients of the dense weights, by name.
      by_row: `[u, width]` per stack, gradients of these rows.
      number: `[] int32`, updates before this one, by which the schedules go.

    Returns:
      The state, whose step number stays; the norm before clipping, `[] float32`; and
      whether the update was made, `[] bool`.
    """
    optim = model.config.optim

    # 1. Gradients of a row that several devices looked up are summed.
    collected = {
        name: collect_gradients(model.embedder.stacks[name], found, by_row[name])
        for name, found in unique.items()
    }

    # 2. The joint norm decides whether the update is made and how far it is clipped.
    norm = global_norm(dense, collected)
    applied, norm_mean = _check_norm(model, state, loss, norm)
    scale = jnp.where(applied, clip_scale(norm, optim.clip_norm), 0.0)
    # Gradients of a bad step are replaced, not scaled: 0 x inf is NaN.
    row_gradients = {name: of.gradients for name, of in collected.items()}
    dense, by_row, row_gradients = jax.tree.map(
        lambda g: jnp.where(applied, g * scale, 0.0), (dense, by_row, row_gradients)
    )
    if model.updates > 1:
        # A sample weighs what it weighs in the whole batch: see `optim.py`.
        root = math.sqrt(model.updates)
        by_row, row_gradients = jax.tree.map(
            lambda g: g / root, (by_row, row_gradients)
        )

    # 3. AdamW on the dense weights.
    params, dense_state = _update_params(model, state, dense, applied, number)

    # 4. Row-wise AdaGrad on the rows. A skipped step sends their ids out of range, so
    # that no table is copied.
    rate = table_rate(optim, model.epoch_steps, number, model.updates)
    tables = dict(state.tables)
    rows_state = dict(state.opt_state["rows"])
    for name, found in unique.items():
        tables[name], rows_state[name] = update_rows(
            model.embedder.stacks[name],
            tables[name],
            rows_state[name],
            found,
            by_row[name],
            collected[name]._replace(gradients=row_gradients[name]),
            rate=rate,
            decay=optim.table_weight_decay,
            apply=applied,
        )

    opt_state = {"dense": dense_state, "rows": rows_state} | norm_mean
    return TrainState(state.step, params, tables, opt_state), norm, applied


def _check_norm(
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


def _update_params(
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
    trained, frozen = split_frozen(model.config, state.params)
    # One clock for both rates: the tables follow it too.
    updates, new_state = dense_optimizer(model.config.optim, model.updates).update(
        dense, with_schedule_step(old_state, number), trained
    )
    if model.config.tuning.rates:
        # An update is the rate times a step, weight decay included.
        updates = {
            name: u * rate_factor(model.config, name) for name, u in updates.items()
        }
    if model.config.tokens.random_tokens:
        # Weight decay would move weights that have no gradient.
        updates = {
            name: u
            if name.startswith(TRAINED_WITH_RANDOM_TOKENS)
            else jnp.zeros_like(u)
            for name, u in updates.items()
        }
    params = jax.tree.map(lambda w, u: jnp.where(applied, w + u, w), trained, updates)
    kept_state = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old), new_state, old_state
    )
    return params | frozen, kept_state
