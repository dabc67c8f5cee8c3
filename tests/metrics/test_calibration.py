"""Calibration against slow, literal code, and its edge cases."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenrec.metrics import binary
from tokenrec.metrics.calibration import BINS, calibration_of_sorted
from tokenrec.metrics.score_store import ScoreStore


def calibration(labels, probabilities):
    labels, p = np.asarray(labels), np.asarray(probabilities, np.float32)
    return calibration_of_sorted(np.sort(p[labels == 1]), np.sort(p[labels == 0]))


def slow_bins(labels, probabilities):
    """(sum of p, positives, rows) of each bin that holds rows, row by row."""
    n = len(labels)
    bins = {}
    for p, y in zip(probabilities, labels, strict=True):
        lower = sum(other < p for other in probabilities)
        old = bins.get(lower * BINS // n, (0.0, 0, 0))
        bins[lower * BINS // n] = (old[0] + float(p), old[1] + int(y), old[2] + 1)
    return [bins[number] for number in sorted(bins)]


ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 12)), min_size=1, max_size=60
)


@given(ROWS)
def test_bins_and_top_decile_are_those_of_a_slow_loop(rows):
    labels = [y for y, _ in rows]
    # Few distinct values, so that many are tied.
    p = [float(np.float32(k / 12)) for _, k in rows]
    found, wanted = calibration(labels, p), slow_bins(labels, p)
    assert [part["examples"] for part in found["reliability"]] == [
        count for _, _, count in wanted
    ]
    for part, (total, positives, count) in zip(
        found["reliability"], wanted, strict=True
    ):
        assert part["predicted"] == pytest.approx(total / count)
        assert part["observed"] == positives / count
    gaps = [abs(total - positives) for total, positives, _ in wanted]
    assert found["expected_error"] == pytest.approx(sum(gaps) / len(rows))
    assert found["predicted"] == pytest.approx(np.mean(p))
    assert found["observed"] == pytest.approx(np.mean(labels))
    edge = sorted(p, reverse=True)[math.ceil(len(p) / 10) - 1]
    top = [(a, y) for a, y in zip(p, labels, strict=True) if a >= edge]
    decile = found["top_decile"]
    assert decile["examples"] == len(top)
    assert decile["over_prediction"] == pytest.approx(
        np.mean([a for a, _ in top]) - np.mean([y for _, y in top])
    )


def test_slope_and_intercept_are_the_maximum_of_the_likelihood():
    random = np.random.default_rng(0)
    x = random.normal(-2, 1.5, 4000)
    labels = random.random(4000) < 1 / (1 + np.exp(-(0.3 + 0.5 * x)))
    p = (1 / (1 + np.exp(-x))).astype(np.float32)
    found = calibration(labels, p)
    slope, intercept = found["slope"], found["intercept"]
    # Two deviations of the estimate of 4,000 rows are about 0.06 and 0.13.
    assert slope == pytest.approx(0.5, abs=0.06)
    assert intercept == pytest.approx(0.3, abs=0.13)
    # The maximum of a concave function is where its gradient is zero.
    wide = p.astype(np.float64)
    logit = np.log(wide) - np.log1p(-wide)
    residual = 1 / (1 + np.exp(-(intercept + slope * logit))) - labels
    assert abs(residual.sum()) < 1e-6
    assert abs((residual * logit).sum()) < 1e-6


def test_calibrated_probabilities_have_slope_one_and_a_small_error():
    random = np.random.default_rng(1)
    p = random.beta(2, 5, 20_000)
    found = calibration(random.random(20_000) < p, p)
    assert found["slope"] == pytest.approx(1, abs=0.06)
    assert found["intercept"] == pytest.approx(0, abs=0.06)
    # Of 1,000 labels a bin: a deviation of at most 0.016.
    assert found["expected_error"] < 0.02
    assert {part["examples"] for part in found["reliability"]} == {20_000 // BINS}


def test_a_start_far_from_the_maximum_converges():
    # Certain and mostly wrong: the slope is negative.
    p = np.array([1 - 1e-6] * 50 + [1e-6] * 50)
    found = calibration([0] * 45 + [1] * 5 + [1] * 45 + [0] * 5, p)
    step = 2 * math.log(9) / (2 * (math.log(1 - 1e-6) - math.log(1e-6)))
    assert found["slope"] == pytest.approx(-step, rel=1e-3)


@pytest.mark.parametrize(
    ("labels", "p"),
    [
        ([1, 1], [0.2, 0.7]),
        ([0, 0, 1, 1], [0.1, 0.2, 0.7, 0.9]),
        ([0, 1, 0, 1], [0.3, 0.3, 0.3, 0.3]),
        ([1, 1, 0], [0.1, 0.3, 0.3]),
    ],
)
def test_no_line_is_fitted_where_the_labels_do_not_determine_one(labels, p):
    found = calibration(labels, p)
    assert found["slope"] is None
    assert found["intercept"] is None
    assert found["expected_error"] >= 0


def test_no_rows_have_no_calibration():
    assert calibration([], []) is None


@pytest.mark.parametrize("memory_rows", [64, 10**6])
def test_a_store_gives_the_calibration_of_the_summary_bit_for_bit(memory_rows):
    random = np.random.default_rng(2)
    labels = random.integers(-1, 2, (700, 2)).astype(np.int8)
    p = np.round(random.random((700, 2)), 2).astype(np.float32)
    users = random.integers(0, 30, 700)
    store = ScoreStore(["a", "b"], memory_rows=memory_rows)
    order = random.permutation(700)
    for rows in np.array_split(order, 9):
        store.append(labels[rows], p[rows], users[rows])
    found = store.summarize(calibration=True)
    assert found == binary.summarize(labels, p, users, ["a", "b"], calibration=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    known = labels[:, 1] >= 0
    assert found["tasks"]["b"]["calibration"] == calibration(
        labels[known, 1], p[known, 1]
    )
    assert "calibration" not in store.summarize()["tasks"]["a"]
