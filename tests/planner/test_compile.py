"""Train steps compiled for described pods, and the figures of their programs."""

import dataclasses
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from tests.worlds import FEW_FEATURES, SCHEMA, TABLES, TASKS, mesh_of
from tokenrec.config import MeshConfig
from tokenrec.config.load import load_config, shipped_configs
from tokenrec.config.validate import validate
from tokenrec.data.pipeline import batch_shapes
from tokenrec.errors import InputError
from tokenrec.ops.attention import splash, splash_kernel
from tokenrec.ops.attention.pattern import causal_pattern
from tokenrec.planner.compile import compile_train_step
from tokenrec.planner.compiled_program import program_figures
from tokenrec.planner.flops import (
    Work,
    attention_work,
    device_flops,
    product_flops,
    step_flops,
    step_work,
)
from tokenrec.planner.topology import TOPOLOGIES, topology_mesh
from tokenrec.sharding import RULES
from tokenrec.state import abstract_state, build_model

needs_libtpu = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
]


def tpu_compiler(function):
    for mark in needs_libtpu:
        function = mark(function)
    return function


# A stream per impression, with one token per event.
IMPRESSIONS = {
    "data.paradigm": "nio",
    "data.overlap": 0,
    "tokens.fused": True,
    "tokens.user_tokens": 1,
    "tokens.embedding_dim": 8,
    "tokens.maker": "linear",
    "model.windows": (8,),
}


def two_layers(name, **fields):
    """Reduce a shipped config to one full and one sliding layer.

    Its streams are just above the 128 tokens from which splash is used.
    """
    overrides = [f"{field}={value}" for field, value in fields.items()]
    config = load_config(str(shipped_configs()[name]), overrides)
    events = 132 if config.tokens.fused else 68
    data = dataclasses.replace(
        config.data, events=events, buckets=(), batch_size=8, exclude=(), tasks={}
    )
    model = dataclasses.replace(
        config.model, layers=2, windows=config.model.windows[-1:], dtype="bfloat16"
    )
    return validate(dataclasses.replace(config, data=data, model=model))


def model_and_shapes(config, features=SCHEMA):
    schema = dataclasses.replace(features, items=TABLES["video"], levels=(6, 5, 4))
    model = build_model(config, schema, TASKS)
    return model, batch_shapes(schema, config.data, batch_size=config.data.batch_size)[
        config.data.events
    ]


# One of each kind of stream; benchmarks/configs_topology.py and benchmarks/pods.py
# compile all configs.
SMALL = (
    pytest.param("amazon_generative", marks=pytest.mark.slow),
    "complete_journey",
)


@pytest.mark.parametrize("name", SMALL)
@tpu_compiler
def test_every_config_compiles_for_a_tpu_with_splash(name):
    config = two_layers(name, **{"tokens.maker": "linear"})
    # Attention is the matter here: fewer features compile in less time.
    model, shapes = model_and_shapes(config, FEW_FEATURES)
    mesh = topology_mesh("v5e:2x2", MeshConfig(fsdp=2))
    work, layers = step_work(model, mesh, shapes)
    found = program_figures(compile_train_step(model, mesh, shapes), mesh, work)
    kernels = [
        kernel for kernel in found["custom_calls"] if kernel.startswith("splash")
    ]
    if model.config.head.retrieval == "semantic_id":
        # Codes continue every event of the stream, which the kernels cannot express.
        assert "the last shared tokens" in layers[0]["refused"]["splash"]
        assert not kernels
    else:
        assert layers[0]["implementation"] == "splash", layers[0]["refused"]
        # Forward, gradient of q, gradients of k and v.
        assert len(kernels) == 3, kernels
    assert 0 < found["headroom"] < 1
    assert found["flops"] > found["model_flops"] > 0
    with jax.set_mesh(mesh):
        state = abstract_state(model)
    # The state is donated, so that the new state takes its place.
    held = sum(
        4 * math.prod(leaf.sharding.shard_shape(leaf.shape))
        for leaf in jax.tree.leaves(state)
    )
    assert found["bytes"]["aliased"] >= held
    assert {"all-gather", "all-reduce"} <= set(found["collective_bytes"])
    assert 0 < found["mfu_bound"] < 1


