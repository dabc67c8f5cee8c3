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
    layer_gates,
    layer_states,
    read_event_states,
    real_events,
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
from tokenrec.train import train

LENGTHS = [0, 1, 3, 5, 8, 11, 12, 12]


@pytest.mark.parametrize("paradigm", ["uc", "nio"])
def test_states_of_read_rows_are_those_that_the_model_itself_computes(paradigm):
    """The model computes needed rows alone; what both compute is equal, and the read-outs of UC are event rows."""
    mesh, config = one_device(), tiny(paradigm=paradigm, fused=paradigm == "nio", model={"layers": 2, "windows": (4,)})
    with jax.set_mesh(mesh):
        model = build_model(config, SCHEMA, TASKS)
        batch = place(random_batch(config, lengths=LENGTHS), mesh)
        state, whole = init_state(model, 0), all_rows(model)

        @jax.jit
        def both(state, batch):
            module = merge(model, state.params)
            entities = model.embedder.look_up(state.tables, batch)
            read = module(entities, batch, None)
            made = layer_states(whole, state, batch)
            return read, module.backbone.norm(made[-1]), made, module.stream(entities, batch)[0]

        read, last, made, tokens = jax.device_get(both(state, batch))
    assert [layer.shape for layer in made] == [(8, 12, 16)] * 3
    layout = model.layout(12)
    rows = layout.rows_of("state" if paradigm == "uc" else "event")
    np.testing.assert_array_equal(made[0], tokens[:, rows])
    if paradigm == "uc":
        real = real_events(whole, batch)
        np.testing.assert_array_equal(real.sum(axis=1), LENGTHS)
        np.testing.assert_allclose(last[real], read[real], atol=2e-6)


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


def test_gates_start_at_the_sigmoid_of_their_bias():
    mesh, config = one_device(), tiny(fused=True, model={"gate_bias": 2.0, "layers": 2, "windows": (4,)})
    with jax.set_mesh(mesh):
        model = all_rows(build_model(config, SCHEMA, TASKS))
        batch = place(random_batch(config), mesh)
        gates = jax.jit(lambda state, batch: layer_gates(model, state, batch))(init_state(model, 0), batch)
    assert len(gates) == 2
    np.testing.assert_allclose(np.stack(gates), 1 / (1 + np.exp(-2)), rtol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    prepare(SyntheticSource(4_000, users=40, items=40), folder / "data")
    config = Config(
        data=DataConfig(path=str(folder / "data"), events=8, paradigm="uc", batch_size=8, eval_batch_size=16),
        tokens=TokensConfig(embedding_dim=4),
        model=ModelConfig(width=8, heads=1, layers=2, windows=(4,)),
        optim=OptimConfig(steps=4, warmup_steps=1),
        train=TrainConfig(log_every=4, eval_every=2, log_states=True, keep_compiled=False),
    )
    train(config, folder / "run", progress=False)
    return folder / "run"


def test_each_evaluation_logs_ranks_and_gates_of_one_batch(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ranks, gates = ([line for line in lines if f"{kind}/layer_1" in line] for kind in ("rank", "gate"))
    assert [line["step"] for line in ranks] == [line["step"] for line in gates] == [2, 4]
    assert set(ranks[0]) - {"step", "time"} == {"rank/tokens", "rank/layer_0", "rank/layer_1"}
    assert set(gates[0]) - {"step", "time"} == {"gate/layer_0", "gate/layer_1"}
    assert all(1 < line["rank/layer_1"] <= 8 for line in ranks)
    assert ranks[0]["rank/layer_1"] != ranks[1]["rank/layer_1"]
    assert 0.7 < gates[1]["gate/layer_0"] < 0.76  # it starts at 0.731


def test_states_are_drawn_by_seed_each_event_once(run):
    first, again, other = (read_event_states(run, "valid", rows=200, seed=seed) for seed in (0, 0, 1))
    assert list(first.layers) == ["tokens", "layer_0", "layer_1"]
    assert all(layer.shape == (200, 8) for layer in first.layers.values())
    np.testing.assert_array_equal(first.layers["layer_1"], again.layers["layer_1"])
    assert not np.array_equal(first.layers["layer_1"], other.layers["layer_1"])
    log = open_dataset(run.parent / "data").load("valid")
    labels = log.labels[log.flags & SCORED > 0]
    every = read_event_states(run, "valid", rows=len(labels), streams=0)
    for number, task in enumerate(("click", "buy")):
        np.testing.assert_array_equal(np.sort(every.labels[task]), np.sort(labels[:, number]))
    with pytest.raises(InputError, match=f"have {len(labels)} event rows, and {len(labels) + 1} are asked"):
        read_event_states(run, "valid", rows=len(labels) + 1, streams=0)


def test_the_report_is_of_these_states_and_can_stand_in_a_file(run):
    states = read_event_states(run, "valid", rows=300)
    report = collapse_report(run, "valid", rows=300, clusters=(8,))
    assert json.loads(json.dumps(report)) == report
    for name, layer in states.layers.items():
        values = singular_values(layer)
        assert report["layers"][name]["effective_rank"] == effective_rank(values)
        for task, labels in states.labels.items():
            found = cluster_information(layer, labels, seed=0, clusters=(8,))[8]
            assert report["layers"][name]["information"][task] == {"8": found._asdict()}
        variances = np.square(report["layers"][name]["spectrum"])
        assert variances.sum() == pytest.approx(layer.astype(float).var(axis=0).sum())
