"""The PyTorch peers of whole steps compute what our models compute.

Those that need PyTorch are skipped without it.
"""

import dataclasses
import importlib.util
import json
import os

import jax
import numpy as np
import pytest

from benchmarks import step_cases
from benchmarks.peers import step, stream_plan
from tokenrec.config import MeshConfig
from tokenrec.config.load import load_config
from tokenrec.config.validate import validate
from tokenrec.errors import InputError
from tokenrec.planner.planned_schema import resolve_schema
from tokenrec.sharding import make_mesh, to_devices
from tokenrec.state import build_model, init_state
from tokenrec.step import inverses, loss_fn, step_inputs

pytestmark = [
    # PyTorch's own compiler imports a module of its own that uses what PyTorch has
    # deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    # PyTorch's own Adagrad makes sparse tensors without saying whether to check them.
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
TINY = {"width": 16, "heads": 2, "layers": 3, "ffn_width": 24}


@pytest.fixture(autouse=True)
def mesh():
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        yield


def shipped(name, windows):
    """A shipped config of a pod, cut to a toy: all kinds of its features stay."""
    config = load_config(name, [])
    schema = resolve_schema(config)[0].without(config.data.exclude)
    # A table of more rows than `torch_features.LONG` has sparse gradients.
    rows = {name: min(rows, 50) for name, rows in schema.tables.items()}
    schema = dataclasses.replace(
        schema,
        tasks=tuple(task for task in schema.tasks if task.name in config.data.tasks),
        tables=rows | {"video_id": 100_001},
    )
    config = dataclasses.replace(
        config,
        mesh=MeshConfig(),
        data=dataclasses.replace(config.data, events=12, overlap=2, batch_size=2),
        tokens=dataclasses.replace(config.tokens, hidden=20),
    )
    small = TINY | {"windows": windows, "dtype": "float32", "remat": "none"}
    return step_cases.with_model(config, **small), schema


def nio(**model):
    config = step.sized(step_cases.stream_cases()[step.CASE], 2, 12)
    small = TINY | {"windows": (8, 4)} | model
    return step_cases.with_model(config, **small), step_cases.stream_schema()


CASES = {
    "NIO": lambda: nio(),
    "NIO, every token": lambda: nio(needed_rows=False),
    "NIO, full": lambda: nio(windows=()),
    "DIN": lambda: nio(kind="din", windows=()),
    "kuairand_27k": lambda: shipped("kuairand_27k", (8, 4)),
    "lrm_1b": lambda: shipped("lrm_1b", ()),
}


def spec(config, schema):
    tasks = tuple(task.name for task in schema.tasks)
    return build_model(validate(config), schema, tasks)


def test_a_plan_has_the_tokens_that_are_needed_and_their_visible_pairs():
    config, schema = nio()
    model = spec(config, schema)
    plan = stream_plan.plan_stream(model)
    # 26 user tokens, 12 events, a separator behind each, the target.
    assert plan.length == 41
    assert [len(layer) for layer in plan.inputs] == [41, 11, 4, 1]
    assert [layer.kind for layer in plan.layers] == ["mask", "mask", "all"]
    full = stream_plan.plan_stream(spec(*nio(windows=(), needed_rows=False)))
    assert {layer.kind for layer in full.layers} == {"causal"}
    # The second layer: a window of 8, and no query sees a user token.
    mask = plan.layers[1].mask()
    assert mask.shape == (4, 11)
    assert mask.sum(axis=1).tolist() == [8, 8, 8, 8]


def test_a_plan_refuses_streams_that_the_peers_do_not_compute():
    config, schema = nio()
    several = dataclasses.replace(
        config, data=dataclasses.replace(config.data, candidates=3)
    )
    with pytest.raises(InputError, match=r"data\.candidates=1"):
        stream_plan.plan_stream(spec(several, schema))


def test_uneven_positions_are_refused():
    assert stream_plan.as_slice(np.array([3, 5, 7])) == slice(3, 8, 2)
    assert stream_plan.as_slice(np.array([4])) == slice(4, 5, 1)
    with pytest.raises(InputError, match=r"needed_rows=False"):
        stream_plan.as_slice(np.array([0, 1, 3]))


@pytest.mark.parametrize("case", CASES)
def test_a_peer_has_our_loss_and_our_gradients(case):
    torch = pytest.importorskip("torch")
    from benchmarks.peers.torch_din import TorchDIN
    from benchmarks.peers.torch_tokenformer import TorchTokenFormer
    from benchmarks.peers.torch_train import count_parameters, loss_of, to_torch
    from benchmarks.peers.torch_weights import copy_weights

    config, schema = CASES[case]()
    model = spec(config, schema)
    state = init_state(model, 0)
    batch = step_cases.random_batch(config, schema, np.random.default_rng(0))
    inputs = step_inputs(model, state, to_devices(batch, jax.sharding.get_mesh()))
    loss, (dense, rows) = jax.value_and_grad(loss_fn, argnums=(0, 1))(
        state.params,
        inputs.rows,
        model,
        inverses(inputs.unique),
        inputs.batch,
        inputs.counts,
        None,
    )

    peer = (TorchDIN if config.model.kind == "din" else TorchTokenFormer)(model)
    copy_weights(peer, state.params, state.tables)
    tensors = to_torch(batch, "cpu")
    peer_loss = loss_of(peer(tensors), tensors["labels"])
    peer_loss.backward()
    # Float32 rounding. Measured: 4e-7 for losses of about 1.5, and for gradients.
    assert peer_loss.item() == pytest.approx(float(loss), abs=3e-6)
    np.testing.assert_allclose(
        peer.head.weight.grad.numpy().T, dense["head/kernel"], atol=3e-6
    )
    # The gradients of all table rows together: nothing is lost on the way to a table.
    ours = sum(float(np.square(g).sum()) for g in rows.values())
    tables = peer.tokens.tables
    short = tables.short.weight.grad.square().sum().item()
    long = 0.0
    if tables.long is not None:
        assert tables.long.weight.grad.is_sparse
        long = tables.long.weight.grad.coalesce().values().square().sum().item()
    assert short + long == pytest.approx(ours, rel=1e-4)

    counts = count_parameters(peer)
    # DIN does not read the two separators.
    unread = 2 * config.model.width if config.model.kind == "din" else 0
    assert counts["dense"] == sum(w.size for w in state.params.values()) - unread
    assert counts["tables"] == sum(schema.tables.values()) * config.tokens.embedding_dim
    assert torch.isfinite(peer_loss)


def test_a_peer_learns_and_its_blocks_compute_the_same_again():
    torch = pytest.importorskip("torch")
    from benchmarks.peers.torch_tokenformer import TorchTokenFormer
    from benchmarks.peers.torch_train import Trainer

    config, schema = shipped("kuairand_27k", (8, 4))
    model = spec(config, schema)
    batch = step_cases.random_batch(config, schema, np.random.default_rng(0))
    losses = []
    for recompute in (False, True):
        torch.manual_seed(0)
        peer = TorchTokenFormer(model, recompute=recompute)
        trainer = Trainer(peer, config.optim, [batch])
        losses.append([trainer.train_step().item() for _ in range(8)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < 0.8 * losses[0][0]


def test_the_benchmark_compares_and_times_all_models(tmp_path):
    pytest.importorskip("torch")
    threads = str(len(os.sched_getaffinity(0)))
    out = tmp_path / "peers"
    sizes = ["--batch", "2", "--events", "20", "--repeats", "1", "--eager"]
    step.main([*sizes, "--threads", threads, "--out", str(out)])
    result = json.loads(out.with_suffix(".json").read_text())
    assert result["versions"]["torch"]
    assert [row["model"] for row in result["rows"]] == [
        "tokenrec TokenFormer",
        "tokenrec DIN",
        "torch TokenFormer, needed tokens",
        "torch TokenFormer, every token",
        "torch DIN",
    ]
    for row in result["rows"]:
        assert row["train, samples/s"] > 0
        assert row["eval, this / ours"] > 0
    assert result["rows"][0]["parameters"] == result["rows"][2]["parameters"]


def test_the_benchmark_names_the_extra_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install '\.\[peers\]'"):
        step.main(["--out", str(tmp_path / "peers")])