@tpu_compiler
def test_data_lies_across_slices_and_their_traffic_is_counted():
    mesh = topology_mesh("v5e:2x2", MeshConfig(fsdp=2, tensor=2), slices=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "context": 1, "tensor": 2}
    for part, devices in enumerate(mesh.devices):
        assert {device.slice_index for device in devices.flat} == {part}

    def mean(x):
        return jnp.sum(x, axis=0)

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(
            (8, 1024),
            jnp.float32,
            sharding=jax.NamedSharding(mesh, RULES("batch", None)),
        )
        compiled = (
            jax.jit(mean, out_shardings=jax.NamedSharding(mesh, RULES(None)))
            .lower(x)
            .compile()
        )
    found = program_figures(compiled, mesh, Work(0.0, 0.0, 0.0))
    # A ring of two moves 2 x (1 / 2) of 1024 floats: inside a slice over fsdp, and
    # between the slices over data.
    assert found["collective_bytes"] == {
        "all-reduce": 4096,
        "all-reduce across slices": 4096,
    }
    assert found["roofline"].network_seconds > 0


@tpu_compiler
@pytest.mark.parametrize(
    ("topology", "shape"),
    [("v5p:4x4x4", (8, 1, 8)), ("v6e:4x4", (2, 4, 2)), ("tpu7x:2x2x1", (2, 2, 2))],
)
def test_axes_that_cut_through_the_torus_are_laid_out(topology, shape):
    mesh = topology_mesh(topology, MeshConfig(*shape))
    assert tuple(mesh.shape[axis] for axis in ("data", "fsdp", "tensor")) == shape
    assert len({device.id for device in mesh.devices.flat}) == math.prod(shape)


@tpu_compiler
@pytest.mark.parametrize(
    ("topology", "mesh", "slices", "message"),
    [
        (
            "v5e:4x4x4",
            MeshConfig(),
            1,
            "topology='v5e:4x4x4' is not known; did you mean",
        ),
        ("v5p:4x4", MeshConfig(), 1, "topology='v5p:4x4' is not known; did you mean"),
        ("v5f:4x4", MeshConfig(), 1, "did you mean 'v5e:4x4'"),
        ("v5e:3x5", MeshConfig(), 1, "topology='v5e:3x5', refused by libtpu"),
        ("v5e:2x2", MeshConfig(fsdp=3), 1, "do not multiply to 4 devices"),
        ("v5e:2x2", MeshConfig(fsdp=8), 2, "data must be a multiple of 2"),
    ],
)
def test_a_wrong_topology_or_mesh_is_named(topology, mesh, slices, message):
    with pytest.raises(InputError, match=message):
        topology_mesh(topology, mesh, slices)


@tpu_compiler
def test_every_topology_that_is_suggested_exists():
    for topology in TOPOLOGIES:
        cores = 2 if topology.startswith("tpu7x") else 1
        sizes = map(int, topology.partition(":")[2].split("x"))
        assert topology_mesh(topology, MeshConfig()).size == cores * math.prod(sizes), (
            topology
        )


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(InputError, match=r"needs libtpu; run `pip install .*tpu"):
        topology_mesh("v5e:2x2", MeshConfig())


def test_products_in_a_scan_count_as_often_as_they_run_and_attention_not_at_all():
    def scanned(x, w):
        return jax.lax.scan(lambda carry, _: (carry @ w, None), x, None, length=3)[0]

    x, w = jnp.zeros((5, 7)), jnp.zeros((7, 7))
    assert product_flops(jax.make_jaxpr(scanned)(x, w).jaxpr) == 3 * 2 * 5 * 7 * 7
    with jax.set_mesh(mesh_of(1, 1, 1)):
        hidden = jax.make_jaxpr(
            jax.shard_map(scanned, in_specs=jax.P(), out_specs=jax.P(), check_vma=False)
        )(x, w)
    assert product_flops(hidden.jaxpr) == 0


