"""The call of cuDNN, computed by XLA on a machine without a GPU, equals dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_specs import (
    CAUSAL_SPECS,
    causal_spec,
    prefix_spec,
    stream_specs,
)
from tests.ops.attention.compare import differences_from_dense
from tokenrec.errors import InputError
from tokenrec.models.backbones.stacking import apply_remat
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.cudnn import (
    FORWARD_PRIMITIVE,
    MIN_QUERY_SHARE,
    cudnn_attention,
    unsupported_reason,
)
from tokenrec.ops.attention.pattern import Pattern

# Float32 rounding, as in test_blocked.py: the fused call adds up in another order.
# Measured: values 6.6e-7, gradients 2.4e-6. The margin is 3x and 4x.
VALUES, GRADIENTS = 2e-6, 1e-5

# Of the named specs, those with enough queries per key to be served.
SERVED = {
    name: spec
    for name, spec in CAUSAL_SPECS.items()
    if spec.queries >= MIN_QUERY_SHARE * spec.keys
}


def call(pattern, window, q, k, v, valid):
    return cudnn_attention(q, k, v, pattern, window, valid, kernels="xla")


def assert_equals_dense(spec):
    attend = functools.partial(call, spec.pattern, spec.window)
    differences = differences_from_dense(attend, spec)
    assert differences.values < VALUES
    assert differences.gradients < GRADIENTS


@pytest.mark.parametrize("name", SERVED)
def test_plain_causal_order_equals_dense(name):
    assert_equals_dense(SERVED[name])


@pytest.mark.parametrize("name", ["nio", "uc"])
def test_padded_streams_equal_dense_where_it_serves(name):
    # The layers between the first, which has all keys, and the last, which has few
    # queries: one full and one sliding.
    for spec in stream_specs(name)[1:3]:
        keys = spec.pattern.key_positions
        assert spec.window is None or not spec.pattern.static[keys].any()
        assert_equals_dense(spec)


@pytest.mark.parametrize("name", ["333 of 333, full", "300 of 300, full"])
def test_the_kernels_get_an_even_number_of_tokens(name, monkeypatch):
    lengths = []
    attend = jax.nn.dot_product_attention

    def observed(q, k, v, **options):
        lengths.extend(x.shape[1] for x in (q, k, v))
        return attend(q, k, v, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", observed)
    spec = CAUSAL_SPECS[name]
    out = call(spec.pattern, spec.window, *spec.random_inputs()[:3], None)
    assert out.shape[1] == spec.queries
    assert set(lengths) == {spec.keys + spec.keys % 2}


def reason_for(spec):
    q, k, _, _ = spec.replace(dtype="bfloat16", valid=None).arrays()
    return unsupported_reason(q, k, spec.pattern, spec.window)


@pytest.mark.parametrize(("remat", "forward_passes"), [("dots", 1), ("full", 2)])
def test_remat_of_dots_keeps_the_result_of_the_kernel(
    remat, forward_passes, monkeypatch
):
    fused = "jax._src.cudnn.fused_attention_stablehlo"
    # The program is traced, and never compiled: neither library nor GPU is needed.
    monkeypatch.setattr(f"{fused}.check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(f"{fused}.check_compute_capability", lambda capability: True)

    def block(x):
        return jax.nn.dot_product_attention(
            x, x, x, is_causal=True, implementation="cudnn"
        )

    def loss(x):
        return jnp.sum(jnp.square(apply_remat(block, remat)(x)))

    program = str(
        jax.make_jaxpr(jax.grad(loss))(jnp.zeros((1, 8, 2, 64), jnp.bfloat16))
    )
    assert program.count(f"= {FORWARD_PRIMITIVE}[") == forward_passes


def test_what_it_cannot_serve_is_refused_with_a_reason():
    full = stream_specs("requests", every_token=True)[1]
    assert "several candidates" in reason_for(full)
    assert "bidirectional" in reason_for(prefix_spec())
    sliding = stream_specs("nio", every_token=True)[2]
    assert "static tokens" in reason_for(sliding)
    assert "2 queries of 20" in reason_for(causal_spec(2, 20))
    positions = np.arange(8)
    every_second = Pattern(
        positions,
        positions * 2,
        index=np.arange(40),
        static=np.zeros(40, bool),
        candidate=np.full(40, -1),
    )
    gaps = causal_spec(8, 8, 3).replace(pattern=every_second)
    assert "tokens are missing" in reason_for(gaps)


def test_without_the_library_cudnn_says_so_itself():
    assert "cuDNN is not detected" in reason_for(causal_spec(8, 8))


def test_named_on_another_platform_it_is_refused():
    q = jnp.zeros((1, 8, 1, 8), jnp.bfloat16)
    with pytest.raises(
        InputError, match="does not run on cpu; use one of: blocked, dense"
    ):
        attention(q, q, q, implementation="cudnn")
