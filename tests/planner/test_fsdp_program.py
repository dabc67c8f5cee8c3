"""Bytes that FSDP moves in the compiled forward and backward pass of a backbone."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.worlds import SCHEMA, TASKS, tiny
from tokenrec.compiler_options import compiler_options
from tokenrec.config import MeshConfig, ModelConfig
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.planner.hlo import read_program
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import RULES, with_batch_sharding
from tokenrec.state import build_model

LAYERS = 3
CONFIG = ModelConfig(
    width=512,
    heads=4,
    layers=LAYERS,
    ffn_width=1536,
    dtype="bfloat16",
    remat="full",
    scan=3,
)


@pytest.mark.tpu_compiler
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
@pytest.mark.parametrize(
    "sums",
    [jnp.float32, pytest.param(jnp.bfloat16, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
)
def test_weights_are_gathered_in_bfloat16_and_gradients_scattered(sums):
    """`sums` is the type of the matrices, as `optim.gradient_sums` casts them."""
    data, fsdp = 2, 4
    mesh = topology_mesh("v5p:2x2x2", MeshConfig(data=data, fsdp=fsdp))
    layout = build_model(tiny(paradigm="uc", events=12), SCHEMA, TASKS).layout(12)

    def loss(weights, x, events):
        read = nnx.merge(graph, weights)(x, layout, events, None, None)
        return jnp.sum(jnp.square(read.astype(jnp.float32)))

    with jax.set_mesh(mesh):
        graph, weights = nnx.split(
            nnx.eval_shape(lambda: TokenFormer(CONFIG, rngs=nnx.Rngs(0)))
        )
        weights = jax.tree.map(
            lambda w: jax.ShapeDtypeStruct(
                w.shape,
                sums if RULES.embed in w.sharding.spec else w.dtype,
                sharding=jax.NamedSharding(mesh, w.sharding.spec),
            ),
            weights,
        )
        shapes = (
            jax.ShapeDtypeStruct((16, layout.length, 512), jnp.bfloat16),
            jax.ShapeDtypeStruct((16, 12), bool),
        )
        lowered = jax.jit(jax.grad(loss)).lower(
            weights, *with_batch_sharding(shapes, mesh)
        )
        text = lowered.compile(compiler_options(mesh)).as_text()
    # XLA unrolls a loop this short.
    program = read_program(text, mesh.size)

    split = [
        leaf for leaf in jax.tree.leaves(weights) if RULES.embed in leaf.sharding.spec
    ]
    count = sum(leaf.size for leaf in split)
    assert count == LAYERS * (5 * 512 * 512 + 3 * 512 * 1536)
    moved = dict.fromkeys(
        (
            "all-gather",
            "reduce-scatter",
            "all-reduce",
            "all-to-all",
            "collective-permute",
        ),
        0.0,
    )
    for one in program.collectives:
        moved[one.kind] += one.trips * one.size
    # Two bytes a weight, forward and again backward; the top layer may keep what it has
    # just gathered. All bounds here are byte counts of the compiler, the same on every
    # machine with the same libtpu.
    assert (2 - 1 / LAYERS) * 2 * count <= moved["all-gather"] <= 2 * 2 * count
    # Gradients once, in the type of the sums; then the shards over `data`, and 1 % for
    # the weights that are no matrices.
    itemsize = jnp.dtype(sums).itemsize
    summed = moved["reduce-scatter"] + moved["all-reduce"]
    assert itemsize * count < summed <= (1 + 1 / fsdp + 0.01) * itemsize * count
    # XLA sums the attention's matrices, 512 x 512, on all devices if they are bfloat16.
    # Those of `lrm_1b` it scatters in both types (benchmarks/results/pods_changes.md).
    scattered = count if sums == jnp.float32 else LAYERS * 3 * 512 * 1536
    assert moved["reduce-scatter"] == itemsize * scattered
    assert moved["all-to-all"] == moved["collective-permute"] == 0
