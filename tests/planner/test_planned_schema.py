"""Planned schemas: when one is read, its contents, and its agreement with `prepare`."""

import json
from pathlib import Path

import pytest

from benchmarks import plan_kuairand_27k
from tokenrec.cli.main import main
from tokenrec.config import Config, DataConfig
from tokenrec.config.load import load_config, shipped_folder
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
        json.dumps(plan_kuairand_27k.planned())
    )
    schema = read_planned(SHIPPED)
    assert schema.features == FEATURES
    assert schema.items == 32_038_725
    assert set(schema.tables) == {f.table_name for f in schema.features if f.is_integer}
    assert schema.tables["video_id"] == 32_038_725 + 2
    notes = json.loads(SHIPPED.read_text())["notes"]
    assert set(schema.tables) <= set(notes)
    assert "assumption" in notes["author_id"]


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
