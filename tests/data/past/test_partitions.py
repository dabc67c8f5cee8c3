"""Totals that are computed span by span equal those of one log."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tokenrec.data.past import runs as past_runs
from tokenrec.data.past.partitions import join_states
from tokenrec.data.past.runs import Runs, TotalOverflowError
from tokenrec.data.past.totals import SCALE, KeyTotals

SECOND = 1_000
# All the past, a half-life whose epochs hold several spans, and one with several epochs
# in a span.
HALF_LIVES = (None, 500 * SECOND, 3 * SECOND)
EDGES = np.array([100, 250, 260, 700]) * SECOND


def new_totals() -> KeyTotals:
    return KeyTotals(np.array([SCALE, 2.0**20]), HALF_LIVES)


def entries(seed: int, count: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, times with ties, and values; two of the five spans hold few entries."""
    rng = np.random.default_rng(seed)
    key = rng.integers(0, 9, count).astype(np.uint64)
    time = np.sort(rng.integers(0, 1000, count)) * SECOND
    return key, time, np.stack([rng.integers(0, 2, count), rng.normal(size=count)], 1)


def runs_of_parts(key: np.ndarray, time: np.ndarray, values: np.ndarray) -> list[Runs]:
    """Runs of each horizon, merged from three parts of the log."""
    span = np.searchsorted(EDGES, time, side="right")
    parts = [
        new_totals().runs(key[part], time[part], values[part], span[part])
        for part in (np.arange(len(key)) % 3 == i for i in range(3))
    ]
    return [Runs.merge(of_horizon) for of_horizon in zip(*parts, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_spans_on_their_own_have_the_bits_of_one_log(seed: int) -> None:
    key, time, values = entries(seed)
    whole = new_totals()
    expected = whole.update(key, time, values)

    runs, added = runs_of_parts(key, time, values), new_totals()
    cuts = np.searchsorted(time, EDGES)
    found = []
    for span, (first, last) in enumerate(
        itertools.pairwise([0, *cuts.tolist(), len(time)])
    ):
        rows = slice(first, last)
        start = added.state(np.unique(key[rows]))
        own = new_totals()
        own.resume(start)
        found.append(own.update(key[rows], time[rows], values[rows]))
        added.add([of_horizon.of_span(span) for of_horizon in runs])
    for horizon, of_spans in zip(expected, zip(*found, strict=True), strict=True):
        np.testing.assert_array_equal(horizon, np.concatenate(of_spans))
    for name, array in whole.state().items():
        np.testing.assert_array_equal(array, added.state()[name], err_msg=name)


def test_states_of_disjoint_keys_join() -> None:
    key, time, values = entries(0)
    whole, parts = new_totals(), [new_totals(), new_totals()]
    whole.update(key, time, values)
    for i, part in enumerate(parts):
        mine = key % np.uint64(2) == i
        part.update(key[mine], time[mine], values[mine])
    joined = join_states([new_totals().state(), *(part.state() for part in parts)])
    assert joined.keys() == whole.state().keys()
    for name, array in whole.state().items():
        assert joined[name].tobytes() == array.tobytes(), name


def test_a_sum_of_runs_that_is_too_large_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, time, values = entries(0)
    monkeypatch.setattr(past_runs, "_MOST_SUM", 1 << 28)
    runs = runs_of_parts(key, time, values)
    with pytest.raises(TotalOverflowError):
        new_totals().add([of_horizon.of_span(4) for of_horizon in runs])
