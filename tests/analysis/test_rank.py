"""Effective rank of clouds whose directions are known.

All is float64: measured errors are below 1e-14 for singular values and 6e-12 for ranks,
where rounding gives directions that should be empty a share of 1e-14. The tolerances
leave a factor of 1e5 for another LAPACK.
"""

from __future__ import annotations

import numpy as np
import pytest

from tokenrec.analysis.rank import effective_rank, singular_values
from tokenrec.errors import InputError

RANDOM = np.random.default_rng(0)


def cloud(values: np.ndarray, rows: int = 64, width: int = 8) -> np.ndarray:
    """Rows whose centred matrix has the singular values given."""
    left = RANDOM.normal(size=(rows, len(values)))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    right = np.linalg.qr(RANDOM.normal(size=(width, len(values))))[0]
    return left @ np.diag(values) @ right.T


@pytest.mark.parametrize("count", [1, 3, 8])
def test_equal_directions_count_one_each_wherever_the_cloud_lies(count):
    states = cloud(np.full(count, 2.5)) + 100
    np.testing.assert_allclose(singular_values(states)[:count], 2.5, rtol=1e-9)
    assert effective_rank(singular_values(states)) == pytest.approx(count, rel=1e-6)


def test_the_rank_is_the_entropy_of_singular_values_and_not_of_variances():
    values = np.array([4.0, 2.0, 1.0, 1.0])
    expected = np.exp(
        -(0.5 * np.log(0.5) + 0.25 * np.log(0.25) + 2 * 0.125 * np.log(0.125))
    )
    assert effective_rank(singular_values(cloud(values))) == pytest.approx(expected)


def test_the_rank_does_not_depend_on_scale_and_rotation():
    states = cloud(np.array([3.0, 2.0, 0.5]))
    turn = np.linalg.qr(RANDOM.normal(size=(8, 8)))[0]
    rank = effective_rank(singular_values(states))
    assert effective_rank(singular_values(1e-3 * states @ turn)) == pytest.approx(rank)


def test_states_that_are_all_alike_have_rank_0():
    assert effective_rank(singular_values(np.full((5, 3), 0.5))) == 0


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (np.zeros(4), "shape"),
        (np.zeros((0, 4)), "shape"),
        (np.array([[np.nan, 1.0]]), "non-finite"),
    ],
)
def test_what_has_no_rank_is_refused(states, message):
    with pytest.raises(InputError, match=message):
        singular_values(states)
