"""Tests of the functions of `prepare --beam` that need no Apache Beam."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tokenrec.data.beam.lookup import find_positions, vocabulary_ids
from tokenrec.data.beam.shared_files import load_values, save_values
from tokenrec.data.beam.users import LogBlock, partition_log, partition_of_user
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.schema import Feature
from tokenrec.data.value_index import ValueIndex
from tokenrec.data.vocabulary import TableValues

WORDS = sorted(
    {
        f"{a}{b}"
        for a in ("", "a", "é", "z\0", "\U0001f600")
        for b in ("", "0", "9é", "x" * 40)
    }
)


def index_of(values: list) -> ValueIndex:
    index = ValueIndex()
    index.codes(pa.array(values), "values")
    return index


@pytest.mark.parametrize(
    "known", [[], ["m"], WORDS, WORDS[1::2], [-5, 7], list(range(-30, 900, 3))]
)
def test_positions_are_those_of_the_sorted_values(tmp_path: Path, known: list) -> None:
    kind = object if known and isinstance(known[0], str) else np.int64
    save_values(str(tmp_path), "known.arrow", np.array(known, kind))
    mapped = load_values(str(tmp_path), "known.arrow")
    asked = [*WORDS, "zz", "b"] if kind is object else list(range(-40, 40))
    expected = [known.index(value) if value in known else -1 for value in asked]
    assert find_positions(index_of(asked), mapped).tolist() == expected
    assert (
        find_positions(
            index_of([1, 2] if isinstance(asked[0], str) else ["a"]), mapped
        ).max()
        == -1
    ), "another type"
    assert len(find_positions(ValueIndex(), mapped)) == 0


def test_final_ids_are_those_of_the_local_path() -> None:
    table = TableValues()
    provisional = table.provisional(pa.array(["b", None, "c", "a", "d"]), "values")
    table.mark(provisional[[0, 3]])
    known: list[pa.Array] = []
    final = table.finish(known.append)
    assert (
        vocabulary_ids(table, pa.concat_arrays(known)).tolist()
        == final.tolist()
        == [0, 1, 3, 1, 2, 1]
    )


def test_a_user_has_one_partition_on_every_machine() -> None:
    """The expected values are fixed: another hash would split a user's rows."""
    assert partition_of_user(pa.array([0, 7, -1, 2**62]), 1000).tolist() == [
        0,
        789,
        289,
        72,
    ]
    assert partition_of_user(pa.array(["u1", "", "é", "u1"]), 1000).tolist() == [
        178,
        0,
        819,
        178,
    ]
    for same in (
        pa.array([0, 7, -1], pa.int32()),
        pa.array([0, 7, -1]).dictionary_encode(),
    ):
        assert partition_of_user(same, 1000).tolist() == [0, 789, 289]
    counts = np.bincount(
        partition_of_user(pa.array(1000 + 7 * np.arange(10_000)), 16), minlength=16
    )
    assert counts.min() > 500, "ids in steps spread"


def test_spreading_keeps_every_row_and_its_order() -> None:
    user = np.random.default_rng(0).integers(0, 50, 1000)
    pieces = dict(partition_log(LogBlock((0, 0), pa.array(user), np.arange(1000)), 7))
    assert sorted(
        np.concatenate([piece.rows for piece in pieces.values()]).tolist()
    ) == list(range(1000))
    for partition, piece in pieces.items():
        assert (np.diff(piece.rows) > 0).all()
        assert piece.user_id.to_numpy().tolist() == user[piece.rows].tolist()
        assert set(partition_of_user(piece.user_id, 7).tolist()) == {partition}


def test_moments_merge_as_if_added_together() -> None:
    features = (
        Feature("age", "dense", "user"),
        Feature("rare", "dense", "user", transform="log1p"),
    )
    rows = np.random.default_rng(0).normal(1e4, 1, (300, 2)).astype(np.float32)
    rows[:200, 1] = np.nan
    whole, merged = Moments(features), Moments(features)
    none = np.zeros((300, 0), np.int32)
    whole.add(none, rows)
    for part in (rows[:0], rows[:150], rows[150:160], rows[160:]):
        some = Moments(features)
        some.add(none[: len(part)], part)
        merged.merge(some)
    for name, feature in whole.features().items():
        other = merged.features()[name]
        assert (other.mean, other.deviation) == pytest.approx(
            (feature.mean, feature.deviation), rel=1e-12
        )
    alone = Moments(features)
    alone.merge(whole)
    assert alone.features() == whole.features(), "one part is taken as it is"
