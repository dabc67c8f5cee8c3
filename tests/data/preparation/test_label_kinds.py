"""Labels that are numbers or classes, and weights of rows, from a source to batches."""

import contextlib
import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from tests.data.memory_source import SCHEMA as PLAIN
from tests.data.memory_source import MemorySource
from tokenrec.config import DataConfig
from tokenrec.data.batch_shapes import batch_shapes, task_names
from tokenrec.data.dataset import open_dataset
from tokenrec.data.past.declaration import KeyStatistics, PastStatistics
from tokenrec.data.past.source import WithStatistics
from tokenrec.data.pipeline import eval_batches, train_batches
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.schema_difference import schema_differences
from tokenrec.errors import InputError

TASKS = (
    Task("click"),
    Task("seconds", kind="real"),
    Task("stars", kind="classes", classes=("bad", "fair", "good")),
    Task("price", kind="real"),
)
SCHEMA = Schema(PLAIN.features[:1], TASKS, weighted=True)
NONE = None
ROWS = {
    "user_id": [1, 1, 1, 2, 2, 1],
    "item_id": [7, 8, 9, 7, 8, 7],
    "time_ms": [1, 2, 3, 4, 4, 99],
    "split": [0, 0, 0, 0, 0, 1],
    "request": [-1, -1, -1, 5, 5, -1],
    "label_click": [1, 0, NONE, 0, 1, 0],
    "label_seconds": [2.5, NONE, 6.5, 0.0, 3.0, 9.0],
    "label_stars": [2, 0, NONE, -1, 1, 2],
    "label_price": [NONE] * 6,
    "row_weight": [2.0, NONE, 0.5, 0.0, 3.0, 4.0],
}


def source(**changes) -> MemorySource:
    rows = {name: pa.array(values) for name, values in (ROWS | changes).items()}
    return MemorySource(rows, schema=SCHEMA)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds") / "set"
    prepare(source(), folder)
    return open_dataset(folder)


def test_labels_and_weights_come_back_and_training_labels_are_described(data):
    rows = data.to_arrow("train").read_all().sort_by("time_ms").to_pydict()
    assert rows["label_click"][:3] == [1, 0, None]
    assert rows["label_seconds"][:3] == [2.5, None, 6.5]
    assert rows["label_stars"][:3] == [2, 0, None]
    assert rows["row_weight"][:3] == [2.0, 1.0, 0.5]
    seconds = data.schema.real_tasks[0]
    known = np.array([2.5, 6.5, 0, 3])
    assert seconds.mean == known.mean()
    assert seconds.deviation == pytest.approx(known.std())
    assert (seconds.least, seconds.most) == (0, 6.5)
    # Without a label nothing is known of it.
    assert data.schema.real_tasks[1] == TASKS[3]
    counts = data.metadata.counts
    assert counts["labelled_train_seconds"] == 4
    assert counts["positives_train_click"] == 2
    assert "positives_train_stars" not in counts


def test_a_schema_is_the_same_after_json_and_one_of_binary_tasks_is_as_before(data):
    assert Schema.from_json(data.schema.to_json()) == data.schema
    assert PLAIN.to_json()["tasks"] == (
        {"name": "click", "weight": 1.0},
        {"name": "like", "weight": 1.0},
    )
    assert "weighted" not in PLAIN.to_json()
    assert PLAIN.as_dict()["tasks"] == PLAIN.to_json()["tasks"]


@pytest.mark.parametrize("paradigm", ["nio", "uc"])
def test_batches_hold_the_labels_of_the_tasks_of_the_run(data, paradigm):
    config = DataConfig(
        paradigm=paradigm,
        events=4,
        candidates=2 if paradigm == "nio" else 1,
        batch_size=2,
        tasks={"stars": 1.0, "price": 1.0, "seconds": 1.0},
    )
    shape = batch_shapes(data.schema, config, batch_size=2)[4]
    found = {}
    steps = 2 if paradigm == "nio" else 1
    with contextlib.closing(train_batches(data, config, steps=steps, seed=0)) as hosts:
        for host in hosts:
            batch = host.batch
            assert batch.targets.shape == shape.targets.shape
            assert batch.targets.dtype == shape.targets.dtype
            assert np.isfinite(batch.targets).all()
            for b, n in zip(*np.nonzero(host.rows >= 0), strict=True):
                labels = tuple(batch.labels[b, n].tolist())
                target = tuple(batch.targets[b, n].tolist())
                found[int(host.rows[b, n])] = (labels, target, batch.weight[b, n])
    expected = {
        0: ((2, -1, 0), (0, 2.5), 2.0),
        1: ((0, -1, -1), (0, 0), 1.0),
        2: ((-1, -1, 0), (0, 6.5), 0.5),
        3: ((-1, -1, 0), (0, 0), 0.0),
        4: ((1, -1, 0), (0, 3), 3.0),
    }
    # A stream reads the first of two events of one time alone.
    rows = set(range(5)) - ({4} if paradigm == "uc" else set())
    assert found == {row: expected[row] for row in rows}


def test_evaluation_does_not_weigh_rows_and_knows_their_requests(data):
    config = DataConfig(events=4, eval_batch_size=1)
    ((host, read),) = eval_batches(data, config, "valid")
    assert host.batch.weight.tolist() == [[1.0]]
    assert read.labels.tolist() == [[0, 0, 2, -1]]
    np.testing.assert_array_equal(read.targets, [[9.0, np.nan]])
    assert read.request.tolist() == [-1]


