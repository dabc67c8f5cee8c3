"""Pure functions of one step: loss, gradients, train step, evaluation step.

A train step looks up each distinct table row of its batch once, takes gradients with
respect to the dense weights and to these rows, clips them by their joint norm, and
updates the weights with AdamW and the rows with row-wise AdaGrad. A table itself is never
differentiated: its gradient would be as large as the table.

B samples, N scored positions of each, K tasks, u distinct rows of a stack of tables.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokenrec.data.batch import Batch
from tokenrec.losses import (
    label_counts,
    sample_losses,
    with_aligned,
    with_negatives,
)
from tokenrec.micro_batches import (
    Inverses,
    cached_parts,
    join_samples,
    micro_batch_count,
    micro_batches,
)
from tokenrec.ops.layers import sample_keys
from tokenrec.ops.tables.api import UniqueRows
from tokenrec.optim import count_steps, count_updates
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.task_losses import predict_tasks
from tokenrec.tokens.embed import inverses
from tokenrec.tokens.id_dropout import drop_ids
from tokenrec.tuning import split_frozen
from tokenrec.update import apply_gradients

# Numbers that are folded into the key of a step.
DROPOUT_KEY = 0
NEGATIVES_KEY = 1
ID_DROPOUT_KEY = 2
ALIGNMENT_KEY = 3


class Metrics(NamedTuple):
    """Scalars of a step. They stay on the devices until the loop fetches them.

    Attributes:
      loss: mean loss of the batch.
      grad_norm: norm of all gradients before clipping.
      examples: positions that carry loss.
      applied: False if the update was not made, because loss or gradient was not finite
        or the gradient was a spike (`optim.spike_norm`).
      rounds: rounds in which the rows of spread tables were exchanged: 0 without such
        tables, 1 as a rule, more if the ids of a batch lie on few devices.
    """

    loss: jax.Array
    grad_norm: jax.Array
    examples: jax.Array
    applied: jax.Array
    rounds: jax.Array


class Inputs(NamedTuple):
    """Inputs of the loss of a train step besides the dense weights.

    Attributes:
      batch: the batch, with drawn negatives if the softmax is sampled, with the items of
        alignment tasks, and with the ids that `tokens.id_dropout` leaves.
      keys: `[B]`, PRNG keys of dropout.
      unique: which rows of each stack of tables the batch reads.
      rows: `[u, width]` per stack, these rows.
      counts: `label_counts` of the batch.
    """

    batch: Batch
    keys: jax.Array
    unique: dict[str, UniqueRows]
    rows: dict[str, jax.Array]
    counts: jax.Array


def forward(
    model: ModelSpec,
    params: dict[str, jax.Array],
    rows: dict[str, jax.Array],
    row_indices: Inverses,
    batch: Batch,
    keys: jax.Array | None,
) -> jax.Array:
    """Compute the logits of ranking.

    Args:
      model: the static half of the model.
      params: dense weights by name.
      rows: `[u, width]` per stack, the distinct table rows of the batch.
      row_indices: which of these rows each id of the batch is.
      batch: features and masks.
      keys: `[B]`, PRNG keys of dropout; None in evaluation.

    Returns:
      `[B, N, O] float32`, `[B, N, K]` if all tasks are binary.
    """
    module = bind_params(model, params)
    entities = model.embedder.entities(rows, row_indices, batch)
    return module.head(module(entities, batch, keys))


def loss_fn(
    params: dict[str, jax.Array],
    rows: dict[str, jax.Array],
    model: ModelSpec,
    row_indices: Inverses,
    batch: Batch,
    counts: jax.Array,
    keys: jax.Array | None,
) -> jax.Array:
    """Compute the loss of a batch, or its share of the loss for a micro-batch.

    Args:
      params: dense weights by name.
      rows: `[u, width]` per stack, the distinct table rows of the batch.
      model: the static half of the model.
      row_indices: which of these rows each id of the batch is.
      batch: features, masks, labels or goals.
      counts: `label_counts` of the whole step.
      keys: `[B]`, PRNG keys of dropout; None for none.

    Returns:
      `[] float32`.
    """
    module = bind_params(model, params, sums=model.config.optim.gradient_sums)
    entities = model.embedder.entities(rows, row_indices, batch)
    readouts = module(entities, batch, keys)
    losses = sample_losses(model, module, readouts, entities, batch, counts, keys)
    return jnp.sum(losses)


def draw_inputs(
    model: ModelSpec, state: TrainState, batch: Batch
) -> tuple[Batch, jax.Array, jax.Array]:
    """Draw the random numbers of the next step.

    Returns:
      The batch with drawn items and without dropped ids; `[B]`, PRNG keys of dropout; and
      `label_counts` of the batch.
    """
    # The key is a function of seed and step, so a resumed run draws the same numbers.
    key = jax.random.fold_in(jax.random.key(model.config.seed), state.step)
    # Micro-batches have no part in it: negatives are those of the whole batch, and every
    # sample has a key of dropout.
    batch = with_negatives(model, batch, jax.random.fold_in(key, NEGATIVES_KEY))
    batch = with_aligned(model, batch, jax.random.fold_in(key, ALIGNMENT_KEY))
    keys = sample_keys(jax.random.fold_in(key, DROPOUT_KEY), batch.valid.shape[0])
    drop_keys = jax.random.fold_in(key, ID_DROPOUT_KEY)
    batch = drop_ids(
        batch,
        model.embedder.parts,
        model.config.tokens,
        sample_keys(drop_keys, batch.valid.shape[0]),
    )
    return batch, keys, label_counts(model, batch)


def look_up_rows(
    model: ModelSpec,
    state: TrainState,
    batch: Batch,
    keys: jax.Array,
    counts: jax.Array,
) -> Inputs:
    """Add the table rows of a batch to what `draw_inputs` returned."""
    unique = model.embedder.find(batch)
    rows = model.embedder.gather(state.tables, unique)
    return Inputs(batch, keys, unique, rows, counts)


def step_inputs(model: ModelSpec, state: TrainState, batch: Batch) -> Inputs:
    """Prepare the inputs of the next step: draw keys and negatives, look up table rows."""
    return look_up_rows(model, state, *draw_inputs(model, state, batch))


def gradients(
    model: ModelSpec, params: dict[str, jax.Array], inputs: Inputs
) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Compute the loss of a step and its gradients.

    Returns:
      The loss, `[]`; and the gradients of the trained dense weights by name and of the
      table rows, `[u, width]` per stack.
    """
    batch, keys, unique, rows, counts = inputs
    row_indices = inverses(unique)
    count = micro_batch_count(model, batch)
    params, frozen = split_frozen(model.config, params)

    def loss(trained: dict[str, jax.Array], *others: Any) -> jax.Array:
        return loss_fn(frozen | trained, *others)

    loss_and_gradients = jax.value_and_grad(loss, argnums=(0, 1))
    if count == 1:
        return loss_and_gradients(params, rows, model, row_indices, batch, counts, keys)

    # Losses are divided by the counts of the whole step, and every micro-batch meets
    # all negatives, so the shares just add up.
    def add(
        total: Any, piece: tuple[Batch, Inverses, jax.Array | None]
    ) -> tuple[Any, None]:
        part, part_indices, part_keys = piece
        share = loss_and_gradients(
            params, rows, model, part_indices, part, counts, part_keys
        )
        return jax.tree.map(jnp.add, total, share), None

    zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), (params, rows)))
    pieces = micro_batches(batch, row_indices, keys, count)
    return jax.lax.scan(add, zero, pieces)[0]


