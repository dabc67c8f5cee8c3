"""A live state keeps the purchase counts of Complete Journey, beside statistics."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.sources.test_complete_journey import promotion, purchase, write
from tokenrec.data.dataset import open_dataset
from tokenrec.data.past import WithStatistics
from tokenrec.data.past.declaration_json import parse_statistics
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.source import Source
from tokenrec.data.sources.complete_journey import SCHEMA, CompleteJourneySource
from tokenrec.errors import InputError
from tokenrec.serving.export.live import write_live_state
from tokenrec.serving.live.state import LiveState
from tokenrec.serving.request import BadRequest, Request

DECLARED = {
    "keys": [{"key": ["user_id", "item_id"], "horizons": ["all", "28d"]}, "store_id"],
    "matches": ["item_id"],
    "times": {"gap": True},
}


def source(root: Path, last_week: int, statistics: bool) -> Source:
    plain = CompleteJourneySource(root, weeks=(1, last_week))
    if not statistics:
        return plain
    return WithStatistics(plain, parse_statistics(DECLARED, SCHEMA, "here"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    weeks = range(40, 50)
    purchases = [
        purchase(week * 100 + basket, int(product), week, household=1 + basket % 3)
        for week in weeks
        for basket in range(6)
        for product in rng.choice(np.arange(10, 20), 3, replace=False)
    ]
    promotions = [promotion(p, week) for week in weeks for p in range(10, 22)]
    return write(tmp_path_factory.mktemp("files"), purchases, promotions)


@pytest.mark.parametrize("statistics", [False, True])
def test_two_weeks_of_purchases(root: Path, tmp_path: Path, statistics: bool) -> None:
    whole = source(root, 49, statistics)
    prepare(whole, tmp_path / "whole")
    prepare(source(root, 47, statistics), tmp_path / "first")
    write_live_state(tmp_path / "first", tmp_path / "counters", events=8)
    state = LiveState.open(tmp_path / "counters", lateness_ms=0)
    names = state.computed
    assert set(names) >= {"household_purchases", "product_sales"}
    assert (len(names) > 2) is statistics
    wanted = open_dataset(tmp_path / "whole").to_arrow("test").read_all().to_pylist()
    want = {(r["user_id"], r["item_id"], r["time_ms"]): r for r in wanted}
    plain = CompleteJourneySource(root, weeks=(1, 49))
    rows = [r for batch in plain.rows() for r in batch.to_pylist() if r["week"] >= 48]
    rows.sort(key=lambda row: row["time_ms"])
    compared, sales = 0, set()
    for time, group in itertools.groupby(rows, key=lambda row: row["time_ms"]):
        own = list(group)
        shown = [row for row in own if row["scored"]]
        completed = state.complete(request(time, shown))
        for i, row in enumerate(shown):
            stored = want[row["user_id"], row["item_id"], time]
            for name in names:
                value = (
                    completed.candidates[name][i]
                    if name in completed.candidates
                    else completed.context[name]
                )
                expected = np.float32(np.nan if stored[name] is None else stored[name])
                value = np.float32(np.nan if value is None else value)
                np.testing.assert_array_equal(value, expected, err_msg=name)
                compared += 1
            sales.add(stored["product_sales"])
        assert state.add_events(as_events(own, compared)) == len(own)
    assert len(sales) > 3
    assert compared > 200
    with pytest.raises(BadRequest, match="week 47 needs the sales of the 4 weeks"):
        state.complete(request(time + 1, [row | {"week": 47.0} for row in shown]))
    # Sales go on from a state that was saved within a week.
    state.save(tmp_path / "saved")
    again = LiveState.open(tmp_path / "saved")
    for name in ("household_purchases", "product_sales"):
        one, other = (
            s.complete(request(time + 1, shown)).candidates[name]
            for s in (state, again)
        )
        np.testing.assert_array_equal(one, other)
        assert np.asarray(one).max() > 0


def request(time: int, rows: list[dict[str, Any]]) -> Request:
    columns = ("item_id", "display_location", "mailer_location")
    return Request(
        user={"user_id": rows[0]["user_id"]},
        time_ms=time,
        history={},
        context={name: rows[0][name] for name in ("store_id", "week")},
        candidates={name: [row[name] for row in rows] for name in columns},
    )


def as_events(rows: list[dict[str, Any]], first: int) -> dict[str, list[Any]]:
    left_out = ("split", "household_purchases", "product_sales")
    names = [name for name in rows[0] if name not in left_out]
    columns = {name: [row[name] for row in rows] for name in names}
    return columns | {"event_id": [f"{first} {i}" for i in range(len(rows))]}


def test_a_stateful_source_that_is_not_known_is_refused(
    root: Path, tmp_path: Path
) -> None:
    other = source(root, 47, False)
    other.provenance = dataclasses.replace(other.provenance, name="another")
    prepare(other, tmp_path / "first")
    with pytest.raises(InputError, match="source 'another' counts the past by itself"):
        write_live_state(tmp_path / "first", tmp_path / "counters", events=8)
    assert not (tmp_path / "counters").exists()
