"""Tests of how values of the user's files are converted, from CSV and from Parquet."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.errors import InputError

DAY = 86_400_000
START = 1_640_995_200_000  # 2022-01-01
UTC = datetime.UTC


class Log:
    """A log of one table, with a user, an item, a time and a label in each row."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.schema: dict[str, Any] = {
            "features": [{"name": "item_id", "kind": "categorical", "entity": "item"}],
            "tasks": [{"name": "click"}],
            "columns": {"user_id": "user", "item_id": "item", "time_ms": "time"},
        }
        self.columns: dict[str, Any] = {
            "user": ["u", "v"],
            "item": ["a", "b"],
            "time": [START, START + 2 * DAY],
            "click": [1, 0],
        }

    def source(self, suffix: str = ".parquet", **options: Any) -> DelimitedSource:
        (self.folder / "schema.json").write_text(json.dumps(self.schema))
        path = self.folder / f"log{suffix}"
        if suffix == ".parquet":
            pa.parquet.write_table(pa.table(self.columns), path)
        else:
            write_csv(path, self.columns)
        options = {"valid_from": "2022-01-02", **options}
        return DelimitedSource(self.folder / "schema.json", [path], **options)

    def read(self, name: str, suffix: str = ".parquet", **options: Any) -> list[Any]:
        batches = self.source(suffix, **options).rows()
        return [value for batch in batches for value in batch.column(name).to_pylist()]

    def problem(self, suffix: str = ".parquet", **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            list(self.source(suffix, **options).rows())
        return str(caught.value)


def write_csv(path: Path, columns: dict[str, Any]) -> None:
    """Write text as it is, for values that hold no commas, quotes or line breaks."""
    values = [v.to_pylist() if isinstance(v, pa.Array) else v for v in columns.values()]
    lines = [list(columns), *zip(*values, strict=True)]
    path.write_text(
        "".join(
            ",".join("" if v is None else str(v) for v in line) + "\n" for line in lines
        )
    )


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


@pytest.mark.parametrize(
    ("values", "form", "expected"),
    [
        ([START, START + DAY], {}, [START, START + DAY]),
        ([1_640_995_200, 1_641_081_600], {"unit": "s"}, [START, START + DAY]),
        ([START * 1000 + 999, START * 1000 - 1], {"unit": "us"}, [START, START - 1]),
        ([START * 10**6, START * 10**6 - 1], {"unit": "ns"}, [START, START - 1]),
        ([1_640_995_200.001, None], {"unit": "s"}, [START + 1, None]),
        ([float(START), START + 0.9], {}, [START, START]),
        ([decimal.Decimal("1640995200.123")] * 2, {"unit": "s"}, [START + 123] * 2),
        (["2022-01-01", "2022-01-02"], {}, [START, START + DAY]),
        (["2022-01-01T00:00:00Z", "2022-01-01 00:00:00.25"], {}, [START, START + 250]),
        (
            ["2022-01-01T02:00+02:00", "2021-12-31 23:00:00 -0100"],
            {"zone": "Asia/Tokyo"},
            [START, START],
        ),
        (["2022-01-01 00:00:00 UTC", "2022-01-01T00:00:00GMT"], {}, [START, START]),
        (["2022-01-01", "2022-01-01 08:00"], {"zone": "+08:00"}, [START - DAY // 3, START]),
        (["2022-07-01T02:00", "2022-01-01T01:00"], {"zone": "Europe/Oslo"}, [START + 181 * DAY, START]),
        # Each value is read as what it is.
        (["1640995200000", "2022-01-01T00:00:00.123456789Z"], {}, [START, START + 123]),
        (["1640995200000.0", "1.640995200001e12"], {}, [START, START + 1]),
        ([" 1640995200000 ", "\t2022-01-01 "], {}, [START, START]),
        (["-1", "1969-12-31T23:59:59.999Z"], {}, [-1, -1]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_times_are_read_with_their_unit_and_zone(log, values, form, expected, suffix):
    log.schema["time"] = form
    log.columns["time"] = values
    if None in values:
        message = log.problem(suffix)
        assert "None is not a time_ms; every row needs one" in message
        return
    options = {"valid_from": str(max(expected)), "test_from": None}
    if min(expected) == max(expected):
        options["valid_from"] = str(max(expected) + 1)
        assert "leaves valid empty" in log.problem(suffix, **options)
        batches = log.source(suffix, **options).row_parts()[0].read()
        got = [time for batch in batches for time in batch["time_ms"].to_pylist()]
    else:
        got = log.read("time_ms", suffix, **options)
    assert got == expected


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_parquet_timestamps_are_read_with_their_unit_and_zone(log, unit, zone):
    moments = [datetime.datetime(2022, 1, day, tzinfo=UTC) for day in (1, 3)]
    # Text keeps its unit: the unit of the schema is for numbers alone.
    log.schema["time"] = {"unit": "us"}
    if zone is None:
        moments = [moment.replace(tzinfo=None) for moment in moments]
    log.columns["time"] = pa.array(moments, pa.timestamp(unit, zone))
    assert log.read("time_ms") == [START, START + 2 * DAY]


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64()])
def test_dates_begin_at_midnight_of_the_zone(log, kind):
    days = [datetime.date(2022, 1, day) for day in (1, 3)]
    log.columns["time"] = pa.array(days, kind)
    log.schema["time"] = {"zone": "+08:00"}
    assert log.read("time_ms") == [t - DAY // 3 for t in (START, START + 2 * DAY)]
    # The days of the splits begin there too.
    assert log.read("split", valid_from="2022-01-03") == [0, 1]


def test_times_that_occur_twice_in_a_zone_are_counted_and_said(log, capsys):
    log.schema["time"] = {"zone": "Europe/Oslo"}
    log.columns["time"] = ["2021-10-31T02:30", "2022-03-27T02:30"]
    source = log.source()
    list(source.rows())
    assert source.provenance.counts == {"ambiguous_times_time_ms": 2}
    assert "2 times such as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([START // 1000, START // 1000 + 86400], "s"),
        ([START * 1000, START * 1000 + DAY * 1000], "us"),
        ([START * 10**6, START * 10**6 + DAY * 10**6], "ns"),
    ],
)
def test_another_unit_of_time_is_named_even_where_the_splits_have_rows(
    log, values, unit
):
    log.columns["time"] = values
    message = log.problem(".csv", valid_from=str(values[1]))
    assert f'"time": {{"unit": "{unit}"}}' in message
    log.schema["time"] = {"unit": unit}
    assert log.read("time_ms") == [START, START + DAY]


def test_days_written_as_numbers_are_not_milliseconds(log):
    log.columns["time"] = [20220101, 20220103]
    assert "2022-05-03" in log.problem(".csv", valid_from="20220103")


@pytest.mark.parametrize(
    ("values", "word"),
    [
        (["noon", "2022-01-01"], "'noon' is not a time"),
        (["2022-01-01", "03/01/2022"], "'03/01/2022' is not a time"),
        (["2022-01-01", "2022-13-01"], "'2022-13-01' is not a time"),
        (["0x10", "2022-01-01"], "'0x10' is not a time"),
        ([1e300, 1.0], "too large"),
        ([True, False], "is bool, and no time"),
    ],
)
def test_what_is_no_time_is_named(log, values, word):
    log.columns["time"] = values
    message = log.problem()
    assert word in message
    assert "leave it empty" not in message


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 0, None, -1], [1, 0, None, -1]),
        (["1.0", "0.0", None, "-1.0"], [1, 0, None, -1]),
        (["true", "FALSE", " 1 ", "0"], [1, 0, 1, 0]),
        ([1.0, 0.0, None, -1.0], [1, 0, None, -1]),
        ([True, False, None, None], [1, 0, None, None]),
        ([decimal.Decimal("1.00"), decimal.Decimal("0.00"), None, None], [1, 0, None, None]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_labels_are_read_from_any_type(log, values, expected, suffix):
    log.columns = {name: 2 * column for name, column in log.columns.items()}
    log.columns["click"] = values
    assert log.read("label_click", suffix) == expected


def test_nan_is_an_unknown_label(log):
    log.columns["click"] = pa.array([float("nan"), 1.0])
    assert log.read("label_click") == [None, 1]
    log.schema["labels"] = {"click": "click != 1"}
    assert log.read("label_click") == [None, 0]


@pytest.mark.parametrize("value", [2, 0.5, "maybe", "yes"])
def test_what_is_no_label_is_named(log, value):
    log.columns["click"] = [value] * 2
    message = log.problem()
    for word in ("row 1", "column 'click'", f"{value!r} is not a label", "1, 0"):
        assert word in message


@pytest.mark.parametrize(
    ("values", "rule", "expected"),
    [
        ([4, 3], ">= 4", [1, 0]),
        ([4, 3], "> 3.5", [1, 0]),
        ([4, 3], "== 3", [0, 1]),
        ([4.5, None], "< 5", [1, None]),
        (["4", "3.5"], "<=3.5", [0, 1]),
        ([" 10", "9"], "> 9", [1, 0]),
        ([decimal.Decimal("4.10"), decimal.Decimal("4.09")], ">= 4.1", [1, 0]),
        (pa.array([4.1, 4.0], pa.float32()), ">= 4.1", [1, 0]),
        (pa.array([1 << 53, (1 << 53) + 1]), f"> {1 << 53}", [0, 1]),
        ([-1, 1], "> -1e0", [0, 1]),
    ],
)
def test_a_label_may_compare_a_number(log, values, rule, expected):
    del log.columns["click"]
    log.columns["my rating"] = values
    log.schema["labels"] = {"click": f"my rating {rule}"}
    assert log.read("label_click") == expected


def test_a_label_that_compares_text_is_named(log):
    log.columns["click"] = ["4", "good"]
    log.schema["labels"] = {"click": "click >= 4"}
    message = log.problem(".csv")
    for word in ("line 3", "'good' is not a number", "'click >= 4'"):
        assert word in message


@pytest.mark.parametrize(
    "values",
    [[True, False], [1, 0], [1.0, 0.0], ["true", "0"], ["Yes", "no"], ["1.0", "FALSE"]],
)
def test_flags_are_read_from_any_type(log, values):
    log.schema["columns"] |= {"event": "bought", "scored": "shown"}
    log.columns |= {"bought": values, "shown": values}
    for suffix in (".csv", ".parquet"):
        assert log.read("event", suffix) == [True, False]
        assert log.read("scored", suffix) == [True, False]


def test_a_flag_that_is_missing_or_none_is_named(log):
    log.schema["columns"]["event"] = "bought"
    log.columns["bought"] = [None, "true"]
    assert "is not a event" in log.problem()
    log.columns["bought"] = ["2", "true"]
    assert "'2' is not a flag; use true or false" in log.problem()


@pytest.mark.parametrize(
    ("values", "text", "integers"),
    [
        ([12.0, -7.0], ["12", "-7"], [12, -7]),
        ([decimal.Decimal("12.00"), decimal.Decimal("-7.00")], ["12", "-7"], [12, -7]),
        ([decimal.Decimal(10**20), decimal.Decimal(1)], [str(10**20), "1"], None),
        (pa.array([1 << 63, 1], pa.uint64()), [str(1 << 63), "1"], None),
        ([1 << 60, -(1 << 60)], [str(1 << 60), str(-(1 << 60))], [1 << 60, -(1 << 60)]),
        ([b"a", b"\xc3\xa9"], ["a", "é"], None),
        (pa.array(["x", "y"]).dictionary_encode(), ["x", "y"], None),
        (pa.array(["x", "y"], pa.large_string()), ["x", "y"], None),
        (["12.0", " 7"], ["12.0", " 7"], [12, 7]),
        (["007", "+7"], ["007", "+7"], [7, 7]),
        (["0x1F", "1"], ["0x1F", "1"], None),
    ],
)
def test_ids_are_text_or_integers_without_a_decimal_point(log, values, text, integers):
    log.columns["user"] = values
    assert log.read("user_id") == text
    log.schema["key_types"] = {"user_id": "int64"}
    if integers is None:
        assert "column 'user'" in log.problem()
    else:
        assert log.read("user_id") == integers


@pytest.mark.parametrize(
    "values",
    [
        [1.5, 2.0],
        [float(1 << 53), 1.0],
        [1e300, 1.0],
        [float("inf"), 1.0],
        ["1.2345678901234568e+17", "1"],
        ["123456789012345680.0", "1"],
    ],
)
@pytest.mark.parametrize("kind", ["int64", "string"])
def test_ids_that_a_double_has_rounded_are_refused(log, values, kind):
    log.columns["user"] = values
    log.schema["key_types"] = {"user_id": kind}
    message = log.problem()
    assert "row 1: column 'user'" in message
    assert "rounded" in message or "is not int64" in message


def test_nan_is_no_id(log):
    log.columns["user"] = pa.array([1.0, float("nan")])
    assert "row 2: column 'user': nan is not a user_id" in log.problem()


@pytest.mark.parametrize(
    ("values", "kind", "count"),
    [
        (["1000.0", "1000"], "string", "ids_like_floats_user_id"),
        ([" ann", "bob"], "string", "padded_user_id"),
        (["NULL", "bob"], "string", "missing_words_user_id"),
        (["1000.0", "1000"], "int64", "whole_floats_user_id"),
    ],
)
def test_odd_ids_are_counted_and_said_once(log, capsys, values, kind, count):
    log.columns["user"] = values
    log.schema["key_types"] = {"user_id": kind}
    source = log.source(".csv")
    for _ in range(2):
        list(source.rows())
    assert source.provenance.counts == {count: 1}
    said = capsys.readouterr().err
    assert said.count("column 'user': 1 values such as") == 1
    assert repr(values[0]) in said


def test_categories_may_be_fractions_and_empty_text_is_missing(log):
    log.schema["features"].append(
        {"name": "size", "kind": "categorical", "entity": "context"}
    )
    log.columns["size"] = [0.5, 3.0]
    assert log.read("size") == ["0.5", "3"]
    log.columns["size"] = ["", "b"]
    assert log.read("size") == [None, "b"]
    log.columns["size"] = pa.array([None, None], pa.null())
    assert log.read("size") == [None, None]
    log.columns["size"] = [["a"], ["b"]]
    assert "declare it multi_valued" in log.problem()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.5, None], [0.5, None]),
        (["0.5", " 3 "], [0.5, 3.0]),
        ([(1 << 62) + 1, 2], [float((1 << 62) + 1), 2.0]),
        ([decimal.Decimal("0.1"), None], [0.1, None]),
        ([True, False], [1.0, 0.0]),
        (pa.array([1, 2], pa.uint64()), [1.0, 2.0]),
    ],
)
def test_numbers_are_read_from_any_type(log, values, expected):
    log.schema["features"].append(
        {"name": "size", "kind": "dense", "entity": "context"}
    )
    log.columns["size"] = values
    assert log.read("size") == expected


