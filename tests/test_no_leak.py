"""From files to scores, nothing of the present or the future reaches an impression: not its own outcomes, not those of
impressions shown at the same moment, not what comes later, and not how samples are cut and padded.

Every weight is random and large enough for every input to move a score, which is tested too; so a leak would show.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from tests.data.test_kuairand import DAY_MS, HISTORY, START_MS, Log, write
from tests.scorer import Key, Scored, Scorer, changed
from tokenrec.config import DataConfig
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.kuairand import RATE_TASKS, KuaiRandSource
from tokenrec.data.pipeline import eval_batches
from tokenrec.data.prepare import prepare
from tokenrec.data.source import SPLITS, Source
from tokenrec.data.synthetic import SyntheticSource

VALID_FROM, TEST_FROM = START_MS + 2 * DAY_MS, START_MS + 4 * DAY_MS  # "2022-05-03" and "2022-05-05" in China
# Columns of `Log.label`; the last is also written as comment_stay_time and is_profile_enter.
OUTCOMES = {"is_click": 0, "is_like": 1, "is_follow": 2, "is_comment": 3, "is_forward": 4, "long_view": 6}
NO_FEATURES = {"is_hate": 5, "profile_stay_time": 7}
UC = DataConfig(path="-", paradigm="uc", events=16, overlap=8, eval_batch_size=64)
NIO = DataConfig(path="-", paradigm="nio", events=50, eval_batch_size=64)
REQUESTS = DataConfig(path="-", paradigm="nio", events=12, candidates=4, eval_batch_size=32)

Rescored = Callable[[Log], Iterator[tuple[Scored, Scored]]]


@dataclasses.dataclass
class World:
    """A log, its prepared data set, and its scores under both paradigms."""

    log: Log
    dataset: Dataset
    scorers: dict[str, Scorer]
    scores: dict[str, Scored]


def prepared(source: Source, folder: Path) -> Dataset:
    prepare(source, folder)
    return open_dataset(folder)


def from_files(log: Log, folder: Path) -> Dataset:
    source = KuaiRandSource(write(folder / "raw", log, HISTORY), "2022-05-03", "2022-05-05", rates=True)
    return prepared(source, folder / "prepared")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    log = Log()
    dataset = from_files(log, tmp_path_factory.mktemp("world"))
    scorers = {"uc": Scorer(UC, dataset), "nio": Scorer(NIO, dataset)}
    return World(log, dataset, scorers, {name: scorer(dataset) for name, scorer in scorers.items()})


@pytest.fixture
def rescored(world: World, tmp_path: Path) -> Rescored:
    """Scores before and after a change of the log, under each paradigm."""

    def run(log: Log) -> Iterator[tuple[Scored, Scored]]:
        dataset = from_files(log, tmp_path)
        for name, scorer in world.scorers.items():
            yield world.scores[name], scorer(dataset)

    return run


def key_of(log: Log, row: int | np.integer) -> Key:
    return int(log.user[row]), int(log.video[row]), int(log.time[row])


def lone_row(log: Log) -> int:
    """A row of the valid days, alone at its moment, after which its user has ten more valid rows or so."""
    for row in np.argsort(log.time):
        alone = np.sum((log.user == log.user[row]) & (log.time == log.time[row])) == 1
        later = np.sum((log.user == log.user[row]) & (log.time > log.time[row]) & (log.time < TEST_FROM))
        if log.time[row] >= VALID_FROM and alone and later >= 8:
            return int(row)
    raise AssertionError("the log has no such row")


def siblings(log: Log) -> tuple[int, int]:
    """Two valid rows of one user and moment, the lower video first, with later valid rows of that user."""
    for row in np.argsort(log.time):
        same = np.flatnonzero((log.user == log.user[row]) & (log.time == log.time[row]))
        later = np.sum((log.user == log.user[row]) & (log.time > log.time[row]) & (log.time < TEST_FROM))
        if log.time[row] >= VALID_FROM and len(same) == 2 == len(set(log.video[same])) and later >= 4:
            first, second = same[np.argsort(log.video[same])]
            return int(first), int(second)
    raise AssertionError("the log has no such rows")


@pytest.mark.parametrize("paradigm", ["uc", "nio"])
def test_every_input_moves_a_score(world: World, paradigm: str) -> None:
    scorer = world.scorers[paradigm]
    batch = next(eval_batches(world.dataset, scorer.config.data, "valid"))[0].batch
    before = scorer.on(batch)
    assert (np.abs(before[batch.weight > 0] - 0.5) < 0.499).mean() > 0.9  # few scores are saturated
    for part in ("user", "state", "action", *(["target"] if paradigm == "nio" else [])):
        signals = getattr(batch, part)
        for kind, values in signals._asdict().items():
            for column in range(values.shape[-1]):
                other = values.copy()
                old = other[..., column]
                other[..., column] = (old == 0) if kind == "ids" else np.where(np.isnan(old), 0.0, np.nan)
                after = scorer.on(batch._replace(**{part: signals._replace(**{kind: other})}))
                assert (before != after)[batch.weight > 0].any(), f"{part}.{kind}[{column}] moves nothing"


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_what_happens_later_moves_no_score(world: World, rescored: Rescored, share: float) -> None:
    log = copy.deepcopy(world.log)
    moment = np.quantile(log.time[(log.time >= VALID_FROM) & (log.time < TEST_FROM)], share, method="nearest")
    later = np.flatnonzero(log.time > moment)
    random = np.random.default_rng(3)
    for column in (log.label, log.played, log.tab, log.video):
        column[later] = column[random.permutation(later)]
    until = {key for key in world.scores["nio"] if key[2] <= moment}
    assert len(until) > 20
    for before, after in rescored(log):
        assert until <= after.keys()
        assert not changed(before, after) & until
        assert changed(before, after)  # the same video may be shown later by chance, with another past


@pytest.mark.parametrize("outcome", [*OUTCOMES, "play_time_ms"])
def test_an_outcome_moves_later_scores_but_not_its_own(world: World, rescored: Rescored, outcome: str) -> None:
    log = copy.deepcopy(world.log)
    row = lone_row(log)
    if outcome == "play_time_ms":
        log.played[row] = 85_000 if log.played[row] < 40_000 else 500
    else:
        log.label[row, OUTCOMES[outcome]] ^= 1
    own, (user, _, time) = key_of(log, row), key_of(log, row)
    for before, after in rescored(log):
        moved = changed(before, after)
        assert own in after
        assert min(key[2] for key in moved) > time  # not empty: min would raise
        users = {key[0] for key in moved}
        # Past rates of a video tell other users of a click; the outcomes without rates stay with the user's history.
        assert users > {user} if outcome in RATE_TASKS else users == {user}


def test_outcomes_that_are_no_features_move_nothing_at_all(world: World, rescored: Rescored) -> None:
    log = copy.deepcopy(world.log)
    log.label[:, list(NO_FEATURES.values())] ^= 1
    for before, after in rescored(log):
        assert before.keys() == after.keys()
        assert not changed(before, after)


@pytest.mark.parametrize("which", [0, 1])
def test_outcomes_of_a_row_shown_at_the_same_moment_move_only_what_comes_later(
    world: World, rescored: Rescored, which: int
) -> None:
    log = copy.deepcopy(world.log)
    rows = siblings(log)
    log.label[rows[which]] ^= 1
    log.played[rows[which]] = 1
    for before, after in rescored(log):
        moved = changed(before, after)
        assert {key_of(log, row) for row in rows} <= after.keys()
        assert min(key[2] for key in moved) > log.time[rows[0]]


def test_both_paradigms_score_exactly_the_impressions_of_the_log(world: World) -> None:
    log = world.log
    for split, begin, end in (("train", START_MS, VALID_FROM), ("valid", VALID_FROM, TEST_FROM)):
        want = {key_of(log, row) for row in np.flatnonzero((log.time >= begin) & (log.time < end))}
        for scorer in world.scorers.values():
            assert scorer(world.dataset, split=split).keys() == want


def test_padding_moves_no_score(world: World) -> None:
    scorer, log = world.scorers["nio"], world.log
    before = scorer(world.dataset, split="train")
    after = scorer(world.dataset, dataclasses.replace(NIO, events=10), split="train")
    bucketed = scorer(world.dataset, dataclasses.replace(NIO, buckets=(10,)), split="train")
    of_log = {key_of(log, row) for row in range(len(log.time))}
    older = {row["user_id"]: len(row["watch_seq"]) for row in HISTORY}
    earlier = {
        key: older.get(key[0], 0) + sum(other[0] == key[0] and other[2] < key[2] for other in of_log) for key in before
    }
    fits = {key for key in before if earlier[key] <= 10}
    assert 50 < len(fits) < len(before)
    moved = {key for key in before if np.abs(before[key] - after[key]).max() > 1e-6}
    print("PAD", max(np.abs(before[k] - after[k]).max() for k in fits), len(fits), len(before), len(moved))
    print("BUCK", max(np.abs(before[k] - bucketed[k]).max() for k in before))
    assert moved
    assert not moved & fits
    for key in before:
        np.testing.assert_allclose(before[key], bucketed[key], rtol=0, atol=1e-6)


def test_buckets_move_no_score_of_a_user_stream(world: World) -> None:
    before = world.scores["uc"]
    after = world.scorers["uc"](world.dataset, dataclasses.replace(UC, buckets=(12,)))
    assert before.keys() == after.keys()
    print("BUCK UC", max(np.abs(before[k] - after[k]).max() for k in before))
    for key in before:
        np.testing.assert_allclose(before[key], after[key], rtol=0, atol=1e-6)


class Edited:
    """A source whose rows are changed."""

    def __init__(self, source: Source, edit: Callable[[pa.Table], pa.Table]) -> None:
        self._source, self._edit = source, edit
        self.schema, self.provenance = source.schema, source.provenance
        self.users, self.items = source.users, source.items

    def rows(self) -> Iterator[pa.RecordBatch]:
        return iter(self._edit(pa.Table.from_batches(list(self._source.rows()))).combine_chunks().to_batches())


def replaced(table: pa.Table, name: str, rows: np.ndarray, make: Callable[[pa.Array], pa.Array]) -> pa.Table:
    column = pc.if_else(pa.array(rows), make(table[name]), table[name])
    return table.set_column(table.column_names.index(name), name, column)


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> tuple[Source, Scorer, Scored]:
    """Visits of four scored candidates and then one event, the purchase; and their scores."""
    source = SyntheticSource(2_500, users=10, items=30, requests=4)
    dataset = prepared(source, tmp_path_factory.mktemp("requests") / "prepared")
    scorer = Scorer(REQUESTS, dataset)
    return source, scorer, scorer(dataset)


def is_valid(table: pa.Table) -> np.ndarray:
    return table["split"].to_numpy() == SPLITS.index("valid")


def test_labels_move_no_score_of_a_request(requests: tuple[Source, Scorer, Scored], tmp_path: Path) -> None:
    source, scorer, before = requests

    def flip(table: pa.Table) -> pa.Table:
        for name in ("label_click", "label_buy"):
            table = replaced(table, name, is_valid(table), lambda labels: pc.subtract(np.int8(1), labels))
        return table

    dataset = prepared(Edited(source, flip), tmp_path / "flipped")
    after = scorer(dataset)
    assert before.keys() == after.keys()
    assert not changed(before, after)


def test_siblings_move_no_score_of_a_request(requests: tuple[Source, Scorer, Scored], tmp_path: Path) -> None:
    source, scorer, before = requests

    def keep_one(table: pa.Table) -> pa.Table:
        row = np.arange(table.num_rows)
        visit, place = row // 5, row % 5
        return table.filter(pa.array(~is_valid(table) | (place == visit % 4) | (place == 4)))

    after = scorer(prepared(Edited(source, keep_one), tmp_path / "alone"))
    assert 4 * len(after) == len(before) >= 200
    print("SIB", max(np.abs(before[k] - after[k]).max() for k in after))
    for key in after:
        np.testing.assert_allclose(before[key], after[key], rtol=0, atol=1e-6)


def test_a_purchase_moves_later_requests_but_none_of_its_own_moment(
    requests: tuple[Source, Scorer, Scored], tmp_path: Path
) -> None:
    source, scorer, before = requests
    table = pa.Table.from_batches(list(source.rows()))
    user, time = table["user_id"].to_numpy(), table["time_ms"].to_numpy()
    twice = [
        row
        for row in np.flatnonzero(is_valid(table) & table["event"].to_numpy())
        if np.sum((user == user[row]) & (time == time[row])) == 10  # two visits at one moment
        and np.sum((user == user[row]) & (time > time[row]) & is_valid(table))
    ]
    bought = np.arange(table.num_rows) == twice[0]

    def react(rows: pa.Table) -> pa.Table:
        return replaced(rows, "reaction", bought, lambda reaction: pc.subtract(1, reaction))

    moved = changed(before, scorer(prepared(Edited(source, react), tmp_path / "reacted")))
    assert {key[0] for key in moved} == {user[twice[0]]}
    assert min(key[2] for key in moved) > time[twice[0]]
