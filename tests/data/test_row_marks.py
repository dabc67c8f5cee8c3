"""Samples that are counted from the marks of rows are those that the rows are cut into.

The logs have ties in time, requests, unknown labels, rows that are no events, users
with several chunks, and more tasks than fit into a byte.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.fuzz_targets import without_digests
from tests.data.memory_source import MemorySource
from tokenrec.config import DataConfig
from tokenrec.data import records, windows
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED, InteractionLog
from tokenrec.data.pipeline import eval_batches, steps_per_epoch, train_batches
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.row_marks import NEW_REQUEST, NEW_TIME, log_of_marks, mark_rows
from tokenrec.data.samples import cut_samples
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.windows import WindowPlan, Windows
from tokenrec.errors import InputError

TASKS = tuple(f"task{i}" for i in range(10))
SCHEMA = Schema(
    (Feature("item_id", "categorical", "item"),), tuple(Task(name) for name in TASKS)
)
SPLITS = ("train", "valid", "test")


def prepared(seed: int, out: Path, *, all_events: bool) -> Dataset:
    """Prepare a random log of 300 rows of 6 users; `all_events` as UC needs it."""
    random = np.random.default_rng(seed)
    rows = 300
    # Two rows of a user, an item and a time would be a repeat.
    keys = random.permutation(6 * 40 * 5)[:rows]
    user, time, item = keys // 200, keys // 5 % 40, keys % 5
    labels = random.choice([-1, -1, 0, 1], (rows, len(TASKS)))
    scored = random.random(rows) < 0.6
    request = np.where(
        random.random(rows) < 0.3, -1, 2 * time + random.integers(0, 2, rows)
    )
    prepare(
        MemorySource(
            {
                "user_id": user,
                "item_id": item,
                "time_ms": time,
                "event": (random.random(rows) < 0.7) | all_events,
                "scored": scored,
                # Splits that interleave in time too.
                "split": pa.array(
                    random.choice([0, 0, 0, 1, 2], rows)
                    if seed % 2
                    else (time > 20).astype(int) + (time > 30),
                    pa.int8(),
                ),
                "request": request,
            }
            | {
                f"label_{name}": pa.array(labels[:, i], pa.int8())
                for i, name in enumerate(TASKS)
            },
            schema=SCHEMA,
        ),
        out,
        chunk_events=int(random.integers(3, 30)),
        overlap=12,
    )
    return open_dataset(out)


def configs(seed: int, paradigm: str) -> list[DataConfig]:
    """Random settings of everything that decides how a split is cut."""
    random = np.random.default_rng(seed)

    def config(**values: object) -> DataConfig:
        events = int(random.integers(1, 12))
        return DataConfig(
            paradigm=paradigm,
            events=events,
            overlap=int(random.integers(0, events)),
            candidates=int(random.integers(1, 5)),
            window_rows=int(random.choice([1, 20, 90, 10_000])),
            **values,  # type: ignore[arg-type]
        )

    some = random.choice(TASKS, random.integers(1, 4), replace=False)
    return [
        config(),
        config(tasks={str(name): 1.0 for name in some}),
        config(tasks={"task9": 1.0}),
        # Every request of two goals and more is split.
        dataclasses.replace(config(objective="retrieval"), candidates=1),
        config(objective="retrieval", positive=str(random.choice(TASKS))),
    ]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("paradigm", ["nio", "uc"])
def test_plans_are_those_of_the_rows_for_every_config(
    paradigm: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several blocks in a window.
    monkeypatch.setattr(windows, "_BLOCK_ROWS", 25)
    data = prepared(seed, tmp_path / "set", all_events=paradigm == "uc")
    planned: list[tuple[list[WindowPlan], list[WindowPlan]]] = []
    for config, split, train in itertools.product(
        configs(seed, paradigm), SPLITS, (True, False)
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Dataset, "load", None)  # planning reads no log row
            by_marks = Windows(data, config, split, train=train).plans
        with monkeypatch.context() as patch:
            patch.setattr(Dataset, "row_marks", lambda self, split: None)
            by_rows = Windows(data, config, split, train=train).plans
        assert by_marks == by_rows, (config, split, train)
        planned.append((by_marks, by_rows))
    # The logs are worth the comparison.
    assert sum(plan.samples > plan.requests for plans, _ in planned for plan in plans)
    assert sum(plan.samples > 5 for plans, _ in planned for plan in plans) > 9


@pytest.mark.parametrize("seed", range(4))
def test_a_log_of_marks_is_cut_into_the_same_samples(seed: int, tmp_path: Path) -> None:
    """Not only as many: each has the same rows."""
    data = prepared(seed, tmp_path / "set", all_events=True)
    for split, paradigm in itertools.product(SPLITS, ("nio", "uc")):
        log = data.load(split)
        marks = data.row_marks(split)
        assert marks is not None
        for config, train in itertools.product(configs(seed, paradigm), (True, False)):
            names = list(config.tasks) or list(TASKS)
            if config.objective == "retrieval":
                names = [config.positive] if config.positive else []
            tasks = [TASKS.index(name) for name in names]
            rows = dataclasses.replace(log, labels=log.labels[:, tasks])
            expected = cut_samples(rows, config, train=train)
            found = cut_samples(
                log_of_marks(marks, log.start, tasks), config, train=train
            )
            assert type(found) is type(expected)
            for name, array in vars(expected).items():
                np.testing.assert_array_equal(vars(found)[name], array, err_msg=name)


def test_bits_of_marks_are_those_of_the_layout() -> None:
    """A later version reads them: what a bit means must not change."""
    rows = np.zeros(7, records.row_dtype(SCHEMA))
    rows["flags"] = [
        EVENT,
        EVENT | SCORED,
        SCORED,
        EVENT,
        EVENT | SCORED | LEARNED,
        0,
        0,
    ]
    rows["time"] = [1, 1, 1, 2, 2, 2, 2]
    rows["request"] = [4, 4, 5, -1, -1, 6, 6]
    rows["labels"] = -1
    rows["labels"][0, [0, 9]] = [0, 1]
    # The second chunk begins within a time, and the third within a request.
    marks = mark_rows(rows, np.array([0, 4, 6, 7]))
    first = NEW_TIME | NEW_REQUEST
    assert (marks["bits"] - rows["flags"]).tolist() == [
        *(first, 0, NEW_REQUEST, first),
        *(first, NEW_REQUEST),
        first,
    ]
    assert marks["known"][0].tolist() == [0b10000000, 0b01000000]
    assert marks["positive"][0].tolist() == [0, 0b01000000]
    assert not marks["known"][1:].any()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "set"
    prepared(0, folder, all_events=True)
    return folder


SMALL = DataConfig(events=4, window_rows=40, batch_size=1)


@pytest.mark.parametrize("marked", [True, False])
def test_planning_tells_its_progress_and_can_be_ended(
    sound: Path, tmp_path: Path, marked: bool
) -> None:
    folder = sound if marked else without_digests(sound, tmp_path / "before")
    told: list[str] = []
    train_batches(
        open_dataset(folder), SMALL, steps=1, seed=0, on_progress=told.append
    ).close()
    count = len(told)
    assert count > 2
    assert told == [
        f"planning the split 'train': window {n} of {count}"
        for n in range(1, count + 1)
    ]

    class Ended(Exception):
        pass

    def end(phase: str) -> None:
        if "window 2 of" in phase:
            raise Ended

    with pytest.raises(Ended):
        train_batches(open_dataset(folder), SMALL, steps=1, seed=0, on_progress=end)


def test_progress_is_told_within_a_large_window(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(windows, "_BLOCK_ROWS", 25)
    told: list[str] = []
    Windows(
        open_dataset(sound),
        dataclasses.replace(SMALL, window_rows=10_000),
        "train",
        train=True,
        on_progress=told.append,
    )
    assert len(told) > 3
    assert set(told) == {"planning the split 'train': window 1 of 1"}


def test_a_data_set_from_before_there_were_marks_is_planned_from_its_rows(
    sound: Path, tmp_path: Path
) -> None:
    before = open_dataset(without_digests(sound, tmp_path / "before"))
    assert before.row_marks("train") is None
    now = open_dataset(sound)
    assert steps_per_epoch(before, SMALL) == steps_per_epoch(now, SMALL)
    assert len(list(eval_batches(before, SMALL, "valid"))) == len(
        list(eval_batches(now, SMALL, "valid"))
    )


def test_rows_that_do_not_fit_the_marks_are_refused(
    sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_dataset(sound)
    plan = Windows(data, SMALL, "train", train=True)
    usual = Dataset.load

    def unscored(self: Dataset, *args: int, frozen: bool) -> InteractionLog:
        log = usual(self, *args, frozen=frozen)
        return dataclasses.replace(log, flags=np.zeros_like(log.flags))

    monkeypatch.setattr(Dataset, "load", unscored)
    with pytest.raises(
        InputError, match=r"0 samples, and .* by the marks of their rows"
    ):
        plan.load(0)


@pytest.mark.parametrize("damage", ["missing", "truncated", "of another split"])
def test_a_shard_that_is_not_whole_is_found_before_the_first_batch(
    sound: Path, tmp_path: Path, damage: str
) -> None:
    folder = shutil.copytree(sound, tmp_path / "set")
    (shard,) = folder.glob("*train.array_record*")
    if damage == "missing":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-100])
    else:
        (other,) = folder.glob("*valid.array_record*")
        shutil.copy(other, shard)
    with pytest.raises(InputError, match=shard.name):
        train_batches(open_dataset(folder), SMALL, steps=1, seed=0)


def test_marks_that_were_written_part_by_part_are_those_of_one_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(3, tmp_path / "one", all_events=True)
    monkeypatch.setattr("tokenrec.data.preparation.intake.PARTITION_ROWS", 20)
    prepared(3, tmp_path / "many", all_events=True)
    for split in SPLITS:
        one, many = (
            open_dataset(tmp_path / name).row_marks(split) for name in ("one", "many")
        )
        assert one is not None
        assert many is not None
        # Users come in another order.
        assert sorted(mark.tobytes() for mark in one) == sorted(
            mark.tobytes() for mark in many
        )