def train_step(
    model: ModelSpec, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """Make the update of a step, or its updates with `model.updates` above 1.

    An update whose loss or gradient is not finite, or whose gradient is a spike, changes
    nothing.
    """
    batch, keys, counts = draw_inputs(model, state, batch)
    if model.updates == 1:
        inputs = look_up_rows(model, state, batch, keys, counts)
        new_state, metrics = _update(model, state, inputs, state.step)
    else:
        new_state, metrics = _make_updates(model, state, batch, keys, counts)
    return dataclasses.replace(new_state, step=state.step + 1), metrics


def _make_updates(
    model: ModelSpec,
    state: TrainState,
    batch: Batch,
    keys: jax.Array,
    counts: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Make k updates, each on every k-th sample, at the rates of `optim.py`.

    Returns:
      The state, and metrics of the step: the sum of the losses, which are shares of that
      of the step, and the mean of the gradient norms. `applied` is False if any of the
      updates was not made.
    """
    updates = model.updates
    parts = micro_batches(batch, {}, keys, updates)[::2]
    numbers = state.step * updates + jnp.arange(updates, dtype=jnp.int32)

    def update(
        state: TrainState, piece: tuple[Batch, jax.Array | None, jax.Array]
    ) -> tuple[TrainState, Metrics]:
        part, part_keys, number = piece
        assert part_keys is not None
        inputs = look_up_rows(model, state, part, part_keys, counts)
        return _update(model, state, inputs, number)

    dense = count_updates(state.opt_state["dense"], updates)
    state = dataclasses.replace(state, opt_state=state.opt_state | {"dense": dense})
    state, metrics = jax.lax.scan(update, state, (*parts, numbers))
    dense = count_steps(state.opt_state["dense"], updates)
    state = dataclasses.replace(state, opt_state=state.opt_state | {"dense": dense})
    return state, Metrics(
        loss=jnp.sum(metrics.loss),
        grad_norm=jnp.mean(metrics.grad_norm),
        examples=jnp.sum(metrics.examples),
        applied=jnp.all(metrics.applied),
        rounds=jnp.max(metrics.rounds),
    )


def _update(
    model: ModelSpec, state: TrainState, inputs: Inputs, number: jax.Array
) -> tuple[TrainState, Metrics]:
    """Make one update; `number` counts those before it. The step number stays."""
    # 1. Gradients of dense weights and of the distinct rows of the batch.
    loss, (dense, by_row) = gradients(model, state.params, inputs)
    if model.updates > 1:
        # Losses are divided by the counts of the whole step: see `optim.py`.
        root = math.sqrt(model.updates)
        dense, by_row = jax.tree.map(lambda g: g * root, (dense, by_row))

    # 2. Clipping, AdamW, AdaGrad; or nothing, if the gradients are bad.
    new_state, norm, applied = apply_gradients(
        model, state, inputs.unique, loss, dense, by_row, number
    )
    rounds = jnp.int32(0)
    if inputs.unique:
        rounds = jnp.max(jnp.stack([u.rounds for u in inputs.unique.values()]))
    examples = jnp.sum((inputs.batch.weight > 0).astype(jnp.float32))
    return new_state, Metrics(loss, norm, examples, applied, rounds)


def step_loss(model: ModelSpec, state: TrainState, batch: Batch) -> jax.Array:
    """Forward pass of a train step without dropout, for counting its FLOPs."""
    batch = with_negatives(model, batch, jax.random.key(0))
    batch = with_aligned(model, batch, jax.random.key(0))
    unique = model.embedder.find(batch)
    rows = model.embedder.gather(state.tables, unique)
    counts = label_counts(model, batch)
    return loss_fn(state.params, rows, model, inverses(unique), batch, counts, None)


def eval_step(model: ModelSpec, state: TrainState, batch: Batch) -> jax.Array:
    """Compute the predictions of `predict_tasks`, `[B, N, O] float32`.

    These are probabilities `[B, N, K]` if all tasks are binary. Positions of weight 0
    are padding; the caller drops them.
    """
    unique = model.embedder.find(batch)
    rows = model.embedder.gather(state.tables, unique)

    def logits(batch: Batch, row_indices: Inverses) -> jax.Array:
        return forward(model, state.params, rows, row_indices, batch, None)

    row_indices = inverses(unique)
    count = cached_parts(model, batch, batch.valid.shape[0])
    if count == 1:
        return predict_tasks(model.task_plans, logits(batch, row_indices))
    parts = micro_batches(batch, row_indices, None, count)[:2]
    joined = join_samples(jax.lax.map(lambda part: logits(*part), parts))
    return predict_tasks(model.task_plans, joined)
