"""Pure steps: loss, train step, evaluation step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokenrec.data.batch import Batch
from tokenrec.ops.lookup import update_rows
from tokenrec.optim import clip_scale, dense_optimizer, global_norm, schedule
from tokenrec.sharding import RULES
from tokenrec.state import Model, TrainState, merge

Inverses = dict[str, dict[str, jax.Array]]


class Metrics(NamedTuple):
    """Scalars of a step, on the device until the loop logs. `finite` False: the update was not made."""

    loss: jax.Array
    grad_norm: jax.Array
    examples: jax.Array
    finite: jax.Array


def known_labels(batch: Batch) -> jax.Array:
    """`[B, N, K] float32`: 1 where a row is read and its label is known."""
    return batch.weight[..., None] * (batch.labels >= 0)


def forward(
    model: Model,
    params: dict[str, jax.Array],
    rows: dict[str, jax.Array],
    inverses: Inverses,
    batch: Batch,
    key: jax.Array | None,
) -> jax.Array:
    """Logits `[B, N, K] float32`; `rows` are the unique table rows of the batch."""
    entities = model.embedder.entities(rows, inverses, batch)
    candidates = None if batch.target is None else candidate_mask(batch)
    return merge(model, params)(entities, batch.valid, candidates, key)


def candidate_mask(batch: Batch) -> jax.Array:
    """`[B, C] bool`: real candidates. Others are padding, which no row sees."""
    return batch.weight > 0


def loss_fn(
    params: dict[str, jax.Array],
    rows: dict[str, jax.Array],
    model: Model,
    inverses: Inverses,
    batch: Batch,
    counts: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    """Sum over tasks of weight x (summed BCE / known labels of the whole step), `counts: [K]` being the latter."""
    logits = forward(model, params, rows, inverses, batch, key)
    losses = optax.sigmoid_binary_cross_entropy(logits, jnp.maximum(batch.labels, 0).astype(jnp.float32))
    return jnp.sum(task_weights(model) * jnp.sum(losses * known_labels(batch), axis=(0, 1)) / jnp.maximum(counts, 1))


def task_weights(model: Model) -> jax.Array:
    given = model.config.data.tasks or {task.name: task.weight for task in model.schema.tasks}
    return jnp.array([given[name] for name in model.tasks], jnp.float32)


def _micro_batches(tree: Any, count: int) -> Any:
    """`[B, ...]` -> `[count, B / count, ...]`; takes every count-th sample, so that nothing moves between devices."""

    def cut(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0] // count, count, *leaf.shape[1:])
        spec = RULES("batch", *[None] * (len(shape) - 1))
        return jnp.moveaxis(jnp.reshape(leaf, shape, out_sharding=spec), 1, 0)

    return jax.tree.map(cut, tree)


def train_step(model: Model, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """One update. A step whose loss or gradient is not finite changes nothing but the step number."""
    optim = model.config.optim
    unique = model.embedder.unique(batch)
    rows = model.embedder.gather(state.tables, unique)
    inverses = model.embedder.inverses(batch, unique)
    counts = jnp.sum(known_labels(batch), axis=(0, 1))
    key = jax.random.fold_in(jax.random.key(model.config.seed), state.step)
    gradient = jax.value_and_grad(loss_fn, argnums=(0, 1))
    if optim.accumulate == 1:
        loss, (dense, by_row) = gradient(state.params, rows, model, inverses, batch, counts, key)
    else:

        def add(total: Any, piece: tuple[Batch, Inverses, jax.Array]) -> tuple[Any, None]:
            part, inverse, number = piece
            made = gradient(state.params, rows, model, inverse, part, counts, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, made), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), (state.params, rows)))
        pieces = _micro_batches((batch, inverses), optim.accumulate)
        (loss, (dense, by_row)), _ = jax.lax.scan(add, zero, (*pieces, jnp.arange(optim.accumulate)))

    norm = global_norm(dense, by_row)
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    scale = jnp.where(finite, clip_scale(norm, optim.clip_norm), 0.0)
    # 0 x inf is NaN, so gradients of a bad step are replaced, not scaled; they are small beside a table.
    dense, by_row = jax.tree.map(lambda g: jnp.where(finite, g * scale, 0.0), (dense, by_row))

    updates, dense_state = dense_optimizer(optim).update(dense, state.opt_state["dense"], state.params)
    params = jax.tree.map(lambda w, u: jnp.where(finite, w + u, w), state.params, updates)
    dense_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), dense_state, state.opt_state["dense"])
    rate = schedule(optim, optim.table_learning_rate)(state.step)
    tables, rows_state = dict(state.tables), dict(state.opt_state["rows"])
    for name in model.embedder.stacks:
        tables[name], rows_state[name] = update_rows(
            tables[name],
            rows_state[name],
            unique[name].ids,
            by_row[name],
            rate=rate,
            decay=optim.table_weight_decay,
            apply=finite,
        )
    new = TrainState(state.step + 1, params, tables, {"dense": dense_state, "rows": rows_state})
    return new, Metrics(loss, norm, jnp.sum(batch.weight), finite)


def eval_step(model: Model, state: TrainState, batch: Batch) -> jax.Array:
    """Probabilities `[B, N, K] float32` of every row; the caller drops those of weight 0."""
    unique = model.embedder.unique(batch)
    rows = model.embedder.gather(state.tables, unique)
    logits = forward(model, state.params, rows, model.embedder.inverses(batch, unique), batch, None)
    return jax.nn.sigmoid(logits)
