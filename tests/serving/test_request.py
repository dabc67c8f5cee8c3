import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenrec.serving.request import (
    BadRequest,
    Limits,
    Request,
    check_value,
    parse_request,
)

LONG = "x" * 20_000


def _request(**fields):
    return {
        "user": {"user_id": 7, "age": "25-34", "interests": [1, 2]},
        "time_ms": 1_000,
        "history": {
            "time_ms": [1, 2, 2],
            "item_id": [4, 5, 6],
            "price": [1.5, None, 2],
        },
        "context": {"store": 3},
        "candidates": {"item_id": [8, 9], "place": ["front", None]},
    } | fields


def test_a_request_keeps_its_columns():
    parsed = parse_request(_request(user_version="3"), Limits())
    assert parsed == Request(**_request(), user_version="3")
    assert parsed.events == 3
    assert parsed.candidate_count == 2


def test_arrays_are_columns_too():
    history = {"time_ms": np.arange(3), "item_id": np.array(["a", "b", "c"])}
    parsed = parse_request(_request(history=history), Limits())
    assert parsed.events == 3


def test_a_user_may_have_no_past():
    value = _request(history={})
    assert parse_request(value, Limits()).events == 0
    del value["history"], value["context"]
    assert parse_request(value, Limits()).context == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"canidates": {}}, "no field 'canidates'; did you mean 'candidates'"),
        ({"time_ms": "now"}, "time_ms: 'now' is not an int64"),
        ({"time_ms": True}, "time_ms: True is not an int64"),
        ({"user": [1]}, r"user: \[1\] is not a JSON object"),
        ({"context": {"store": math.nan}}, "context.store: nan is not finite"),
        ({"context": {"store": {}}}, r"context.store: \{\} is a dict"),
        ({"context": {"store": [[1]]}}, "a list within a list"),
        ({"context": {"store": 1 << 63}}, "exceeds 64 bits"),
        ({"candidates": {"item_id": []}}, "missing or empty"),
        ({"candidates": {"place": [1]}}, "missing or empty"),
        ({"candidates": {"item_id": 3}}, "candidates.item_id: 3 is not a list"),
        (
            {"candidates": {"item_id": [1], "place": [1, 2]}},
            "candidates.place: has 2 values, and the column 'item_id' has 1",
        ),
        ({"history": {"time_ms": [1]}}, "history: the column 'item_id' is missing"),
        (
            {"history": {"time_ms": [3, 2], "item_id": [1, 1]}},
            r"history.time_ms\[1\]: 2 is earlier than the event before it, 3",
        ),
        (
            {"history": {"time_ms": [1_000], "item_id": [1]}},
            "not earlier than the request at time_ms=1000",
        ),
        (
            {"history": {"time_ms": np.array([1.5]), "item_id": [1]}},
            r"history.time_ms\[0\]: 1.5 is not an int64",
        ),
        (
            {"candidates": {"item_id": [1], "x": np.array([np.inf])}},
            "candidates.x: holds inf",
        ),
        ({"user_version": 3}, "user_version: 3 is no text"),
    ],
)
def test_what_is_wrong_is_named(fields, message):
    with pytest.raises(BadRequest, match=message):
        parse_request(_request(**fields), Limits())


@pytest.mark.parametrize(
    "fields",
    [
        {LONG: 1},
        {"user": {LONG: 1}},
        {"context": {LONG: [[1]]}},
        {"candidates": {LONG: [1, 2], "item_id": [1]}},
    ],
)
def test_a_message_does_not_repeat_a_long_name(fields):
    with pytest.raises(BadRequest, match="'xxx") as refused:
        parse_request(_request(**fields), Limits())
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("name", ["user", "time_ms", "candidates"])
def test_a_missing_field_is_named(name):
    value = _request()
    del value[name]
    with pytest.raises(BadRequest, match=f"the field '{name}' is missing"):
        parse_request(value, Limits())


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (
            {"candidates": 1},
            "candidates.item_id: has 2 values, more than the limit of 1",
        ),
        ({"history": 2}, "history.time_ms: has 3 values, more than the limit of 2"),
        ({"columns": 2}, "user: has 3 columns, more than the limit of 2"),
        ({"values": 1}, "user.interests: has 2 values, more than the limit of 1"),
        (
            {"text": 4},
            r"candidates.place\[0\]: has 5 characters, more than the limit of 4",
        ),
    ],
)
def test_a_limit_is_kept(limit, message):
    user = {"user_id": 7, "age": "25-34", "interests": [1, 2]}
    request = _request(history={"time_ms": [1, 2, 2], "item_id": [4, 5, 6]}, user=user)
    with pytest.raises(BadRequest, match=message):
        parse_request(request, Limits(**limit))


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([(1 << 63) - 1, 1 << 63, -(1 << 63), -(1 << 63) - 1, 10**400]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(0, 3), max_size=2),
)


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.lists(_VALUES, min_size=1, max_size=5),
        st.lists(st.none() | st.floats(), min_size=1, max_size=5),
        st.lists(st.text(max_size=8) | st.none(), min_size=1, max_size=5),
    )
)
def test_a_column_is_sound_if_each_of_its_values_is(values):
    limits = Limits(text=5)

    def accepts(check):
        try:
            check()
        except BadRequest:
            return False
        return True

    candidates = {"item_id": [0] * len(values), "x": values}
    assert accepts(
        lambda: parse_request(_request(candidates=candidates), limits)
    ) == all(accepts(lambda v=v: check_value(v, "x", limits, 0)) for v in values)


def test_an_array_of_more_than_64_bits_is_refused():
    ids = np.array([1, 1 << 63], np.uint64)
    with pytest.raises(BadRequest, match="9223372036854775808 exceeds 64 bits"):
        parse_request(_request(candidates={"item_id": ids}), Limits())


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["time_ms", "item_id", "x"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries(
        {"user": _json, "time_ms": _json, "candidates": _json},
        optional={"history": _json, "context": _json, "user_version": _json},
    )
    | _json
)
def test_any_json_is_a_request_or_refused(value):
    try:
        parsed = parse_request(value, Limits(candidates=3))
    except BadRequest:
        return
    assert 1 <= parsed.candidate_count <= 3
