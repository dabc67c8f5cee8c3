"""Planned schemas: when one is read, its contents, and its agreement with `prepare`."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import planned_schemas
from tokenrec.cli.main import main
from tokenrec.config import Config, DataConfig
from tokenrec.config.load import load_config, shipped_folder
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.kuairand import FEATURES
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import InputError
from tokenrec.planner.planned_schema import read_planned, resolve_schema

SHIPPED = shipped_folder() / "schemas" / "kuairand_27k.json"


def config_of(**data) -> Config:
    return Config(data=DataConfig(**data))


def test_the_shipped_schema_is_what_its_command_writes_and_what_kuairand_prepares():
    assert json.loads(SHIPPED.read_text()) == json.loads(
        json.dumps(planned_schemas.kuairand_27k())
    )
    schema = read_planned(SHIPPED)
    assert schema.features == FEATURES
    assert schema.items == 32_038_725
    assert set(schema.tables) == {f.table_name for f in schema.features if f.is_integer}
    assert schema.tables["video_id"] == 32_038_725 + 2
    notes = json.loads(SHIPPED.read_text())["notes"]
    assert set(schema.tables) <= set(notes)
    assert "assumption" in notes["author_id"]


def test_every_shipped_schema_has_its_command_and_no_values_of_the_data():
    folder = SHIPPED.parent
    assert {file.stem for file in folder.glob("*.json")} == set(planned_schemas.NAMES)
    for name in planned_schemas.NAMES:
        value = json.loads((folder / f"{name}.json").read_text())
        assert set(value["schema"]) == {"features", "tasks", "tables"}
        for feature in value["schema"]["features"]:
            assert not {"mean", "deviation"} & set(feature)
        read_planned(folder / f"{name}.json")


def test_a_planned_schema_is_that_of_the_prepared_data_set_with_fewer_words(tmp_path):
    prepare(SyntheticSource(2_000), tmp_path / "synthetic")
    made = tmp_path / "plan.json"
    made.write_text(json.dumps(planned_schemas.from_prepared(tmp_path / "synthetic")))
    planned, prepared = read_planned(made), open_dataset(tmp_path / "synthetic").schema
    assert planned.tables == prepared.tables
    assert planned.items == prepared.items
    assert planned.tasks == prepared.tasks
    # The statistics of dense features are values of the data.
    plain = [
        dataclasses.replace(feature, mean=0.0, deviation=1.0)
        for feature in prepared.features
    ]
    assert list(planned.features) == plain
    # The shipped one differs in its sizes alone: more rows were prepared.
    shipped = read_planned(SHIPPED.with_name("synthetic.json"))
    assert shipped.features == planned.features
    assert shipped.tables.keys() == planned.tables.keys()


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("amazon", "amazon_beauty.json"),
        ("complete_journey", "complete_journey.json"),
        ("complete_journey_retrieval", "complete_journey.json"),
        ("lrm_gemma3_1b", "complete_journey.json"),
        ("lrm_qwen3_4b", "complete_journey.json"),
        ("kuairand_pure_nio", "kuairand_pure.json"),
        ("kuairand_pure_uc", "kuairand_pure.json"),
        ("synthetic", "synthetic.json"),
    ],
)
def test_a_shipped_config_finds_the_planned_schema_of_its_data_set(
    name, schema, monkeypatch, tmp_path
):
    monkeypatch.setenv("TOKENREC_DATA", str(tmp_path))
    config = load_config(name)
    found, origin = resolve_schema(config)
    place = tmp_path / config.data.name
    assert origin == f"planned schema {schema}; no data set at {place}"
    assert set(config.data.tasks) <= {task.name for task in found.tasks}
    assert set(config.data.exclude) <= {feature.name for feature in found.features}
    # The data set itself goes first, and one that is named must be there.
    config.data.path = str(place)
    with pytest.raises(InputError, match="leave --data out and give --config"):
        resolve_schema(config)


@pytest.mark.parametrize("name", ["lrm_1b", "kuairand_27k"])
def test_pod_configs_are_described_from_a_fresh_clone(
    name, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("TOKENREC_DATA", str(tmp_path))
    config = load_config(name)
    schema, origin = resolve_schema(config)
    assert set(config.data.tasks) <= {task.name for task in schema.tasks}
    assert set(config.data.exclude) <= {feature.name for feature in schema.features}
    assert origin.startswith("planned schema kuairand_27k.json")
    assert main(["train", f"--config={name}", "--workdir", str(tmp_path / "run")]) == 2
    assert (
        "tokenrec prepare" in capsys.readouterr().err
    )  # training needs the data itself


def test_a_prepared_data_set_goes_before_a_planned_schema(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENREC_DATA", str(tmp_path))
    prepare(SyntheticSource(200), tmp_path / "set")
    schema, origin = resolve_schema(config_of(name="set", schema="kuairand_27k.json"))
    assert "price" in {feature.name for feature in schema.features}
    assert origin == f"prepared data set {tmp_path / 'set'}"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"name": "none", "schema": "kuairand_27.json"},
            "did you mean 'kuairand_27k.json'",
        ),
        ({"name": "none"}, "run `tokenrec prepare`"),
        ({"name": "none"}, r"data\.schema=FILE, the tokenrec.json .* synthetic\.json"),
        (
            {"path": "none", "schema": "kuairand_27k.json"},
            "'none' is not a prepared data set",
        ),
        (
            {"name": "none", "schema": "kuairand_27k.json", "semantic_ids": "ids"},
            "data.semantic_ids='ids' belongs",
        ),
    ],
)
def test_what_is_not_there_is_named(data, message, tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENREC_DATA", str(tmp_path))
    with pytest.raises(InputError, match=message):
        resolve_schema(config_of(**data))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": {}}', '{"schema": {"features": []}, "counts": {}}']
)
def test_a_file_that_is_no_planned_schema_is_named(text, tmp_path):
    path = Path(tmp_path / "plan.json")
    path.write_text(text)
    with pytest.raises(
        InputError, match=r"data\.schema '.*plan\.json' is not (JSON|a planned schema)"
    ):
        read_planned(path)
