"""Losses of labels of every kind against slow loops, values and gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenrec.config import Config, DataConfig, TrainConfig
from tokenrec.config.validate import validate
from tokenrec.data.batch import Batch, Signals
from tokenrec.data.schema import Schema, Task
from tokenrec.errors import InputError
from tokenrec.task_losses import (
    check_request_loss,
    pointwise_losses,
    predict_tasks,
    request_counts,
    request_losses,
)
from tokenrec.task_plan import (
    check_auxiliary,
    evaluated_tasks,
    output_names,
    plan_tasks,
)

REAL = {"kind": "real", "mean": 3.0, "deviation": 2.0, "least": 0.0, "most": 9.0}
TASKS = (
    Task("seconds", **REAL),
    Task("click"),
    Task("stars", kind="classes", classes=("1", "2", "3")),
    Task("squared", **REAL),
    Task("watched", **REAL),
    Task("share", **(REAL | {"most": 1.0})),
)
NAMES = tuple(task.name for task in TASKS)
LOSSES = {
    "squared": "squared",
    "watched": "weighted_logistic",
    "share": "cross_entropy",
}
PLANS = plan_tasks(Schema((), TASKS), NAMES, LOSSES)
DELTA = 0.7


def make_batch(seed=0, samples=3, candidates=4) -> Batch:
    random = np.random.default_rng(seed)
    shape = (samples, candidates)
    targets = random.uniform(0, 9, (*shape, 4)).astype(np.float32)
    targets[..., 3] = random.random(shape)
    labels = np.zeros((*shape, len(TASKS)), np.int8)
    labels[..., 1] = random.integers(0, 2, shape)
    labels[..., 2] = random.integers(0, 3, shape)
    labels[random.random(labels.shape) < 0.2] = -1
    targets[labels[..., [0, 3, 4, 5]] < 0] = 0
    none = Signals(None, None)
    weight = random.uniform(0.5, 2, shape).astype(np.float32)
    return Batch(none, none, none, None, None, labels, weight, targets=targets)


def log_sigmoid(z: float) -> float:
    return -math.log1p(math.exp(-z))


def slow_loss(plan, z, label: int, target: float) -> float:
    """The table in the docstring of `task_losses`, for one label."""
    if plan.task.kind == "classes":
        return math.log(sum(math.exp(v) for v in z)) - z[label]
    z, y = z[0], float(target if plan.task.kind == "real" else label)
    if plan.loss == "cross_entropy":
        return -y * log_sigmoid(z) - (1 - y) * log_sigmoid(-z)
    if plan.loss == "weighted_logistic":
        return -y / 3.0 * log_sigmoid(z) - log_sigmoid(-z)
    error = abs(z - (y - 3.0) / 2.0)
    if plan.loss == "squared" or error <= DELTA:
        return error**2 / 2
    return DELTA * (error - DELTA / 2)


def slow_total(logits, batch: Batch) -> float:
    """The weighted sum of all known labels."""
    total = 0.0
    for b, n, k in np.ndindex(batch.labels.shape):
        plan, label = PLANS[k], int(batch.labels[b, n, k])
        if label >= 0:
            z = [float(v) for v in logits[b, n, plan.start : plan.stop]]
            loss = slow_loss(plan, z, label, batch.targets[b, n, plan.target])
            total += float(batch.weight[b, n]) * loss
    return total


def slow_request(logits, batch: Batch, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Losses `[B, K]` and counts `[K]` of a loss inside requests, pair by pair."""
    samples, candidates, tasks = batch.labels.shape
    losses, counts = np.zeros((samples, tasks)), np.zeros(tasks)
    for b in range(samples):
        for k, plan in enumerate(PLANS):
            if plan.task.kind == "classes":
                continue
            rows = [n for n in range(candidates) if batch.labels[b, n, k] >= 0]
            z = {n: float(logits[b, n, plan.start]) for n in rows}
            w = {n: float(batch.weight[b, n]) for n in rows}
            y = {
                n: float(batch.targets[b, n, plan.target])
                if plan.task.kind == "real"
                else float(batch.labels[b, n, k])
                for n in rows
            }
            if kind == "pairwise":
                for i in rows:
                    for j in rows:
                        if y[i] > y[j]:
                            loss = -log_sigmoid(z[i] - z[j])
                            losses[b, k] += w[i] * w[j] * loss
                            counts[k] += w[i] * w[j]
                continue
            total = sum(w[n] * y[n] for n in rows)
            if len(rows) < 2 or not total:
                continue
            counts[k] += 1
            partition = math.log(sum(math.exp(z[n]) for n in rows))
            for n in rows:
                losses[b, k] += w[n] * y[n] / total * (partition - z[n])
    return losses, counts


def numeric_gradient(function, x: np.ndarray) -> np.ndarray:
    gradient = np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[place] = 1e-4
        gradient[place] = (function(x + step) - function(x - step)) / 2e-4
    return gradient


def known_of(batch: Batch) -> np.ndarray:
    return batch.weight[..., None] * (batch.labels >= 0)


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(3, 4, 8)).astype(np.float32)


