"""Candidates of a request, and the purchase that ends it, do not reveal each other.

See test_no_leak.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.scorer import Scored, Scorer, changed, prepared
from tokenrec.config import DataConfig
from tokenrec.data.dataset import Dataset
from tokenrec.data.source import SPLITS, Source
from tokenrec.data.sources.synthetic import SyntheticSource

REQUESTS = DataConfig(
    path="-", paradigm="nio", events=12, candidates=4, eval_batch_size=32
)


class Edited:
    """A source whose rows are changed."""

    def __init__(self, source: Source, edit: Callable[[pa.Table], pa.Table]) -> None:
        self._source, self._edit = source, edit
        self.schema, self.provenance = source.schema, source.provenance
        self.users, self.items = source.users, source.items

    def rows(self) -> Iterator[pa.RecordBatch]:
        return iter(
            self._edit(pa.Table.from_batches(list(self._source.rows())))
            .combine_chunks()
            .to_batches()
        )


def replaced(
    table: pa.Table, name: str, rows: np.ndarray, make: Callable[[pa.Array], pa.Array]
) -> pa.Table:
    column = pc.if_else(pa.array(rows), make(table[name]), table[name])
    return table.set_column(table.column_names.index(name), name, column)


class World(NamedTuple):
    """Visits of four scored candidates and one purchase, and the candidates' scores."""

    source: Source
    dataset: Dataset
    scorer: Scorer
    scores: Scored


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    source = SyntheticSource(2_500, users=10, items=30, requests=4)
    dataset = prepared(source, tmp_path_factory.mktemp("requests") / "prepared")
    scorer = Scorer(REQUESTS, dataset)
    return World(source, dataset, scorer, scorer(dataset))


def is_valid(table: pa.Table) -> np.ndarray:
    return table["split"].to_numpy() == SPLITS.index("valid")


def test_labels_move_no_score_of_a_request(world: World, tmp_path: Path) -> None:
    source, _, scorer, before = world

    def flip(table: pa.Table) -> pa.Table:
        for name in ("label_click", "label_buy"):
            table = replaced(
                table,
                name,
                is_valid(table),
                lambda labels: pc.subtract(np.int8(1), labels),
            )
        return table

    dataset = prepared(Edited(source, flip), tmp_path / "flipped")
    after = scorer(dataset)
    assert (
        dataset.load("valid").labels != world.dataset.load("valid").labels
    ).sum() > 200
    assert before.keys() == after.keys()
    assert not changed(before, after)


def test_siblings_move_no_score_of_a_request(world: World, tmp_path: Path) -> None:
    source, _, scorer, before = world

    def keep_one(table: pa.Table) -> pa.Table:
        row = np.arange(table.num_rows)
        visit, place = row // 5, row % 5
        return table.filter(
            pa.array(~is_valid(table) | (place == visit % 4) | (place == 4))
        )

    after = scorer(prepared(Edited(source, keep_one), tmp_path / "alone"))
    assert 4 * len(after) == len(before) >= 200
    for key in after:
        # Other samples share the batch, in another order, so float32 sums have another
        # order. Measured 9e-8 at most over AVX2, AVX-512 and SSE4.2; ten times as much
        # is allowed.
        np.testing.assert_allclose(before[key], after[key], rtol=0, atol=1e-6)


def test_a_purchase_moves_later_requests_but_none_of_its_own_moment(
    world: World, tmp_path: Path
) -> None:
    source, _, scorer, before = world
    table = pa.Table.from_batches(list(source.rows()))
    user, time = table["user_id"].to_numpy(), table["time_ms"].to_numpy()
    twice = [
        row
        for row in np.flatnonzero(is_valid(table) & table["event"].to_numpy())
        if np.sum((user == user[row]) & (time == time[row]))
        == 10  # two visits at one moment
        and np.sum((user == user[row]) & (time > time[row]) & is_valid(table))
    ]
    bought = np.arange(table.num_rows) == twice[0]

    def react(rows: pa.Table) -> pa.Table:
        return replaced(
            rows, "reaction", bought, lambda reaction: pc.subtract(1, reaction)
        )

    moved = changed(
        before, scorer(prepared(Edited(source, react), tmp_path / "reacted"))
    )
    assert {key[0] for key in moved} == {user[twice[0]]}
    assert min(key[2] for key in moved) > time[twice[0]]
