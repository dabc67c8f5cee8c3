"""Statistics of the past equal their definitions, and see nothing but the past."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.memory_source import SCHEMA
from tests.data.past.declared import DECLARED, ITEMS, USERS, random_rows, source
from tests.data.past.reference import Reference, Row
from tokenrec.data.past import PastStatistics, WithStatistics, features, key_index
from tokenrec.data.past.declaration import Unscored
from tokenrec.data.past.declaration_json import parse_statistics

HOUR = 3_600_000
OPTIONAL = ("label_click", "label_like", "tab", "price")
# Item 4 and user 3 are in no table. Times: ties, bursts, and gaps of days.
row = st.fixed_dictionaries(
    {
        "user_id": st.integers(0, 3),
        "item_id": st.integers(0, 4),
        "time_ms": st.builds(
            lambda day, minute: day * 24 * HOUR + minute * 60_000 - HOUR,
            st.sampled_from([0, 0, 0, 1, 20, 300]),
            st.integers(0, 90),
        ),
        "event": st.booleans() | st.just(True),
        "scored": st.booleans() | st.just(True),
        "label_click": st.sampled_from([None, 0, 1]),
        "label_like": st.sampled_from([None, 0, 1]),
        "tab": st.sampled_from([None, 0, 1]),
        "price": st.none() | st.floats(-50.0, 50.0, width=32),
    }
)
logs = st.lists(row, min_size=1, max_size=40)


def statistics(**changes: Any) -> PastStatistics:
    return dataclasses.replace(parse_statistics(DECLARED, SCHEMA, "here"), **changes)


def computed(
    rows: Sequence[Row], declared: PastStatistics | None = None
) -> list[dict[str, Any]]:
    """Rows in the order of time, with their statistics."""
    found = WithStatistics(source(rows), declared or statistics())
    return pa.Table.from_batches(found.rows()).to_pylist()


@functools.cache
def names() -> list[str]:
    return [f.name for f in statistics().features(SCHEMA)]


def assert_equal_bits(
    one: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]
) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert {n: a[n] for n in names()} == {n: b[n] for n in names()}


@settings(max_examples=40, deadline=None)
@given(logs, st.sampled_from(["count", "skip", "full"]))
def test_statistics_equal_their_definitions(
    rows: list[Row], unscored: Unscored
) -> None:
    # Rows that repeat one another differ in labels alone: which of other features
    # counts is a matter of hashes.
    seen: dict[tuple[Any, ...], Row] = {}
    for r in rows:
        key = (r["user_id"], r["item_id"], r["time_ms"], r["scored"])
        first = seen.setdefault(key, r)
        r |= {name: first[name] for name in ("tab", "price", "event")}
    declared = statistics(unscored=unscored)
    of_user = {u["user_id"]: u for u in pa.table(USERS).to_pylist()}
    of_item = {i["item_id"]: i for i in pa.table(ITEMS).to_pylist()}
    # `prepare` keeps two tags of an item.
    joined = [
        {**of_user.get(r["user_id"], {}), **of_item.get(r["item_id"], {}), **r}
        for r in rows
    ]
    for r in joined:
        r["tags"] = (r.get("tags") or [])[:2]
    reference = Reference(joined, declared.of_tasks(SCHEMA), ("click", "like"))
    want = [reference.features(r) for r in sorted(joined, key=lambda r: r["time_ms"])]
    found = computed(rows, declared)
    assert list(want[0]) == names() == list(found[0])[-len(names()) :]
    for name in names():
        given_ = [np.nan if r[name] is None else r[name] for r in found]
        # Weights are rounded to 6e-8, values of a mean to 5e-7; then float32. Measured
        # on twelve logs of 120 rows: at most 2.5e-7.
        np.testing.assert_allclose(
            given_, [r[name] for r in want], rtol=2e-6, atol=2e-6, err_msg=name
        )


@pytest.mark.parametrize("block", [1, 2, 17])
def test_bits_do_not_depend_on_where_the_log_is_cut(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows(100, 0)
    whole = computed(rows)
    monkeypatch.setattr(features, "_BLOCK_ROWS", block)
    # New keys are merged with the others now and then.
    monkeypatch.setattr(key_index, "_MOST_RECENT", 2 * block)
    assert_equal_bits(whole, computed(rows))


@pytest.mark.parametrize("at", [1, 90, 199])
def test_a_log_that_goes_on_from_a_state_has_the_bits_of_the_whole_log(
    at: int,
) -> None:
    rows = random_rows(200, 1)
    last = rows[at - 1]["time_ms"]
    first = WithStatistics(
        source([r for r in rows if r["time_ms"] <= last]), statistics()
    )
    before = pa.Table.from_batches(first.rows()).to_pylist()
    # The later source has the whole log, of which the earlier rows are left out, and
    # tables that lack the users and items of the earlier one.
    inner = source(rows)
    inner.user_columns, inner.item_columns = {}, {}
    later = WithStatistics(inner, statistics())
    later.resume(first.state(), last)
    after = pa.Table.from_batches(later.rows()).to_pylist()
    whole = WithStatistics(source(rows), statistics())
    assert_equal_bits(before + after, pa.Table.from_batches(whole.rows()).to_pylist())
    assert len(after) == sum(r["time_ms"] > last for r in rows)
    # The states are those of the whole log too, and reading twice changes nothing.
    for name, array in whole.state().items():
        np.testing.assert_array_equal(array, later.state()[name], err_msg=name)
    again = pa.Table.from_batches(later.rows()).to_pylist()
    assert_equal_bits(after, again)


def test_the_order_of_rows_and_files_changes_nothing() -> None:
    rows = random_rows(200, 2)
    # Repeats that disagree in everything, in different places of the log.
    rows += [{**r, "tab": 1, "price": 7.0, "label_click": 1} for r in rows[::5]]
    keyed = [dict(r, request=i) for i, r in enumerate(rows)]
    shuffled = [keyed[i] for i in np.random.default_rng(3).permutation(len(keyed))]
    one, other = (
        sorted(computed(log), key=lambda r: r["request"]) for log in (keyed, shuffled)
    )
    assert_equal_bits(one, other)


def test_a_repeated_log_has_the_statistics_of_the_log() -> None:
    rows = random_rows(100, 4)
    once = {(r["user_id"], r["item_id"], r["time_ms"], r["scored"]): r for r in rows}
    distinct = list(once.values())
    twice = [r for r in distinct for _ in range(2)]
    assert_equal_bits(computed(distinct), computed(twice)[::2])


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_what_happens_later_or_at_the_same_moment_changes_nothing(
    share: float,
) -> None:
    rows = random_rows(200, 5)
    moment = rows[int(share * len(rows))]["time_ms"]
    # Everything of the rows from this moment on but their times, users and items is
    # shuffled: a row of the moment sees neither its own outcome nor a sibling's.
    rng = np.random.default_rng(6)
    changed = [dict(r) for r in rows]
    now = [i for i, r in enumerate(rows) if r["time_ms"] >= moment]
    for name in ("label_click", "label_like", "price", "event"):
        for i, j in zip(now, rng.permutation(now), strict=True):
            changed[i][name] = rows[j][name]
    # And rows are added at the moment and after it.
    changed += [
        {**r, "user_id": int(rng.integers(4)), "time_ms": max(r["time_ms"], moment)}
        for r in rows[::3]
    ]

    def by_key(found: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[Any]]:
        keys = ("user_id", "item_id", "time_ms", "scored", "tab")
        return {
            tuple(r[n] for n in keys): [r[n] for n in names()]
            for r in found
            if r["time_ms"] <= moment
        }

    before, after = by_key(computed(rows)), by_key(computed(changed))
    assert len(before) > 50
    assert all(after[key] == values for key, values in before.items())
    # Later rows do see what changed.
    assert computed(rows)[-1] != computed(changed)[-1]


def test_candidates_that_were_not_shown_do_not_count() -> None:
    rows = random_rows(60, 7)
    last = rows[-1]["time_ms"]
    unknown = {"label_click": None, "label_like": None, "event": False, "scored": True}
    candidates = [
        {**r, **unknown, "time_ms": last + 1000 * (i + 1)} for i, r in enumerate(rows)
    ]
    with_all = computed(rows + candidates)[len(rows) :]
    alone = [computed([*rows, candidate])[len(rows)] for candidate in candidates[::10]]
    assert_equal_bits(with_all[::10], alone)


def test_features_of_items_are_per_row_and_all_of_them_dense() -> None:
    found = {f.name: f for f in statistics().features(SCHEMA)}
    assert {f.kind for f in found.values()} == {"dense"}
    assert {f.group for f in found.values()} == {"row"}
    assert found["rate_item_id_click"].entity == "item"
    assert found["rate_user_id_author_click_2h"].entity == "item"
    assert found["count_topic"].transform == "log1p"
    assert found["mean_tab_city_price"].transform == "identity"


def test_a_long_log_and_an_old_key_are_exact() -> None:
    # A million half-lives pass between two rows of a key.
    rows = random_rows(4, 8)
    for r, time in zip(rows, (0, 60_000, 10**11, 10**11 + 60_000), strict=True):
        r |= {"user_id": 0, "item_id": 0, "time_ms": time, "scored": True}
        r |= {"event": True, "label_click": 1}
    found = computed(rows)
    assert [r["count_user_id_1m"] for r in found] == [0.0, 0.5, 0.0, 0.5]
    assert [r["rate_user_id_click_1m"] is None for r in found] == [
        *(True, False, True, False)
    ]
    counts = [r["matches_item_id"] for r in found]
    assert counts == list(itertools.accumulate([0, 1, 1, 1]))
