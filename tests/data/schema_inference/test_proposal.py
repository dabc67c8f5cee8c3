"""Every column of a log is put where a careful reader would put it, with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.data.schema_inference.logs import START, clicks, write_csv, write_parquet
from tokenrec.data.schema import Feature
from tokenrec.data.schema_inference.decisions import Decision
from tokenrec.data.schema_inference.find_keys import Flags
from tokenrec.data.schema_inference.keys import stem
from tokenrec.data.schema_inference.proposal import Proposal, propose
from tokenrec.data.schema_inference.write import write_proposal
from tokenrec.data.sources.delimited_schema import read_schema
from tokenrec.errors import InputError


def decide(
    tmp_path: Path, columns: dict[str, Any], flags: Flags | None = None
) -> Proposal:
    return propose([write_csv(tmp_path / "log.csv", columns)], flags=flags)


def features(proposal: Proposal) -> dict[str, Feature]:
    return {d.feature.name: d.feature for d in proposal.features if d.feature}


def decision(proposal: Proposal, column: str, table: str = "log") -> Decision:
    """The last decision about a column."""
    return [d for d in proposal.decisions if (d.table, d.column) == (table, column)][-1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("userId", "user"),
        ("USER_ID", "user"),
        ("user_id", "user"),
        ("CustomerKey", "customer"),
        ("movieid", "movie"),
        ("uid", "uid"),
        ("id", "id"),
        ("household_id", "household"),
        ("author_id", "author"),
    ],
)
def test_stem_of_an_id_is_what_it_names(name: str, expected: str) -> None:
    assert stem(name) == (expected if name != "id" else "")


def test_a_log_of_clicks_is_understood(tmp_path: Path) -> None:
    found = decide(tmp_path, clicks())
    columns = {name: key.profile.column for name, key in found.keys.items()}
    assert columns == {"user_id": "uid", "item_id": "sku", "time_ms": "ts"}
    assert found.keys["time_ms"].unit == "ms"
    assert [label.task for label in found.labels] == ["click"]
    assert found.config == "ranker"
    by_entity = {name: (f.entity, f.kind) for name, f in features(found).items()}
    assert by_entity == {
        "item_id": ("item", "categorical"),
        "device": ("context", "categorical"),
        "dwell": ("action", "dense"),
        "price": ("item", "dense"),
        "past_click": ("action", "categorical"),
        "hour": ("context", "categorical"),
    }
    assert features(found)["price"].per_row
    left_out = {d.column for d in found.decisions if d.role == "left out"}
    assert left_out == {"row", "version"}
    assert all(d.reason for d in found.decisions)


def test_a_circumstance_that_tells_the_label_is_an_outcome(tmp_path: Path) -> None:
    columns = clicks()
    columns["position"] = columns["click"] * 10 + np.arange(900) % 9
    found = decide(tmp_path, columns)
    assert features(found)["position"].entity == "action"
    assert "tells the label" in decision(found, "position").reason


def test_a_clock_that_lags_behind_the_time_is_left_out(tmp_path: Path) -> None:
    columns = clicks()
    # A row in six shows a later hour, more often after a click.
    late = (np.arange(900) % 6 == 0) | ((np.arange(900) % 3 == 0) & columns["click"])
    columns["hour"] = (columns["hour"] + late) % 24
    found = decide(tmp_path, columns)
    assert decision(found, "hour").role == "left out"
    assert "know the outcome" in decision(found, "hour").reason


def test_a_clock_of_another_zone_is_a_circumstance(tmp_path: Path) -> None:
    columns = clicks()
    columns["hour"] = (columns["hour"] + 8) % 24
    assert features(decide(tmp_path, columns))["hour"].entity == "context"


def test_what_is_unclear_is_seen_for_earlier_rows_only(tmp_path: Path) -> None:
    columns = clicks()
    columns["mystery"] = [["a", "b", "c"][i] for i in np.arange(900) % 3]
    found = decide(tmp_path, columns)
    assert features(found)["mystery"].entity == "action"
    assert decision(found, "mystery").check


def test_ratings_get_the_threshold_that_splits_them_best(tmp_path: Path) -> None:
    columns = {name: clicks()[name] for name in ("uid", "sku", "ts")}
    columns["stars"] = [1, 2, 4, 5, 5] * 180
    found = decide(tmp_path, columns)
    assert [(x.task, x.expression) for x in found.labels] == [("liked", "stars >= 4")]
    assert found.labels[0].positive == pytest.approx(0.6)
    assert features(found)["stars"].entity == "action"


def test_a_log_of_positives_is_for_a_retriever(tmp_path: Path) -> None:
    columns = clicks()
    columns["click"] = [1] * 900
    found = decide(tmp_path, columns)
    assert (found.config, found.labels) == ("retriever", [])
    assert decision(found, "click").role == "left out"


def test_a_log_with_labels_gets_a_few_statistics_each_with_a_reason(
    tmp_path: Path,
) -> None:
    log = write_csv(tmp_path / "log.csv", clicks())
    items = {
        "sku": [f"s{i}" for i in range(30)],
        "brand": [f"b{i % 5}" for i in range(30)],
        # Too many values, or one: they pool nothing.
        "name": [f"n{i}" for i in range(30)],
        "shop": ["here"] * 30,
    }
    found = propose([log], None, write_csv(tmp_path / "items.csv", items))
    half_life = "1d"  # of a log of a month
    assert found.statistics.value == {
        "keys": [
            {"key": "item_id", "horizons": ["all", half_life]},
            {"key": "user_id", "horizons": ["all", half_life]},
            {"key": "brand"},
            {"key": ["user_id", "brand"]},
            {"key": "hour"},
            {"key": "device"},
        ],
        "matches": ["item_id", "brand"],
        "times": {"gap": True},
    }
    write_proposal(found, tmp_path / "out")
    schema = read_schema(tmp_path / "out" / "schema.json")
    assert schema.statistics is not None
    names = {f.name for f in schema.statistics.features(schema.schema)}
    assert {"rate_item_id_click_1d", "count_user_id", "past_gap"} <= names
    reasons = (tmp_path / "out" / "README.md").read_text()
    for what in ("item_id", "user_id x brand", "past_gap"):
        assert re.search(rf"^\| `{what}` \| \w.+ \|$", reasons, re.MULTILINE)


def test_statistics_are_left_out_without_labels_and_where_a_name_is_taken(
    tmp_path: Path,
) -> None:
    columns = clicks()
    taken = columns | {"rate_item_id_click": columns["price"]}
    found = decide(tmp_path, taken)
    assert not found.statistics.value
    assert any("because 'rate_item_id_click' is a column" in r for r in found.remarks)
    found = decide(tmp_path, {n: columns[n] for n in ("uid", "sku", "ts")})
    assert not found.statistics.value
    write_proposal(found, tmp_path / "out")
    assert "statistics" not in json.loads((tmp_path / "out/schema.json").read_text())


def test_rare_reactions_are_actions_and_no_tasks(tmp_path: Path) -> None:
    columns = clicks()
    columns["follow"] = [int(i < 3) for i in range(900)]
    found = decide(tmp_path, columns)
    assert [label.task for label in found.labels] == ["click"]
    assert features(found)["follow"].entity == "action"


@pytest.mark.parametrize(
    ("unit", "values"),
    [
        ("s", lambda s: s),
        ("s", lambda s: s + 0.25),
        ("ms", lambda s: s * 1000),
        ("us", lambda s: s * 1_000_000),
        ("ns", lambda s: s * 1_000_000_000),
        ("", lambda s: [str(np.datetime64(int(t), "s")) for t in s]),
        ("", lambda s: [f"{np.datetime64(int(t), 's')}+02:00" for t in s]),
    ],
)
def test_unit_of_a_time_is_found(tmp_path: Path, unit: str, values: Any) -> None:
    columns = clicks()
    columns["ts"] = values(columns["ts"] // 1000)
    del columns["hour"]
    found = decide(tmp_path, columns)
    assert found.keys["time_ms"].unit == unit
    # 80 % of thirty days.
    assert found.splits.valid_from in ("2022-01-24", "2022-01-25", "2022-01-26")


def test_splits_of_a_short_log_are_exact_times(tmp_path: Path) -> None:
    columns = clicks()
    columns["ts"] = START * 1000 + np.arange(900)
    splits = decide(tmp_path, columns).splits
    assert int(splits.valid_from) == START * 1000 + 720
    assert splits.shares == pytest.approx((0.8, 0.1, 0.1))


def test_splits_of_few_times_are_the_last_two(tmp_path: Path) -> None:
    columns = clicks()
    columns["ts"] = START * 1000 + np.minimum(np.arange(900), 2)
    splits = decide(tmp_path, columns).splits
    assert [splits.valid_from, splits.test_from] == [
        str(START * 1000 + 1),
        str(START * 1000 + 2),
    ]
    columns["ts"] = START * 1000 + np.arange(900) % 2
    with pytest.raises(InputError, match=r"has 2 different times, from 2022-01-01"):
        decide(tmp_path, columns)


def test_rows_of_a_page_are_a_request(tmp_path: Path) -> None:
    columns = clicks()
    page = np.arange(900) // 4
    columns["uid"] = page % 40
    columns["ts"] = (START + page * 9000) * 1000
    columns["request_id"] = page
    found = decide(tmp_path, columns)
    assert found.keys["request"].profile.column == "request_id"
    assert found.rows_per_request == pytest.approx(4)
    columns["request_id"] = [f"page {number}" for number in page]
    assert decide(tmp_path, columns).keys["request"].profile.type == "string"
    # A session goes on for some time, and is none.
    columns["ts"] = columns["ts"] + np.arange(900)
    assert "request" not in decide(tmp_path, columns).keys


def test_tables_of_users_and_items_are_read(tmp_path: Path) -> None:
    log = write_csv(tmp_path / "log.csv", clicks())
    users = write_parquet(
        tmp_path / "users.parquet",
        {
            "uid": np.arange(40),
            "age": np.arange(40) + 20,
            "city": [["Oslo", "Rome"][i % 2] for i in range(40)],
            "vector": pa.array([[0.5 * i, 1.0] for i in range(40)]),
        },
    )
    tags = [["red;hot", "red", "hot;new", "new", "blue"][i % 5] for i in range(30)]
    items = write_csv(
        tmp_path / "items.csv",
        {
            "sku": [f"s{i}" for i in range(30)],
            "tags": tags,
            "added": ["2021-05-01", "2021-05-02"] * 15,
            "price": [1.0, 2.5] * 15,
        },
    )
    found = propose([log], users, items)
    kinds = {name: (f.entity, f.kind, f.length) for name, f in features(found).items()}
    assert kinds["age"] == ("user", "dense", 1)
    assert kinds["city"] == ("user", "categorical", 1)
    assert kinds["vector"] == ("user", "embedding", 2)
    assert kinds["tags"] == ("item", "multi_valued", 2)
    # The log has a price as well: two features, two names.
    assert kinds["item_price"] == ("item", "dense", 1)
    assert decision(found, "added", "items").role == "left out"
    write_proposal(found, tmp_path / "out")
    schema = json.loads((tmp_path / "out" / "schema.json").read_text())
    assert schema["separators"] == {"tags": ";"}
    assert schema["columns"]["item_price"] == "price"
    assert schema["files"]["users"] == "../users.parquet"
    assert schema["key_types"]["user_id"] == "int64"


def test_ids_with_leading_zeros_are_strings(tmp_path: Path) -> None:
    columns = clicks()
    columns["uid"] = [f"{u:03}" for u in columns["uid"]]
    users = {"uid": [f"{u:03}" for u in range(40)], "city": ["a", "b"] * 20}
    log = write_csv(tmp_path / "log.csv", columns)
    found = propose([log], write_csv(tmp_path / "users.csv", users))
    assert decision(found, "uid").key_type == "string"
    assert "100.0% of the users" in found.remarks[0]


def test_types_in_the_header_decide(tmp_path: Path) -> None:
    columns = clicks()
    typed = {
        "user_id:token": columns["uid"],
        "item_id:token": columns["sku"],
        "timestamp:float": columns["ts"] // 1000,
        "rating:float": [1.0, 5.0, 4.0] * 300,
        "tags:token_seq": ["a b", "b", "c a"] * 300,
        "code:token": np.arange(900) % 77,
    }
    log = write_csv(tmp_path / "x.inter", typed, "\t")
    found = propose([log])
    assert features(found)["tags"].kind == "multi_valued"
    assert features(found)["code"].kind == "categorical"
    write_proposal(found, tmp_path / "out")
    schema = json.loads((tmp_path / "out" / "schema.json").read_text())
    assert schema["separators"] == {"tags": " "}
    assert schema["labels"] == {"liked": "rating >= 4"}
    assert schema["time"] == {"unit": "s"}


@pytest.mark.parametrize(
    ("renamed", "flags", "message"),
    [
        ({"uid": "who"}, None, "--user COLUMN"),
        ({"sku": "what"}, None, "--item COLUMN"),
        ({"uid": "who"}, Flags(user="whom"), "--user=whom.*did you mean 'who'"),
        ({"click": "c"}, Flags(labels=("dwell",)), "threshold: --label 'liked: dwell"),
        ({}, Flags(labels=("device",)), "holds string values"),
        ({}, Flags(labels=("x: click ~ 3",)), "is not a label"),
        ({}, Flags(labels=("x: dwell >= 1000",)), "one class"),
        ({}, Flags(time="device"), "does not hold a time"),
        ({}, Flags(user="sku", item="sku"), "both the user and the item"),
    ],
)
def test_wrong_input_names_the_flag_that_settles_it(
    tmp_path: Path, renamed: dict[str, str], flags: Flags | None, message: str
) -> None:
    columns = {renamed.get(name, name): v for name, v in clicks().items()}
    with pytest.raises(InputError, match=message):
        decide(tmp_path, columns, flags)


def test_flags_settle_what_names_do_not(tmp_path: Path) -> None:
    names = {"uid": "a", "sku": "b", "ts": "c", "click": "d"}
    columns = {names.get(name, name): v for name, v in clicks().items()}
    flags = Flags("a", "b", "c", ("d", "long: dwell > 20"))
    found = decide(tmp_path, columns, flags)
    assert [(x.task, x.expression) for x in found.labels] == [
        ("d", ""),
        ("long", "dwell > 20"),
    ]
    assert features(found)["dwell"].entity == "action"


def test_a_log_without_times_is_refused(tmp_path: Path) -> None:
    columns = clicks()
    for name in ("ts", "row"):
        del columns[name]
    with pytest.raises(InputError, match="--time COLUMN"):
        decide(tmp_path, columns)


def test_a_key_that_is_empty_on_some_rows_is_refused(tmp_path: Path) -> None:
    columns = clicks()
    columns["uid"] = [None, *columns["uid"][1:].tolist()]
    with pytest.raises(InputError, match=r"'uid'.*is empty on 1 rows"):
        decide(tmp_path, columns)


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ({"id": np.arange(40), "age": np.arange(40)}, "rename it to 'uid'"),
        ({"uid": np.arange(100, 140), "age": np.arange(40)}, "holds none of the log"),
        ({"x": np.arange(100, 140)}, "no column is called 'uid', as in the log"),
    ],
)
def test_a_table_that_does_not_join_is_refused(
    tmp_path: Path, users: dict[str, Any], message: str
) -> None:
    log = write_csv(tmp_path / "log.csv", clicks())
    with pytest.raises(InputError, match=message):
        propose([log], write_csv(tmp_path / "users.csv", users))


def test_a_schema_is_replaced_on_demand_only(tmp_path: Path) -> None:
    found = decide(tmp_path, clicks())
    write_proposal(found, tmp_path / "out")
    with pytest.raises(InputError, match="--overwrite"):
        write_proposal(found, tmp_path / "out")
    write_proposal(found, tmp_path / "out", overwrite=True)
