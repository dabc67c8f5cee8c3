"""Tests of sums that do not depend on order or blocks, against exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenrec.data.preparation.exact_sums import ExactSums

FLOATS = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1
)


def sums_of(values: list[float]) -> ExactSums:
    sums = ExactSums()
    sums.add(np.array(values, np.float32))
    return sums


@given(FLOATS)
def test_mean_and_variance_are_the_exact_ones_rounded_once(values: list[float]) -> None:
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    variance = sum((x - mean) ** 2 for x in exact) / len(exact)
    assert sums_of(values).mean_and_variance() == (float(mean), float(variance))


@given(FLOATS, st.data())
def test_order_and_blocks_change_nothing(
    values: list[float], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(values))
    cut = data.draw(st.integers(0, len(values)))
    merged = sums_of(shuffled[:cut])
    merged.merge(sums_of(shuffled[cut:]))
    assert merged.count == len(values)
    assert merged.mean_and_variance() == sums_of(values).mean_and_variance()


def test_many_large_numbers_do_not_overflow() -> None:
    most = float(np.finfo(np.float32).max)
    sums = ExactSums()
    for _ in range(20):
        sums.add(np.full(1 << 18, most, np.float32))
    assert sums.mean_and_variance() == (most, 0.0)
    with pytest.raises(ZeroDivisionError):
        ExactSums().mean_and_variance()
