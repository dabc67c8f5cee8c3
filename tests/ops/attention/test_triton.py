"""Values that the Triton kernels compute, in interpret mode on any machine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks.attention_specs import (
    causal_spec,
    codes_specs,
    prefix_spec,
    stream_specs,
)
from tests.ops.attention.compare import differences_from_dense, values_and_gradients
from tokenrec.errors import InputError
from tokenrec.ops.attention import api, attention, choose
from tokenrec.ops.attention.dense import dense_attention
from tokenrec.ops.attention.pattern import causal_pattern
from tokenrec.ops.attention.triton import (
    block_sizes,
    triton_attention,
    unsupported_reason,
)

# Float32 rounding, as in test_blocked.py: the kernels add up tile by tile. Measured
# over all named specs, with tiles of 64 x 64 and 16 x 32: values 8.4e-7, gradients
# 2.9e-6. The margin is 3x.
VALUES, GRADIENTS = 3e-6, 9e-6

SPECS = {
    "full, whole tiles": causal_spec(128, 128),
    "full, few queries": causal_spec(47, 200),
    "window of one key": causal_spec(100, 100, 1),
    "window": causal_spec(150, 150, 40),
    # Candidates, static tokens and padding.
    "requests, full": stream_specs("requests", every_token=True)[0],
    "requests, sliding": stream_specs("requests", every_token=True)[2],
    "many candidates": stream_specs("many candidates")[2],
    # Every second token is a query.
    "uc": stream_specs("uc")[3],
    # Candidates that continue tokens in the middle of the stream.
    "codes, sliding": codes_specs(30)[1],
    "prefix": prefix_spec(100, 45),
    "head of 24": causal_spec(40, 40, 9, head_dim=24),
}


def triton(spec, blocks=(32, 16)):
    """The kernels for a spec, step by step on this machine."""

    def attend(q, k, v, valid):
        return triton_attention(
            q, k, v, spec.pattern, spec.window, valid, blocks=blocks, interpret=True
        )

    return attend


@pytest.mark.parametrize("name", SPECS)
def test_values_and_gradients_equal_dense(name):
    spec = SPECS[name].replace(heads=1)
    differences = differences_from_dense(triton(spec), spec)
    assert differences.values < VALUES
    assert differences.gradients < GRADIENTS


def test_several_streams_and_heads_in_tiles_of_the_default_size():
    spec = stream_specs("nio", every_token=True)[2]
    assert (spec.batch, spec.heads) == (2, 2)
    differences = differences_from_dense(triton(spec, blocks=None), spec)
    assert differences.values < VALUES
    assert differences.gradients < GRADIENTS


def test_a_fully_padded_stream_is_finite_with_finite_gradients():
    spec = causal_spec(40, 40, 2, batch=1, heads=1)
    padding = jnp.zeros((1, 40), bool)

    def total(x):
        return triton(spec)(x, x, x, padding).sum()

    value, gradient = jax.value_and_grad(total)(spec.random_inputs()[0])
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bfloat16_stays_bfloat16():
    spec = causal_spec(70, 70, 9, batch=1)

    def in_bfloat16(q, k, v, valid):
        out = triton(spec)(*(x.astype(jnp.bfloat16) for x in (q, k, v)), valid)
        assert out.dtype == jnp.bfloat16
        return out

    def dense(q, k, v, valid):
        return dense_attention(q, k, v, spec.pattern, spec.window, valid)

    out, gradients = values_and_gradients(in_bfloat16, spec)
    expected, expected_gradients = values_and_gradients(dense, spec)
    for got, wanted in zip(
        (out, *gradients), (expected, *expected_gradients), strict=True
    ):
        # Rounding of inputs, weights and results to bfloat16, as in test_splash.py.
        np.testing.assert_allclose(got.astype(np.float32), wanted, atol=0.03)


def h100_mesh():
    """A mesh of one GPU that is only described."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    axes = ("data", "fsdp", "tensor")
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    return AbstractMesh((1, 1, 1), axes, axis_types=explicit, abstract_device=device)


# JAX says that its Triton back end is deprecated.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sliding_layer_with_candidates_lowers_for_a_gpu(dtype):
    spec = stream_specs("requests", every_token=True)[2].replace(
        head_dim=64, dtype=dtype
    )
    *arrays, _ = spec.arrays()
    valid = jax.ShapeDtypeStruct(spec.valid.shape, bool)

    def loss(q, k, v, valid):
        out = attention(
            q,
            k,
            v,
            window=spec.window,
            pattern=spec.pattern,
            valid=valid,
            implementation="triton",
        )
        return out.astype(jnp.float32).sum()

    target = "__gpu$xla.gpu.triton"
    with jax.sharding.use_abstract_mesh(h100_mesh()):
        exported = jax.export.export(
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))),
            platforms=["cuda"],
            # JAX does not promise that programs with this call run in later versions.
            disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target)],
        )(*arrays, valid)
    # Forward, gradient of q, gradients of k and v.
    assert exported.mlir_module().count(f"custom_call @{target}") == 3


def test_it_serves_on_a_gpu_and_only_when_it_is_named(monkeypatch):
    monkeypatch.setattr(api, "current_platform", lambda: "gpu")
    spec = stream_specs("requests", every_token=True)[2]
    q, k, _, _ = spec.arrays()
    arguments = {"window": spec.window, "pattern": spec.pattern}
    choice = choose(q, k, **arguments)
    assert "triton" not in {choice.name, *choice.refused}
    assert choose(q, k, **arguments, implementation="triton").name == "triton"


def test_named_on_another_platform_it_is_refused():
    q = jnp.zeros((1, 8, 1, 8))
    with pytest.raises(
        InputError, match=r"does not run on cpu; use one of: blocked, dense$"
    ):
        attention(q, q, q, implementation="triton")


def reason_for(spec):
    q, k, _, _ = spec.arrays()
    return unsupported_reason(q, k, spec.pattern, spec.window)


def test_what_it_cannot_serve_is_refused_with_a_reason():
    assert not reason_for(causal_spec(20, 20))
    assert "not float16" in reason_for(causal_spec(20, 20, dtype="float16"))
    assert "70000 streams" in reason_for(causal_spec(20, 20, batch=70_000))
    pattern = dataclasses.replace(causal_pattern(20, 20), static=np.arange(20) == 3)
    late = causal_spec(20, 20, 4).replace(pattern=pattern)
    assert "static tokens are not the first" in reason_for(late)


def test_wide_heads_have_narrow_tiles():
    assert block_sizes(2048, 2048, width=128, itemsize=2) == (64, 64)
    assert block_sizes(2048, 2048, width=128, itemsize=4) == (32, 32)
    assert block_sizes(3, 40, width=64, itemsize=2) == (16, 64)