def test_flops_of_a_device_are_those_of_its_shards_and_of_what_it_computes_again():
    mesh = mesh_of(2, 2, 2)

    def split(x, w):
        whole = jax.sharding.reshard(w, RULES(None, "ffn"))
        return jnp.einsum("bd,df->bf", x, whole, out_sharding=RULES("batch", "ffn"))

    def scattered(x, g):
        return jnp.einsum("bd,bf->df", x, g, out_sharding=RULES("embed", "ffn"))

    def scanned(x, w):
        whole = jax.sharding.reshard(w, RULES(None, None))
        layer = jax.checkpoint(lambda x: jnp.sin(jnp.sin(x) @ whole))
        return jax.lax.scan(lambda x, _: (layer(x), None), x, None, length=3)[0].sum()

    def hidden(x, w):
        spec = RULES("batch", None)
        return jax.shard_map(
            lambda a, b: a @ b, in_specs=(spec, jax.P(None, None)), out_specs=spec
        )(x, w)

    def shape(*sizes, axes):
        return jax.ShapeDtypeStruct(
            sizes, jnp.float32, sharding=jax.NamedSharding(mesh, RULES(*axes))
        )

    x, w = shape(8, 6, axes=("batch", None)), shape(6, 4, axes=("embed", "ffn"))
    square = shape(6, 6, axes=("embed", None))
    with jax.set_mesh(mesh):
        assert device_flops(jax.make_jaxpr(split)(x, w).jaxpr) == 2 * (8 // 4) * 6 * (
            4 // 2
        )
        # Summed over `fsdp` before it is scattered there: every device computes all six
        # rows.
        of_weight = jax.make_jaxpr(scattered)(x, shape(8, 4, axes=("batch", "ffn")))
        assert device_flops(of_weight.jaxpr) == 2 * (8 // 4) * 6 * (4 // 2)
        # Three layers: forward, forward again, and the gradients of both sides.
        again = jax.make_jaxpr(jax.grad(scanned, (0, 1)))(x, square)
        assert device_flops(again.jaxpr) == 3 * 4 * 2 * (8 // 4) * 6 * 6
        assert (
            device_flops(
                jax.make_jaxpr(hidden)(x, shape(6, 4, axes=(None, None))).jaxpr
            )
            == 2 * (8 // 4) * 6 * 4
        )


def test_remat_of_dots_computes_no_product_with_a_weight_again():
    mesh, flops = mesh_of(2, 2, 1), {}
    for remat in ("none", "dots", "full"):
        config = two_layers("synthetic", **IMPRESSIONS)
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, remat=remat)
        )
        model, shapes = model_and_shapes(config)
        flops[remat] = step_flops(
            model, mesh, shapes, step_work(model, mesh, shapes)[0]
        )
    # Two products of attention remain where no kernel keeps its result: measured 0.16
    # of the FLOPs that "full" computes again. The counts do not depend on the
    # processor.
    assert flops["dots"] - flops["none"] < 0.3 * (flops["full"] - flops["none"])
    assert flops["none"] < flops["full"]


def test_work_of_a_kernel_is_by_tiles_and_that_of_the_model_by_pairs():
    pattern, sizes = (
        causal_pattern(256, 256),
        {"batch": 2, "heads": 3, "head_dim": 16, "itemsize": 2},
    )
    forward = attention_work("dense", pattern, None, **sizes, backward=False)
    flops = 2 * 3 * 2 * 2 * 16 * (256 * 257 // 2)
    assert forward == Work(flops, 0.0, 0.0, forward_flops=flops)
    both = attention_work("splash", pattern, None, **sizes, backward=True)
    # Two products forward, four backward.
    assert both.model_flops == 3 * forward.model_flops == 3 * both.forward_flops
    # Two products forward and seven backward, over the tiles: one of 256 x 256, the
    # upper half of the diagonal tile included.
    assert splash_kernel.block_sizes(splash.visible_spans(pattern, None), 256) == (
        256,
        256,
    )
    assert both.kernel_flops == 2 * 3 * 2 * 9 * 16 * 256 * 256
    assert both.kernel_bytes == 2 * 3 * ((4 * 256 + 8 * 256) * 16 * 2 + 2 * 4 * 256)
    # The ten tiles of 64 x 64 on the diagonal of four and below it.
    on_gpu = attention_work("triton", pattern, None, **sizes, backward=True)
    assert on_gpu == both._replace(kernel_flops=2 * 3 * 2 * 9 * 16 * 10 * 64 * 64)


def test_the_train_step_compiles_for_the_devices_at_hand_too():
    quick = {"tokens.maker": "linear"}
    model, shapes = model_and_shapes(two_layers("synthetic", **IMPRESSIONS | quick))
    mesh = mesh_of(2, 2, 2)
    compiled = compile_train_step(model, mesh, shapes)
    assert compiled.memory_analysis().argument_size_in_bytes > 0
    work, layers = step_work(model, mesh, shapes)
    assert [layer["window"] for layer in layers] == [None, 8]
    assert work.model_flops > 0
    # No splash on CPU devices.
    assert work.kernel_flops == 0
