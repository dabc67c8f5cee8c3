"""Past rates compared with brute force, and what must never enter them."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from tokenrec.data.past_rates import PastRates, RateKey
from tokenrec.data.time_order import time_blocks, time_ordered
from tokenrec.errors import InputError

KEYS = (RateKey("video", "item"), RateKey("user", "context"))
TASKS = ("click", "view")
STRENGTH = 5.0


class Rows:
    """A random log with many ties in time, missing keys and unknown labels."""

    def __init__(self, count: int = 300, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.time = np.sort(rng.integers(0, count // 2, count))
        self.keys = {
            "video": rng.integers(-1, 8, count),
            "user": rng.integers(-1, 30, count),
        }
        self.labels = {
            task: rng.integers(-1, 2, count).astype(np.int8) for task in TASKS
        }

    def features(
        self, cuts: tuple[int, ...] = (), counted: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        """Compute features in runs that end at `cuts`, moved back to where ties end."""
        rates = PastRates(KEYS, TASKS, strength=STRENGTH)
        places = [
            0,
            *(int(np.searchsorted(self.time, self.time[c])) for c in cuts),
            len(self.time),
        ]
        parts = []
        for low, high in itertools.pairwise(places):
            part = slice(low, high)
            keys = {name: values[part] for name, values in self.keys.items()}
            labels = {name: values[part] for name, values in self.labels.items()}
            parts.append(
                rates.update(
                    self.time[part],
                    keys,
                    labels,
                    None if counted is None else counted[part],
                )
            )
        return {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0]
        }


def by_brute_force(
    rows: Rows, key: str, task: str, counted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    rates, counts = [], []
    for i, time in enumerate(rows.time):
        past = counted & (rows.time < time)
        known = past & (rows.labels[task] >= 0)
        share = (np.sum(rows.labels[task][known] == 1) + 1) / (known.sum() + 2)
        mine = known & (rows.keys[key] == rows.keys[key][i])
        rate = (np.sum(rows.labels[task][mine] == 1) + STRENGTH * share) / (
            mine.sum() + STRENGTH
        )
        present = rows.keys[key][i] >= 0
        logit = np.log(rate / (1 - rate)) - np.log(share / (1 - share))
        rates.append(logit if present and mine.any() else np.nan)
        counts.append(
            np.sum(past & (rows.keys[key] == rows.keys[key][i])) if present else np.nan
        )
    return np.array(rates), np.array(counts)


@pytest.mark.parametrize("cuts", [(), (40, 41, 200), tuple(range(3, 300, 3))])
def test_rates_and_counts_equal_brute_force_however_the_log_is_cut(
    cuts: tuple[int, ...],
) -> None:
    rows = Rows()
    counted = np.random.default_rng(1).random(300) < 0.8
    features = rows.features(cuts, counted)
    for key in ("video", "user"):
        for task in TASKS:
            rates, counts = by_brute_force(rows, key, task, counted)
            # float64 here and float32 there: half a unit in the last place is 6e-8.
            # Measured 5.5e-8; NumPy's logarithm may differ by as much on another
            # processor.
            np.testing.assert_allclose(
                features[f"rate_{key}_{task}"], rates, rtol=1e-5, atol=1e-6
            )
            np.testing.assert_array_equal(features[f"count_{key}"], counts)


def test_shuffling_the_future_leaves_earlier_rows_unchanged() -> None:
    rows, other = Rows(), Rows()
    start = int(np.searchsorted(rows.time, rows.time[150]))
    order = start + np.random.default_rng(2).permutation(len(rows.time) - start)
    for values in (*other.keys.values(), *other.labels.values()):
        values[start:] = values[order]
    before, after = rows.features((100, 220)), other.features((100, 220))
    for name in before:
        np.testing.assert_array_equal(before[name][:start], after[name][:start])
    assert any((before[name][start:] != after[name][start:]).any() for name in before)


def test_a_siblings_label_at_the_same_time_changes_nothing() -> None:
    rows, other = Rows(), Rows()
    tied = np.flatnonzero(rows.time == rows.time[150])
    assert len(tied) > 1
    for task in TASKS:
        other.labels[task][tied] = 1 - np.abs(rows.labels[task][tied])
    before, after = rows.features(), other.features()
    for name in before:
        np.testing.assert_array_equal(
            before[name][: tied[-1] + 1], after[name][: tied[-1] + 1]
        )
    assert any(
        (before[name][tied[-1] + 1 :] != after[name][tied[-1] + 1 :]).any()
        for name in before
    )


def test_the_features_are_declared_as_they_come() -> None:
    features = PastRates(KEYS, TASKS).features()
    assert [f.name for f in features] == list(Rows().features())
    assert {f.group for f in features} == {"row"}
    assert {f.name: f.transform for f in features}["count_video"] == "log1p"


def test_rows_out_of_order_are_refused() -> None:
    rates = PastRates((), TASKS)
    labels = {task: np.array([1, 0], np.int8) for task in TASKS}
    rates.update(np.array([4, 5]), {}, labels)
    for time in ([5, 6], [8, 7]):
        with pytest.raises(InputError, match="order of time"):
            rates.update(np.array(time), {}, labels)
    with pytest.raises(InputError, match="strength=0"):
        PastRates((), TASKS, strength=0)


def test_spilled_rows_come_back_in_the_order_of_time_with_ties_together() -> None:
    rng = np.random.default_rng(3)
    hour = 3_600_000
    time = rng.integers(0, 40, 2000) * hour
    number = np.arange(2000)
    batches = [
        pa.RecordBatch.from_pydict(
            {"time_ms": time[i : i + 130], "number": number[i : i + 130]}
        )
        for i in range(0, 2000, 130)
    ]
    tables = list(time_ordered(batches))
    assert len(tables) > 3
    for earlier, later in itertools.pairwise(tables):
        assert earlier["time_ms"][-1].as_py() < later["time_ms"][0].as_py()
    numbers = pa.concat_tables(tables)["number"].to_numpy()
    np.testing.assert_array_equal(numbers, np.argsort(time, kind="stable"))


def test_a_log_of_decades_is_sorted_in_fewer_longer_spans() -> None:
    rng = np.random.default_rng(4)
    time = rng.integers(0, 30 * 365, 3000) * 86_400_000
    number = np.arange(3000)
    batches = [
        pa.RecordBatch.from_pydict(
            {"time_ms": time[i : i + 700], "number": number[i : i + 700]}
        )
        for i in range(0, 3000, 700)
    ]
    tables = list(time_ordered(batches))
    assert 250 < len(tables) <= 500
    joined = pa.concat_tables(tables)
    order = np.argsort(time, kind="stable")
    np.testing.assert_array_equal(joined["number"].to_numpy(), order)
    blocks = list(time_blocks(tables, 64))
    assert pa.concat_tables(blocks).equals(joined)
    assert all(64 <= block.num_rows < 80 for block in blocks[:-1])
    for earlier, later in itertools.pairwise(blocks):
        assert earlier["time_ms"][-1].as_py() < later["time_ms"][0].as_py()


def test_batches_of_other_columns_are_refused() -> None:
    batches = [
        pa.RecordBatch.from_pydict({"time_ms": [1], "number": number})
        for number in ([1], ["a"])
    ]
    with pytest.raises(InputError, match=r"disagree about the columns \['number'\]"):
        list(time_ordered(batches))


def test_times_that_are_not_milliseconds_are_refused() -> None:
    time = np.arange(600) * 10**12
    with pytest.raises(InputError, match="check that it is in milliseconds"):
        list(time_ordered([pa.RecordBatch.from_pydict({"time_ms": time})]))
