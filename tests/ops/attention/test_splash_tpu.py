"""Splash through the entry point, compiled for a described TPU.

These tests need libtpu, the TPU compiler, and no TPU.
"""

import importlib.util
import os

# Queries for the metadata of a TPU machine would wait for an answer, and libtpu lets in
# one process by default. Both are read when JAX is imported.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from benchmarks.attention_specs import STREAMS, AttentionSpec, causal_spec, stream_specs
from tokenrec.config import MeshConfig
from tokenrec.ops.attention import attention, choose
from tokenrec.sharding import RULES, make_mesh

pytestmark = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the TPU compiler, is not installed",
    ),
]

SIZES = {"batch": 4, "heads": 4, "head_dim": 32}
NAMES = (
    "full",
    "windowed",
    "padded",
    "several candidates",
    "candidates, needed tokens",
)


@pytest.fixture(scope="module")
def specs() -> dict[str, AttentionSpec]:
    """One spec for every form of mask that the kernels serve.

    Made before the mesh is set: its padding is computed, and the chips are not there.
    """
    padding = np.ones((1, 300), bool)
    padding[0, :9] = False
    # All tokens as queries and keys in a sliding layer, and the heads' tokens in a full
    # one.
    requests = stream_specs("requests", every_token=True)[0]
    layout = STREAMS["requests"].layout()
    readout = layout.pattern(layout.readout, requests.pattern.key_positions)
    made = (
        causal_spec(300, 300),
        causal_spec(700, 700, 64),
        causal_spec(300, 300, 64, batch=1, valid=padding),
        requests.replace(window=64),
        requests.replace(pattern=readout),
    )
    return {name: spec.replace(**SIZES) for name, spec in zip(NAMES, made, strict=True)}


@pytest.fixture(scope="module")
def devices():
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return list(topology.devices)


@pytest.fixture
def mesh(devices):
    """Two by two chips, half of the batch and half of the heads on each."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), devices)
    with jax.set_mesh(mesh):
        yield mesh


def arguments(mesh, spec, dtype):
    """Shapes of q, k, v and the padding mask, laid out over the mesh."""
    q, k, v, _ = spec.replace(dtype=dtype).arrays(mesh)
    if spec.valid is None:
        return q, k, v, None
    sharding = jax.NamedSharding(mesh, RULES("batch", None))
    return q, k, v, jax.ShapeDtypeStruct(k.shape[:2], bool, sharding=sharding)


def attend(spec, q, k, v, valid):
    return attention(q, k, v, window=spec.window, pattern=spec.pattern, valid=valid)


def count_kernels(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forward_compiles_to_one_kernel(specs, mesh, dtype):
    all_specs = list(specs.values())

    @jax.jit
    def forward(inputs):
        return [
            attend(spec, *arrays)
            for spec, arrays in zip(all_specs, inputs, strict=True)
        ]

    inputs = [arguments(mesh, spec, dtype) for spec in all_specs]
    assert count_kernels(forward.lower(inputs).compile()) == len(all_specs)


# Float32 forward is above.
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"]
)
def test_forward_and_backward_compile_to_three_kernels(specs, mesh, dtype, name):
    spec = specs[name]

    @jax.jit
    def forward_and_backward(q, k, v, valid):
        def total(q, k, v):
            return attend(spec, q, k, v, valid).astype(jnp.float32).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    # Forward, gradient of the queries, gradient of keys and values.
    lowered = forward_and_backward.lower(*arguments(mesh, spec, dtype))
    assert count_kernels(lowered.compile()) == 3


@pytest.mark.parametrize("width", [8, 64, 160])
def test_heads_need_no_padding_to_a_width(mesh, width):
    spec = causal_spec(300, 300, 64).replace(**SIZES | {"head_dim": width})
    gradient = jax.grad(lambda x: attention(x, x, x, window=64).sum())
    lowered = jax.jit(gradient).lower(spec.arrays(mesh)[0])
    assert count_kernels(lowered.compile()) == 3


def test_a_tpu_prefers_splash_and_says_why_it_falls_through(mesh):
    spec = causal_spec(300, 300).replace(**SIZES)
    q, k, _, _ = spec.arrays(mesh)
    assert choose(q, k, window=None, pattern=spec.pattern).name == "splash"
    short = causal_spec(16, 16).replace(**SIZES)
    q, k, _, _ = short.arrays(mesh)
    choice = choose(q, k, window=4, pattern=short.pattern)
    assert choice.name != "splash"
    assert "nothing to skip" in choice.refused["splash"]
