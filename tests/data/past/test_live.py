"""Statistics of a log that grows event by event have the bits of the whole log."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.memory_source import SCHEMA
from tests.data.past.declared import DECLARED, random_rows, source
from tests.data.past.reference import Row
from tokenrec.data.past import live_totals
from tokenrec.data.past.declaration_json import parse_statistics
from tokenrec.data.past.features import PastFeatures
from tokenrec.data.past.live import LivePast
from tokenrec.data.past.live_totals import LiveTotals
from tokenrec.data.past.totals import KeyTotals
from tokenrec.data.past_counts import PastCounts
from tokenrec.data.sources.complete_journey_live import LivePurchases
from tokenrec.data.sources.complete_journey_rows import RECENT_WEEKS
from tokenrec.data.sources.promotions import PRODUCT_BITS
from tokenrec.errors import InputError

# With epochs of 12 and of 200 milliseconds.
HALF_LIVES = (None, 3, 50)
# Totals over several epochs then have more bits than a float64: the order of additions
# would show.
_LARGE = 2.0**24 / 3
entries = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 90), st.integers(-2, 5)), max_size=25
)
asked = st.lists(
    st.tuples(st.integers(0, 4), st.integers(1, 120)), min_size=1, max_size=6
)


def totals() -> KeyTotals:
    return KeyTotals(np.array([2.0**24]), HALF_LIVES)


def columns(
    rows: list[tuple[int, int, int]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Key, time and values of entries, in the order of time."""
    rows = sorted(rows, key=lambda row: row[1])
    array = np.array(rows, np.int64).reshape(-1, 3)
    return array[:, 0].astype(np.uint64), array[:, 1], array[:, 2:] * _LARGE


def in_order(
    rows: list[tuple[int, int, int]], queries: list[tuple[int, int]]
) -> list[np.ndarray]:
    """Totals before each query, of a log that is read once in the order of time."""
    key, time, values = columns([*rows, *((k, t, 0) for k, t in queries)])
    results = totals().update(key, time, values)
    found = []
    for k, t in queries:
        at = int(np.flatnonzero((key == k) & (time == t))[0])
        found.append([part[at, 0] for part in results])
    return [np.array(column) for column in zip(*found, strict=True)]


@settings(max_examples=50, deadline=None)
@given(
    before=entries,
    batches=st.lists(entries, max_size=6),
    queries=asked,
    watermark=st.integers(0, 60),
    move=st.integers(0, 60),
    many=st.sampled_from([0, 3, 256]),
)
def test_totals_take_entries_in_any_order(
    before: list[tuple[int, int, int]],
    batches: list[list[tuple[int, int, int]]],
    queries: list[tuple[int, int]],
    watermark: int,
    move: int,
    many: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_totals, "_MANY", many)
        check_any_order(before, batches, queries, watermark, move)


def check_any_order(
    before: list[tuple[int, int, int]],
    batches: list[list[tuple[int, int, int]]],
    queries: list[tuple[int, int]],
    watermark: int,
    move: int,
) -> None:
    seen = [row for row in before if row[1] <= watermark]
    head = totals()
    head.update(*columns(seen))
    live = LiveTotals(head)
    for number, batch in enumerate(batches):
        batch = [row for row in batch if row[1] > watermark]
        live.count(*columns(batch))
        seen = [*seen, *batch]
        if number == 2:
            # Times until there are neither counted nor asked for from now on.
            watermark = max(watermark, move)
            live.forget(watermark)
            at_watermark = totals()
            at_watermark.update(*columns([r for r in seen if r[1] <= watermark]))
            state, wanted = live.state(), at_watermark.state()
            found = dict(zip(state["keys"].tolist(), state["sums_0"], strict=True))
            for key, sums in zip(
                wanted["keys"].tolist(), wanted["sums_0"], strict=True
            ):
                # A key whose entries add nothing need not be there.
                np.testing.assert_array_equal(found.get(key, [0]), sums)
        later = [(k, t) for k, t in queries if t > watermark]
        if not later:
            continue
        key = np.array([k for k, _ in later], np.uint64)
        time = np.array([t for _, t in later])
        got = live.update(key, time, np.zeros((len(later), 1)))
        for part, want in zip(got, in_order(seen, later), strict=True):
            np.testing.assert_array_equal(part[:, 0], want)


