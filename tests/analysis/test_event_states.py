"""Event states of a run are those that its model computes, and the report and the log say what they are."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from tests.worlds import SCHEMA, TASKS, one_device, place, random_batch, tiny
from tokenrec.analysis.event_states import (
    all_rows,
    collapse_report,
    event_labels,
    event_rows,
    read_event_states,
    real_events,
    states_and_gates,
)
from tokenrec.analysis.information import cluster_information
from tokenrec.analysis.rank import effective_rank, singular_values
from tokenrec.config import Config, DataConfig, ModelConfig, OptimConfig, TokensConfig, TrainConfig
from tokenrec.data.dataset import open_dataset
from tokenrec.data.log import SCORED
from tokenrec.data.prepare import prepare
from tokenrec.data.synthetic import SyntheticSource
from tokenrec.errors import InputError
from tokenrec.state import build_model, init_state, merge
from tokenrec.tokens.layout import ROLES
from tokenrec.train import train

LENGTHS = [0, 1, 3, 5, 8, 11, 12, 12]


def test_states_are_those_that_the_model_itself_computes_and_gates_those_of_their_blocks():
    """The model computes needed rows alone; what both compute is equal, and the read-outs of UC are event rows."""
    mesh, config = one_device(), tiny(paradigm="uc", model={"layers": 2, "windows": (4,)})
    with jax.set_mesh(mesh):
        model = build_model(config, SCHEMA, TASKS)
        batch = place(random_batch(config, lengths=LENGTHS), mesh)
        state, whole = init_state(model, 0), all_rows(model)
        kernels = [name for name in state.params if name.endswith("gate/kernel")]
        for name in kernels:  # which start at 0, so that all gates are alike
            state.params[name] += 0.1 * np.random.default_rng(0).normal(size=(16, 16)).astype(np.float32)

        @jax.jit
        def both(state, batch):
            module = merge(model, state.params)
            entities = model.embedder.look_up(state.tables, batch)
            made, gates = states_and_gates(whole, state, batch)
            opened = [block.gate(made[number]).mean(axis=-1) for number, block in enumerate(module.backbone.layers())]
            tokens = module.stream(entities, batch)[0]
            return module(entities, batch, None), module.backbone.norm(made[-1]), made, tokens, gates, opened

        read, last, made, tokens, gates, opened = jax.device_get(both(state, batch))
    assert len(kernels) == 2
    assert [layer.shape for layer in made] == [(8, 12, 16)] * 3
    np.testing.assert_array_equal(made[0], tokens[:, model.layout(12).rows_of("state")])
    real = real_events(whole, batch)
    np.testing.assert_array_equal(real.sum(axis=1), LENGTHS)
    np.testing.assert_allclose(last[real], read[real], atol=2e-6)
    np.testing.assert_allclose(gates, opened, rtol=1e-6)


def test_event_rows_are_fused_events_where_states_and_actions_are_one_token():
    model = build_model(tiny(fused=True), SCHEMA, TASKS)
    layout = model.layout(12)
    assert [ROLES[role] for role in layout.roles[event_rows(layout)]] == ["event"] * 12


def test_labels_belong_to_their_rows():
    uc, nio = tiny(paradigm="uc"), tiny(fused=True, candidates=3)
    for config in (uc, nio):
        model, batch = build_model(config, SCHEMA, TASKS), random_batch(config, lengths=LENGTHS)
        labels = event_labels(model, batch)
        expected = batch.labels if config is uc else np.repeat(batch.labels[:, :1], 12, axis=1)
        np.testing.assert_array_equal(labels, expected)
    batch = random_batch(uc, lengths=LENGTHS)
    unread = batch._replace(weight=np.where(np.arange(12) < 10, 0, batch.weight))
    assert real_events(build_model(uc, SCHEMA, TASKS), unread)[:, :10].sum() == 0


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    prepare(SyntheticSource(4_000, users=40, items=40), folder / "data")
    config = Config(
        data=DataConfig(path=str(folder / "data"), events=8, paradigm="uc", batch_size=8, eval_batch_size=16),
        tokens=TokensConfig(embedding_dim=4),
        model=ModelConfig(width=8, heads=1, layers=1, windows=()),
        optim=OptimConfig(steps=4, warmup_steps=1),
        train=TrainConfig(log_every=4, eval_every=2, log_states=True, keep_compiled=False),
    )
    train(config, folder / "run", progress=False)
    return folder / "run"


def test_each_evaluation_logs_ranks_and_gates_of_one_batch(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ranks, gates = ([line for line in lines if f"{kind}/layer_0" in line] for kind in ("rank", "gate"))
    assert [line["step"] for line in ranks] == [line["step"] for line in gates] == [2, 4]
    assert set(ranks[0]) - {"step", "time"} == {"rank/tokens", "rank/layer_0"}
    assert set(gates[0]) - {"step", "time"} == {"gate/layer_0"}
    assert all(1 < line["rank/layer_0"] <= 8 for line in ranks)
    assert ranks[0]["rank/layer_0"] != ranks[1]["rank/layer_0"]
    assert 0.7 < gates[1]["gate/layer_0"] < 0.76  # it starts at 0.731


def test_every_event_is_read_once_and_the_report_is_of_those_drawn_by_its_seed(run):
    log = open_dataset(run.parent / "data").load("valid")
    labels = log.labels[log.flags & SCORED > 0]
    every = read_event_states(run, "valid", rows=len(labels), streams=0)
    assert list(every.layers) == ["tokens", "layer_0"]
    for number, task in enumerate(("click", "buy")):
        np.testing.assert_array_equal(np.sort(every.labels[task]), np.sort(labels[:, number]))

    report = collapse_report(run, "valid", rows=300, streams=0, seed=1, clusters=(8,))
    assert json.loads(json.dumps(report)) == report
    drawn = np.sort(np.random.default_rng(1).choice(len(labels), 300, replace=False))
    for name, states in every.layers.items():
        layer, found = states[drawn], report["layers"][name]
        assert found["effective_rank"] == effective_rank(singular_values(layer))
        for task, of_task in every.labels.items():
            information = cluster_information(layer, of_task[drawn], seed=1, clusters=(8,))[8]
            assert found["information"][task] == {"8": information._asdict()}
        assert np.square(found["spectrum"]).sum() == pytest.approx(layer.astype(float).var(axis=0).sum())


def test_more_rows_than_there_are_events_are_refused(run):
    with pytest.raises(InputError, match=r"2 streams of split 'valid' have \d+ event rows, and 999 are asked for"):
        read_event_states(run, "valid", rows=999, streams=2)
