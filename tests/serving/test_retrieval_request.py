"""The form of a request for items: what is read, and what is refused by name."""

import numpy as np
import pytest

from tokenrec.serving.request import BadRequest, Limits
from tokenrec.serving.retrieval_request import Bounds, parse_retrieval

REQUEST = {"user": {"user_id": 7}, "time_ms": 10}


def test_a_request_needs_user_and_time_alone():
    parsed = parse_retrieval(REQUEST, Limits())
    assert parsed.request.candidates == {}
    assert parsed.request.candidate_count == 0
    assert parsed.request.events == 0
    # The run decides.
    assert parsed.k is parsed.drop_seen is None
    assert parsed.exclude == ()
    assert parsed.filter == {}


def test_choices_are_read():
    parsed = parse_retrieval(
        REQUEST
        | {
            "history": {"time_ms": [1, 2], "item_id": [4, 5]},
            "k": 3,
            "drop_seen": False,
            "exclude": np.array([4, 9]),
            "filter": {
                "brand": ["a", "b"],
                "price": {"min": 1, "max": None},
                "size": {"max": 2.5},
            },
        },
        Limits(),
    )
    assert parsed.request.events == 2
    assert (parsed.k, parsed.drop_seen, parsed.exclude) == (3, False, (4, 9))
    assert parsed.filter == {
        "brand": ("a", "b"),
        "price": Bounds(1.0, None),
        "size": Bounds(None, 2.5),
    }


def test_scalars_of_numpy_are_their_values():
    choices = {
        "k": np.int64(3),
        "drop_seen": np.bool_(True),
        "exclude": [np.int32(4), np.str_("a")],
        "filter": {"brand": [np.int64(5)], "price": {"min": np.float32(0.5)}},
    }
    parsed = parse_retrieval(REQUEST | choices, Limits())
    assert (parsed.k, parsed.drop_seen, parsed.exclude) == (3, True, (4, "a"))
    assert parsed.filter == {"brand": (5,), "price": Bounds(0.5, None)}
    found = [parsed.k, parsed.drop_seen, *parsed.exclude, *parsed.filter["brand"]]
    assert [type(value) for value in found] == [int, bool, int, str, int]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": {"item_id": [1]}}, "no field 'candidates'"),
        ({"K": 3}, "no field 'K'"),
        ({"k": 2.0}, r"k: 2\.0 is no integer"),
        ({"k": True}, "k: True is no integer"),
        ({"exclude": {"item_id": [1]}}, "exclude: .* is not a list"),
        (
            {"exclude": list(range(4))},
            "exclude: has 4 values, more than the limit of 3",
        ),
        ({"exclude": [1 << 70]}, r"exclude\[0\]: .* exceeds 64 bits"),
        ({"exclude": [None]}, r"exclude\[0\]: None is no integer and no text"),
        ({"filter": ["brand"]}, "filter: .* is not a JSON object"),
        ({"filter": {"brand": "a"}}, r"filter\.brand: 'a' is not a list"),
        ({"filter": {"brand": [["a"]]}}, r"filter\.brand\[0\]: \['a'\] is no"),
        ({"filter": {"price": {}}}, r"filter\.price: has neither 'min' nor 'max'"),
        ({"filter": {"price": {"min": "1"}}}, r"price\.min: '1' is no number"),
        ({"filter": {"price": {"min": float("nan")}}}, "nan is not finite"),
        ({"filter": {"price": {"max": 10**400}}}, "is not finite"),
        ({"filter": {"x" * 20_000: [1]}}, "has 20000 characters"),
        ({"filter": {str(i): [1] for i in range(4)}}, "filter: has 4 features"),
        ({"history": {"time_ms": [10], "item_id": [1]}}, "not earlier than"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    with pytest.raises(BadRequest, match=message):
        parse_retrieval(REQUEST | change, Limits(history=3, columns=3))


def test_a_missing_field_is_named():
    with pytest.raises(BadRequest, match="the field 'time_ms' is missing"):
        parse_retrieval({"user": {}}, Limits())
    with pytest.raises(BadRequest, match="is not a JSON object"):
        parse_retrieval([], Limits())
