"""Pure steps: loss, train step, evaluation step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from tokenrec.data.batch import Batch
from tokenrec.models.heads import NextItemHead, SemanticIdHead
from tokenrec.models.recommender import Recommender
from tokenrec.ops.tables.api import UniqueRows, collect_gradients, update_rows
from tokenrec.optim import clip_scale, dense_optimizer, global_norm, schedule
from tokenrec.sharding import RULES
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.tokens.embed import ITEM_ROWS, EntityFeatures, inverses, samples_items

Inverses = dict[str, dict[str, jax.Array]]
NORM_RATE = 0.01  # of the running mean of gradient norms: its memory is some 100 steps
TRAINED = ("backbone/", "head/")  # weights that random tokens leave to be trained


class Metrics(NamedTuple):
    """Scalars of a step, on the device until the loop logs. `applied` False: the update was not made, because loss or
    gradient was not finite or a spike. `rounds`: how often rows of spread tables were exchanged, 1 unless the ids fell
    on few devices, 0 without such tables.
    """

    loss: jax.Array
    grad_norm: jax.Array
    examples: jax.Array
    applied: jax.Array
    rounds: jax.Array


def known_labels(batch: Batch) -> jax.Array:
    """What carries loss. `[B, N, K] float32`: 1 where a row is read and its label is known; `[B, R, P]`: the goals."""
    if batch.labels is None:
        return (batch.goals >= 0).astype(jnp.float32)
    return batch.weight[..., None] * (batch.labels >= 0)


def label_counts(batch: Batch) -> jax.Array:
    """`[K]` known labels of each task, or `[1]` goals: what the sums of a step's loss are divided by."""
    known = known_labels(batch)
    return (
        jnp.sum(known, axis=(0, 1))
        if batch.labels is not None
        else jnp.sum(known)[None]
    )


def forward(
    model: ModelSpec,
    params: dict[str, jax.Array],
    rows: dict[str, jax.Array],
    reads: Inverses,
    batch: Batch,
    key: jax.Array | None,
) -> jax.Array:
    """Logits `[B, N, K] float32` of ranking; `rows` are the unique table rows of the batch."""
    module = bind_params(model, params)
    return module.head(module(model.embedder.entities(rows, reads, batch), batch, key))


