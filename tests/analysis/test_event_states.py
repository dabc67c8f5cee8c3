"""Event states of a run, its report and its log against what the model computes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.worlds import SCHEMA, TASKS, random_batch, tiny
from tokenrec.analysis import event_states
from tokenrec.analysis.event_states import (
    collapse_report,
    event_labels,
    event_positions,
    read_event_states,
    real_events,
    states_and_gates,
    with_all_positions,
)
from tokenrec.analysis.information import cluster_information
from tokenrec.analysis.rank import effective_rank, singular_values
from tokenrec.analysis.watch import make_state_logger
from tokenrec.checkpoint.run_folder import OpenedRun, create_or_check_run, open_model
from tokenrec.config import Config, DataConfig, ModelConfig, TokensConfig, TrainConfig
from tokenrec.config.validate import validate
from tokenrec.data.batch import HostBatch
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.interaction_log import SCORED
from tokenrec.data.pipeline import eval_batches
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import InputError
from tokenrec.sharding import make_mesh, to_devices, to_host
from tokenrec.state import (
    ModelSpec,
    TrainState,
    abstract_state,
    bind_params,
    build_model,
)
from tokenrec.tokens.layout import ROLES

STREAMS = 16

# Two programs compute the same float32 values, but may fuse and order sums differently
# on another processor. States are at most 6.3, where neighbouring floats lie 4.8e-7
# apart: this is 10 such steps. Measured on an AMD EPYC: 0.
TWO_PROGRAMS = 5e-6
# The same of means and ranks of such states, relative. Measured: 2e-7 at most.
TWO_PROGRAMS_RELATIVE = 1e-5


class Measured(NamedTuple):
    """A run, and the states and gates of its first batch of valid."""

    workdir: Path
    model: ModelSpec
    dataset: Dataset
    mesh: Mesh
    state: TrainState
    host: HostBatch
    states: list[jax.Array]
    gates: np.ndarray


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A user-centric run with a full and a sliding layer.

    Its only checkpoint, of step 7, has random weights instead of trained ones.
    """
    folder = tmp_path_factory.mktemp("run")
    prepare(SyntheticSource(2_000, users=40, items=40), folder / "data")
    config = Config(
        data=DataConfig(
            path=str(folder / "data"),
            events=8,
            paradigm="uc",
            batch_size=8,
            eval_batch_size=STREAMS,
        ),
        tokens=TokensConfig(embedding_dim=4, maker="linear"),
        model=ModelConfig(
            width=8, heads=1, layers=2, windows=(4,), positions="additive"
        ),
    )
    create_or_check_run(config, open_dataset(folder / "data"), folder / "run")
    model, dataset = open_model(folder / "run", None)
    mesh, random = make_mesh(config.mesh), np.random.default_rng(0)

    def drawn(leaf):
        return jax.device_put(
            random.normal(0, 0.4, leaf.shape).astype(leaf.dtype), leaf.sharding
        )

    with jax.set_mesh(mesh):
        state = jax.tree.map(drawn, abstract_state(model))
        host, _ = next(eval_batches(dataset, config.data, "valid", limit=STREAMS))
        look = jax.jit(functools.partial(states_and_gates, with_all_positions(model)))
        states, gates = look(state, to_devices(host.batch, mesh))
    with pytest.MonkeyPatch.context() as patched:
        steps = {"latest": 7}
        patched.setattr(
            event_states,
            "open_run",
            lambda _, name, data: OpenedRun(model, dataset, steps[name], state),
        )
        yield Measured(
            folder / "run",
            model,
            dataset,
            mesh,
            state,
            host,
            states,
            np.stack(to_host(gates)),
        )


def test_states_and_gates_equal_those_that_the_model_itself_computes(
    run,
):
    """The model computes only the positions that it needs; these are equal.

    The read-outs of UC are positions of events.
    """

    @jax.jit
    def computed(state, batch, states):
        module = bind_params(run.model, state.params)
        entities = run.model.embedder.look_up(state.tables, batch)
        opened = [
            block.gate(entered)
            for block, entered in zip(module.backbone.layers(), states, strict=False)
        ]
        tokens, layout = module.make_stream(entities, batch)
        placed = tokens + module.backbone.places(
            layout.rope_positions(batch.valid), layout.roles
        )
        return (
            module(entities, batch, None),
            module.backbone.norm(states[-1]),
            placed,
            opened,
        )

    with jax.set_mesh(run.mesh):
        found = computed(run.state, to_devices(run.host.batch, run.mesh), run.states)
    read, last, placed, opened = to_host(found)
    assert [layer.shape for layer in run.states] == [(STREAMS, 8, 8)] * 3
    np.testing.assert_allclose(
        run.states[0],
        placed[:, run.model.layout(8).positions_of("state")],
        atol=TWO_PROGRAMS,
    )
    real = real_events(run.model, run.host.batch)
    assert real.any()
    np.testing.assert_allclose(last[real], read[real], atol=TWO_PROGRAMS)
    np.testing.assert_allclose(
        run.gates, np.mean(opened, axis=-1), rtol=TWO_PROGRAMS_RELATIVE
    )
    assert np.ptp(run.gates[0]) > 0.01


