"""Losses of ranking and retrieval, per sample.

Ranking with K tasks, labels `y` and logits `z` (docs/methods.md section 2, "Tasks"):

    L = sum_k w_k / n_k * sum_i l_k(z_ik, y_ik)

l_k is the loss of the task's kind (`tokenrec/task_losses.py`), for a binary label the
cross-entropy. n_k counts the known labels of task k in the whole step, over all devices
and micro-batches, so that how a batch is split does not change its loss. Unknown labels
are -1 and carry no loss. With weights of rows or `data.unscored_weight` both sums are
weighted. `data.request_loss` adds a loss inside each request, likewise divided by its
count in the whole step and multiplied by w_k and `data.request_weight`. Retrieval uses
the cross-entropy of the next item, or of the codes of its semantic id, divided by the
number of goals in the step. `head.alignment` adds losses of alignment tasks
(`tokenrec/alignment.py`), divided by the number of samples.

B samples, N scored positions of each, K tasks, R read-outs, P goals of each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tokenrec.alignment import alignment_losses, draw_aligned
from tokenrec.data.batch import Batch
from tokenrec.models.heads import CopiedItems, NextItemHead, SemanticIdHead
from tokenrec.models.recommender import Recommender
from tokenrec.sharding import RULES
from tokenrec.state import ModelSpec
from tokenrec.task_losses import pointwise_losses, request_counts, request_losses
from tokenrec.tokens.embed import EntityFeatures, samples_items
from tokenrec.tokens.output_vectors import output_vectors


def known_labels(batch: Batch) -> jax.Array:
    """Weights of what carries loss.

    Returns:
      Ranking: `[B, N, K] float32`, the weight of a position where its label is known,
      otherwise 0. Retrieval: `[B, R, P] float32`, 1 for real goals.
    """
    if batch.labels is None:
        return (batch.goals >= 0).astype(jnp.float32)
    return batch.weight[..., None] * (batch.labels >= 0)


def label_counts(model: ModelSpec, batch: Batch) -> jax.Array:
    """Count what the losses of a step are divided by.

    Returns:
      Ranking: the sum of the weights of the known labels of each task, `[K]`; with a
      loss inside requests followed by `request_counts`, `[2 K]` together. Retrieval:
      the numbers of goals and of samples, `[2]`.
    """
    known = known_labels(batch)
    if batch.labels is None:
        return jnp.stack([jnp.sum(known), jnp.float32(batch.valid.shape[0])])
    counts = jnp.sum(known, axis=(0, 1))
    request_loss = model.config.data.request_loss
    if request_loss == "none":
        return counts
    inside = request_counts(model.task_plans, batch, known, request_loss)
    return jnp.concatenate([counts, inside])


def sample_losses(
    model: ModelSpec,
    module: Recommender,
    readouts: jax.Array,
    entities: dict[str, EntityFeatures],
    batch: Batch,
    counts: jax.Array,
    keys: jax.Array | None,
) -> jax.Array:
    """Compute what each sample adds to the loss of the step.

    Args:
      model: the static half of the model.
      module: the model with its weights.
      readouts: `[B, R, d] float32`, input of the heads.
      entities: values of the batch's features, for the vectors of sampled items.
      batch: labels or goals.
      counts: `label_counts` of the whole step.
      keys: `[B]`, PRNG keys of dropout in streams besides that of the history; None for
        none.

    Returns:
      `[B] float32`; its sum over all samples of a step is the loss.
    """
    if batch.labels is None:
        losses = retrieval_losses(module, readouts, entities, batch)
        losses /= jnp.maximum(counts[0], 1)
        if model.alignment is None:
            return losses
        aligned = alignment_losses(model.alignment, module, batch, keys)
        return losses + aligned / counts[1]
    data, plans = model.config.data, model.task_plans
    logits, known = module.head(readouts), known_labels(batch)
    losses = pointwise_losses(plans, logits, batch, data.huber_delta)
    by_task = jnp.sum(losses * known, axis=1)
    weights = task_weights(model)
    if data.request_loss != "none":
        inside = request_losses(plans, logits, batch, known, data.request_loss)
        by_task = jnp.concatenate([by_task, inside], axis=1)
        weights = jnp.concatenate([weights, data.request_weight * weights])
    # Not `maximum(counts, 1)`: a sum of small weights may lie below 1.
    return by_task @ (weights / jnp.where(counts > 0, counts, 1))


def retrieval_losses(
    module: Recommender,
    readouts: jax.Array,
    entities: dict[str, EntityFeatures],
    batch: Batch,
) -> jax.Array:
    """Sum the cross-entropies of the goals of each sample: `[B, R, d]` -> `[B]`."""
    head = module.head
    if isinstance(head, SemanticIdHead):
        if head.copy is None:
            return head.losses(readouts, batch.codes)
        # Behind the read-outs of the history lie those of the goals' codes.
        reads = readouts[:, : batch.goals.shape[1]]
        mixture = head.copy(reads, batch.items, module.event_tokens(entities))
        return head.copy_losses(readouts, batch.codes, batch.goals, mixture)
    assert isinstance(head, NextItemHead)
    copied = copied_items(module, readouts, entities, batch)
    if batch.negatives is None:
        return head.full_losses(readouts, batch.goals, copied)

    # Every sample is scored against the negatives of all samples, so these are gathered.
    goal_vectors = output_vectors(*entities["goals"])
    drawn = output_vectors(*entities["negatives"])
    negative_vectors = jax.sharding.reshard(drawn, RULES(*[None] * drawn.ndim))
    negative_vectors = negative_vectors.reshape(-1, drawn.shape[-1])
    negatives = jax.sharding.reshard(batch.negatives, RULES(None, None)).reshape(-1)
    return head.sampled_losses(
        readouts, batch.goals, goal_vectors, negatives, negative_vectors, copied
    )


def copied_items(
    module: Recommender,
    readouts: jax.Array,
    entities: dict[str, EntityFeatures],
    batch: Batch,
) -> CopiedItems | None:
    """Prepare the items of the history for a head with `head.copy`; None without it."""
    head = module.head
    assert isinstance(head, NextItemHead)
    if head.copy is None:
        return None
    vectors = module.event_item_vectors(entities, batch)
    return CopiedItems(head.copy(readouts, batch.items, vectors), vectors)


def with_negatives(model: ModelSpec, batch: Batch, key: jax.Array) -> Batch:
    """Add uniformly drawn items for a sampled softmax; a full softmax needs none."""
    if not samples_items(model.config):
        return batch
    size = batch.valid.shape[0]
    shape = (size, model.config.head.negatives // size)
    drawn = jax.random.randint(
        key, shape, 0, model.schema.items, jnp.int32, out_sharding=RULES("batch", None)
    )
    return batch._replace(negatives=drawn)


def with_aligned(model: ModelSpec, batch: Batch, key: jax.Array) -> Batch:
    """Add drawn items for the tasks of `head.alignment`, if there are any."""
    if model.alignment is None:
        return batch
    drawn = draw_aligned(model.alignment, key, batch.valid.shape[0])
    return batch._replace(aligned=drawn)


def task_weights(model: ModelSpec) -> jax.Array:
    """Weights of the tasks in the loss, `[K] float32`: of `data.tasks`, or the schema."""
    defaults = {task.name: task.weight for task in model.schema.tasks}
    weights = model.config.data.tasks or defaults
    return jnp.array([weights[name] for name in model.tasks], jnp.float32)
