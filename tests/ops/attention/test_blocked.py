"""Bands and tiles compute what the reference computes, and skip what is not visible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_specs import (
    CAUSAL_SPECS,
    STREAMS,
    causal_spec,
    codes_specs,
    prefix_spec,
    stream_specs,
)
from tests.ops.attention.compare import differences_from_dense
from tokenrec.ops.attention import attention, bands, blocked, choose
from tokenrec.ops.attention.bands import BandPlan, plan_band
from tokenrec.ops.attention.blocked import blocked_attention
from tokenrec.ops.attention.pattern import causal_pattern
from tokenrec.ops.attention.tiles import plan_tiles

# Float32 rounding: `blocked` adds up the terms of `dense` in another order. Outputs are
# means of up to 500 values, of order 1 to 4; gradients are sums over as many queries,
# of order 1 to 10. Largest differences over all specs below: values 5.4e-7 on an Intel
# Xeon and 6.6e-7 on an AMD EPYC, gradients 3.4e-6 and 1.7e-6. The margin is 3x.
VALUES, GRADIENTS = 2e-6, 1e-5


def assert_equals_dense(spec):
    def attend(q, k, v, valid):
        return attention(
            q,
            k,
            v,
            window=spec.window,
            implementation="blocked",
            pattern=spec.pattern,
            valid=valid,
        )

    differences = differences_from_dense(attend, spec)
    assert differences.values < VALUES
    assert differences.gradients < GRADIENTS


@pytest.mark.parametrize("name", CAUSAL_SPECS)
def test_plain_causal_order_equals_dense(name):
    assert_equals_dense(CAUSAL_SPECS[name])


@pytest.mark.parametrize(
    ("name", "every_token"),
    [
        *(pytest.param(name, False, id=f"{name}-needed") for name in STREAMS),
        # "requests" has static tokens, candidates and a query as well as padding.
        *(
            pytest.param(
                name,
                True,
                id=f"{name}-every token",
                marks=[] if name == "requests" else pytest.mark.slow,
            )
            for name in STREAMS
        ),
    ],
)
def test_padded_streams_with_static_tokens_equal_dense(name, every_token):
    for spec in stream_specs(name, every_token=every_token):
        assert_equals_dense(spec)


def test_a_bidirectional_prefix_equals_dense():
    spec = prefix_spec(tokens=200, prefix=90)
    assert spec.pattern.visible(None)[3, 80]
    assert_equals_dense(spec)


def test_codes_that_continue_every_event_equal_dense():
    for spec in codes_specs():
        assert_equals_dense(spec)


def test_streams_in_groups_equal_one_group(monkeypatch):
    spec = causal_spec(300, 300, 50, batch=3)
    q = spec.random_inputs()[0]

    def gradients():
        def loss(q):
            out = blocked_attention(q, q, q, spec.pattern, spec.window, None)
            return jnp.sum(out**2)

        return jax.grad(loss)(q)

    whole = gradients()
    # One of three streams at a time.
    one_stream = spec.heads * plan_band(spec.pattern, spec.window).logits
    monkeypatch.setattr(blocked, "GROUP_LOGITS", one_stream)
    # The same sums, which XLA may order otherwise for another shape: rounding of
    # entries up to 19, 1e-6 each. Measured: 1.9e-6 on an Intel Xeon, 0 on an AMD EPYC.
    np.testing.assert_allclose(gradients(), whole, atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_a_fully_padded_stream_is_finite_with_finite_gradients(window):
    q = causal_spec(300, 300, heads=1, head_dim=4).random_inputs()[0]
    padding = jnp.zeros((2, 300), bool)
    pattern = causal_pattern(300, 300)
    gradient = jax.grad(
        lambda q: blocked_attention(q, q, q, pattern, window, padding).sum()
    )(q)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("window", [None, 30])
def test_bfloat16_keeps_its_dtype_and_comes_close_to_dense(window):
    spec = causal_spec(300, 300, window, batch=1, head_dim=16, dtype="bfloat16")
    q = spec.random_inputs()[0]
    got = attention(q, q, q, window=window, implementation="blocked")
    expected = attention(
        *[q.astype(jnp.float32)] * 3, window=window, implementation="dense"
    )
    assert got.dtype == jnp.bfloat16
    # Rounding of the output to bfloat16: numbers of this type are 0.016 apart between 2
    # and 4, so that half of it, 0.008, is one rounding. Measured: 0.0079. The margin of
    # 2.5x is for the rounded weights.
    np.testing.assert_allclose(got.astype(np.float32), expected, atol=0.02)


@pytest.mark.parametrize("window", [16, 64, 256])
def test_a_sliding_layer_computes_a_band_and_not_the_square(window):
    short, long = (plan_band(causal_pattern(n, n), window) for n in (2048, 8192))
    assert isinstance(long, BandPlan)
    assert long.logits == 4 * short.logits
    assert long.logits <= 8192 * (window + 2 * bands.TILE)


def test_full_layers_skip_what_lies_above_the_diagonal():
    assert plan_tiles(causal_pattern(4096, 4096), None).logits < 0.55 * 4096**2


@pytest.mark.parametrize("window", [None, 64])
def test_no_array_of_the_program_holds_all_logits(window):
    tokens = 1536
    q = jax.ShapeDtypeStruct((1, tokens, 1, 8), jnp.float32)
    gradient = jax.grad(
        lambda q: attention(q, q, q, window=window, implementation="blocked").sum()
    )
    assert f"{tokens}x{tokens}" not in jax.jit(gradient).lower(q).as_text()


def test_short_streams_are_left_to_dense_with_a_reason():
    pattern = causal_pattern(60, 60)
    q = jnp.zeros((1, 60, 1, 4))
    choice = choose(q, q, window=8, pattern=pattern)
    assert choice.name == "dense"
    assert "60 x 60 tokens" in choice.refused["blocked"]
    explicit = choose(q, q, window=8, pattern=pattern, implementation="blocked")
    assert explicit.name == "blocked"


def test_long_streams_take_the_blocked_path_by_default():
    q = jnp.zeros((1, 600, 1, 4))
    assert choose(q, q, window=32, pattern=causal_pattern(600, 600)).name == "blocked"
