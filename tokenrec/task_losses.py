"""Losses and predictions of the tasks of ranking, by kind of the label.

With logit z, label y, and mean m and deviation s of the labels of training
(docs/methods.md section 2, "Tasks"):

    cross_entropy, binary    -y log sigmoid(z) - (1 - y) log sigmoid(-z)
    cross_entropy, real      the same, with the share y in [0, 1]
    cross_entropy, classes   -log softmax(z)[y]
    squared                  (z - t)^2 / 2,  t = (y - m) / s
    huber                    the same where |z - t| <= delta, beyond it
                             delta (|z - t| - delta / 2)
    weighted_logistic        -(y / m) log sigmoid(z) - log sigmoid(-z)

The last one is the weighted logistic regression of Covington et al., *Deep Neural
Networks for YouTube Recommendations*, RecSys 2016, where a positive row has its watch
time y as weight and a negative row has weight 1, and exp(z) estimates the watch time
where positives are rare. Here every row is also a negative of weight 1: then exp(z) is
the mean of y / m at the minimum, however many rows are positive. Huber: P. Huber,
*Robust Estimation of a Location Parameter*, 1964.

Inside a request, over its candidates i and j with known labels, weights w and scores z:

    pairwise   sum_{ij: y_i > y_j} w_i w_j log(1 + exp(z_j - z_i)) / sum_{ij} w_i w_j
    listwise   -sum_i p_i log softmax(z)[i],  p_i = w_i y_i / sum_j w_j y_j

Sources: BPR, Rendle et al., UAI 2009, and RankNet, Burges et al., ICML 2005; ListNet
with the top-one probability, Cao et al., ICML 2007, whose target is here the share of
the labels.

B samples, N positions, K tasks, O logits, V tasks of numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from tokenrec.data.batch import Batch
from tokenrec.errors import InputError
from tokenrec.task_plan import TaskPlan


def pointwise_losses(
    plans: Sequence[TaskPlan], logits: jax.Array, batch: Batch, huber_delta: float
) -> jax.Array:
    """Compute the loss of each label, whether it is known or not.

    Args:
      plans: K tasks.
      logits: `[B, N, O] float32`.
      batch: labels and targets.
      huber_delta: delta of `huber`, in deviations of the labels.

    Returns:
      `[B, N, K] float32`, finite everywhere.
    """
    labels = jnp.maximum(batch.labels, 0)
    if all(plan.task.kind == "binary" for plan in plans):
        # Logits and labels are in the same order.
        return optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32))
    losses = []
    for k, plan in enumerate(plans):
        z = logits[..., plan.start : plan.stop]
        if plan.task.kind == "real":
            target = batch.targets[..., plan.target]
            # The target of an unknown label is 0, which may lie far from all others:
            # its loss has weight 0 but must be finite.
            losses.append(_real_loss(plan, z[..., 0], target, huber_delta))
        elif plan.task.kind == "binary":
            label = labels[..., k].astype(jnp.float32)
            losses.append(optax.sigmoid_binary_cross_entropy(z[..., 0], label))
        else:
            log_probs = jax.nn.log_softmax(z, axis=-1)
            # A comparison instead of a gather: its gradient is no scatter.
            is_label = jnp.arange(plan.task.width) == labels[..., k, None]
            losses.append(-jnp.sum(jnp.where(is_label, log_probs, 0), axis=-1))
    return jnp.stack(losses, axis=-1)


def _real_loss(
    plan: TaskPlan, z: jax.Array, target: jax.Array, huber_delta: float
) -> jax.Array:
    """Loss of a task of numbers: `[B, N]` each."""
    task = plan.task
    if plan.loss == "cross_entropy":
        return optax.sigmoid_binary_cross_entropy(z, target)
    if plan.loss == "weighted_logistic":
        relative = target / (task.mean or 1.0)
        return relative * jax.nn.softplus(-z) + jax.nn.softplus(z)
    standardised = (target - task.mean) / task.deviation
    if plan.loss == "squared":
        return 0.5 * jnp.square(z - standardised)
    return optax.huber_loss(z, standardised, delta=huber_delta)


def predict_tasks(plans: Sequence[TaskPlan], logits: jax.Array) -> jax.Array:
    """Convert logits to predictions in the unit of the labels.

    Args:
      plans: the tasks.
      logits: `[B, N, O] float32`.

    Returns:
      `[B, N, O] float32`: probabilities of binary tasks and of classes, and numbers.
    """
    if all(plan.task.kind == "binary" for plan in plans):
        return jax.nn.sigmoid(logits)
    parts = []
    for plan in plans:
        z, task = logits[..., plan.start : plan.stop], plan.task
        if task.kind == "classes":
            parts.append(jax.nn.softmax(z, axis=-1))
        elif plan.loss == "cross_entropy":
            parts.append(jax.nn.sigmoid(z))
        elif plan.loss == "weighted_logistic":
            parts.append((task.mean or 1.0) * jnp.exp(z))
        else:
            parts.append(task.mean + task.deviation * z)
    return jnp.concatenate(parts, axis=-1)


def check_request_loss(plans: Sequence[TaskPlan], request_loss: str) -> None:
    """Check that a loss inside requests fits the tasks.

    Raises:
      InputError: no task has labels that can be compared, or a label is negative where
        shares of the labels are needed.
    """
    if request_loss == "none":
        return
    ordered = [plan.task for plan in plans if plan.task.kind != "classes"]
    if not ordered:
        raise InputError(
            f"data.request_loss='{request_loss}' compares labels of binary tasks and "
            "of numbers, and the run has tasks of classes only; use 'none'"
        )
    for task in ordered:
        if request_loss == "listwise" and task.least < 0:
            raise InputError(
                f"data.request_loss='listwise' needs labels of 0 or more, and task "
                f"'{task.name}' has one of {task.least:g} in training; use 'pairwise'"
            )


def request_losses(
    plans: Sequence[TaskPlan],
    logits: jax.Array,
    batch: Batch,
    known: jax.Array,
    request_loss: str,
) -> jax.Array:
    """Sum the losses inside the request of each sample.

    Args:
      plans: K tasks.
      logits: `[B, N, O] float32`, of N candidates of one request.
      batch: labels and targets.
      known: `[B, N, K] float32`, weights of the known labels.
      request_loss: "pairwise" or "listwise".

    Returns:
      `[B, K] float32`, before the division by `request_counts`; 0 for tasks of classes.
    """
    columns = []
    for k, plan in enumerate(plans):
        if plan.task.kind == "classes":
            columns.append(jnp.zeros_like(logits[:, 0, 0]))
            continue
        z, y, w = logits[..., plan.start], _relevance(batch, k, plan), known[..., k]
        if request_loss == "pairwise":
            losses = jax.nn.softplus(z[:, None, :] - z[:, :, None])
            columns.append(jnp.sum(_pairs(y, w) * losses, axis=(1, 2)))
            continue
        share, is_list = _shares(y, w)
        # Candidates without a known label are not in the list. A list of none would be
        # NaN in the gradient: it has all candidates, and no weight.
        in_list = (w > 0) | ~is_list[:, None]
        log_probs = jax.nn.log_softmax(jnp.where(in_list, z, -1e30), axis=-1)
        columns.append(-jnp.sum(jnp.where(share > 0, share * log_probs, 0), axis=1))
    return jnp.stack(columns, axis=-1)


def request_counts(
    plans: Sequence[TaskPlan], batch: Batch, known: jax.Array, request_loss: str
) -> jax.Array:
    """Count what a loss inside requests is divided by.

    Returns:
      `[K] float32`: the sum of the weights of all pairs, or the number of lists.
    """
    counts = []
    for k, plan in enumerate(plans):
        if plan.task.kind == "classes":
            counts.append(jnp.zeros(()))
            continue
        y, w = _relevance(batch, k, plan), known[..., k]
        if request_loss == "pairwise":
            counts.append(jnp.sum(_pairs(y, w)))
        else:
            counts.append(jnp.sum(_shares(y, w)[1].astype(jnp.float32)))
    return jnp.stack(counts)


def _relevance(batch: Batch, k: int, plan: TaskPlan) -> jax.Array:
    """Label of each candidate as a number, `[B, N]`."""
    if plan.task.kind == "real":
        return batch.targets[..., plan.target]
    return jnp.maximum(batch.labels[..., k], 0).astype(jnp.float32)


def _pairs(y: jax.Array, w: jax.Array) -> jax.Array:
    """Weight of each pair of candidates, `[B, N, N]`: of i above j, else 0."""
    above = y[:, :, None] > y[:, None, :]
    return jnp.where(above, w[:, :, None] * w[:, None, :], 0)


def _shares(y: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Share of each candidate in the labels of its request, `[B, N]`.

    Also whether the request is a list, `[B] bool`: it has two known labels and one
    above 0. The shares of other requests are 0.
    """
    total = jnp.sum(w * y, axis=1)
    is_list = (total > 0) & (jnp.sum(w > 0, axis=1) > 1)
    share = w * y / jnp.where(is_list, total, 1)[:, None]
    return jnp.where(is_list[:, None], share, 0), is_list
