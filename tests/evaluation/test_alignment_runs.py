"""A run with alignment tasks: trained, evaluated, and given back to its ecosystem."""

import json

import jax
import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import load_file, save_file

from tests.data.memory_source import MemorySource
from tests.data.model_tokenizer import byte_level, write_model
from tests.language.hf_models import CONFIGS, random_tensors
from tests.walks import ITEMS, STEPS, USERS, save_codes, walk
from tokenrec import evaluate
from tokenrec.alignment import losses_by_task
from tokenrec.checkpoint.run_folder import open_run
from tokenrec.cli.main import main
from tokenrec.config import (
    Config,
    DataConfig,
    HeadConfig,
    ModelConfig,
    OptimConfig,
    TokensConfig,
    TrainConfig,
    TuningConfig,
)
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema
from tokenrec.evaluation.alignment import _without_events
from tokenrec.runtime.metric_writer import METRICS_FILE
from tokenrec.sharding import RULES, make_run_mesh
from tokenrec.state import bind_params
from tokenrec.train_loop import train

# Devices are not the matter here.
pytestmark = pytest.mark.usefixtures("lone_device")

TASKS = {"Which is {title}? {sid}": 1.0, "{sid} is {title}": 0.5}
TEXTS = [f"{kind} tea {n}" for kind in ("green", "black") for n in range(ITEMS // 2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Llama 3, whose words have vectors of their own to be scored, with a tokenizer."""
    folder = write_model(tmp_path_factory.mktemp("model") / "llama3")
    sizes = {"vocab_size": byte_level().get_vocab_size(), "num_hidden_layers": 1}
    config = CONFIGS["llama3"] | sizes
    save_file(
        {name: np.asarray(value) for name, value in random_tensors(config).items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def workdir(model, tmp_path_factory):
    parent = tmp_path_factory.mktemp("run")
    user, step = np.divmod(np.arange(USERS * STEPS), STEPS)
    rows = {
        "user_id": pa.array(user),
        "item_id": pa.array(100 + walk(user, step)),
        "time_ms": pa.array(step * 1000),
        "split": pa.array(np.maximum(step - (STEPS - 3), 0).astype(np.int8)),
    }
    items = {"item_id": pa.array(100 + np.arange(ITEMS)), "title": pa.array(TEXTS)}
    title = Feature("title", "text", "item", length=16, codes=256)
    source = MemorySource(rows, {}, items, Schema((title,), ()))
    prepare(source, parent / "data", tokenizer=model)
    config = Config(
        data=DataConfig(
            path=str(parent / "data"),
            semantic_ids=str(save_codes(parent / "codes.parquet")),
            objective="retrieval",
            paradigm="nio",
            events=3,
            batch_size=16,
            eval_batch_size=8,
        ),
        tokens=TokensConfig(
            fused=True, template="Seen: {history} Next: {sid}", output_scale=True
        ),
        model=ModelConfig(kind="llama3", pretrained=str(model), windows=()),
        tuning=TuningConfig(method="all"),
        head=HeadConfig(
            retrieval="semantic_id", beams=10, top_k=10, alignment=dict(TASKS)
        ),
        optim=OptimConfig(steps=30, warmup_steps=2, learning_rate=1e-2),
        train=TrainConfig(eval_every=30, save_every=30, eval_samples=16, log_every=10),
    )
    train(config, parent / "run")
    return parent / "run"


def test_the_report_has_the_loss_of_each_task_over_the_catalogue(workdir):
    report = evaluate(workdir, split="valid", checkpoint="latest", samples=8)
    found = report["alignment"]
    assert {task["template"] for task in found.values()} == TASKS.keys()
    with jax.set_mesh(make_run_mesh(Config())):
        run = open_run(workdir, "latest", None)

        @jax.jit
        def losses_of(params, rows):
            module, batch = bind_params(run.model, params), _without_events(rows)
            return losses_by_task(run.model.alignment, module, batch, None)

        # Sixteen samples on eight devices, of which the first are the items.
        rows = np.stack([np.arange(16) % ITEMS] * 2, axis=1)
        rows = jax.device_put(rows, RULES("batch", None))
        losses = jax.device_get(losses_of(run.state.params, rows))
    for (name, task), each in zip(found.items(), losses, strict=True):
        wanted = float(np.mean(each[:ITEMS]))
        assert task["loss"] == pytest.approx(wanted, rel=1e-5), name
    # Chance: log 3 + log 2 + log 2 nats. It has begun to learn 12 items.
    assert found["title_to_sid"]["loss"] < 1.5
    assert '"valid/alignment/sid_to_title"' in (workdir / METRICS_FILE).read_text()


def test_the_table_of_evaluate_shows_the_tasks(workdir, capsys):
    arguments = ["--workdir", str(workdir), "--split", "valid", "--samples", "8"]
    assert main(["evaluate", *arguments]) == 0
    assert "alignment task" in capsys.readouterr().out


def test_vectors_that_words_are_scored_with_are_trained_and_given_back(
    workdir, model, tmp_path
):
    out = tmp_path / "out"
    arguments = ["--workdir", str(workdir), "--format", "hf", "--out", str(out)]
    assert main(["export", *arguments]) == 0
    before, after = (load_file(path / "model.safetensors") for path in (model, out))
    words = len(before["lm_head.weight"])
    head = after["lm_head.weight"]
    assert (head[:words] != before["lm_head.weight"]).any()
    # The codes are words that are scored too.
    assert len(head) > words


def test_an_artifact_leaves_vectors_that_words_are_scored_with(workdir, tmp_path):
    pytest.importorskip("flatbuffers")
    out = tmp_path / "artifact"
    arguments = ["--workdir", str(workdir), "--platforms", "cpu", "--out", str(out)]
    # It compares the items that it finds with those of `predict`.
    assert main(["export", *arguments]) == 0
    params = json.loads((out / "manifest.json").read_text())["params"]
    assert "words/inputs" in params
    assert "words/outputs" not in params
