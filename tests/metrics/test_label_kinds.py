"""Metrics of numbers, of classes and of requests against slow loops."""

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec.errors import InputError
from tokenrec.metrics.binary import auc, with_macro_means
from tokenrec.metrics.classes import class_report
from tokenrec.metrics.real import real_report, xauc
from tokenrec.metrics.requests import request_codes, request_ndcg

# Few distinct values, so that ties are common.
SMALL = st.integers(-3, 3).map(float)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float64, st.tuples(st.integers(0, 21), st.just(2)), elements=SMALL)
)
def test_xauc_is_the_share_of_pairs_in_order(values):
    y, p = values.T
    right = pairs = 0.0
    for i in range(len(y)):
        for j in range(len(y)):
            if y[i] > y[j]:
                pairs += 1
                right += (p[i] > p[j]) + 0.5 * (p[i] == p[j])
    expected = right / pairs if pairs else None
    assert xauc(y, p) == expected


def test_xauc_of_ones_and_zeros_is_the_auc():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 500)
    scores = np.round(random.random(500), 2)
    assert xauc(labels, scores) == auc(labels, scores)


def test_a_report_of_numbers_stands_beside_a_constant():
    y = np.array([1.0, 2.0, 6.0])
    report = real_report(y, np.array([2.0, 2.0, 4.0]), mean=2.0, deviation=4.0)
    assert report["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert report["mae"] == 1.0
    assert report["rmse_of_mean"] == pytest.approx(math.sqrt(17 / 3))
    assert report["mae_of_mean"] == pytest.approx(5 / 3)
    assert report["loss"] == pytest.approx(5 / 3 / 32)
    assert report["xauc"] == pytest.approx(2.5 / 3)
    constant = real_report(y, np.full(3, 2.0), mean=2.0, deviation=4.0)
    assert constant["rmse"] == constant["rmse_of_mean"]
    assert constant["xauc"] == 0.5
    empty = real_report(y[:0], y[:0], 0.0, 1.0)
    assert empty["rmse"] is None
    assert empty["examples"] == 0
    with pytest.raises(InputError, match="predictions hold nan at row 1"):
        real_report(y, np.array([1.0, np.nan, 2.0]), 0.0, 1.0)


def test_a_report_does_not_depend_on_the_order_of_rows():
    random = np.random.default_rng(1)
    y, p = random.normal(size=(2, 999))
    order = random.permutation(999)
    assert real_report(y, p, 0.0, 1.0) == real_report(y[order], p[order], 0.0, 1.0)
    labels, q = random.integers(0, 4, 999), random.dirichlet(np.ones(4), 999)
    assert class_report(labels, q) == class_report(labels[order], q[order])


def test_a_report_of_classes_is_that_of_a_loop():
    random = np.random.default_rng(2)
    labels, p = random.integers(0, 3, 200), random.dirichlet(np.ones(4), 200)
    report = class_report(labels, p)
    losses = [-math.log(p[i, c]) for i, c in enumerate(labels)]
    assert report["log_loss"] == pytest.approx(np.mean(losses))
    right = [p[i].argmax() == c for i, c in enumerate(labels)]
    assert report["accuracy"] == np.mean(right)
    aucs = [auc((labels == c).astype(int), p[:, c]) for c in range(4)]
    # No row is of the last class, so that it has no AUC.
    assert aucs[3] is None
    assert report["ovr_auc"] == pytest.approx(np.mean(aucs[:3]))
    shares = np.bincount(labels) / 200
    entropy = -(shares * np.log(shares)).sum()
    assert report["normalized_entropy"] == pytest.approx(report["log_loss"] / entropy)
    assert report["accuracy_of_commonest"] == shares.max()
    with pytest.raises(InputError, match="labels hold 4, which is none of 4 classes"):
        class_report(np.array([4]), p[:1])
    with pytest.raises(InputError, match="outside"):
        class_report(labels[:1], p[:1] * 9)


def slow_ndcg(requests, gains, scores, k) -> list[float]:
    """NDCG@k of each request without ties, one by one."""
    values = []
    for request in np.unique(requests):
        rows = np.flatnonzero(requests == request)
        g = np.maximum(gains[rows], 0)
        if len(rows) < 2 or not g.sum():
            continue
        discount = [1 / math.log2(2 + place) for place in range(min(k, len(rows)))]
        ranked = g[np.argsort(-scores[rows])][:k]
        best = np.sort(g)[::-1][:k]
        values.append(float((ranked * discount).sum() / (best * discount).sum()))
    return values


@pytest.mark.parametrize("k", [1, 3, 100])
def test_ndcg_within_requests_is_that_of_a_loop(k):
    random = np.random.default_rng(k)
    requests = random.integers(0, 30, 120)
    gains = random.choice([-1.0, 0.0, 1.0, 2.5], 120)
    scores = random.random(120)
    expected = slow_ndcg(requests, gains, scores, k)
    value, count = request_ndcg(requests, gains, scores, k)
    assert count == len(expected)
    assert value == pytest.approx(np.mean(expected))


def test_equal_scores_share_their_places():
    requests, gains = np.zeros(4, int), np.array([1.0, 0.0, 0.0, 0.0])
    discounts = 1 / np.log2(1 + np.arange(1, 5))
    for k in (2, 4):
        value, _ = request_ndcg(requests, gains, np.zeros(4), k)
        assert value == pytest.approx(discounts[:k].sum() / 4)
    assert request_ndcg(requests[:1], gains[:1], gains[:1], 3) == (None, 0)


def test_requests_are_told_apart_by_user_time_and_number():
    user, time, number = np.meshgrid(np.arange(-3, 30), [0, 1, 10**12], np.arange(9))
    codes = request_codes(user.ravel(), time.ravel(), number.ravel())
    assert len(np.unique(codes)) == user.size


def test_the_mean_over_tasks_takes_the_share_of_pairs_in_order():
    reports = {
        "click": {"auc": 0.5, "gauc": 0.75},
        "seconds": {"xauc": 0.75},
        "stars": {"ovr_auc": 1.0},
        "none": {"xauc": None},
    }
    means = with_macro_means(reports)
    assert means["macro_auc"] == 0.75
    assert means["macro_gauc"] == 0.75
