"""Metrics against scikit-learn and brute force, and the store against memory.

All of it is float64 arithmetic of NumPy and Python. Errors are measured with NumPy's
code for AVX512, for AVX2 and without either, and are the same. `pytest.approx` without
a tolerance allows a relative 1e-6, for sums in another order: measured 3e-17 at most.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tokenrec.errors import InputError
from tokenrec.metrics import binary, exact_auc, groups, ranking, score_store


def sample(
    rows: int = 4000, groups: int = 300, tasks: int = 1, seed: int = 0, levels: int = 50
):
    """Draw labels with unknowns, probabilities with many ties, and skewed users."""
    rng = np.random.default_rng(seed)
    probabilities = (rng.integers(1, levels, (rows, tasks)) / levels).astype(np.float32)
    labels = (rng.random((rows, tasks)) < probabilities).astype(np.int8)
    labels[rng.random((rows, tasks)) < 0.2] = -1
    users = (groups * rng.random(rows) ** 3).astype(np.int64)
    return labels, probabilities, users


def known_sample(**options):
    labels, probabilities, users = sample(**options)
    known = labels[:, 0] >= 0
    return labels[known, 0], probabilities[known, 0], users[known]


def pair_count_auc(labels, scores):
    """Count every (positive, negative) pair, one by one."""
    positives, negatives = scores[labels == 1], scores[labels == 0]
    if not len(positives) or not len(negatives):
        return None
    difference = positives[:, None].astype(float) - negatives[None, :].astype(float)
    return ((difference > 0).sum() + 0.5 * (difference == 0).sum()) / difference.size


def pair_count_gauc(labels, scores, groups):
    total = rows = 0
    for group in np.unique(groups):
        inside = groups == group
        area = pair_count_auc(labels[inside], scores[inside])
        if area is not None:
            total += inside.sum() * area
            rows += inside.sum()
    return total / rows if rows else None


@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_auc_equals_scikit_learn_and_pair_counting(levels):
    labels, scores, _ = known_sample(levels=levels)
    # Trapezoids against pair counts: equal here, a sum of some thousand terms may
    # round.
    assert binary.auc(labels, scores) == pytest.approx(
        sklearn.metrics.roc_auc_score(labels, scores), abs=1e-12
    )
    assert binary.auc(labels, scores) == pair_count_auc(labels, scores)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_gauc_equals_pair_counting_in_each_group(dtype):
    labels, scores, groups = known_sample(rows=2000)
    scores = (100 * scores - 50).astype(dtype)
    # Another order of the sum over groups: equal here, an ulp is 1e-16.
    assert binary.gauc(labels, scores, groups) == pytest.approx(
        pair_count_gauc(labels, scores, groups), abs=1e-14
    )


def test_gauc_of_one_group_is_auc_and_strings_group_like_integers():
    labels, scores, groups = known_sample()
    assert binary.gauc(labels, scores, np.zeros(len(labels), np.int32)) == binary.auc(
        labels, scores
    )
    expected = binary.gauc(labels, scores, groups)
    assert (
        binary.gauc(labels, scores, np.array([f"user {g}" for g in groups])) == expected
    )
    assert (
        binary.gauc(labels, scores, np.array([f"user {g}" for g in groups], object))
        == expected
    )
    assert binary.gauc(labels, scores, groups - 2**62) == expected


def test_gauc_weights_groups_by_rows_and_leaves_out_groups_of_one_class():
    labels = np.array([1, 0, 0, 1, 0, 1, 1])
    scores = np.array([0.9, 0.1, 0.2, 0.1, 0.9, 0.5, 0.6])
    # AUC 1 over 3 log rows, 0 over 2 log rows, undefined.
    groups = np.array([0, 0, 0, 1, 1, 2, 2])
    assert binary.gauc(labels, scores, groups) == 3 / 5


def test_signed_zeros_tie():
    labels, scores = np.array([1, 0]), np.array([-0.0, 0.0], np.float32)
    assert binary.auc(labels, scores) == 0.5
    assert binary.gauc(labels, scores, np.array([4, 4])) == 0.5


def test_log_loss_equals_scikit_learn():
    labels, probabilities, _ = known_sample(levels=997)
    expected = sklearn.metrics.log_loss(labels, probabilities.astype(np.float64))
    # Another order of some thousand logarithms: measured 6e-17.
    assert binary.log_loss(labels, probabilities) == pytest.approx(expected, rel=1e-12)


def test_log_loss_of_a_wrong_certain_prediction_is_finite_and_the_same_for_both_classes():
    losses = [
        binary.log_loss(np.array([y]), np.array([1 - y], np.float32)) for y in (0, 1)
    ]
    # 1 - (1 - 1e-7) is 1e-7 to a relative 5e-10 in float64: measured 5.3e-10 of 16.1.
    assert losses == pytest.approx([-math.log(exact_auc.CLIP)] * 2, rel=1e-8)


def test_normalized_entropy_of_the_base_rate_is_one():
    labels = np.array([1, 0, 0, 0, 1, 0, 0, 0])
    # NumPy's logarithm over Python's: equal here, but the two may differ by some ulp of
    # 2.2e-16 on another processor.
    assert binary.normalized_entropy(labels, np.full(8, 0.25)) == pytest.approx(
        1, abs=1e-14
    )
    better = binary.normalized_entropy(labels, np.where(labels, 0.8, 0.2))
    assert better is not None
    assert better < 1


def test_undefined_metrics_are_none():
    nothing, ones, half = np.empty(0), np.ones(3), np.full(3, 0.5)
    groups = np.zeros(3, np.int64)
    assert binary.auc(nothing, nothing) is None
    assert binary.auc(ones, half) is None
    assert binary.gauc(nothing, nothing, np.empty(0, np.int64)) is None
    assert binary.gauc(nothing, nothing, np.empty(0, object)) is None
    assert binary.gauc(ones, half, groups) is None
    assert binary.gauc(np.array([0, 1, 1]), half, np.arange(3)) is None
    assert binary.log_loss(nothing, nothing) is None
    assert binary.log_loss(ones, half) == pytest.approx(math.log(2))
    assert binary.normalized_entropy(ones, half) is None
    assert binary.normalized_entropy(nothing, nothing) is None


labels_and_scores = st.integers(1, 60).flatmap(
    lambda n: st.tuples(
        hnp.arrays(np.int8, n, elements=st.integers(0, 1)),
        hnp.arrays(np.float32, n, elements=st.floats(-4, 4, width=16)),
        hnp.arrays(np.int64, n, elements=st.integers(0, 5)),
    )
)


@settings(max_examples=60, deadline=None)
@given(labels_and_scores)
def test_areas_equal_pair_counting_and_only_depend_on_the_order_of_scores(case):
    labels, scores, groups = case
    area, grouped = binary.auc(labels, scores), binary.gauc(labels, scores, groups)
    assert area == pair_count_auc(labels, scores)
    # Another order of the sum over six groups: equal here, an ulp is 1e-16.
    assert grouped == pytest.approx(pair_count_gauc(labels, scores, groups), abs=1e-14)
    monotone = np.arctan(scores.astype(np.float64)) * 3 + 1
    assert (binary.auc(labels, monotone), binary.gauc(labels, monotone, groups)) == (
        area,
        grouped,
    )


@settings(max_examples=60, deadline=None)
@given(labels_and_scores)
def test_areas_of_swapped_labels_or_negated_scores_are_the_complement(case):
    labels, scores, groups = case
    for metric, arguments in ((binary.auc, ()), (binary.gauc, (groups,))):
        area = metric(labels, scores, *arguments)
        if area is None:
            assert metric(1 - labels, scores, *arguments) is None
        else:
            # Two quotients that are rounded apart: measured 1.1e-16.
            assert metric(1 - labels, scores, *arguments) == pytest.approx(
                1 - area, abs=1e-14
            )
            assert metric(labels, -scores, *arguments) == pytest.approx(
                1 - area, abs=1e-14
            )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: binary.auc(np.array([0, -1]), np.zeros(2)),
            "labels hold -1.*leave unknown labels out",
        ),
        (lambda: binary.auc(np.zeros(2), np.array([0.1, np.nan])), "NaN at row 1"),
        (lambda: binary.auc(np.zeros(2), np.zeros(3)), r"shape \(2,\), scores \(3,\)"),
        (
            lambda: binary.log_loss(np.zeros(2), np.array([0.5, 1.5])),
            r"outside \[0, 1\].*sigmoids",
        ),
        (
            lambda: binary.log_loss(np.ones(2), np.array([-0.5, 0.5])),
            r"outside \[0, 1\]",
        ),
        (
            lambda: binary.gauc(np.zeros(2), np.zeros(2), np.array([0.5, 1.5])),
            "integers or strings",
        ),
        (
            lambda: binary.gauc(
                np.zeros(2), np.zeros(2), np.array(["a", None], object)
            ),
            "1 nulls",
        ),
        (
            lambda: binary.gauc(np.zeros(2), np.zeros(2), np.array(["a", 1], object)),
            "integers or strings",
        ),
        (
            lambda: binary.gauc(np.zeros(2), np.zeros(2), np.zeros(3, np.int64)),
            "one group per label",
        ),
        (
            lambda: binary.summarize(
                np.zeros((2, 2)), np.zeros((2, 2)), np.zeros(2), ["a"]
            ),
            r"need \(2, 1\)",
        ),
        (lambda: score_store.ScoreStore(["a"], memory_rows=0), "memory_rows=0"),
        (
            lambda: score_store.ScoreStore(["a"]).merge(score_store.ScoreStore(["b"])),
            "same tasks",
        ),
        (
            lambda: score_store.ScoreStore(["a"]).append(
                np.full((1, 1), 2), np.zeros((1, 1)), np.zeros(1, int)
            ),
            "labels hold 2",
        ),
        (lambda: ranking.hit_rate_at(np.array([1]), 0), "k=0"),
        (lambda: ranking.mrr(np.array([0.5])), "ranks hold 0.5"),
        (
            lambda: ranking.ranks_of(np.zeros((1, 3)), np.array([3])),
            "columns are 0 to 2",
        ),
        (lambda: ranking.ranks_of(np.full((1, 3), np.nan), np.array([0])), "NaN"),
    ],
)
def test_wrong_input_is_an_error_with_reason_and_remedy(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_summary_equals_the_single_metrics_on_known_rows_and_is_json():
    labels, probabilities, users = sample(tasks=3)
    # A task without positives.
    labels[:, 2] = np.minimum(labels[:, 2], 0)
    summary = binary.summarize(labels, probabilities, users, ["click", "long", "hate"])
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    for k, task in enumerate(("click", "long", "hate")):
        known = labels[:, k] >= 0
        y, p = labels[known, k], probabilities[known, k]
        assert summary["tasks"][task] == {
            "auc": binary.auc(y, p),
            "gauc": binary.gauc(y, p, users[known]),
            "log_loss": binary.log_loss(y, p),
            "normalized_entropy": binary.normalized_entropy(y, p),
            "positives": int(y.sum()),
            "examples": int(known.sum()),
        }
    assert summary["tasks"]["hate"]["auc"] is None
    click, long = summary["tasks"]["click"], summary["tasks"]["long"]
    assert summary["macro_auc"] == pytest.approx((click["auc"] + long["auc"]) / 2)
    assert summary["macro_gauc"] == pytest.approx((click["gauc"] + long["gauc"]) / 2)


def test_summary_without_rows_has_no_means():
    empty = binary.summarize(
        np.empty((0, 1), np.int8),
        np.empty((0, 1), np.float32),
        np.empty(0, np.int64),
        ["a"],
    )
    assert (
        empty["macro_auc"],
        empty["macro_gauc"],
        empty["tasks"]["a"]["examples"],
    ) == (None, None, 0)
    assert score_store.ScoreStore(["a"]).summarize() == empty


@pytest.mark.parametrize("memory_rows", [64, 1000, 10**6])
@pytest.mark.parametrize("batch", [37, 5000])
def test_store_equals_the_summary_in_memory_bit_for_bit(memory_rows, batch, tmp_path):
    labels, probabilities, users = sample(tasks=2)
    store = score_store.ScoreStore(
        ["a", "b"], memory_rows=memory_rows, directory=tmp_path
    )
    for start in range(0, len(users), batch):
        rows = slice(start, start + batch)
        store.append(labels[rows], probabilities[rows], users[rows])
    assert store.rows == len(users)
    assert store.summarize() == binary.summarize(
        labels, probabilities, users, ["a", "b"]
    )
    assert list(tmp_path.iterdir()) == []


def test_store_keeps_at_most_memory_rows_outside_files():
    labels, probabilities, users = sample(rows=1000)
    store = score_store.ScoreStore(["a"], memory_rows=100)
    for start in range(0, 1000, 30):
        store.append(
            labels[start : start + 30],
            probabilities[start : start + 30],
            users[start : start + 30],
        )
        assert sum(map(len, store._fresh)) < 100
    assert all(isinstance(run, np.memmap) for run in store._spilled)
    assert isinstance(store._array(101, np.float32), np.memmap)
    assert not isinstance(store._array(100, np.float32), np.memmap)


def test_stores_of_several_hosts_merge_to_the_result_of_one_in_any_order():
    labels, probabilities, users = sample(tasks=2)
    names = np.array([f"user {u}" for u in users], object)
    expected = binary.summarize(labels, probabilities, names, ["a", "b"])
    hosts = []
    for host in range(3):
        hosts.append(score_store.ScoreStore(["a", "b"], memory_rows=500))
        for start in range(host * 100, len(users), 300):
            rows = slice(start, start + 100)
            hosts[-1].append(labels[rows], probabilities[rows], names[rows])
    merged = score_store.ScoreStore(["a", "b"], memory_rows=700)
    for host in (2, 0, 1):
        merged.merge(hosts[host])
    assert merged.summarize() == expected
    again = score_store.ScoreStore(["a", "b"])
    for block in merged.blocks():
        again.append(*block)
    assert again.summarize() == expected


def test_a_user_longer_than_memory_rows_counts_as_one_group():
    labels, probabilities, _ = sample(rows=500)
    users = np.repeat([3, 8, 9], [5, 490, 5])
    store = score_store.ScoreStore(["a"], memory_rows=20)
    store.append(labels, probabilities, users)
    assert store.summarize() == binary.summarize(labels, probabilities, users, ["a"])


def test_a_full_disk_is_an_input_error(tmp_path, monkeypatch):
    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(score_store.os, "posix_fallocate", full)
    store = score_store.ScoreStore(["a"], memory_rows=10, directory=tmp_path)
    with pytest.raises(InputError, match=r"no room for .* bytes.*free some"):
        store.append(*sample(rows=20))


def test_group_codes_do_not_depend_on_the_batch():
    names = np.array(["ann", "bob", "ann", "żółw"])
    codes = groups.group_codes(names)
    assert codes.dtype == np.int64
    assert codes[0] == codes[2]
    assert len(set(codes.tolist())) == 3
    assert np.array_equal(groups.group_codes(names[[3, 1]]), codes[[3, 1]])
    assert groups.group_codes(np.empty(0, object)).shape == (0,)


def test_ranks_equal_brute_force_with_midranks():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, (20, 15)).astype(np.float32)
    relevant = rng.integers(-1, 15, (20, 3))
    ranks = ranking.ranks_of(scores, relevant)
    for n in range(20):
        for r, item in enumerate(relevant[n]):
            if item < 0:
                assert ranks[n, r] == 0
                continue
            places = [
                i + 1
                for i, s in enumerate(sorted(scores[n], reverse=True))
                if s == scores[n, item]
            ]
            assert ranks[n, r] == np.mean(places)
    assert np.array_equal(ranking.ranks_of(scores, np.abs(relevant[:, 0])).shape, (20,))


def test_list_metrics_equal_brute_force():
    rng = np.random.default_rng(1)
    scores = rng.permuted(np.tile(np.arange(30.0), (40, 1)), axis=1)
    relevant = np.stack([rng.choice(30, 4, replace=False) for _ in range(40)])
    relevant[::3, 2:] = -1
    ranks, k = ranking.ranks_of(scores, relevant), 10
    hits, recalls, gains, reciprocal = [], [], [], []
    for n in range(40):
        wanted = {i for i in relevant[n] if i >= 0}
        found = [item in wanted for item in np.argsort(-scores[n])]
        hits.append(any(found[:k]))
        recalls.append(sum(found[:k]) / len(wanted))
        best = sum(1 / math.log2(i + 2) for i in range(min(k, len(wanted))))
        gains.append(sum(1 / math.log2(i + 2) for i in range(k) if found[i]) / best)
        reciprocal.append(1 / (found.index(True) + 1))
    assert ranking.hit_rate_at(ranks, k) == pytest.approx(np.mean(hits))
    assert ranking.recall_at(ranks, k) == pytest.approx(np.mean(recalls))
    assert ranking.ndcg_at(ranks, k) == pytest.approx(np.mean(gains))
    assert ranking.mrr(ranks) == pytest.approx(np.mean(reciprocal))
    truth = np.where(np.arange(30) == relevant[:, :1], 1, 0)
    expected = sklearn.metrics.ndcg_score(truth, scores, k=k)
    assert ranking.ndcg_at(ranks[:, 0], k) == pytest.approx(expected)


def test_queries_without_a_relevant_item_are_left_out_and_items_not_found_count_as_misses():
    ranks = np.array([[1, 0], [0, 0], [np.inf, np.inf]])
    assert ranking.hit_rate_at(ranks, 5) == 0.5
    assert ranking.recall_at(ranks, 5) == 0.5
    assert ranking.ndcg_at(ranks, 5) == 0.5
    assert ranking.mrr(ranks) == 0.5
    for metric in (ranking.hit_rate_at, ranking.recall_at, ranking.ndcg_at):
        assert metric(np.zeros((2, 3)), 5) is None
    assert ranking.mrr(np.empty(0)) is None
    assert ranking.ranks_of(np.empty((0, 4)), np.empty(0, int)).shape == (0,)
