"""`optim.epochs`: its steps are the batches that the pipeline gives, and stay so."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from tests.data.memory_source import SCHEMA, MemorySource
from tokenrec.checkpoint.run_folder import create_or_check_run, load_run_config
from tokenrec.config import Config, DataConfig, OptimConfig, TokensConfig, from_json
from tokenrec.config import to_json as config_text
from tokenrec.config.load import load_config
from tokenrec.config.validate import validate
from tokenrec.data.dataset import open_dataset
from tokenrec.data.pipeline import train_batches
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.windows import Windows
from tokenrec.errors import InputError
from tokenrec.optim import schedule
from tokenrec.planner.describe import to_text
from tokenrec.planner.inputs import planned_inputs
from tokenrec.planner.planned_schema import resolve_steps
from tokenrec.run_length import with_steps
from tokenrec.run_setup import set_up
from tokenrec.sharding import make_mesh
from tokenrec.study.plan import Study, TrainingRun, run_config


def make(directory: Path, rows: int = 400) -> Path:
    columns = {
        "user_id": [i % 23 for i in range(rows)],
        "item_id": [i % 7 for i in range(rows)],
        "time_ms": list(range(rows)),
        "split": [2 * i // rows for i in range(rows)],
    }
    columns |= {
        f"label_{task.name}": [i % 2 for i in range(rows)] for task in SCHEMA.tasks
    }
    prepare(MemorySource(columns, schema=SCHEMA), directory)
    return directory


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("epochs") / "set")


def small(data: Path, epochs: float, **fields: object) -> Config:
    config = Config(
        data=DataConfig(path=str(data), events=8, batch_size=8, eval_batch_size=8),
        tokens=TokensConfig(embedding_dim=4),
        optim=OptimConfig(steps=0, epochs=epochs, warmup_steps=1),
    )
    config.model.windows = ()
    for name, value in fields.items():
        section, field = name.split("__")
        setattr(getattr(config, section), field, value)
    return config


PIPELINES = {
    "requests": {},
    "streams": {"data__paradigm": "uc", "data__overlap": 2},
    "windows and buckets": {"data__window_rows": 60, "data__buckets": (4,)},
    "micro-batches": {"optim__accumulate": 4},
    "candidates": {"data__candidates": 3},
}


@pytest.mark.parametrize("fields", PIPELINES.values(), ids=PIPELINES.keys())
def test_the_steps_of_an_epoch_are_the_batches_before_a_sample_comes_again(
    fields: dict[str, object], data: Path
) -> None:
    """Brute force: read batches until one holds a row that was read before."""
    config = small(data, 1.0, **fields)
    dataset = open_dataset(data)
    steps = with_steps(config, dataset).optim.steps
    windows = Windows(dataset, config.data, "train", train=True).plans
    # Every batch is whole, and what is dropped is less than a batch a window.
    samples = sum(plan.samples for plan in windows)
    size = config.data.batch_size
    assert steps * size <= samples < (steps + len(windows)) * size
    batches = train_batches(dataset, config.data, steps=steps + 1, seed=0)
    read: set[tuple[int, ...]] = set()
    counts = []
    try:
        for host in itertools.islice(batches, steps + 1):
            marks = {tuple(row) for row in host.rows.reshape(size, -1).tolist()}
            counts.append(len(marks - read))
            read |= marks
    finally:
        batches.close()
    assert counts[:steps] == [size] * steps
    assert counts[steps] < size


def test_fractions_are_rounded_and_there_is_a_step_at_least(data: Path) -> None:
    dataset = open_dataset(data)
    (whole, half, tiny, many) = (
        with_steps(small(data, epochs), dataset).optim.steps
        for epochs in (1.0, 0.5, 1e-6, 2.5)
    )
    assert whole > 20
    assert half == round(whole / 2)
    assert tiny == 1
    assert many == round(2.5 * whole)


def test_a_run_keeps_its_steps_and_every_schedule_follows_them(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(data, 2.0, optim__table_rates=(1.0, 0.0))
    began = set_up(config, tmp_path)
    steps = began.last_step
    assert steps == began.config.optim.steps == 2 * began.model.epoch_steps > 40
    assert began.model.config.optim.steps == steps
    assert f"optim.epochs=2 is {steps:,} steps" in capsys.readouterr().err
    rate = schedule(began.config.optim, 1.0)
    assert float(rate(steps)) == 0 < float(rate(steps - 1))
    create_or_check_run(began.config, began.dataset, tmp_path)
    recorded = load_run_config(tmp_path, None).optim
    assert (recorded.steps, recorded.epochs) == (steps, 2.0)
    # The command that began the run, and its own config.json, go on with it.
    for again in (config, from_json((tmp_path / "config.json").read_text())):
        assert set_up(again, tmp_path).config == began.config
    # Other data: the steps stay, and the rows are refused.
    moved = small(make(tmp_path / "longer", 800), 2.0, optim__table_rates=(1.0, 0.0))
    resumed = set_up(moved, tmp_path)
    assert resumed.last_step == steps
    with pytest.raises(InputError, match="other log rows"):
        create_or_check_run(resumed.config, resumed.dataset, tmp_path)
    # Another length is another run.
    for length in ({"epochs": 3.0}, {"steps": 50, "epochs": 0.0}):
        other = dataclasses.replace(config.optim, **length)
        setup = set_up(dataclasses.replace(config, optim=other), tmp_path)
        with pytest.raises(InputError, match=r"(?s)another config.*optim.epochs: 2.0"):
            create_or_check_run(setup.config, setup.dataset, tmp_path)
    steps_too = dataclasses.replace(config.optim, steps=steps + 1)
    setup = set_up(dataclasses.replace(config, optim=steps_too), tmp_path)
    with pytest.raises(InputError, match=rf"optim.steps: {steps} -> {steps + 1}"):
        create_or_check_run(setup.config, setup.dataset, tmp_path)


def test_steps_and_epochs_that_contradict_each_other_are_refused(
    data: Path, tmp_path: Path
) -> None:
    dataset = open_dataset(data)
    steps = with_steps(small(data, 1.0), dataset).optim.steps
    same = small(data, 1.0, optim__steps=steps)
    assert set_up(same, tmp_path).last_step == steps
    with pytest.raises(InputError, match=rf"is {steps} steps of this data set.*=7 "):
        set_up(small(data, 1.0, optim__steps=7), tmp_path)
    with pytest.raises(InputError, match=r"optim.steps=0 and optim.epochs=0 give"):
        validate(small(data, 0.0))
    for field in ("optim.warmup_steps", "train.stop_at"):
        fields = {field.replace(".", "__"): steps + 1}
        validate(small(data, 1.0, **fields))
        with pytest.raises(
            InputError, match=rf"{field}=.* optim.steps={steps}, the steps of optim.ep"
        ):
            with_steps(small(data, 1.0, **fields), dataset)
    with pytest.raises(InputError, match=r"optim.epochs=1 is no number of steps yet"):
        schedule(small(data, 1.0).optim, 1.0)


def test_an_override_of_one_length_switches_the_other_off(tmp_path: Path) -> None:
    by_epochs = load_config("synthetic", ["optim.epochs=1.5"])
    assert (by_epochs.optim.steps, by_epochs.optim.epochs) == (0, 1.5)
    file = tmp_path / "config.json"
    file.write_text(config_text(by_epochs))
    by_steps = load_config(str(file), ["optim.steps=40"])
    assert (by_steps.optim.steps, by_steps.optim.epochs) == (40, 0)
    with pytest.raises(InputError, match=r"=40 and optim.epochs=2.0 both say how long"):
        load_config("synthetic", ["optim.steps=40", "optim.epochs=2"])


def test_a_model_of_a_study_may_have_epochs_where_the_others_have_steps() -> None:
    study = Study(
        base="synthetic",
        models={"a": {}, "b": {"optim.epochs": 2.0}},
        reference="a",
        learning_rates=(1e-3,),
        overrides={"optim.steps": 40, "optim.warmup_steps": 4},
        cpu_hours=1,
    )
    lengths = {
        name: run_config(study, TrainingRun(name, 1e-3, 0), None).optim
        for name in study.models
    }
    assert (lengths["a"].steps, lengths["a"].epochs) == (40, 0)
    assert (lengths["b"].steps, lengths["b"].epochs) == (0, 2)
    epochs = dataclasses.replace(study, models={"a": {}}, overrides={"optim.epochs": 3})
    optim = run_config(epochs, TrainingRun("a", 1e-3, 1), None).optim
    assert (optim.steps, optim.epochs) == (0, 3)


def test_planned_steps_are_those_of_the_prepared_data_set_or_unknown(
    data: Path,
) -> None:
    config = small(data, 2.0)
    counted = resolve_steps(config)
    assert counted == with_steps(config, open_dataset(data))
    planned = load_config("kuairand_27k", ["optim.epochs=2", "data.name=none"])
    assert resolve_steps(planned) is planned
    # A step is compiled without them.
    inputs = planned_inputs(config, SCHEMA, make_mesh(config.mesh), batch_size=8)
    assert inputs.model.schema == SCHEMA


@pytest.mark.parametrize(
    ("training", "line"),
    [
        ({"steps": 1_200, "epochs": None}, "training    1,200 steps"),
        ({"steps": 52, "epochs": 2.0}, "training    52 steps, which are 2 epochs"),
        ({"steps": None, "epochs": 0.5}, "0.5 epochs; a prepared data set gives"),
    ],
)
def test_describe_says_how_long_training_is(
    training: dict[str, float | None], line: str
) -> None:
    description = {
        "paradigm": "nio",
        "objective": "ranking",
        "tasks": [],
        "parameters": {
            "dense": 1,
            "tables": 1,
            "by_part": {},
            "by_table": {},
            "spread": [],
        },
        "tokens": 1,
        "layout": [],
        "history": {"events": 1, "tokens": 1, "how": "x"},
        "layers": [],
        "flops_per_example": 1,
        "training": training,
    }
    assert line in to_text(json.loads(json.dumps(description)))
