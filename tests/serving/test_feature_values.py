"""Raw values become the ids and numbers that `prepare` gives them."""

import numpy as np
import pyarrow as pa
import pytest

from tokenrec.data.preparation.encode import encode_features
from tokenrec.data.schema import Feature
from tokenrec.data.vocabulary import FrozenValues
from tokenrec.serving import vocabularies
from tokenrec.serving.feature_values import FeatureGroup
from tokenrec.serving.request import BadRequest
from tokenrec.serving.vocabularies import item_rows, table_ids

FEATURES = (
    Feature("city", "categorical", "user"),
    Feature("day", "categorical", "context"),
    Feature("tags", "multi_valued", "item", length=2),
    Feature("age", "dense", "user"),
    Feature("price", "dense", "user"),
    Feature("picture", "embedding", "item", length=2),
    Feature("code", "semantic_id", "item", length=2, codes=4),
)
KNOWN = {
    "city": pa.array(["oslo", "rome"]),
    "day": pa.array([3, 5, 9]),
    "tags": pa.array([1, 2]),
}
GIVEN = {
    "city": ["rome", None, "bern"],
    "day": [9, 4, None],
    "tags": [[2, 7, 1], None, []],
    "age": [1.5, None, 3],
    "price": [True, 1e-40, None],
    "picture": [[0.5, 1], None, [2, 3]],
    "code": [[0, 3], None, [2, None]],
}


def group():
    return FeatureGroup(FEATURES, {n: table_ids(v) for n, v in KNOWN.items()})


def encode(given, rows=3):
    ids, dense = group().blank(rows)
    group().encode(given, "part", ids, dense)
    return ids, dense


def test_values_are_encoded_as_prepare_encodes_them():
    batch = pa.RecordBatch.from_pydict(GIVEN | {"price": pa.array([1.0, 1e-40, None])})
    tables = {name: FrozenValues([values]) for name, values in KNOWN.items()}
    expected = encode_features(batch, FEATURES, tables, "log", 0)
    for got, wanted in zip(encode(GIVEN), expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_arrays_are_columns_too():
    given = GIVEN | {
        "day": np.array([9, 4, 3]),
        "age": np.array([1.5, np.nan, 3]),
        "city": np.array(["rome", "oslo", "bern"]),
    }
    ids, dense = encode(given)
    assert ids[:, :2].tolist() == [[3, 4], [2, 1], [1, 2]]
    np.testing.assert_array_equal(dense[:, 0], np.float32([1.5, np.nan, 3]))


def test_unknown_and_missing_values_are_counted_by_feature():
    unknown, missing = {}, {}
    group().count(*encode(GIVEN), unknown, missing)
    assert unknown == {"city": 1, "day": 1, "tags": 1}
    assert missing == {
        "city": 1, "day": 1, "tags": 2, "age": 1, "price": 1, "picture": 1, "code": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("city", [1], r"part.city\[0\]: 1 is a int"),
        ("day", [3.0], r"part.day\[0\]: 3.0 is a float"),
        ("tags", [3], r"part.tags\[0\]: 3 is no list"),
        ("age", ["3"], r"part.age\[0\]: '3' is no number"),
        ("age", [1e39], r"part.age\[0\]: 1e\+39 is not a finite float32"),
        ("picture", [[1]], r"part.picture\[0\]: has 1 values"),
        ("code", [[0, 4]], r"part.code\[0\]: 4 is no code; codes are 0 to 3"),
    ],
)
def test_a_wrong_value_is_named(name, values, message):
    with pytest.raises(BadRequest, match=message):
        encode({name: values}, rows=1)


def test_large_tables_of_integers_are_looked_up_alike(monkeypatch):
    values = pa.array([30, 10, 20])
    given = [10, None, 25, 30, 31, True]
    small = item_rows(values).find(given, "items")
    monkeypatch.setattr(vocabularies, "DICT_INTEGERS", 0)
    large = item_rows(values).find(given, "items")
    assert small.tolist() == large.tolist() == [1, -2, -1, 0, -1, -1]


def test_a_rare_value_reads_the_row_that_training_gave_it():
    rare = np.array([0, 1, 2, 1], np.int32)
    assert table_ids(pa.array(["a", "b"]), rare).find(["a", "b"], "x").tolist() == [
        2,
        1,
    ]
