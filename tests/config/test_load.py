"""Config files and overrides are read, or refused with field, value and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenrec.config import Config, HeadConfig, to_json
from tokenrec.config.load import load_config, shipped_configs
from tokenrec.config.overrides import apply_overrides, split_overrides
from tokenrec.config.validate import validate
from tokenrec.errors import InputError

CLONE = Path(__file__).parents[2]


def write(path: Path, body: str) -> str:
    path.write_text("from tokenrec.config import Config\n" + body)
    return str(path)


@pytest.fixture
def plain(tmp_path: Path) -> str:
    return write(tmp_path / "plain.py", "def get_config():\n    return Config()\n")


def value(config: Config, field: str) -> object:
    found: object = config
    for name in field.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", 7),
        ("model.width=128", 128),
        ("data.window_rows=1_000_000", 1_000_000),
        ("optim.learning_rate=3e-4", 3e-4),
        ("optim.clip_norm=0", 0.0),
        ("model.gate=false", False),
        ("model.gate=True", True),
        ("model.gate=0", False),
        ("model.windows=(32,16)", (32, 16)),
        ("model.windows=[32, 16]", (32, 16)),
        ("model.windows=32,16", (32, 16)),
        ("model.windows=(8,)", (8,)),
        ("model.windows=8", (8,)),
        ("model.windows=()", ()),
        ("model.windows=", ()),
        ("data.exclude=('age', 'tab')", ("age", "tab")),
        ("data.exclude=age,tab", ("age", "tab")),
        (
            "data.tasks={'is_click': 1, 'long_view': 0.5}",
            {"is_click": 1.0, "long_view": 0.5},
        ),
        ("data.tasks=is_click:2", {"is_click": 2.0}),
        ("data.tasks={}", {}),
        ("tokens.embedding_dims={'item': 32}", {"item": 32}),
        ("data.path=a=b", "a=b"),
        ("data.path='quoted name'", "quoted name"),
        ("model.dtype=bfloat16", "bfloat16"),
    ],
)
def test_override_is_read_as_the_type_of_its_field(
    plain: str, override: str, expected: object
) -> None:
    got = value(load_config(plain, [override]), override.partition("=")[0])
    assert got == expected
    assert type(got) is type(expected)


def test_last_override_of_a_field_wins(plain: str) -> None:
    assert load_config(plain, ["seed=1", "seed=2"]).seed == 2


def test_one_key_of_a_mapping_can_be_set(tmp_path: Path) -> None:
    body = "def get_config():\n    c = Config()\n    c.data.tasks = {'is_click': 1.0, 'like': 1.0}\n    return c\n"
    config = load_config(write(tmp_path / "tasks.py", body), ["data.tasks.like=0.25"])
    assert config.data.tasks == {"is_click": 1.0, "like": 0.25}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            'head.alignment={"Title: {title}, id: {sid}": 1}',
            {"Title: {title}, id: {sid}": 1.0},
        ),
        ("head.alignment={sid}: {title}:2", {"{sid}: {title}": 2.0}),
        # The other key stays as it is, line break and all.
        (
            "head.alignment.v1.0 {sid} = {title}=0.5",
            {"Old: {title},\n{sid}": 1.0, "v1.0 {sid} = {title}": 0.5},
        ),
        ('tokens.text={"history": ("title",)}', {"history": ("title",)}),
        ("tokens.text.history=title,brand", {"history": ("title", "brand")}),
        ("train.compiler_options.xla_a=b=c", {"xla_a": "b=c"}),
    ],
)
def test_mappings_of_any_text(override: str, expected: object) -> None:
    config = Config(head=HeadConfig(alignment={"Old: {title},\n{sid}": 1.0}))
    changed, problems = apply_overrides(config, [override])
    assert not problems
    assert (
        value(changed, ".".join(override.split(".")[:2]).partition("=")[0]) == expected
    )


def test_key_of_a_mapping_may_be_any_name(plain: str) -> None:
    overrides = [
        "tokens.embedding_dims.items=8",
        "tokens.embedding_dims.item-id=4",
    ]  # a method of dict; no identifier
    assert load_config(plain, overrides).tokens.embedding_dims == {
        "items": 8,
        "item-id": 4,
    }


def test_whole_mapping_replaces_the_keys_before_it(plain: str) -> None:
    config = load_config(
        plain,
        ["data.tasks.like=1", "data.tasks={'is_click':1.0}", "data.tasks.follow=2"],
    )
    assert config.data.tasks == {"is_click": 1.0, "follow": 2.0}


def test_value_of_a_file_that_cannot_be_overridden_is_named(tmp_path: Path) -> None:
    body = (
        "def get_config():\n    c = Config()\n    c.model.width = 64.0\n    return c\n"
    )
    with pytest.raises(InputError, match=r"model\.width.*float"):
        load_config(write(tmp_path / "float.py", body), ["model.width=128"])


def test_names_of_one_file_do_not_reach_the_next(plain: str, tmp_path: Path) -> None:
    load_config(plain)
    with pytest.raises(InputError, match=r"defines no get_config\(\)"):
        load_config(write(tmp_path / "empty.py", ""))


def test_overrides_of_one_load_do_not_reach_the_next(plain: str) -> None:
    load_config(plain, ["data.tasks.like=1", "model.width=32"])
    assert load_config(plain) == Config()


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.widht=3", ["model.widht", "did you mean 'model.width'"]),
        ("width=3", ["'width'", "did you mean 'model.width'"]),
        ("modle.width=3", ["modle.width", "did you mean 'model.width'"]),
        ("data.event=3", ["data.event", "did you mean 'data.events'"]),
        ("model=3", ["'model'", "section", "model.kind"]),
        ("optim.lr=3", ["optim.lr", "did you mean 'optim.learning_rate'"]),
        ("lr=3", ["'lr'", "did you mean 'optim.learning_rate'"]),
        ("learning_rate=3", ["did you mean 'optim.learning_rate'"]),
        ("optimizer.table_lr=3", ["did you mean 'optim.table_learning_rate'"]),
        ("model.n_heads=3", ["model.n_heads", "did you mean 'model.heads'"]),
        ("num_layers=3", ["did you mean 'model.layers'"]),
        ("head.top_m=3", ["did you mean 'head.top_k'"]),
        ("mesh.zzz=3", ["known: mesh.context, mesh.data, mesh.fsdp, mesh.tensor"]),
        ("zzz=3", ["'zzz'", "`tokenrec config` lists all fields"]),
        ("tokens.tables_backend=exchange", ["removed", "leave it out"]),
        ("model.width=wide", ["model.width", "'wide'", "whole number"]),
        ("model.width=1.5", ["model.width", "'1.5'", "whole number"]),
        ("optim.learning_rate=fast", ["optim.learning_rate", "'fast'", "number"]),
        ("optim.learning_rate=nan", ["optim.learning_rate=nan", "finite number"]),
        ("model.gate=maybe", ["model.gate", "'maybe'", "true or false"]),
        ("model.windows=(32,x)", ["model.windows", "'x'", "whole number"]),
        ("data.tasks=is_click", ["data.tasks", "'is_click'", "mapping"]),
        ("data.tasks.is_click=much", ["data.tasks.is_click", "'much'", "number"]),
        ("data.paradigm=ucc", ["data.paradigm", "'ucc'", "did you mean 'uc'"]),
        ("model.heads=3", ["model.heads=3", "model.width=64"]),
    ],
)
def test_wrong_override_names_field_value_and_remedy(
    plain: str, override: str, parts: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        load_config(plain, [override])
    for part in parts:
        assert part in str(caught.value)


def test_problems_of_overrides_and_of_values_are_reported_together(plain: str) -> None:
    overrides = [
        "model.widht=3",
        "seed=x",
        "data.buckets=(8,y)",
        "model.dtype=float23",
        "optim.warmup_steps=2000",
    ]
    with pytest.raises(InputError) as caught:
        load_config(plain, overrides)
    header, *problems = str(caught.value).splitlines()
    assert header == "the config has 5 problems:"
    fields = ["'model.widht'", "seed", "data.buckets", "model.dtype", "optim.warmup_"]
    for field, problem in zip(fields, problems, strict=True):
        assert field in problem


def test_problems_of_a_json_file_and_of_overrides_are_reported_together(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text('{"model": {"widht": 3, "heads": 5}}')
    with pytest.raises(InputError) as caught:
        load_config(str(tmp_path / "config.json"), ["seed=-1"])
    message = str(caught.value)
    assert all(
        part in message for part in ("'model.width'", "model.heads=5", "seed=-1")
    )


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ("def get_confg():\n    return Config()\n", ["get_config()"]),
        ("def get_config():\n    return {'seed': 1}\n", ["dict", "Config"]),
        (
            "def get_config():\n    return Config(sede=1)\n",
            ["line 3", "TypeError", "sede"],
        ),
        ("def get_config(:\n", ["line 2", "SyntaxError"]),
        ("import no_such_module_here\n", ["line 2", "no_such_module_here"]),
    ],
)
def test_broken_config_file_is_named_with_its_line(
    tmp_path: Path, body: str, parts: list[str]
) -> None:
    file = write(tmp_path / "broken.py", body)
    with pytest.raises(InputError) as caught:
        load_config(file)
    for part in [file, *parts]:
        assert part in str(caught.value)


def test_unknown_config_suggests_the_near_shipped_one() -> None:
    with pytest.raises(InputError, match="did you mean 'synthetic'"):
        load_config("sinthetic")


def test_missing_path_is_not_taken_for_a_shipped_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a file nor a shipped config"):
        load_config(str(tmp_path / "synthetic.py"))


def test_shipped_configs_load_by_name_and_by_path_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_path = {name: load_config(str(file)) for name, file in shipped_configs().items()}
    monkeypatch.chdir(tmp_path)
    for name, config in by_path.items():
        assert load_config(name) == config
        assert load_config(f"configs/{name}.py") == config


def test_a_file_here_goes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    write(
        tmp_path / "configs" / "synthetic.py",
        "def get_config():\n    return Config(seed=99)\n",
    )
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/synthetic.py").seed == 99


@pytest.mark.parametrize(
    "name", sorted(file.stem for file in (CLONE / "configs").glob("*.py"))
)
def test_shipped_config_is_valid_and_says_how_to_run_it(name: str) -> None:
    validate(load_config(name))
    text = (CLONE / "configs" / f"{name}.py").read_text()
    assert f"tokenrec train --config=configs/{name}.py" in text
    for fact in ("Command:", "Hardware:", "Time:", "Score:", "Source:"):
        assert f"\n{fact}" in text


def test_splitting_overrides_keeps_order_and_takes_both_spellings() -> None:
    arguments = [
        "--config.seed=1",
        "train",
        "--config",
        "c",
        "--config.mesh.data",
        "-1",
        "--workdir=w",
    ]
    assert split_overrides(arguments) == (
        ["train", "--config", "c", "--workdir=w"],
        ["seed=1", "mesh.data=-1"],
    )


@pytest.mark.parametrize(
    "arguments", [["--config.seed"], ["--config.seed", "--workdir=w"]]
)
def test_override_without_a_value_is_refused(arguments: list[str]) -> None:
    with pytest.raises(InputError, match=r"--config\.seed has no value"):
        split_overrides(arguments)


def test_config_json_of_a_run_is_read_with_overrides(
    plain: str, tmp_path: Path
) -> None:
    config = load_config(plain, ["model.windows=(32,16)", "data.tasks={click: 2}"])
    (tmp_path / "config.json").write_text(to_json(config))
    assert load_config(str(tmp_path / "config.json")) == config
    changed = load_config(
        str(tmp_path / "config.json"), ["model.width=128", "data.tasks.click=3"]
    )
    assert (changed.model.width, changed.model.windows, changed.data.tasks) == (
        128,
        (32, 16),
        {"click": 3.0},
    )


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"open('ran', 'w')", ["config.json", "not JSON"]),
        (
            b"{\"seed\": \"__import__('os').mkdir('ran')\"}",
            ["seed", "not a whole number"],
        ),
        (b'{"modle": {}}', ["config.json", "modle", "did you mean 'model'?"]),
        (b"\xff{}", ["config.json", "decode"]),
        (b"[" * 100_000, ["config.json", "not JSON"]),
    ],
)
def test_config_json_is_never_run(
    content: bytes, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_config("config.json")
    assert all(part in str(caught.value) for part in parts)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
