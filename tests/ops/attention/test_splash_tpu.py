"""Splash through the entry, compiled for a TPU that is only described; needs the TPU compiler, not a TPU."""

import importlib.util
import os

# Queries for the metadata of a TPU machine would wait for an answer, and libtpu lets in one process by default.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies

from tokenrec.config import MeshConfig
from tokenrec.ops.attention import attention, choose
from tokenrec.ops.attention.pattern import causal_pattern
from tokenrec.sharding import RULES, make_mesh
from tokenrec.tokens.layout import build_layout

pytestmark = [
    pytest.mark.tpu_compiler,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, the TPU compiler, is not installed",
    ),
]

BATCH, HEADS, WIDTH = 4, 4, 32


def cases():
    """Pattern, window and whether some rows are padding."""
    requests = build_layout(
        user_tokens=5, events=200, fused=True, candidates=4, target_tokens=3
    )
    rows = np.arange(requests.rows)
    return {
        "full": (causal_pattern(300, 300), None, False),
        "windowed": (causal_pattern(700, 700), 64, False),
        "padded": (causal_pattern(300, 300), 64, True),
        "several candidates": (requests.pattern(rows, rows), 64, True),
        "candidates, needed rows": (
            requests.pattern(requests.readout, rows),
            None,
            True,
        ),
    }


@pytest.fixture(scope="module")
def devices():
    return list(
        topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    )


@pytest.fixture
def mesh(devices):
    """Two by two chips, half of the batch and half of the heads on each."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2), devices)
    with jax.set_mesh(mesh):
        yield mesh


def shape_of(mesh, shape, dtype, *axes):
    return jax.ShapeDtypeStruct(
        shape, dtype, sharding=jax.NamedSharding(mesh, RULES(*axes))
    )


def arguments(mesh, case, dtype):
    pattern, _, padded = case
    q, k = (
        shape_of(
            mesh, (BATCH, len(rows), HEADS, WIDTH), dtype, "batch", None, "heads", None
        )
        for rows in (pattern.query_positions, pattern.key_positions)
    )
    return (
        q,
        k,
        k,
        shape_of(mesh, k.shape[:2], bool, "batch", None) if padded else None,
    )


def attend(case, q, k, v, valid):
    return attention(q, k, v, window=case[1], pattern=case[0], valid=valid)


def kernels(compiled):
    return compiled.as_text().count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_compiles_to_one_kernel(mesh, dtype):
    every = list(cases().values())

    @jax.jit
    def forward(inputs):
        return [
            attend(case, *of_case) for case, of_case in zip(every, inputs, strict=True)
        ]

    compiled = forward.lower([arguments(mesh, case, dtype) for case in every]).compile()
    assert kernels(compiled) == len(every)


@pytest.mark.parametrize("name", list(cases()))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forward_and_backward_compile_to_three_kernels(mesh, dtype, name):
    case = cases()[name]

    @jax.jit
    def both(q, k, v, valid):
        def total(q, k, v):
            return attend(case, q, k, v, valid).astype(jnp.float32).sum()

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    # Forward, gradient of the queries, gradient of keys and values.
    assert kernels(both.lower(*arguments(mesh, case, dtype)).compile()) == 3


@pytest.mark.parametrize("width", [8, 64, 160])
def test_heads_need_no_padding_to_a_width(mesh, width):
    x = shape_of(
        mesh, (BATCH, 300, HEADS, width), jnp.float32, "batch", None, "heads", None
    )
    compiled = (
        jax.jit(jax.grad(lambda x: attention(x, x, x, window=64).sum()))
        .lower(x)
        .compile()
    )
    assert kernels(compiled) == 3


def test_a_tpu_prefers_splash_and_says_why_it_falls_through(mesh):
    q, k, _, _ = arguments(mesh, cases()["full"], jnp.float32)
    assert choose(q, k, window=None, pattern=causal_pattern(300, 300)).name == "splash"
    few = shape_of(
        mesh, (BATCH, 16, HEADS, WIDTH), jnp.float32, "batch", None, "heads", None
    )
    choice = choose(few, few, window=4, pattern=causal_pattern(16, 16))
    assert choice.name != "splash"
    assert "nothing to skip" in choice.refused["splash"]
