"""Mutual information of known joints, and of clusters with and without the label.

Counts and logarithms are float64 (measured errors below 1e-15). k-means runs in
float32, but on clusters that are 12 deviations apart: no state is near a border.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from tokenrec.analysis.information import (
    cluster_information,
    label_information,
    mutual_information,
)
from tokenrec.errors import InputError

RANDOM = np.random.default_rng(0)


def test_a_known_joint_has_its_information():
    counts = np.array([[30, 10], [5, 15], [0, 40]])
    codes = np.repeat([0, 0, 1, 1, 2, 2], counts.ravel())
    labels = np.repeat([0, 1, 0, 1, 0, 1], counts.ravel())
    p = counts / 100
    entropy = lambda q: -np.sum(q[q > 0] * np.log(q[q > 0]))  # noqa: E731
    expected = entropy(p.sum(axis=0)) + entropy(p.sum(axis=1)) - entropy(p)
    assert mutual_information(codes, labels) == pytest.approx(expected)


def test_shuffled_labels_take_the_bias_away():
    codes, labels = RANDOM.integers(0, 200, 2000), RANDOM.integers(0, 2, 2000)
    found = label_information(codes, labels, seed=0)
    # (200 - 1) / (2 * 2000) by Miller and Madow; 0.0585 were measured, from NumPy's
    # draws.
    assert found.raw == pytest.approx(0.05, abs=0.015)
    assert abs(found.corrected) < 0.01
    assert found.corrected == found.raw - found.shuffled
    assert label_information(codes, labels, seed=0) == found


def test_clusters_find_what_the_states_hold_and_skip_unknown_labels():
    labels = RANDOM.integers(0, 2, 1200).astype(np.int8)
    states = RANDOM.normal(size=(1200, 6))
    states[:, 0] += 12 * labels
    labels[::3] = -1
    held = cluster_information(states, labels, seed=0, clusters=(16,))
    # No cluster holds both sides of such a gap: the information is the entropy of the
    # label.
    truth = labels[labels >= 0].mean()
    entropy = -truth * math.log(truth) - (1 - truth) * math.log(1 - truth)
    assert held[16].raw == pytest.approx(entropy)
    states[:, 0] -= 12 * (states[:, 0] > 6)
    hidden = cluster_information(states, labels, seed=0, clusters=(16,))
    assert abs(hidden[16].corrected) < 0.02


def test_more_clusters_than_labelled_states_are_refused():
    labels = np.array([1] * 10 + [-1] * 90)
    with pytest.raises(
        InputError, match="10 states have a label, too few for 50 clusters"
    ):
        cluster_information(np.zeros((100, 2)), labels, seed=0, clusters=(50,))