def loss_fn(
    params: dict[str, jax.Array],
    rows: dict[str, jax.Array],
    model: ModelSpec,
    reads: Inverses,
    batch: Batch,
    counts: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    """Summed loss over counts of the whole step, `counts` being `label_counts` of it.

    Ranking: sum over tasks of weight x (summed BCE / known labels). Retrieval: cross-entropy, all levels of a semantic
    id together.
    """
    module = bind_params(model, params)
    entities = model.embedder.entities(rows, reads, batch)
    return jnp.sum(
        sample_losses(
            model, module, module(entities, batch, key), entities, batch, counts
        )
    )


def sample_losses(
    model: ModelSpec,
    module: Recommender,
    read: jax.Array,
    entities: dict[str, EntityFeatures],
    batch: Batch,
    counts: jax.Array,
) -> jax.Array:
    """`[B] float32`: what each sample adds to the loss of the step; `read` is what the heads read."""
    if batch.labels is None:
        return retrieval_losses(module, read, entities, batch) / jnp.maximum(
            counts[0], 1
        )
    losses = optax.sigmoid_binary_cross_entropy(
        module.head(read), jnp.maximum(batch.labels, 0).astype(jnp.float32)
    )
    return jnp.sum(losses * known_labels(batch), axis=1) @ (
        task_weights(model) / jnp.maximum(counts, 1)
    )


def retrieval_losses(
    module: Recommender,
    read: jax.Array,
    entities: dict[str, EntityFeatures],
    batch: Batch,
) -> jax.Array:
    """`[B]`: summed cross-entropy of the goals of each sample."""
    head = module.head
    if isinstance(head, SemanticIdHead):
        return head.losses(read, batch.codes)
    assert isinstance(head, NextItemHead)
    if batch.negatives is None:
        return head.full_losses(read, batch.goals)
    of_goals = entities["goals"].values[ITEM_ROWS.name][..., 0, :]
    drawn = entities["negatives"].values[ITEM_ROWS.name]
    of_negatives = jax.sharding.reshard(drawn, RULES(*[None] * drawn.ndim)).reshape(
        -1, drawn.shape[-1]
    )
    negatives = jax.sharding.reshard(batch.negatives, RULES(None, None)).reshape(-1)
    return head.sampled_losses(read, batch.goals, of_goals, negatives, of_negatives)


def with_negatives(model: ModelSpec, batch: Batch, key: jax.Array) -> Batch:
    """The batch with the items of a sampled softmax, drawn uniformly; unchanged where the softmax is full."""
    if not samples_items(model.config):
        return batch
    size = batch.valid.shape[0]
    shape = (size, model.config.head.negatives // size)
    drawn = jax.random.randint(
        key, shape, 0, model.schema.items, jnp.int32, out_sharding=RULES("batch", None)
    )
    return batch._replace(negatives=drawn)


def task_weights(model: ModelSpec) -> jax.Array:
    given = model.config.data.tasks or {
        task.name: task.weight for task in model.schema.tasks
    }
    return jnp.array([given[name] for name in model.tasks], jnp.float32)


def micro_batches(tree: Any, count: int) -> Any:
    """`[B, ...]` -> `[count, B / count, ...]`; takes every count-th sample, so that nothing moves between devices."""

    def cut(leaf: jax.Array) -> jax.Array:
        shape = (leaf.shape[0] // count, count, *leaf.shape[1:])
        spec = RULES("batch", *[None] * (len(shape) - 1))
        return jnp.moveaxis(jnp.reshape(leaf, shape, out_sharding=spec), 1, 0)

    return jax.tree.map(cut, tree)


class Inputs(NamedTuple):
    """What a train step computes its loss from, besides the dense weights. `rows` are those `found`, of every stack;
    `counts` the `label_counts` of the batch, which holds the negatives; `key` that of the step's dropout.
    """

    batch: Batch
    key: jax.Array
    found: dict[str, UniqueRows]
    rows: dict[str, jax.Array]
    counts: jax.Array


def step_inputs(model: ModelSpec, state: TrainState, batch: Batch) -> Inputs:
    """The inputs of the next step of `state`."""
    key = jax.random.fold_in(jax.random.key(model.config.seed), state.step)
    batch = with_negatives(
        model, batch, jax.random.fold_in(key, model.config.optim.accumulate)
    )
    found = model.embedder.find(batch)
    return Inputs(
        batch,
        key,
        found,
        model.embedder.gather(state.tables, found),
        label_counts(batch),
    )


def gradients(
    model: ModelSpec, params: dict[str, jax.Array], inputs: Inputs
) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Loss of a step, and its gradients by dense weight and by row of `inputs.rows`."""
    batch, key, found, rows, counts = inputs
    reads, count = inverses(found), model.config.optim.accumulate
    gradient = jax.value_and_grad(loss_fn, argnums=(0, 1))
    if count == 1:
        return gradient(params, rows, model, reads, batch, counts, key)

    def add(total: Any, piece: tuple[Batch, Inverses, jax.Array]) -> tuple[Any, None]:
        part, inverse, number = piece
        made = gradient(
            params, rows, model, inverse, part, counts, jax.random.fold_in(key, number)
        )
        return jax.tree.map(jnp.add, total, made), None

    zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), (params, rows)))
    return jax.lax.scan(
        add, zero, (*micro_batches((batch, reads), count), jnp.arange(count))
    )[0]


def train_step(
    model: ModelSpec, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One update. A step whose loss or gradient is not finite, or whose gradient is a spike, changes nothing but the
    step number.
    """
    optim = model.config.optim
    inputs = step_inputs(model, state, batch)
    batch, found = inputs.batch, inputs.found
    loss, (dense, by_row) = gradients(model, state.params, inputs)
    summed = {
        name: collect_gradients(state.tables[name], found[name], by_row[name])
        for name in found
    }
    norm = global_norm(dense, summed)
    applied = jnp.isfinite(loss) & jnp.isfinite(norm)
    mean = {}
    if optim.spike_norm:
        before = state.opt_state["norm"]
        applied &= (before == 0) | (norm <= optim.spike_norm * before)
        now = jnp.where(before == 0, norm, before + NORM_RATE * (norm - before))
        mean = {"norm": jnp.where(applied, now, before)}
    scale = jnp.where(applied, clip_scale(norm, optim.clip_norm), 0.0)
    # 0 x inf is NaN, so gradients of a bad step are replaced, not scaled; they are small beside a table.
    scaled = {name: some.gradients for name, some in summed.items()}
    dense, by_row, scaled = jax.tree.map(
        lambda g: jnp.where(applied, g * scale, 0.0), (dense, by_row, scaled)
    )

    updates, dense_state = dense_optimizer(optim).update(
        dense, state.opt_state["dense"], state.params
    )
    if model.config.tokens.random_tokens:
        # Weight decay would move what has no gradient.
        updates = {
            name: u if name.startswith(TRAINED) else jnp.zeros_like(u)
            for name, u in updates.items()
        }
    params = jax.tree.map(
        lambda w, u: jnp.where(applied, w + u, w), state.params, updates
    )
    dense_state = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old),
        dense_state,
        state.opt_state["dense"],
    )
    rate = schedule(optim, optim.table_learning_rate)(state.step)
    tables, rows_state = dict(state.tables), dict(state.opt_state["rows"])
    for name in found:
        tables[name], rows_state[name] = update_rows(
            tables[name],
            rows_state[name],
            found[name],
            by_row[name],
            summed[name]._replace(gradients=scaled[name]),
            rate=rate,
            decay=optim.table_weight_decay,
            apply=applied,
        )
    rounds = (
        jnp.max(jnp.stack([of.rounds for of in found.values()]))
        if found
        else jnp.int32(0)
    )
    new = TrainState(
        state.step + 1,
        params,
        tables,
        {"dense": dense_state, "rows": rows_state} | mean,
    )
    return new, Metrics(loss, norm, jnp.sum(batch.weight), applied, rounds)


def step_loss(model: ModelSpec, state: TrainState, batch: Batch) -> jax.Array:
    """The forward pass of a train step, without dropout: what `work` counts the products of."""
    batch = with_negatives(model, batch, jax.random.key(0))
    found = model.embedder.find(batch)
    rows = model.embedder.gather(state.tables, found)
    return loss_fn(
        state.params, rows, model, inverses(found), batch, label_counts(batch), None
    )


def eval_step(model: ModelSpec, state: TrainState, batch: Batch) -> jax.Array:
    """Probabilities `[B, N, K] float32` of every row; the caller drops those of weight 0."""
    found = model.embedder.find(batch)
    rows = model.embedder.gather(state.tables, found)
    logits = forward(model, state.params, rows, inverses(found), batch, None)
    return jax.nn.sigmoid(logits)
