"""Programs of retrieval find what evaluation finds, for heads that no artifact covers."""

import jax
import numpy as np
import pytest

from tests.serving.retrieval_worlds import basket_config, opened_run, prepare_baskets
from tests.worlds import one_device
from tokenrec.config import HeadConfig, ModelConfig
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.pipeline import eval_batches
from tokenrec.evaluation.evaluate import make_retrieval_step
from tokenrec.serving.export.retrieval_programs import (
    CATALOGUE,
    catalogue_weights,
    make_retrieval_programs,
)
from tokenrec.serving.export.served_model import served_weights, serving_model
from tokenrec.sharding import to_devices


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_baskets(tmp_path_factory.mktemp("data") / "baskets")


def full_softmax(data):
    """Requests with a query, whose items have a bonus."""
    return basket_config(data, HeadConfig(copy=True, top_k=5), candidates=1)


def spread_tables(data):
    """Tables in storage order, untied item vectors, and a backbone that reads ages."""
    head = HeadConfig(negatives=8, copy=True, tied=False, top_k=5)
    config = basket_config(data, head, paradigm="uc", overlap=2)
    config.tokens.replicate_rows = 10
    config.model = ModelConfig(
        kind="hstu", width=8, heads=1, layers=2, windows=(), time_bias=True
    )
    return config


@pytest.mark.parametrize("make", [full_softmax, spread_tables])
def test_programs_find_what_evaluation_finds(data, make):
    config = make(data)
    run, _ = opened_run(config, answers=0)
    mesh = one_device()
    ages = reads_event_ages(config.model)
    with jax.set_mesh(mesh):
        host, _ = next(eval_batches(run.dataset, config.data, "test", ages=ages))
        step = make_retrieval_step(run.model, run.dataset)
        expected = jax.device_get(step(run.state, to_devices(host.batch, mesh)))
        catalogue = catalogue_weights(run)
    model = serving_model(run.model)
    weights = served_weights(run.model, run.state) | {CATALOGUE: catalogue}
    count = run.dataset.known_items
    programs = make_retrieval_programs(model, catalogue, count, max_k=5)
    batch = host.batch
    inputs = {"valid": batch.valid, "items": batch.items}
    parts = {"user": batch.user, "state": batch.state, "action": batch.action}
    for name, (ids, dense) in (parts | {"query": batch.target}).items():
        inputs |= {f"{name}_ids": ids, f"{name}_dense": dense}
    if ages:
        inputs["ages"] = batch.ages
    shapes = programs["prefill"].inputs(len(batch.valid), None)
    kept = jax.jit(programs["prefill"].function)(
        weights, {name: inputs[name] for name in shapes}
    )
    found = jax.jit(programs["retrieve"].function)(weights, kept)
    is_request = (batch.goals >= 0).any(axis=(1, 2))
    assert is_request.sum() > 4
    # float32 sums in another order. Measured: 2.4e-7.
    np.testing.assert_allclose(
        found["scores"][is_request], expected.scores[is_request], rtol=0, atol=1e-5
    )
    np.testing.assert_array_equal(
        found["items"][is_request], expected.items[is_request]
    )
    # The table of items is no weight beside the vectors that were made of it.
    rows = sum(len(table) for table in weights["tables"].values())
    assert rows == sum(run.dataset.schema.tables.values())
