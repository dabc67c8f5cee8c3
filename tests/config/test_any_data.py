"""The configs for any data set take tasks and sizes from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.data.memory_source import SCHEMA, MemorySource
from tokenrec.config.data_sizes import DataSizes, history_events, model_size
from tokenrec.config.load import load_config
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.errors import InputError

# Devices are not the matter here.
pytestmark = pytest.mark.usefixtures("lone_device")

BARE = Schema((Feature("item_id", "categorical", "item"),), ())


def make(directory: Path, schema: Schema, rows: int = 200, splits: int = 3) -> str:
    """Prepare a small data set with the tasks of a schema."""
    columns = {
        "user_id": [i % 9 for i in range(rows)],
        "item_id": [i % 7 for i in range(rows)],
        "time_ms": list(range(rows)),
        "split": [i * splits // rows for i in range(rows)],
    }
    columns |= {
        f"label_{task.name}": [i % 2 for i in range(rows)] for task in schema.tasks
    }
    prepare(MemorySource(columns, schema=schema), directory)
    return str(directory)


@pytest.mark.parametrize(
    ("config", "schema"),
    [
        pytest.param(
            "ranker",
            dataclasses.replace(BARE, tasks=(Task("click"),)),
            id="one task, no features",
        ),
        # tests/cli/test_init.py trains on two tasks, and on a log without one.
        pytest.param("ranker", SCHEMA, id="two tasks", marks=pytest.mark.slow),
        pytest.param("retriever", BARE, id="no task", marks=pytest.mark.slow),
        pytest.param("retriever", SCHEMA, id="goals of a task", marks=pytest.mark.slow),
    ],
)
def test_a_step_runs_on_any_data_set(
    tmp_path: Path, config: str, schema: Schema
) -> None:
    from tokenrec.train_loop import train

    data = make(tmp_path / "set", schema)
    # Two steps of a small model, with one shape of its batches.
    fast = [
        *("optim.steps=2", "optim.warmup_steps=1", "train.eval_every=2"),
        *("model.layers=1", "model.windows=()", "model.width=8", "data.buckets=()"),
        "tokens.maker=linear",
    ]
    loaded = load_config(config, fast, data)
    assert loaded.data.path == data
    assert loaded.data.exclude == ()
    summary = train(loaded, tmp_path / "run", progress=False)
    assert summary["step"] == 2
    assert summary["best_step"] == 2


def test_goals_are_what_the_first_task_says(tmp_path: Path) -> None:
    labelled, bare = make(tmp_path / "a", SCHEMA), make(tmp_path / "b", BARE)
    for config, data, positive in (
        ("ranker", labelled, ""),
        ("retriever", labelled, "click"),
        ("retriever", bare, ""),
    ):
        assert load_config(config, (), data).data.positive == positive


def test_a_data_set_of_a_config_file_may_be_named_in_three_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(tmp_path / "set", SCHEMA)
    monkeypatch.setenv("TOKENREC_DATA", str(tmp_path))
    by_flag = load_config("ranker", (), data)
    by_path = load_config("ranker", [f"data.path={data}"])
    by_name = load_config("ranker", ["data.name=set"])
    assert by_flag == by_path
    assert by_name.optim == by_flag.optim
    # The sizes without a data set are those of a longer log.
    assert load_config("ranker").train.eval_every > by_flag.train.eval_every
    assert load_config("ranker").optim.epochs == 1.0 < by_flag.optim.epochs


def test_data_without_labels_is_not_ranked(tmp_path: Path) -> None:
    data = make(tmp_path / "set", BARE)
    with pytest.raises(InputError, match="no task; use --config=retriever"):
        load_config("ranker", (), data)


def test_data_without_a_valid_split_is_trained_without_evaluation(
    tmp_path: Path,
) -> None:
    data = make(tmp_path / "set", SCHEMA, splits=1)
    assert load_config("ranker", (), data).train.eval_split == ""
    assert load_config("retriever", (), data).train.eval_split == ""


def test_a_folder_without_data_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a prepared data set"):
        load_config("ranker", (), str(tmp_path))


def test_a_config_file_gets_the_metadata(tmp_path: Path) -> None:
    data = make(tmp_path / "set", SCHEMA)
    file = tmp_path / "mine.py"
    file.write_text(
        "from tokenrec.config import Config\n\n\n"
        "def get_config(data):\n"
        "    config = Config()\n"
        "    config.optim.steps = data.counts['rows_train'] if data else 7\n"
        "    return config\n"
    )
    rows = Metadata.load(Path(data)).counts["rows_train"]
    assert load_config(str(file), ["optim.warmup_steps=0"], data).optim.steps == rows
    assert load_config(str(file), ["optim.warmup_steps=0"]).optim.steps == 7


@pytest.mark.parametrize("labelled", [0, 1_000, 10**5, 10**7, 10**9])
def test_models_grow_with_the_log_and_heads_divide_them(labelled: int) -> None:
    size, larger = model_size(labelled), model_size(10 * labelled + 1)
    assert size.width <= larger.width
    assert size.layers <= larger.layers
    assert size.width % size.heads == 0
    assert size.width // size.heads >= 16


@pytest.mark.parametrize(("mean", "expected"), [(1, 16), (12, 32), (500, 64)])
def test_histories_are_twice_the_mean_within_bounds(mean: int, expected: int) -> None:
    sizes = DataSizes(0, 1000 * mean, 1000, 100, True)
    assert history_events(sizes) == expected