@pytest.mark.parametrize("many", [0, 256])
def test_late_entries_round_as_if_in_order(
    many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Decay is exact; only the sum of a carry and the totals of its epoch is rounded, and
    # so differs by an entry that is added after the end of its epoch.
    monkeypatch.setattr(live_totals, "_MANY", many)
    rng = np.random.default_rng(0)
    for _ in range(60):
        count = int(rng.integers(4, 14))
        time = np.sort(rng.integers(1, 60, count))
        key, values = np.zeros(count, np.uint64), rng.random((count, 1)) * 2.0**30
        late = np.arange(count) == rng.integers(0, count)
        live = LiveTotals(totals())
        for rows in (~late, late):
            live.count(key[rows], time[rows], values[rows])
        asked = np.unique(np.append(time + 1, 70))
        none = np.zeros((len(asked), 1))
        together = np.append(time, asked)
        order = np.argsort(together, kind="stable")
        keys = np.zeros(len(order), np.uint64)
        want = totals().update(
            keys, together[order], np.concatenate([values, none])[order]
        )
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        # One at a time: other requests know nothing of later ones.
        for i, moment in enumerate(asked):
            got = live.update(keys[:1], np.array([moment]), none[:1])
            for part, wanted in zip(got, want, strict=True):
                np.testing.assert_array_equal(part[0], wanted[place[count + i]])


def table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_batches(source(rows, 10**6).rows())


def past(rows: list[Row]) -> PastFeatures:
    features = PastFeatures(parse_statistics(DECLARED, SCHEMA, "here"), SCHEMA)
    features.require_tables(_Described(features, source(rows)))
    features._start()
    return features


class _Described:
    """A source whose tables describe users and items to some features."""

    def __init__(self, features: PastFeatures, of: object) -> None:
        self._features, self._of = features, of

    def users(self) -> None:
        self._features.describe("user_id", self._of.users())

    def items(self) -> None:
        self._features.describe("item_id", self._of.items())


@pytest.mark.parametrize("seed", range(3))
def test_statistics_have_the_bits_of_the_whole_log(seed: int) -> None:
    rng = np.random.default_rng(seed)
    distinct: dict[tuple[object, ...], Row] = {}
    for row in random_rows(50, seed):
        key = (row["user_id"], row["item_id"], row["time_ms"], row["scored"])
        distinct.setdefault(key, row)
    rows = list(distinct.values())
    whole = past(rows).add_to_block(table(rows))
    cut = rows[len(rows) // 3]["time_ms"]
    first = past(rows)
    first.add_to_block(table([row for row in rows if row["time_ms"] <= cut]))
    statistics = parse_statistics(DECLARED, SCHEMA, "here")
    live = LivePast(statistics, SCHEMA, first.state(), cut)
    rest = [row for row in rows if row["time_ms"] > cut]
    waiting = rng.permutation(len(rest)).tolist()
    while waiting:
        batch, waiting = sorted(waiting[:3]), waiting[3:]
        live.count(table([rest[i] for i in batch]))
    middle = rest[len(rest) // 2]["time_ms"]
    compared = 0
    for watermark in (None, middle):
        if watermark is not None:
            old = [row for row in rest if row["time_ms"] <= watermark]
            live.forget(table(old), watermark)
            rest = [row for row in rest if row["time_ms"] > watermark]
        for row in rest:
            mine = [
                other
                for other in rest
                if other["user_id"] == row["user_id"]
                and other["time_ms"] < row["time_ms"]
            ]
            ask = row | {"event": False, "label_click": None, "label_like": None}
            got = live.of_rows(table([*mine, ask]), len(mine))
            for feature in live.features:
                want = whole[feature.name][rows.index(row)].as_py()
                value = np.float32(got[feature.name][-1])
                np.testing.assert_array_equal(
                    value, np.float32(np.nan if want is None else want)
                )
                compared += want is not None
    assert compared > 300


def purchases(count: int, seed: int) -> pa.Table:
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, 40, count)) * 1000
    return pa.table(
        {
            "user_id": rng.integers(1, 4, count),
            "item_id": rng.integers(1, 5, count),
            "time_ms": time,
            "week": (time // 5000 + 1).astype(np.float32),
            "event": rng.random(count) < 0.8,
        }
    )


def test_purchases_are_counted_as_the_source_counts_them() -> None:
    rows = purchases(300, 0)
    time = rows["time_ms"].to_numpy()
    bought = rows.filter(rows["event"])
    user, item, when, week = (
        bought[name].to_numpy().astype(np.int64)
        for name in ("user_id", "item_id", "time_ms", "week")
    )
    by_household = PastCounts(user << PRODUCT_BITS | item, when // 1000)
    by_week = PastCounts(item, week)
    start = 12_000
    first = when <= start
    keys, counts = PastCounts(
        (user << PRODUCT_BITS | item)[first], when[first] // 1000
    ).totals()
    state = {
        "household_purchases_keys": keys,
        "household_purchases_counts": counts,
        "product_sales_products": item[first],
        "product_sales_weeks": week[first],
    }
    live = LivePurchases(state)
    later = rows.filter(pa.array(time > start))
    live.count(later.take(pa.array(np.arange(0, later.num_rows, 2))))
    live.count(later.take(pa.array(np.arange(1, later.num_rows, 2))))
    for watermark in (start, 25_000):
        live.forget(watermark)
        rest = rows.filter(pa.array(time > watermark))
        got = live.of_rows(rest)
        u, i, w = (
            rest[n].to_numpy().astype(np.int64) for n in ("user_id", "item_id", "week")
        )
        t = rest["time_ms"].to_numpy() // 1000
        want = by_household.before(u << PRODUCT_BITS | i, t)
        np.testing.assert_array_equal(got["household_purchases"], want)
        sales = by_week.before(i, w) - by_week.before(i, w - RECENT_WEEKS)
        np.testing.assert_array_equal(got["product_sales"], sales)
        assert want.max() > 3
        # A state that is saved is one of the source.
        again = LivePurchases(live.state())
        again.count(rest)
        np.testing.assert_array_equal(again.of_rows(rest)["product_sales"], sales)


def test_a_product_that_cannot_be_counted_is_refused() -> None:
    rows = purchases(3, 0).set_column(1, "item_id", pa.array([1, 1 << PRODUCT_BITS, 2]))
    none = np.zeros(0, np.int64)
    names = ("household_purchases_keys", "household_purchases_counts")
    state = dict.fromkeys(
        (*names, "product_sales_products", "product_sales_weeks"), none
    )
    with pytest.raises(InputError, match="column 'item_id': a value is missing or not"):
        LivePurchases(state).check(rows)