def test_losses_of_every_kind_and_their_gradients_are_those_of_a_loop(logits):
    batch = make_batch()

    def total(z):
        losses = pointwise_losses(PLANS, z, batch, DELTA)
        return jnp.sum(losses * known_of(batch))

    value, gradient = jax.value_and_grad(total)(jnp.asarray(logits))
    np.testing.assert_allclose(value, slow_total(logits, batch), rtol=1e-5)
    slow = numeric_gradient(lambda z: slow_total(z, batch), logits.astype(np.float64))
    np.testing.assert_allclose(gradient, slow, atol=1e-4)
    # The loss of an unknown label is finite: 0 times it is 0.
    assert np.isfinite(pointwise_losses(PLANS, logits, batch, DELTA)).all()


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_losses_inside_requests_and_their_gradients_are_those_of_a_loop(logits, kind):
    batch = make_batch(2)
    # A request without a label, one with a single label, and one with equal labels.
    batch.labels[0] = -1
    batch.labels[1, 1:] = -1
    batch.labels[2, :, 1] = 1
    batch.targets[batch.labels[..., [0, 3, 4, 5]] < 0] = 0
    known = known_of(batch)

    def total(z):
        return jnp.sum(request_losses(PLANS, z, batch, known, kind))

    losses, counts = slow_request(logits, batch, kind)
    np.testing.assert_allclose(
        request_losses(PLANS, logits, batch, known, kind), losses, atol=1e-5
    )
    np.testing.assert_allclose(
        request_counts(PLANS, batch, known, kind), counts, rtol=1e-5
    )
    assert counts[0] > 0
    slow = numeric_gradient(
        lambda z: slow_request(z, batch, kind)[0].sum(), logits.astype(np.float64)
    )
    gradient = jax.grad(total)(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, slow, atol=1e-4)


def test_predictions_are_in_the_unit_of_the_label(logits):
    out = np.asarray(predict_tasks(PLANS, logits))
    sigmoid = 1 / (1 + np.exp(-logits))
    softmax = np.exp(logits[..., 2:5])
    softmax /= softmax.sum(-1, keepdims=True)
    expected = [
        3 + 2 * logits[..., :1],
        sigmoid[..., 1:2],
        softmax,
        3 + 2 * logits[..., 5:6],
        3 * np.exp(logits[..., 6:7]),
        sigmoid[..., 7:8],
    ]
    np.testing.assert_allclose(out, np.concatenate(expected, -1), rtol=1e-5)


def test_the_minimum_of_weighted_logistic_is_the_mean_of_the_label():
    plans = plan_tasks(
        Schema((), TASKS), ("watched",), {"watched": "weighted_logistic"}
    )
    times = np.array([0.0, 0.0, 1.0, 7.0, 30.0], np.float32)
    batch = make_batch()._replace(
        labels=np.zeros((5, 1, 1), np.int8), targets=times[:, None, None]
    )

    def loss(z):
        logits = jnp.full((5, 1, 1), z)
        return jnp.sum(pointwise_losses(plans, logits, batch, 1.0))

    at_mean = math.log(float(times.mean()) / 3.0)
    assert abs(float(jax.grad(loss)(at_mean))) < 1e-5
    np.testing.assert_allclose(
        predict_tasks(plans, jnp.full((1, 1, 1), at_mean)), times.mean(), rtol=1e-6
    )


def test_tasks_keep_their_order_and_auxiliary_ones_are_left_out():
    names = ("stars", "seconds", "click", "share")
    plans = plan_tasks(Schema((), TASKS), names, {"share": "cross_entropy"})
    assert output_names(plans) == (
        *("stars/1", "stars/2", "stars/3"),
        *("seconds", "click", "share"),
    )
    kept = evaluated_tasks(plans, ("seconds", "click"))
    assert kept.labels == (0, 3)
    assert kept.outputs == (0, 1, 2, 5)
    assert kept.targets == (1,)
    assert [(p.start, p.stop, p.target) for p in kept.plans] == [(0, 3, -1), (3, 4, 0)]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"clicks": "huber"}, "data.losses: 'clicks' is no task.*click"),
        (
            {"click": "huber"},
            r"losses\['click'\]='huber'.*kind 'binary'.*cross_entropy",
        ),
        ({"seconds": "cross_entropy"}, r"from 0 to 1.*has a label of 9"),
        ({"debt": "weighted_logistic"}, r"of 0 or more.*has a label of -2"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused(losses, message):
    schema = Schema((), (*TASKS, Task("debt", **(REAL | {"least": -2.0}))))
    with pytest.raises(InputError, match=message):
        plan_tasks(schema, ("seconds", "click", "debt"), losses)


def test_options_of_tasks_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="'stars' is no task of the run"):
        check_auxiliary(DataConfig(auxiliary=("stars",)), ("click",))
    with pytest.raises(InputError, match="nothing is evaluated"):
        check_auxiliary(DataConfig(auxiliary=("click",)), ("click",))
    classes = [plan for plan in PLANS if plan.task.kind == "classes"]
    with pytest.raises(InputError, match="tasks of classes only"):
        check_request_loss(classes, "pairwise")
    debt = plan_tasks(
        Schema((), (Task("debt", **(REAL | {"least": -2.0})),)), ("debt",), {}
    )
    check_request_loss(debt, "pairwise")
    with pytest.raises(InputError, match="'listwise' needs labels of 0 or more"):
        check_request_loss(debt, "listwise")


@pytest.mark.parametrize(
    ("data", "train", "message"),
    [
        (
            {"objective": "retrieval", "losses": {"seconds": "huber"}},
            {},
            r"data.losses=.*is for data.objective='ranking'.*use \{\}",
        ),
        (
            {"paradigm": "uc", "request_loss": "pairwise"},
            {},
            "a training stream reads the first alone.*data.paradigm='nio'",
        ),
        ({"request_loss": "listwise"}, {}, "data.candidates=1.*raise it"),
        ({"request_loss": "triplet"}, {}, "'triplet' is not a choice.*pairwise"),
        ({"losses": {"seconds": "hubert"}}, {}, "'hubert' must be huber, squared"),
        ({}, {"best_metric": "request_ndcg"}, "data.request_ndcg=0.*such as 10"),
    ],
)
def test_options_that_do_not_go_together_are_refused(data, train, message):
    config = Config(data=DataConfig(path="-", **data), train=TrainConfig(**train))
    with pytest.raises(InputError, match=message):
        validate(config)