def test_an_evaluation_logs_ranks_and_gates_of_its_first_batch(run):
    with jax.set_mesh(run.mesh):
        logged = make_state_logger(run.model, run.dataset, run.mesh)(run.state)
    real = real_events(run.model, run.host.batch)
    ranks, gates = logged["rank"], logged["gate"]
    assert list(ranks) == ["tokens", "layer_0", "layer_1"]
    assert list(gates) == ["layer_0", "layer_1"]
    expected = [
        effective_rank(singular_values(np.asarray(layer)[real])) for layer in run.states
    ]
    np.testing.assert_allclose(
        list(ranks.values()), expected, rtol=TWO_PROGRAMS_RELATIVE
    )
    np.testing.assert_allclose(
        list(gates.values()),
        [gate[real].mean() for gate in run.gates],
        rtol=TWO_PROGRAMS_RELATIVE,
    )


def test_every_event_is_read_once_and_the_report_is_of_those_drawn_by_its_seed(run):
    log = open_dataset(run.workdir.parent / "data").load("valid")
    labels = log.labels[log.flags & SCORED > 0]
    every = read_event_states(
        run.workdir, "valid", checkpoint="latest", rows=len(labels), streams=0
    )
    assert (every.step, list(every.layers)) == (7, ["tokens", "layer_0", "layer_1"])
    for number, task in enumerate(("click", "buy")):
        np.testing.assert_array_equal(
            np.sort(every.labels[task]), np.sort(labels[:, number])
        )

    choice = {"checkpoint": "latest", "rows": 100, "streams": 0, "seed": 1}
    report = collapse_report(run.workdir, "valid", clusters=(8,), **choice)
    assert json.loads(json.dumps(report)) == report
    drawn = np.sort(np.random.default_rng(1).choice(len(labels), 100, replace=False))
    for name, states in every.layers.items():
        layer, found = states[drawn], report["layers"][name]
        assert found["effective_rank"] == effective_rank(singular_values(layer))
        for task, of_task in every.labels.items():
            information = cluster_information(
                layer, of_task[drawn], seed=1, clusters=(8,)
            )[8]
            assert found["information"][task] == {"8": information._asdict()}
        assert np.square(found["spectrum"]).sum() == pytest.approx(
            layer.astype(float).var(axis=0).sum()
        )


def test_states_stand_beside_their_labels(run):
    real = real_events(run.model, run.host.batch)
    found = read_event_states(
        run.workdir, "valid", checkpoint="latest", rows=int(real.sum()), streams=STREAMS
    )
    for layer, states in zip(found.layers.values(), run.states, strict=True):
        np.testing.assert_array_equal(layer, np.asarray(states)[real])
    for task, expected in zip(
        ("click", "buy"), run.host.batch.labels[real].T, strict=True
    ):
        np.testing.assert_array_equal(found.labels[task], expected)


def test_more_rows_than_there_are_events_are_refused(run):
    with pytest.raises(
        InputError,
        match=r"2 streams of split 'valid' have \d+ events, but rows=999 are asked for",
    ):
        read_event_states(
            run.workdir, "valid", checkpoint="latest", rows=999, streams=2
        )


def test_labels_belong_to_their_rows():
    uc, nio = tiny(paradigm="uc"), tiny(fused=True, candidates=3)
    for config in (uc, nio):
        model, batch = build_model(config, SCHEMA, TASKS), random_batch(config)
        labels = event_labels(model, batch)
        expected = (
            batch.labels if config is uc else np.repeat(batch.labels[:, :1], 12, axis=1)
        )
        np.testing.assert_array_equal(labels, expected)


def test_an_event_counts_where_it_is_scored_and_in_a_history_where_it_stands():
    uc, nio = (
        build_model(tiny(paradigm=paradigm), SCHEMA, TASKS)
        for paradigm in ("uc", "nio")
    )
    lengths = [0, 1, 3, 5, 8, 11, 12, 12]
    batch = random_batch(uc.config, lengths=lengths)
    np.testing.assert_array_equal(real_events(uc, batch), batch.valid)
    unread = batch._replace(weight=np.where(np.arange(12) < 10, 0, batch.weight))
    assert real_events(uc, unread)[:, :10].sum() == 0
    np.testing.assert_array_equal(
        real_events(nio, random_batch(nio.config, lengths=lengths)), batch.valid
    )


def test_fused_events_stand_for_themselves():
    model = build_model(tiny(fused=True), SCHEMA, TASKS)
    layout = model.layout(12)
    assert [ROLES[role] for role in layout.roles[event_positions(layout)]] == [
        "event"
    ] * 12


def test_rivals_have_no_event_states():
    model = build_model(tiny(model={"kind": "sasrec", "windows": ()}), SCHEMA, TASKS)
    with pytest.raises(
        InputError,
        match=r"model\.kind='sasrec': event states exist for model\.kind='tokenformer'",
    ):
        with_all_positions(model)
    with pytest.raises(
        InputError, match=r"train\.log_states=True with model\.kind='sasrec'"
    ):
        validate(
            Config(
                model=ModelConfig(kind="sasrec", windows=()),
                train=TrainConfig(log_states=True),
            )
        )


def test_no_rows_are_refused(run):
    with pytest.raises(InputError, match="--rows 0"):
        read_event_states(run.workdir, "valid", checkpoint="latest", rows=0)
