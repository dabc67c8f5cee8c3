"""Plans of language models: published sizes, and the work of frozen weights."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import pytest

from tests.models.test_language_models import lm, model_of
from tests.worlds import mesh_of
from tokenrec.config import Config
from tokenrec.config.load import load_config
from tokenrec.data.pipeline import batch_shapes
from tokenrec.planner.describe import describe
from tokenrec.planner.flops import (
    Work,
    step_flops,
    step_work,
    trained_product_flops,
)
from tokenrec.planner.inputs import planned_inputs
from tokenrec.planner.memory import state_bytes
from tokenrec.planner.mesh_cost import expected_collectives, predict
from tokenrec.planner.planned_schema import resolve_schema
from tokenrec.planner.roofline import CHIPS
from tokenrec.sharding import with_batch_sharding
from tokenrec.state import TrainState, abstract_state
from tokenrec.tuning import group_of


# Gemma 3 Technical Report, table 1: 302 million in word vectors, 698 million besides.
# Qwen3-4B's card: 4.0 billion, of which 3.6 billion are no word vectors.
@pytest.mark.parametrize(
    ("name", "words", "layers"),
    [
        ("lrm_gemma3_1b", 301_989_888, 697_896_064),
        ("lrm_qwen3_4b", 388_956_160, 3_633_511_936),
    ],
)
def test_shipped_configs_have_the_published_sizes(name, words, layers, monkeypatch):
    monkeypatch.setenv("TOKENREC_DATA", "none")
    config = load_config(name)
    schema, origin = resolve_schema(config)
    assert origin.startswith("planned schema complete_journey.json")
    inputs = planned_inputs(config, schema, mesh_of(1, 1, 1))
    sizes = {"words": 0, "base": 0}
    for weight, leaf in inputs.state.params.items():
        if group_of(weight) in sizes:
            sizes[group_of(weight)] += leaf.size
    assert sizes == {"words": words, "base": layers}
    assert inputs.model.layout(config.data.events).length == 512


class Figures(NamedTuple):
    """Of a step on eight devices."""

    work: Work
    products: float
    device_flops: float
    state: TrainState
    tokens: int


def figures(config: Config) -> Figures:
    model, mesh = model_of(config), mesh_of(2, 2, 2)
    data = config.data
    shapes = batch_shapes(model.schema, data, batch_size=data.batch_size)[data.events]
    with jax.set_mesh(mesh):
        state = abstract_state(model)
        given = state, with_batch_sharding(shapes, mesh)
        products = trained_product_flops(model, *given)
    work = step_work(model, mesh, shapes)[0]
    tokens = data.batch_size * model.layout(data.events).length
    return Figures(work, products, step_flops(model, mesh, shapes, work), state, tokens)


@pytest.fixture(scope="module")
def found() -> dict[str, Figures]:
    """Figures by `tuning.method`."""
    return {
        method: figures(
            lm(
                "gemma3",
                prompt=("user", "history", "||", "title", "candidate"),
                model={"needed_rows": False, "remat": "dots", "dtype": "bfloat16"},
                tuning={"method": method, "rank": 2},
                candidates=2,
            )
        )
        for method in ("all", "frozen", "lora")
    }


def test_a_product_with_a_frozen_weight_has_no_gradient_of_the_weight(found):
    trained, frozen, lora = (found[name] for name in ("all", "frozen", "lora"))
    projections = sum(
        leaf.size
        for name, leaf in trained.state.params.items()
        if group_of(name) == "base" and "norm" not in name
    )
    one_product = 2 * projections * trained.tokens
    assert trained.products - frozen.products == one_product
    # Three times the forward pass has gradients of raw features too, which are few.
    assert trained.work.model_flops == 3 * trained.work.forward_flops
    saved = trained.work.model_flops - frozen.work.model_flops
    assert one_product <= saved < 1.01 * one_product
    assert frozen.work.forward_flops == trained.work.forward_flops
    # Adapters are products of their own, all of which are trained.
    extra = lora.work.forward_flops - frozen.work.forward_flops
    assert extra > 0
    assert lora.work.model_flops - frozen.work.model_flops == 3 * extra
    # A device computes none of the dropped products either: an eighth each, but those
    # of the one head of keys and values, which both devices of `tensor` compute.
    saved = trained.device_flops - frozen.device_flops
    assert one_product / 8 <= saved < one_product / 4


def test_frozen_weights_take_their_own_bytes_and_no_others(found, monkeypatch):
    monkeypatch.setitem(CHIPS, jax.devices()[0].device_kind, CHIPS["TPU v5 lite"])
    mesh = mesh_of(2, 2, 2)
    states = {method: each.state for method, each in found.items()}
    base = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape))
        for name, leaf in states["all"].params.items()
        if group_of(name) in ("base", "words")
    )
    trained, frozen = state_bytes(states["all"]), state_bytes(states["frozen"])
    # bfloat16 in place of float32, and none of Adam's two moments.
    assert trained["weights"] - frozen["weights"] == 2 * base
    assert trained["optimizer"] - frozen["optimizer"] == 2 * 4 * base
    # By formula, no gradients, and none that are scattered or summed.
    config = lm("gemma3", tuning={"method": "frozen"})
    costs = {
        method: predict(config, states[method], 1e12, 64, mesh)
        for method, config in {"all": lm("gemma3"), "frozen": config}.items()
    }
    assert costs["all"].bytes - costs["frozen"].bytes == (2 + 4 + 8) * base
    kinds = {
        one.kind: one.size
        for one in expected_collectives(config, states["frozen"], 64, mesh)
    }
    both = {
        one.kind: one.size
        for one in expected_collectives(lm("gemma3"), states["all"], 64, mesh)
    }
    assert kinds["all-gather"] == both["all-gather"]
    # Makers, which are trained either way, are most of what is left: measured .56.
    assert kinds["reduce-scatter"] < 0.6 * both["reduce-scatter"]


def test_describe_counts_one_forward_pass_whatever_is_trained():
    config = load_config("lrm_gemma3_1b", ["tuning.method=frozen"])
    per_sample = describe(config, resolve_schema(config)[0])["flops_per_example"]
    # Two FLOPs a weight of the layers and token, and those of attention; the last layer
    # computes read-outs alone.
    assert per_sample == pytest.approx(2 * 697.9e6 * 512, rel=0.02)
