"""Study files: which fields are valid, and which runs they make."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tokenrec.config.load import shipped_folder
from tokenrec.errors import InputError
from tokenrec.study.plan import (
    Study,
    TrainingRun,
    check_study,
    final_runs,
    load_study,
    run_config,
    search_runs,
)

STUDY = Study(
    base="synthetic",
    models={
        "tokenformer": {},
        "bfts": {"model.gate": False},
        "plain": {"model.windows": ()},
    },
    reference="tokenformer",
    learning_rates=(1e-3, 3e-3),
    overrides={"optim.steps": 40, "optim.warmup_steps": 4},
    cpu_hours=1,
)


def test_every_rate_has_the_first_seed_and_the_best_all() -> None:
    assert [job[1:] for job in search_runs(STUDY)] == [(1e-3, 0), (3e-3, 0)] * 3
    assert final_runs(STUDY, {"bfts": 3e-3}) == [
        TrainingRun("bfts", 3e-3, seed) for seed in (0, 1, 2)
    ]
    folders = {
        job.folder for job in (*search_runs(STUDY), *final_runs(STUDY, {"bfts": 3e-3}))
    }
    assert len(folders) == 6 + 2


def test_a_model_may_have_rates_of_its_own() -> None:
    study = dataclasses.replace(STUDY, own_rates={"bfts": (5e-3,)})
    check_study(study)
    assert [job for job in search_runs(study) if job.model == "bfts"] == [
        TrainingRun("bfts", 5e-3, 0)
    ]
    assert [job for job in search_runs(study) if job.model != "bfts"] == [
        job for job in search_runs(STUDY) if job.model != "bfts"
    ]


def test_a_run_has_the_fields_of_the_base_the_study_and_its_model() -> None:
    config = run_config(STUDY, TrainingRun("plain", 3e-3, 2), Path("some/data"))
    assert (config.optim.steps, config.optim.learning_rate, config.seed) == (
        40,
        3e-3,
        2,
    )
    assert config.model.windows == ()
    assert config.model.gate
    assert config.data.path == "some/data"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reference": "tokenfomer"}, "did you mean 'tokenformer'"),
        (
            {"models": {"a/b": {}}, "reference": "a/b"},
            "'a/b' is also the name of a folder",
        ),
        ({"learning_rates": ()}, r"learning_rates=\(\) is empty"),
        ({"own_rates": {"bfts": ()}}, r"own_rates\['bfts'\]=\(\) is empty"),
        (
            {"own_rates": {"bfst": (1e-3,)}},
            "own_rates: 'bfst' is none of the models.*did you mean 'bfts'",
        ),
        ({"seeds": (1, 1)}, "has a value twice"),
        ({"seeds": (-1,)}, "must not be negative"),
        ({"splits": ("test",)}, "contain valid, on which learning rates are chosen"),
        ({"cpu_hours": 0}, "cpu_hours=0 must be above 0"),
        ({"draws": 5}, "too few"),
        ({"seeds": 3}, "seeds=3 is not a list of whole numbers"),
        (
            {"learning_rates": 1e-3},
            "learning_rates=0.001 is not a list of finite numbers",
        ),
        ({"checkpoint": "newest"}, "checkpoint='newest' is not .*'latest', 'best'"),
        (
            {"models": {"a": {"seed": 4}}, "reference": "a"},
            "'a' sets seed, which the study sets",
        ),
        (
            {"models": {"a": {"model.widht": 4}}, "reference": "a"},
            "model 'a': config field 'model.widht'.*model.width",
        ),
        (
            {"models": {"a": {"model.heads": 3}}, "reference": "a"},
            "model 'a': .*model.heads=3 does not divide",
        ),
        ({"freeze_at": "2022-05-02"}, "freeze_at='2022-05-02' is not .*'split'"),
        ({"ensembles": {"bfts": ("bfts",)}}, "'bfts' is a model; give the average"),
        ({"ensembles": {"all": ("bfst",)}}, "name one or more.*did you mean 'bfts'"),
        ({"ensembles": {"all": ()}}, r"averages \(\); name one or more"),
        ({"base": "amazon"}, "studies compare rankers"),
    ],
)
def test_a_slip_is_refused_with_its_field(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=f"(?s){words}"):
        check_study(dataclasses.replace(STUDY, **changes))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1", r"defines no get_study\(\)"),
        (
            "def get_study():\n    return 3",
            "returned int, not tokenrec.study.plan.Study",
        ),
        ("def get_study(:", r"study file .*s\.py, line 1: SyntaxError"),
        ("def get_study():\n    return 1 / 0", r"s\.py, line 2: ZeroDivisionError"),
    ],
)
def test_a_file_that_gives_no_study_is_refused(
    tmp_path: Path, text: str, words: str
) -> None:
    (tmp_path / "s.py").write_text(text)
    with pytest.raises(InputError, match=words):
        load_study(tmp_path / "s.py")
    with pytest.raises(InputError, match="did you mean 'synthetic'"):
        load_study(Path("syntetic"))


@pytest.mark.parametrize(
    "file",
    sorted((shipped_folder() / "studies").glob("*.py")),
    ids=lambda file: file.stem,
)
def test_shipped_studies_are_whole_and_say_how_to_run_them(file: Path) -> None:
    study = load_study(Path(file.stem))
    assert study.cpu_hours <= 10
    text = file.read_text()
    assert f"tokenrec study --config=configs/studies/{file.name}" in text
    assert "Hardware" in text
