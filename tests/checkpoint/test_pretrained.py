"""A run that starts from a pretrained language model, resumes, and gives it back."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.language.checkpoints import (
    FILES,
    D,
    L,
    V,
    random_tensors,
    write_checkpoint_folder,
    write_config_json,
)
from tests.worlds import one_device
from tokenrec import evaluate
from tokenrec.checkpoint.pretrained import PRETRAINED_FILE, start_from_pretrained
from tokenrec.checkpoint.reader import CheckpointReader
from tokenrec.checkpoint.run_folder import create_or_check_run, open_run
from tokenrec.cli.main import main
from tokenrec.config import (
    Config,
    DataConfig,
    DecoderConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
    TuningConfig,
    read_config,
)
from tokenrec.config.validate import validate
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import EXIT_INPUT, InputError
from tokenrec.language.export_run import MAKERS_FILE, export_language_model
from tokenrec.language.new_rows import draw_rows
from tokenrec.language.tensor_files import folder_digest
from tokenrec.language.tokenizer_checks import check_tokenizer
from tokenrec.sharding import make_run_mesh
from tokenrec.state import build_model, init_state
from tokenrec.train_loop import train
from tokenrec.tuning import group_of, split_frozen

LAYERS = 2
# What carries no part of a test only takes time to compile.
EXCLUDED = (
    *("interests", "age", "load", "genre", "price", "vector", "code"),
    *("place", "seconds", "reaction"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "synthetic"
    prepare(SyntheticSource(1_500, users=40, items=30), out)
    return out


def tensors_of_model():
    """Two layers of the model, which compile in less time than five."""
    left_out = tuple(f"model.layers.{layer}." for layer in range(LAYERS, L))
    tensors = random_tensors("qwen3")
    return {n: x for n, x in tensors.items() if not n.startswith(left_out)}


def write_folder(out, tensors):
    write_checkpoint_folder(out, "qwen3", tensors)
    write_config_json(out, FILES["qwen3"] | {"num_hidden_layers": LAYERS})
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("model") / "qwen3", tensors_of_model())


def config_of(data, folder, **tuning):
    lora = {"rank": 2} if tuning.get("method", "lora") == "lora" else {}
    return Config(
        data=DataConfig(
            path=str(data),
            events=4,
            batch_size=16,
            eval_batch_size=64,
            exclude=EXCLUDED,
        ),
        tokens=TokensConfig(
            embedding_dim=4,
            fused=True,
            user_tokens=1,
            maker="linear",
            output_scale=True,
            prompt=("user", "sep", "history", "||", "candidate"),
        ),
        model=ModelConfig(kind="qwen3", pretrained=str(folder), windows=(), scan=0),
        tuning=TuningConfig(**{"method": "lora"} | lora | tuning),
        optim=OptimConfig(steps=4, warmup_steps=1, learning_rate=1e-2),
        train=TrainConfig(
            eval_every=4, eval_samples=64, save_every=2, keep_compiled=False
        ),
    )


@pytest.fixture(scope="module")
def runs(data, folder, tmp_path_factory):
    """A run with adapters in one go, and the same stopped at step 2 and resumed."""
    parent = tmp_path_factory.mktemp("runs")
    train(config_of(data, folder), parent / "whole")
    first = config_of(data, folder)
    first.train.stop_at = 2
    train(first, parent / "lora")
    assert train(config_of(data, folder), parent / "lora")["step"] == 4
    return parent


@pytest.fixture
def workdir(runs):
    return runs / "lora"


def params_of(workdir):
    with jax.set_mesh(make_run_mesh(Config())):
        return jax.device_get(open_run(workdir, "latest", None).state.params)


def test_a_run_begins_with_the_weights_of_the_folder(data, folder):
    config = validate(config_of(data, folder))
    dataset = open_dataset(data, config.data.exclude)
    model = build_model(config, dataset.schema, ("click",))
    with jax.set_mesh(one_device()):
        drawn = init_state(model, 0)
        state = start_from_pretrained(model, drawn)
    tensors = load_file(folder / "model.safetensors")
    words = state.params["words/inputs"]
    np.testing.assert_array_equal(words[:V], tensors["model.embed_tokens.weight"])
    assert not words[V:].any()
    query = state.params["backbone/blocks/1/attention/query"]
    stored = tensors["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(query.reshape(D, -1), stored.T)
    # The scale of a maker is the size of a word, and an adapter changes nothing yet.
    size = np.sqrt(np.mean(np.square(tensors["model.embed_tokens.weight"])))
    np.testing.assert_allclose(state.params["user/scale"], size, rtol=1e-6)
    assert not state.params["backbone/blocks/1/attention/query_adapter/up"].any()
    assert (state.params["separators"] != drawn.params["separators"]).any()


def test_new_rows_are_drawn_like_words():
    random = np.random.default_rng(0)
    mix = random.normal(size=(4, 4))
    words = random.normal(size=(3_000, 4)) @ mix + np.array([1.0, 2.0, 3.0, 4.0])
    words = np.concatenate([words, np.full((72, 4), 1e3)]).astype(np.float32)
    with jax.set_mesh(one_device()):
        like = jax.numpy.zeros((20_000, 4))
        rows = draw_rows(jax.random.key(0), jax.numpy.asarray(words), 3_000, like)
    wanted = words[:3_000]
    # Deviation of a mean of 20,000 rows: under 0.03.
    np.testing.assert_allclose(rows.mean(0), wanted.mean(0), atol=0.1)
    covariance = np.cov(wanted.T)
    np.testing.assert_allclose(
        np.cov(np.asarray(rows).T), covariance, atol=0.05 * np.abs(covariance).max()
    )


def test_a_checkpoint_holds_what_is_trained_alone(workdir):
    config = read_config(workdir / "config.json")
    with CheckpointReader(workdir) as checkpoints:
        saved = checkpoints._saved_arrays(4)["params"]
    trained, frozen = split_frozen(config, params_of(workdir))
    assert saved.keys() == trained.keys()
    assert frozen


def test_a_resumed_run_equals_one_in_one_go(runs):
    whole, resumed = (params_of(runs / name) for name in ("whole", "lora"))
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)


def test_the_folder_may_move_and_not_change(runs, data, folder, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(runs / "lora", workdir)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert train(config_of(data, moved), workdir)["step"] == 4
    before = (workdir / "config.json").read_text()

    other = shutil.copytree(folder, tmp_path / "other")
    tensors = tensors_of_model()
    tensors["model.norm.weight"] += 1
    write_folder(other, tensors)
    with pytest.raises(InputError, match=r"other' holds other weights \(sha256 "):
        train(config_of(data, other), workdir)
    # The run still names the folder with its weights.
    assert (workdir / "config.json").read_text() == before
    shutil.rmtree(moved)
    with pytest.raises(InputError, match="moved"):
        open_at(workdir)


def open_at(workdir):
    with jax.set_mesh(make_run_mesh(Config())):
        return open_run(workdir, "latest", None)


def test_random_weights_are_not_frozen(data, tmp_path):
    config = config_of(data, "", method="frozen")
    config.model.architecture = "qwen3_0.6b"
    config.model.layers, config.model.width = 4, 64
    before = list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"tuning.method='frozen'.*random weights"):
        train(small(config), tmp_path / "run")
    assert list(tmp_path.iterdir()) == before


def small(config):
    """The sizes of a small model, as if they had been read."""
    config.model.ffn_width, config.model.heads = 24, 2
    config.model.decoder = DecoderConfig(vocabulary=8, kv_heads=1, head_width=4)
    return config


def test_the_language_model_is_given_back(workdir, folder, tmp_path, capsys):
    out = tmp_path / "out"
    main(["export", "--workdir", str(workdir), "--format", "hf", "--out", str(out)])
    assert f"{V + 1:,} words, 1 of them new" in capsys.readouterr().out
    before, after = (load_file(path / "model.safetensors") for path in (folder, out))
    assert before.keys() == after.keys()
    words = after.pop("model.embed_tokens.weight")
    np.testing.assert_array_equal(words[:V], before["model.embed_tokens.weight"])
    params = params_of(workdir)
    np.testing.assert_array_equal(words[V:], params["separators"])
    for name, value in after.items():
        changed = any(part in name for part in ("_proj",))
        assert changed != np.array_equal(value, before[name]), name
    down, up = (
        params[f"backbone/blocks/1/attention/query_adapter/{side}"]
        for side in ("down", "up")
    )
    merged = 16.0 * np.tensordot(down, up, axes=1).reshape(D, -1).T
    name = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_allclose(after[name], before[name] + merged, atol=1e-6)

    others = load_file(out / MAKERS_FILE)
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == V + 1
    assert {"head/kernel", "user/scale", "tables/item"} <= others.keys()
    assert not [name for name in others if group_of(name) in ("base", "words")]
    np.testing.assert_array_equal(others["head/kernel"], params["head/kernel"])


def test_a_run_without_a_language_model_has_no_such_format(data, tmp_path):
    config = config_of(data, "")
    config.tuning = TuningConfig()
    config.model = ModelConfig(width=8, heads=1, layers=1, windows=())
    config.tokens.prompt = ()
    create_or_check_run(validate(config), open_dataset(data), tmp_path / "run")
    with pytest.raises(InputError, match=r"--format=hf with model.kind='tokenformer'"):
        export_language_model(tmp_path / "run", tmp_path / "out", checkpoint="latest")
    for format, flag in (("hf", "--max-k=3"), ("artifact", "--dtype=float32")):
        arguments = ["--format", format, "--workdir", "a", "--out", "b", flag]
        assert main(["export", *arguments]) == EXIT_INPUT


def test_the_run_is_evaluated_and_noted(workdir, folder):
    noted = json.loads((workdir / PRETRAINED_FILE).read_text())
    assert noted == {"folder": str(folder), "sha256": folder_digest(folder)}
    report = evaluate(workdir, split="valid", checkpoint="latest")
    assert 0 < report["tasks"]["click"]["log_loss"] < 5


def test_texts_are_in_the_words_of_the_model(data, folder, tmp_path):
    config = validate(config_of(data, folder))
    text = Feature("title", "text", "item", length=3, codes=256)

    def check(words, of_data=None, of_model=None):
        shutil.rmtree(tmp_path / "own", ignore_errors=True)
        own, given = tmp_path / "own" / "data", tmp_path / "own" / "model"
        for place, name in ((own, of_data), (given, of_model)):
            place.mkdir(parents=True)
            if name:
                (place / "tokenizer.json").write_text(name)
        model = dataclasses.replace(config.model, pretrained=str(given))
        check_tokenizer(model, Schema((text,), (), {"text": 2 + words}), own)

    check(V, "{}", "{}")
    check(V, "{}", None)
    with pytest.raises(InputError, match=r"its tokenizer is not that of model\.pre"):
        check(V, "{}", "{ }")
    with pytest.raises(InputError, match=r"=24; prepare.*--tokenizer"):
        check(V + 400, "{}", "{}")
