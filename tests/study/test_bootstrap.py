"""Paired bootstrap over users.

The metrics of a resample equal those of `tokenrec/metrics/binary.py` on the impressions
that it repeats, and intervals cover the true difference.
"""

from __future__ import annotations

import numpy as np
import pytest

from tokenrec.metrics.binary import auc, gauc, log_loss
from tokenrec.study.bootstrap import _SortedScores, paired_bootstrap, user_auc

# Sums of 300 float64 values in another order; measured: 2e-16.
FLOAT64_SUMS = 1e-12


def some(
    rows: int = 300, users: int = 40, ties: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    user = draw.integers(0, users, rows)
    labels = draw.integers(0, 2, rows)
    scores = 0.3 * labels + draw.uniform(0, 0.7, rows)  # rounded, some are 0 or 1
    return labels, (np.round(scores, 1) if ties else scores).astype(np.float32), user


@pytest.mark.parametrize("ties", [True, False])
def test_a_draw_has_the_metrics_of_its_rows(ties: bool) -> None:
    labels, scores, user = some(ties=ties)
    times = np.random.default_rng(1).integers(0, 4, 40).astype(np.float64)
    again = np.concatenate(
        [np.flatnonzero(user == u) for u in range(40) for _ in range(int(times[u]))]
    )
    copy = np.concatenate(
        [
            np.full((user == u).sum(), 100 * u + c)
            for u in range(40)
            for c in range(int(times[u]))
        ]
    )
    expected = (
        auc(labels[again], scores[again]),
        gauc(labels[again], scores[again], copy),
    )
    found = _SortedScores(labels, scores, user, 40).metrics(times)
    assert found[:2] == pytest.approx(expected, abs=FLOAT64_SUMS)
    assert found[2] == pytest.approx(
        log_loss(labels[again], scores[again]), rel=FLOAT64_SUMS
    )


def test_auc_within_users_weighted_by_rows_is_gauc() -> None:
    labels, scores, user = some()
    value, rows = user_auc(labels, scores, user, 40)
    assert np.nansum(value * rows) / rows.sum() == pytest.approx(
        gauc(labels, scores, user), abs=FLOAT64_SUMS
    )


def test_a_difference_is_that_of_the_means_over_seeds_and_lies_in_its_interval() -> (
    None
):
    labels, scores, user = some(ties=False)
    noise = np.random.default_rng(2).uniform(size=(2, len(labels))).astype(np.float32)
    runs = {
        "right": {0: scores, 1: scores},
        "half": {seed: (scores + n) / 2 for seed, n in enumerate(noise)},
    }
    found = paired_bootstrap(labels, runs, user, "right", draws=300)["auc"]["half"]
    assert found.value == pytest.approx(
        np.mean([auc(labels, s) for s in runs["half"].values()]) - auc(labels, scores)
    )
    assert found.low < found.value < found.high < 0
    assert found.p_value == pytest.approx(
        2 / 300
    )  # the least that so many draws can tell


def test_a_model_does_not_differ_from_itself_and_a_draw_is_the_same_for_all() -> None:
    labels, scores, user = some()
    one = paired_bootstrap(
        labels, {"a": {0: scores}, "b": {0: scores}}, user, "a", draws=100
    )
    for models in one.values():
        assert models["b"] == (0, 0, 0, 1, 0)
    runs = {"a": {0: scores}, "b": {0: 1 - scores}}
    assert paired_bootstrap(
        labels, runs, user, "a", draws=100, seed=3
    ) == paired_bootstrap(labels, runs, user, "a", draws=100, seed=3)


def test_a_model_with_fewer_seeds_is_compared_on_those_it_shares() -> None:
    labels, scores, user = some(ties=False)
    noise = np.random.default_rng(2).uniform(size=(3, len(labels))).astype(np.float32)
    seeds = dict(enumerate((scores + noise) / 2))
    runs = {"all": seeds, "first": {0: seeds[0]}, "none of them": {-1: seeds[0]}}
    found = paired_bootstrap(labels, runs, user, "all", draws=100)["auc"]
    assert found["first"] == (0, 0, 0, 1, 0)
    mean = np.mean([auc(labels, of_seed) for of_seed in seeds.values()])
    assert found["none of them"].value == pytest.approx(auc(labels, seeds[0]) - mean)


def test_intervals_hold_the_true_difference_about_as_often_as_they_say() -> None:
    draw, held, studies = np.random.default_rng(5), 0, 60
    for _ in range(studies):
        user = np.repeat(np.arange(60), 5)
        labels = draw.integers(0, 2, 300)
        # Both see the label through equal noise: the true difference is 0. A user's
        # rows share some of it.
        shared = draw.normal(size=(2, 60)).repeat(5, axis=1)
        a, b = (1 / (1 + np.exp(-(labels + s + draw.normal(size=300)))) for s in shared)
        found = paired_bootstrap(
            labels, {"a": {0: a}, "b": {0: b}}, user, "a", draws=200
        )["auc"]["b"]
        held += found.low <= 0 <= found.high
    assert 0.85 * studies < held <= studies


def few_positive_users() -> tuple[
    np.ndarray, dict[str, dict[int, np.ndarray]], np.ndarray
]:
    """Labels and two models; two of 30 users hold all positives."""
    draw = np.random.default_rng(0)
    user = np.repeat(np.arange(30), 6)
    labels = ((user < 2) & (draw.uniform(size=180) < 0.7)).astype(int)
    # Both models see the label, through noise of their own.
    a, b = (0.25 * labels + draw.uniform(0, 0.7, 180) for _ in range(2))
    return labels, {"a": {0: a}, "b": {0: b}}, user


def test_undefined_draws_are_counted_and_left_out_of_interval_and_p_value() -> None:
    labels, runs, user = few_positive_users()
    draws = 400
    found = paired_bootstrap(labels, runs, user, "a", draws=draws, seed=1)

    # The same resamples, with metrics of the log rows that they repeat.
    generator = np.random.default_rng(1)
    deltas = []
    for _ in range(draws):
        drawn = generator.integers(30, size=30)
        rows = np.concatenate([np.flatnonzero(user == u) for u in drawn])
        of_models = [auc(labels[rows], of[0][rows]) for of in runs.values()]
        if None not in of_models:
            deltas.append(of_models[1] - of_models[0])
    undefined = draws - len(deltas)
    assert 0.08 * draws < undefined < 0.2 * draws  # exp(-2) = 0.135

    estimate = found["auc"]["b"]
    assert estimate.undefined_draws == undefined
    expected = np.quantile(deltas, [0.025, 0.975])
    assert (estimate.low, estimate.high) == pytest.approx(tuple(expected))
    share_below, share_above = (
        np.mean(np.less_equal(deltas, 0)),
        np.mean(np.greater_equal(deltas, 0)),
    )
    assert estimate.p_value == pytest.approx(2 * min(share_below, share_above))
    # Counted over all draws, the undefined ones would be in neither tail.
    assert estimate.p_value > 2 * min(share_below, share_above) * len(deltas) / draws
    # A log loss is defined whatever is drawn.
    assert found["log_loss"]["b"].undefined_draws == 0


def test_the_least_p_value_is_that_of_the_defined_draws() -> None:
    labels, _, user = few_positive_users()
    runs = {"a": {0: 1.0 - labels}, "b": {0: labels + 0.0}}
    found = paired_bootstrap(labels, runs, user, "a", draws=200)["auc"]["b"]
    assert found.undefined_draws > 0
    assert found.p_value == pytest.approx(2 / (200 - found.undefined_draws))
    assert (found.low, found.high) == (1, 1)


def test_a_metric_that_no_draw_defines_has_no_interval() -> None:
    user = np.repeat(np.arange(20), 4)
    labels = np.repeat(np.arange(20) % 2, 4)  # every user has one class: no GAUC
    scores = np.random.default_rng(0).uniform(size=(2, 80))
    runs = {"a": {0: scores[0]}, "b": {0: scores[1]}}
    found = paired_bootstrap(labels, runs, user, "a", draws=100)
    assert found["gauc"]["b"] == (None, None, None, None, 100)
    assert found["auc"]["b"].undefined_draws == 0


def test_too_few_defined_draws_make_no_interval() -> None:
    # One user holds all positives: exp(-1) of 100 draws are undefined.
    user = np.repeat(np.arange(20), 4)
    labels = (user == 0).astype(int)
    scores = np.random.default_rng(0).uniform(size=(2, 80))
    runs = {"a": {0: scores[0]}, "b": {0: scores[1]}}
    found = paired_bootstrap(labels, runs, user, "a", draws=100)["auc"]["b"]
    assert found.value is not None
    assert 20 < found.undefined_draws < 55
    assert (found.low, found.high, found.p_value) == (None, None, None)
