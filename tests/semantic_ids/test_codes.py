"""Semantic ids on disk: written, read back, aligned, refused when not sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenrec.data.semantic_id_file import (
    SEMANTIC_IDS,
    SemanticIds,
    align,
    load_semantic_ids,
    save_semantic_ids,
)
from tokenrec.errors import InputError
from tokenrec.semantic_ids.collisions import disambiguate

CODES = np.array([[1, 2], [1, 3], [0, 0]], np.int32)


@pytest.mark.parametrize("item_id", [np.array([7, 9, 30]), np.array(["a", "ø", "zz"])])
def test_file_and_folder_give_back_what_was_saved(
    tmp_path: Path, item_id: np.ndarray
) -> None:
    save_semantic_ids(SemanticIds(item_id, CODES), tmp_path / SEMANTIC_IDS)
    assert [p.name for p in tmp_path.iterdir()] == [SEMANTIC_IDS]
    for path in (tmp_path, tmp_path / SEMANTIC_IDS):
        read = load_semantic_ids(path)
        np.testing.assert_array_equal(read.item_id, item_id)
        np.testing.assert_array_equal(read.codes, CODES)
        assert read.codes.dtype == np.int32
    kind = pa.int64() if item_id.dtype.kind == "i" else pa.string()
    schema = pq.read_schema(tmp_path / SEMANTIC_IDS)
    assert schema.field("item_id").type == kind
    assert schema.field("codes").type == pa.list_(pa.int32())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"item_id": [1, 2], "code": [[0], [1]]},
            r"columns item_id, code, not item_id and codes",
        ),
        (
            {"item_id": [1, 2, 3], "codes": [[0, 1], [1, 0], [2]]},
            r"item_id=3 has 1 codes.*have 2",
        ),
        ({"item_id": [1, 2], "codes": [[0, 1], None]}, r"codes holds a null"),
        ({"item_id": [1, 2], "codes": [[0, 1], [1, None]]}, r"codes holds a null"),
        ({"item_id": [1, 2], "codes": [0, 1]}, r"codes has the type int64"),
        ({"item_id": [1, 2], "codes": [[0.5], [1.5]]}, r"codes has the type list"),
        ({"item_id": [1, 2], "codes": [[2**40], [1]]}, r"a code is no int32"),
        (
            {"item_id": [1.5, 2.5], "codes": [[0], [1]]},
            r"item_id has 0 nulls and the type double",
        ),
        ({"item_id": [1, None], "codes": [[0], [1]]}, r"item_id has 1 nulls"),
        (
            {"item_id": ["a", "b", "a"], "codes": [[0], [1], [2]]},
            r"item_id='a' occurs twice",
        ),
        (
            {"item_id": [1, 2], "codes": [[0, 1], [1, -3]]},
            r"item_id=2 has the codes \[1, -3\]; codes start at 0",
        ),
        (
            {"item_id": [4, 5, 6], "codes": [[0, 1], [1, 1], [0, 1]]},
            r"items 4 and 6 both have the codes \[0, 1\]",
        ),
        (
            {
                "item_id": pa.array([], pa.int64()),
                "codes": pa.array([], pa.list_(pa.int32())),
            },
            r"no item has a code",
        ),
    ],
)
def test_unsound_file_is_refused(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / SEMANTIC_IDS)
    with pytest.raises(InputError, match=message):
        load_semantic_ids(tmp_path)


def test_absent_or_damaged_file_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match="do not exist; make them with `tokenrec semantic-ids`"
    ):
        load_semantic_ids(tmp_path)
    (tmp_path / SEMANTIC_IDS).write_text("nothing")
    with pytest.raises(InputError, match=r"cannot be read: .*Parquet file size"):
        load_semantic_ids(tmp_path)


def test_align_follows_the_catalogue() -> None:
    ids = SemanticIds(np.array([30, 7, 9]), CODES)
    np.testing.assert_array_equal(align(ids, np.array([9, 30])), CODES[[2, 0]])
    words = SemanticIds(np.array(["b", "abc", "a"]), CODES)
    np.testing.assert_array_equal(
        align(words, np.array(["a", "abc", "b"])), CODES[[2, 1, 0]]
    )


def test_align_names_the_item_without_an_id() -> None:
    ids = SemanticIds(np.array([30, 7, 9]), CODES)
    with pytest.raises(InputError, match=r"item_id=8 has none, nor have 1 other items"):
        align(ids, np.array([7, 8, 40]))
    with pytest.raises(
        InputError, match=r"item_id is int64, but string in the data set"
    ):
        align(ids, np.array(["7"]))


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3)),
        min_size=1,
        max_size=40,
    )
)
def test_last_level_tells_all_items_apart_and_the_popular_come_first(
    rows: list[tuple[int, int, int]],
) -> None:
    codes, popularity = (
        np.array([r[:2] for r in rows], np.int32),
        np.array([r[2] for r in rows]),
    )
    full = disambiguate(codes, popularity)
    np.testing.assert_array_equal(full[:, :2], codes)
    assert len(np.unique(full, axis=0)) == len(rows)
    if len(np.unique(codes, axis=0)) == len(rows):
        assert full.shape[1] == 2
        return
    for prefix in np.unique(codes, axis=0):
        group = np.flatnonzero((codes == prefix).all(axis=1))
        in_order = group[np.argsort(full[group, 2])]
        assert full[in_order, 2].tolist() == list(range(len(group)))
        assert in_order.tolist() == sorted(
            group.tolist(), key=lambda i: (-popularity[i], i)
        )