@pytest.mark.parametrize("value", ["1,5", "NA", "1_000", "0x1F"])
def test_what_is_no_number_is_named(log, value):
    log.schema["features"].append(
        {"name": "size", "kind": "dense", "entity": "context"}
    )
    log.columns["size"] = [value, "1"]
    message = log.problem()
    assert f"row 1: column 'size': {value!r} is not a number" in message
    assert "decimal point" in message


def test_requests_of_any_text_are_numbers_that_depend_on_the_text_alone(log, capsys):
    log.schema["columns"]["request"] = "page"
    texts = ["7", "7.0", " 7", "c0ffee", "é", None]
    log.columns = {name: 3 * column for name, column in log.columns.items()}
    log.columns["page"] = texts
    first = log.read("request")
    assert first[:3] == [7, 7, 7]
    assert first[5] == -1
    assert len(set(first)) == 4
    assert all(0 <= number < 1 << 63 for number in first[:5])
    assert "2 values such as 'c0ffee' are no whole numbers" in capsys.readouterr().err
    # Another file, with other rows around.
    log.columns["page"] = texts[::-1]
    assert log.read("request", ".csv") == first[::-1]


def test_a_request_is_the_same_number_whatever_stands_beside_it(log):
    log.schema["columns"]["request"] = "page"
    for text in (str((1 << 63) - 1), "0x1F", "12345678901234567890123", "007", "+7"):
        log.columns["page"] = [text, "1"]
        alone = log.read("request")[0]
        log.columns["page"] = [text, "a-b"]
        assert log.read("request")[0] == alone


@pytest.mark.parametrize(
    "values", [[3, None], [3.0, float("nan")], pa.array([3, None], pa.int32())]
)
def test_requests_that_are_numbers_stay_as_they_are(log, values):
    log.schema["columns"]["request"] = "page"
    log.columns["page"] = values
    assert log.read("request") == [3, -1]


def test_a_negative_request_is_refused(log):
    log.schema["columns"]["request"] = "page"
    log.columns["page"] = ["-2", "x"]
    assert "'-2' is negative" in log.problem()
