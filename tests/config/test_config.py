"""`validate` refuses what cannot run, all of it at once; a config survives its JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from tokenrec.config import (
    Config,
    data_directory,
    from_json,
    read_config,
    to_json,
)
from tokenrec.config.validate import validate
from tokenrec.errors import InputError


def edited(**fields: Any) -> Config:
    """The default config with fields set; `model__width=3` sets `model.width`."""
    config = Config()
    for path, value in fields.items():
        *sections, name = path.split("__")
        holder: Any = config
        for section in sections:
            holder = getattr(holder, section)
        assert name in {field.name for field in dataclasses.fields(holder)}
        setattr(holder, name, value)
    return config


def test_default_config_is_valid() -> None:
    assert validate(Config()) == Config()


RETRIEVAL = {"data__objective": "retrieval", "tokens__fused": True}
WRONG = [
    ({"seed": -1}, "seed=-1"),
    ({"data__events": 0}, "data.events=0"),
    (
        {"model__kind": "hstuu"},
        "model.kind='hstuu' is not a choice; did you mean 'hstu'",
    ),
    ({"data__batch_size": 0}, "data.batch_size=0"),
    ({"data__window_rows": 0}, "data.window_rows=0"),
    ({"data__buckets": (50,)}, "data.buckets: 50"),
    ({"data__overlap": 8}, "data.overlap=8"),
    ({"data__unscored_weight": -0.5}, "data.unscored_weight=-0.5 must be at least 0"),
    (
        {"data__unscored_weight": float("nan")},
        "data.unscored_weight=nan is not a finite number",
    ),
    (
        {"data__unscored_weight": 0.5},
        "data.unscored_weight=0.5 with data.paradigm='nio'",
    ),
    ({"data__tasks": {"click": 0.0}}, "data.tasks['click']=0.0"),
    ({"data__paradigm": "uc", "data__overlap": 50}, "data.overlap=50"),
    ({"data__paradigm": "uc", "tokens__fused": True}, "tokens.fused=True"),
    ({"data__paradigm": "uc", "data__candidates": 2}, "data.candidates=2"),
    ({"data__paradigm": "uc", "tokens__target_tokens": 2}, "tokens.target_tokens=2"),
    ({"tokens__user_tokens": -1}, "tokens.user_tokens=-1"),
    ({"tokens__rare_buckets": 4}, "tokens.rare_buckets=4 with tokens.min_count=0"),
    ({"tokens__embedding_dims": {"item": 0}}, "tokens.embedding_dims['item']=0"),
    ({"model__heads": 5}, "model.heads=5"),
    ({"model__width": 6, "model__heads": 2}, "even head"),
    ({"model__layers": 1}, "model.windows"),
    ({"model__windows": (16, 32)}, "shrink"),
    ({"model__windows": (-1,)}, "at least 1"),
    ({"model__windows": (16, 0, 32)}, "shrink"),
    ({"model__windows": (2, 0)}, "model.windows: 2 holds no event"),
    (
        {"model__kind": "hstu", "model__windows": (), "model__discard_static": False},
        "does not read it",
    ),
    ({"model__dropout": 1.0}, "model.dropout=1.0"),
    ({"model__rope_base": 0.0}, "model.rope_base=0.0"),
    ({"model__ffn_width": -8}, "model.ffn_width=-8"),
    ({"optim__steps": 0}, "optim.steps=0"),
    ({"optim__warmup_steps": 2_000}, "optim.warmup_steps=2000"),
    ({"optim__learning_rate": 0.0}, "optim.learning_rate=0.0"),
    (
        {"optim__learning_rate": float("inf")},
        "optim.learning_rate=inf is not a finite number",
    ),
    ({"data__tasks": {"click": float("nan")}}, "data.tasks={'click': nan}"),
    ({"optim__weight_decay": -0.1}, "optim.weight_decay=-0.1"),
    ({"optim__beta2": 1.0}, "optim.beta2=1.0"),
    ({"optim__accumulate": 3}, "optim.accumulate=3"),
    ({"optim__gradient_sums": "bfloat16"}, "optim.gradient_sums='bfloat16' with"),
    ({"mesh__fsdp": 0}, "mesh.fsdp=0"),
    ({"mesh__data": 0}, "mesh.data=0"),
    ({"train__stop_at": 2_000}, "train.stop_at=2000"),
    ({"train__eval_every": -1}, "train.eval_every=-1"),
    ({"train__patience": -1}, "train.patience=-1"),
    ({"train__patience": 2}, "train.patience=2 with train.eval_every=0"),
    (
        {"train__patience": 2, "train__eval_every": 5, "train__eval_split": ""},
        "train.patience=2 with train.eval_split=''",
    ),
    (
        {"train__log_states": True, "train__eval_split": ""},
        "train.log_states=True with train.eval_split=''",
    ),
    ({"train__eval_samples": -1}, "train.eval_samples=-1"),
    ({"model__width": 64.0}, "model.width=64.0"),
    ({"model__gate": 1}, "model.gate=1"),
    ({"model__windows": (32, "16")}, "model.windows"),
    ({"model__dtype": "float23"}, "did you mean 'float32'"),
    ({"train__best_metric": "auc"}, "macro_auc"),
    ({"optim": None}, "OptimConfig"),
    (
        {"data__paradigm": "uc", "tokens__prompt": ("query", "history")},
        "no one request",
    ),
    (
        {"model__prefix": "bidirectional", "model__layers": 2},
        "every layer has a window",
    ),
    ({"tokens__text": {"query": ("hour",)}}, "holds none"),
    (RETRIEVAL | {"tokens__random_tokens": True}, "use tied=False"),
    (RETRIEVAL | {"head__item_features": ("a",)}, "head.negatives=0, whose item"),
    (
        RETRIEVAL
        | {
            "data__paradigm": "uc",
            "data__overlap": 1,
            "tokens__text": {"history": ("a",)},
        },
        "leave it soft",
    ),
]


@pytest.mark.parametrize(("fields", "part"), WRONG, ids=[part for _, part in WRONG])
def test_wrong_value_is_refused_by_name(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(InputError) as caught:
        validate(edited(**fields))
    assert part in str(caught.value)


def problems_of(config: Config) -> list[str]:
    """The problems that `validate` reports, without the line above them."""
    with pytest.raises(InputError) as caught:
        validate(config)
    first, *problems = str(caught.value).split("\n  ")
    return problems or [first]


def test_all_problems_are_reported_at_once() -> None:
    config = edited(
        data__events="many",
        model__kind="hstuu",
        model__dtype="float23",
        model__dropout=2.0,
        data__overlap=1,
        optim__steps=50,
    )
    names = ["events", "kind", "dtype", "dropout", "overlap", "warmup_steps"]
    problems = problems_of(config)
    assert len(problems) == len(names)
    for name in names:
        assert sum(f".{name}=" in problem for problem in problems) == 1


@pytest.mark.parametrize(("fields", "part"), WRONG, ids=[part for _, part in WRONG])
def test_a_type_problem_does_not_hide_another_one(
    fields: dict[str, Any], part: str
) -> None:
    problems = problems_of(edited(train__warm_start=3, **fields))
    assert "train.warm_start=3 is not a string" in problems
    assert any(part in problem for problem in problems)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        # 50 events, the default, would exclude both buckets.
        ({"data__events": "a", "data__buckets": (60,)}, "data.events='a'"),
        # The default paradigm, nio, has no overlap.
        ({"data__paradigm": "ucc", "data__overlap": 8}, "data.paradigm='ucc'"),
        # 5 heads do not divide the default width.
        ({"model__width": 0, "model__heads": 5}, "model.width=0"),
        # The default backbone divides its width by heads, which DIN does not.
        ({"model__kind": "dim", "model__heads": 5}, "model.kind='dim'"),
        ({"optim": None, "train__stop_at": 2_000}, "optim=None"),
    ],
)
def test_a_field_without_a_usable_value_causes_no_other_problem(
    fields: dict[str, Any], problem: str
) -> None:
    (only,) = problems_of(edited(**fields))
    assert only.startswith(problem)


def test_json_round_trip_keeps_every_field_and_type() -> None:
    config = edited(
        seed=3,
        data__tasks={"click": 0.5},
        data__exclude=("age",),
        model__windows=(16,),
        tokens__embedding_dims={"i": 8},
    )
    assert from_json(to_json(config)) == config
    assert validate(from_json(to_json(config))) == config


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ('{"model": {"widht": 3}}', "did you mean 'model.width'"),
        ('{"sede": 3}', "did you mean 'seed'"),
        ('{"model": {"n_heads": 3}}', "did you mean 'model.heads'"),
        ('{"optim": {"lr": 3}}', "did you mean 'optim.learning_rate'"),
        ('{"lr": 3}', "did you mean 'optim.learning_rate'"),
        ('{"modell": {"width": 3}}', "did you mean 'model'"),
        ('{"model": 3}', "model=3 is not a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_json_that_is_no_config_is_refused(text: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        from_json(text)


def test_all_unknown_fields_of_a_json_config_are_named() -> None:
    with pytest.raises(InputError) as caught:
        from_json('{"sede": 3, "model": {"widht": 3, "layers": 2}, "optim": 1}')
    message = str(caught.value)
    assert all(part in message for part in ("'seed'", "'model.width'", "optim=1"))


def test_a_removed_field_opens_with_its_only_value() -> None:
    text = '{"seed": 3, "tokens": {"tables_backend": "exchange", "fused": true}}'
    assert from_json(text) == edited(seed=3, tokens__fused=True)
    with pytest.raises(InputError, match=r"removed.*behave as with 'exchange'.*delete"):
        from_json('{"tokens": {"tables_backend": "sparsecore"}}')


def test_a_run_of_an_earlier_version_opens(tmp_path: Path) -> None:
    value = dataclasses.asdict(Config())
    value["tokens"]["tables_backend"] = "exchange"
    file = tmp_path / "config.json"
    file.write_text(json.dumps(value))
    assert read_config(file) == Config()
    value["tokens"]["tables_backend"] = "sparsecore"
    file.write_text(json.dumps(value))
    with pytest.raises(InputError, match=r"config\.json.*tables_backend='sparsecore'"):
        read_config(file)


def test_data_directory_prefers_path_over_name_under_the_data_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TOKENREC_DATA", raising=False)
    assert data_directory(edited(data__name="synthetic")) == Path("data/synthetic")
    monkeypatch.setenv("TOKENREC_DATA", "elsewhere")
    assert data_directory(edited(data__name="synthetic")) == Path("elsewhere/synthetic")
    assert data_directory(edited(data__name="synthetic", data__path="here")) == Path(
        "here"
    )
    with pytest.raises(InputError, match="--data DIR"):
        data_directory(Config())
