"""Baselines against brute force and scikit-learn, and what they must not see."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED, InteractionLog
from tokenrec.evaluation.baselines import (
    PRIOR_ROWS,
    baselines,
    past_rates,
    popularity_scores,
    rate_scores,
    repeat_scores,
    row_keys,
)
from tokenrec.evaluation.logistic_regression import fit_logistic, fit_probability


def make_log(rows: list[tuple[int, int, int, int, tuple[int, ...]]]) -> InteractionLog:
    """Make a log from rows of (chunk, time, item, flags, labels), in order."""
    chunk, time, item, flags, labels = zip(*rows, strict=True)
    start = np.searchsorted(chunk, np.arange(max(chunk) + 2))
    nothing, no_user = np.zeros((len(rows), 0)), np.zeros((len(start) - 1, 0))
    return InteractionLog(
        start=start.astype(np.int64),
        user_id=np.arange(len(start) - 1),
        user_ids=no_user.astype(np.int32),
        user_dense=no_user.astype(np.float32),
        time=np.array(time, np.int64),
        item=np.array(item, np.int32),
        flags=np.array(flags, np.uint8),
        request=np.full(len(rows), -1),
        labels=np.array(labels, np.int8),
        row_ids=nothing.astype(np.int32),
        row_dense=nothing.astype(np.float32),
        action_ids=nothing.astype(np.int32),
        action_dense=nothing.astype(np.float32),
    )


def random_log(
    seed: int, rows: int = 400, flags: tuple[int, ...] = (EVENT, SCORED, EVENT | SCORED)
) -> InteractionLog:
    rng = np.random.default_rng(seed)
    chunk = np.sort(rng.integers(0, 5, rows))
    time = rng.integers(0, 40, rows) * 10_000_000_000
    order = np.lexsort((time, chunk))
    labels = rng.integers(-1, 2, (rows, 2))
    item, flag = rng.integers(0, 6, rows), rng.choice(flags, rows)
    return make_log(
        [
            (int(chunk[i]), int(time[i]), int(item[i]), int(flag[i]), tuple(labels[i]))
            for i in order
        ]
    )


def test_repeats_count_strictly_earlier_events_of_the_chunk() -> None:
    log = random_log(0)
    chunk = np.repeat(np.arange(log.num_chunks), np.diff(log.start))
    event = log.flags & EVENT > 0
    brute = [
        int(
            (
                event
                & (chunk == chunk[r])
                & (log.item == log.item[r])
                & (log.time < log.time[r])
            ).sum()
        )
        for r in range(log.num_rows)
    ]
    assert max(brute) > 3
    np.testing.assert_array_equal(repeat_scores(log), brute)


def test_repeats_of_a_log_without_events_are_zero() -> None:
    log = make_log([(0, 1, 3, SCORED, (1,)), (0, 2, 3, SCORED, (0,))])
    assert repeat_scores(log).tolist() == [0.0, 0.0]


def test_popularity_and_rate_count_only_rows_that_may_be_learned_from() -> None:
    learned = SCORED | LEARNED
    train = make_log(
        [
            (0, 1, 0, learned, (1,)),
            (0, 2, 0, learned, (0,)),
            (0, 3, 0, learned, (-1,)),
            # The head of a chunk repeats events that were counted before.
            (0, 4, 0, EVENT, (1,)),
            (0, 5, 1, EVENT | LEARNED, (1,)),
        ]
    )
    log = make_log([(0, 9, item, SCORED, (1,)) for item in (0, 1, 2)])
    assert popularity_scores(train, log, 0).tolist() == [1.0, 1.0, 0.0]
    share = 2 / 3
    wanted = [
        (positives + PRIOR_ROWS * share) / (rows + PRIOR_ROWS)
        for positives, rows in ((1, 2), (1, 1), (0, 0))
    ]
    # Float64 quotients of the same integers: equal here, 1e-7 allows another order.
    np.testing.assert_allclose(rate_scores(train, log, 0), wanted)


def test_probability_is_the_maximum_of_the_likelihood() -> None:
    rng = np.random.default_rng(1)
    scores = rng.poisson(3, 500)
    labels = (rng.random(500) < 1 / (1 + np.exp(2 - 1.5 * np.log1p(scores)))).astype(
        np.int8
    )
    model = LogisticRegression(C=1e10, tol=1e-10).fit(np.log1p(scores)[:, None], labels)
    wanted = model.predict_proba(np.log1p(np.arange(20))[:, None])[:, 1]
    # Two optimisers that stop near one maximum: measured 4e-9, in float64 everywhere.
    np.testing.assert_allclose(
        fit_probability(scores, labels)(np.arange(20)), wanted, atol=1e-5
    )


def test_a_regression_of_several_features_is_the_maximum_of_the_likelihood() -> None:
    rng = np.random.default_rng(2)
    x = np.column_stack([rng.normal(3, 2, 800), rng.poisson(2, 800), np.full(800, 7.0)])
    labels = (rng.random(800) < 1 / (1 + np.exp(1 - x[:, 0] + 0.7 * x[:, 1]))).astype(
        np.int8
    )
    model = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000).fit(x, labels)
    # Two optimisers that stop near one maximum: measured 1.3e-8, in float64 everywhere.
    np.testing.assert_allclose(
        fit_logistic(x, labels)(x[:50]), model.predict_proba(x[:50])[:, 1], atol=1e-4
    )


def test_past_rates_count_earlier_learned_rows_of_train_with_the_same_key() -> None:
    train = random_log(6, flags=(EVENT | SCORED, EVENT | SCORED | LEARNED))
    log = random_log(7, rows=60)
    users = np.unique(np.concatenate([train.user_id, log.user_id]))
    attributes = np.arange(6)[:, None] % 3
    keys, wanted = (row_keys(one, users, attributes, ()) for one in (train, log))
    assert len(keys) == 4
    ok = (train.flags & LEARNED > 0) & (train.labels[:, 0] >= 0)
    share = ((train.labels[ok, 0] == 1).sum() + 0.5) / (ok.sum() + 1)
    for key, at in zip(keys, wanted, strict=True):
        found = past_rates(train, key, 0, log, at)
        for row in range(log.num_rows):
            same = ok & (key == at[row]) & (train.time < log.time[row])
            rate = ((train.labels[same, 0] == 1).sum() + PRIOR_ROWS * share) / (
                same.sum() + PRIOR_ROWS
            )
            # Equal here; another processor's logarithm may differ by 1e-16.
            np.testing.assert_allclose(
                found[row], [np.log(rate / (1 - rate)), np.log1p(same.sum())], atol=1e-9
            )


@pytest.mark.parametrize(
    ("scores", "labels", "wanted"),
    [
        ([0, 1, 2], [1, 1, 1], 3.5 / 4),  # one class
        ([2, 2, 2, 2], [0, 1, 0, 0], 1.5 / 5),  # one score
        ([], [], 0.5),
    ],
)
def test_scores_that_tell_nothing_give_the_smoothed_share(
    scores: list[int], labels: list[int], wanted: float
) -> None:
    probability = fit_probability(np.array(scores, float), np.array(labels, np.int8))
    # A logit and back in float64: measured 6e-17, of 1e-7 allowed.
    np.testing.assert_allclose(probability(np.array([0.0, 5.0])), [wanted, wanted])


def test_scores_that_separate_the_classes_give_finite_probabilities() -> None:
    probability = fit_probability(
        np.array([0, 0, 0, 9, 9, 9]), np.array([0, 0, 0, 1, 1, 1])
    )(np.array([0, 9]))
    # The penalty alone bounds the weights: measured 2.2e-6 from 0 and from 1.
    assert 0 < probability[0] < 1e-3
    assert 1 - 1e-3 < probability[1] < 1


@pytest.mark.parametrize("seed", [5, 17, 22, 52])
def test_many_features_of_few_rows_give_finite_probabilities(seed: int) -> None:
    """These ended in a singular matrix with whole Newton steps and a free intercept."""
    random = np.random.default_rng(seed)
    x, labels = random.normal(size=(20, 12)), random.integers(0, 2, 20)
    found = fit_logistic(x, labels)(x)
    assert np.isfinite(found).all()
    # Twelve features separate 20 rows: measured 0.9996 or more.
    assert found[labels > 0].mean() > found[labels == 0].mean() + 0.5


def test_baselines_score_the_scored_rows_in_order_for_the_tasks_asked() -> None:
    train, log = random_log(2, flags=(EVENT | SCORED | LEARNED,)), random_log(3)
    both, swapped, second = (
        baselines(train, log, tasks) for tasks in ((0, 1), (1, 0), (1,))
    )
    scored = log.flags & SCORED > 0
    assert sorted(both) == ["item_rate", "popularity", "rates", "repeat"]
    for name, probability in both.items():
        assert probability.shape == (scored.sum(), 2)
        assert ((probability > 0) & (probability < 1)).all()
        np.testing.assert_array_equal(swapped[name], probability[:, ::-1])
        np.testing.assert_array_equal(second[name][:, 0], probability[:, 1])
    order = np.argsort(both["popularity"][:, 0], kind="stable")
    counts = popularity_scores(train, log, 0)[scored][order]
    assert (np.diff(counts) >= 0).all() or (np.diff(counts) <= 0).all()


def test_own_label_of_a_training_row_is_left_out_of_its_count() -> None:
    # Every item has one row: its own label would give the answer away, and the item has
    # no other rows.
    train = make_log([(0, i, i, SCORED | LEARNED, (i % 2,)) for i in range(50)])
    log = make_log([(0, 99, 0, SCORED, (0,)), (0, 99, 1, SCORED, (0,))])
    # Equal here; 1e-7 allows another rounding of the regression's start.
    for name in ("popularity", "item_rate"):
        np.testing.assert_allclose(baselines(train, log, [0])[name][:, 0], 0.5)


def test_labels_of_the_scored_split_are_not_used() -> None:
    train, log = random_log(4, flags=(EVENT | SCORED | LEARNED,)), random_log(5)
    other = dataclasses.replace(log, labels=np.zeros_like(log.labels))
    for name, probability in baselines(train, log, [0, 1]).items():
        np.testing.assert_array_equal(
            baselines(train, other, [0, 1])[name], probability
        )