def test_rows_that_repeat_keep_the_greatest_label_and_weight(tmp_path):
    rows = {
        "user_id": [1, 1, 1],
        "label_seconds": pa.array([1.0, None, 4.0]),
        "label_stars": pa.array([0, None, 1], pa.int8()),
        "row_weight": [2.0, 3.0, 1.0],
    }
    metadata = prepare(MemorySource(rows, schema=SCHEMA), tmp_path / "set")
    log = open_dataset(tmp_path / "set").load("train")
    assert log.num_rows == 1
    assert log.labels[0].tolist() == [-1, 0, 1, -1]
    np.testing.assert_array_equal(log.targets[0], [4.0, np.nan])
    assert log.weight.tolist() == [3.0]
    assert metadata.counts["repeats_other_labels"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"label_seconds": [1.0, 2.0, float("inf"), 0.0, 0.0, 0.0]},
            r"'label_seconds' is inf in row 2; a label of the kind real is a finite",
        ),
        ({"label_seconds": ["1"] * 6}, r"'label_seconds' has the type string"),
        (
            {"label_stars": [0, 3, 0, 0, 0, 0]},
            r"'label_stars' is 3 in row 1; a label is the index of a class, 0 to 2",
        ),
        ({"label_stars": [0.5] * 6}, r"'label_stars' has the type double"),
        (
            {"row_weight": [1.0, 1.0, -2.0, 1.0, 1.0, 1.0]},
            r"'row_weight' is -2 in row 2; a weight is 0 or more",
        ),
    ],
)
def test_a_wrong_label_or_weight_is_named(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        prepare(source(**change), tmp_path / "set")


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Task("x", kind="reel"), "task 'x': kind='reel' is not a choice.*real"),
        (Task("x", kind="classes"), "needs the names of 2 to 127 classes"),
        (Task("x", kind="classes", classes=("a", "a")), "class 'a' is declared more"),
        (Task("x", classes=("a", "b")), r"classes=\['a', 'b'\], but its kind is"),
    ],
)
def test_a_task_that_contradicts_itself_is_refused(task, message):
    with pytest.raises(InputError, match=message):
        Schema((), (task,))


def test_other_labels_are_a_difference_between_data_sets(data):
    changed = dataclasses.replace(
        data.schema,
        tasks=(*data.schema.tasks[:3], dataclasses.replace(TASKS[3], mean=4.0)),
        weighted=False,
    )
    found = list(schema_differences(data.schema, changed, compare_items=True))
    assert found[0].startswith("kinds, classes or normalisation of the tasks: ")
    assert found[1] == "weights of the rows: True -> False"


def test_statistics_of_the_past_count_binary_labels_alone(tmp_path):
    counted = WithStatistics(
        source(), PastStatistics(keys=(KeyStatistics(("item_id",)),))
    )
    assert counted.schema.weighted
    names = {f.name for f in counted.schema.features}
    assert "rate_item_id_click" in names
    assert not any("seconds" in name or "stars" in name for name in names)
    prepare(counted, tmp_path / "set")
    wrong = PastStatistics(keys=(KeyStatistics(("item_id",), tasks=("seconds",)),))
    with pytest.raises(InputError, match="'seconds' has the kind 'real'"):
        WithStatistics(source(), wrong)


def test_later_rows_keep_the_normalisation_of_the_labels(data, tmp_path):
    later = {
        "user_id": [1, 2],
        "time_ms": [200, 201],
        "split": [0, 0],
        "label_seconds": [60.0, None],
        "label_stars": pa.array([1, None], pa.int8()),
        "row_weight": [5.0, None],
    }
    prepare(MemorySource(later, schema=SCHEMA), tmp_path / "set", like=data.directory)
    found = open_dataset(tmp_path / "set")
    assert found.schema.tasks == data.schema.tasks
    assert found.schema.weighted
    rows = found.to_arrow("test").read_all().sort_by("time_ms").to_pydict()
    assert rows["label_seconds"] == [60.0, None]
    assert rows["label_stars"] == [1, None]
    # A history holds the earlier rows with their labels.
    log = found.load("test")
    assert log.targets[log.time == 3, 0].tolist() == [6.5]
    other = dataclasses.replace(SCHEMA, tasks=SCHEMA.tasks[:3])
    with pytest.raises(InputError, match="tasks: "):
        prepare(MemorySource(ROWS, schema=other), tmp_path / "x", like=data.directory)


def test_only_positive_labels_can_be_retrieved():
    config = DataConfig(objective="retrieval", positive="seconds")
    with pytest.raises(InputError, match=r"data\.positive='seconds' is no binary task"):
        task_names(SCHEMA, config)


def test_a_feature_that_tells_a_number_is_named_as_a_leak(tmp_path, capsys):
    schema = Schema(
        (Feature("length", "dense", "context"), Feature("tab", "dense", "context")),
        (TASKS[1],),
    )
    random = np.random.default_rng(0)
    seconds = random.random(200)
    rows = {
        "user_id": np.arange(200),
        "label_seconds": seconds,
        "length": 2 * seconds,
        "tab": random.random(200),
    }
    prepare(MemorySource(rows, schema=schema), tmp_path / "set")
    err = capsys.readouterr().err
    assert "feature 'length' predicts task 'seconds' by itself" in err
    assert "'tab' predicts" not in err
