"""Values that the splash kernels compute, in interpret mode on any machine."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_specs import (
    AttentionSpec,
    causal_spec,
    prefix_spec,
    stream_specs,
)
from tests.ops.attention.compare import differences_from_dense, values_and_gradients
from tests.ops.attention.patterns import many_patterns
from tokenrec.ops.attention.dense import dense_attention
from tokenrec.ops.attention.pattern import Pattern, causal_pattern
from tokenrec.ops.attention.span_mask import pack_spans, visible_spans
from tokenrec.ops.attention.splash import (
    inefficient_reason,
    splash_attention,
    unsupported_reason,
)
from tokenrec.ops.attention.splash_kernel import block_sizes, visited_tiles

# Float32 rounding, as in test_blocked.py: the kernels add up tile by tile. Measured:
# values 6.0e-7, gradients 1.2e-6. The margin is 3x.
TOLERANCE = 4e-6


def test_packed_spans_hold_what_the_pattern_shows():
    for pattern, window in many_patterns():
        keys = len(pattern.key_positions)
        mask, packed = pack_spans(visible_spans(pattern, window), keys)
        seen = mask(packed[:, None], np.arange(keys + 5)[None])
        np.testing.assert_array_equal(seen[:, :keys], pattern.visible(window))
        # Fill behind the keys is hidden.
        assert not seen[:, keys:].any()


def test_visited_tiles_are_those_with_something_visible():
    sides = (4, 8)
    for pattern, window in many_patterns():
        visible = pattern.visible(window)
        fill = [
            (0, -size % side) for size, side in zip(visible.shape, sides, strict=True)
        ]
        visible = np.pad(visible, fill)
        blocks = [size // side for size, side in zip(visible.shape, sides, strict=True)]
        by_tile = visible.reshape(blocks[0], sides[0], blocks[1], sides[1])
        spans = visible_spans(pattern, window)
        np.testing.assert_array_equal(
            visited_tiles(spans, len(pattern.key_positions), *sides),
            by_tile.any(axis=(1, 3)),
        )


def test_a_window_computes_a_number_of_tiles_linear_in_length():
    def logits(tokens):
        spans = visible_spans(causal_pattern(tokens, tokens), 64)
        sides = block_sizes(spans, tokens)
        return visited_tiles(spans, tokens, *sides).sum() * np.prod(sides)

    assert logits(2048) < 0.25 * 2048**2
    assert logits(8192) <= 4.2 * logits(2048)


def splash(spec: AttentionSpec, blocks=None):
    """The kernels for a spec, step by step on this machine."""

    def attend(q, k, v, valid):
        return splash_attention(
            q, k, v, spec.pattern, spec.window, valid, blocks=blocks, interpret=True
        )

    return attend


def assert_equals_dense(spec, blocks=(128, 128)):
    differences = differences_from_dense(splash(spec, blocks), spec)
    assert differences.values < TOLERANCE
    assert differences.gradients < TOLERANCE


@pytest.mark.parametrize(
    "window", [None, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (64, 300))]
)
def test_windows_count_keys_with_self(window):
    assert_equals_dense(causal_spec(300, 300, window, batch=1))


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 40])
def test_static_tokens_candidates_and_padding(window):
    spec = stream_specs("requests", every_token=True)[0]
    assert_equals_dense(spec.replace(window=window, heads=1))


def test_every_second_token_is_a_query_in_uc_and_padding_stays_out():
    spec = stream_specs("uc")[3]
    assert set(np.diff(spec.pattern.query_positions)) == {2}
    assert_equals_dense(spec.replace(heads=1))


def test_few_needed_tokens_over_all_keys():
    spec = stream_specs("nio")[1]
    assert (spec.queries, spec.keys) == (47, 159)
    assert_equals_dense(spec.replace(heads=1), blocks=None)


def test_a_prefix_sees_itself_both_ways():
    assert_equals_dense(prefix_spec().replace(batch=1), blocks=(128, 256))


def test_a_fully_padded_stream_is_finite_with_finite_gradients():
    spec = causal_spec(140, 140, 2, batch=1, heads=1)
    padding = jnp.zeros((1, 140), bool)

    def total(x):
        return splash(spec)(x, x, x, padding).sum()

    value, gradient = jax.value_and_grad(total)(spec.random_inputs()[0])
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bfloat16_stays_bfloat16():
    spec = causal_spec(140, 140, 9, batch=1)

    def in_bfloat16(q, k, v, valid):
        narrow = (x.astype(jnp.bfloat16) for x in (q, k, v))
        out = splash(spec)(*narrow, valid)
        assert out.dtype == jnp.bfloat16
        return out

    def dense(q, k, v, valid):
        return dense_attention(q, k, v, spec.pattern, spec.window, valid)

    out, gradients = values_and_gradients(in_bfloat16, spec)
    expected, expected_gradients = values_and_gradients(dense, spec)
    for got, wanted in zip(
        (out, *gradients), (expected, *expected_gradients), strict=True
    ):
        # Rounding of inputs, weights and results to bfloat16, 2^-9 relative each, at
        # entries up to 2.3. Measured: 0.015; most of it is the rounding of the inputs,
        # which is the same on every processor.
        np.testing.assert_allclose(got.astype(np.float32), wanted, atol=0.03)


def small_pattern(**change):
    """Two static tokens, four events and two candidates of one token, changed."""
    pattern = Pattern(
        query_positions=np.arange(8),
        key_positions=np.arange(8),
        index=np.array([0, 1, 2, 3, 4, 5, 6, 6]),
        static=np.arange(8) < 2,
        candidate=np.array([-1] * 6 + [0, 1]),
    )
    return dataclasses.replace(pattern, **change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"key_positions": np.arange(1, 8)}, "not among the keys"),
        ({"candidate": np.array([0] + [-1] * 6 + [1])}, "one candidate after another"),
        ({"candidate": np.array([-1] * 5 + [0, 1, 0])}, "one candidate after another"),
        ({"index": np.array([0, 2, 1, 3, 4, 5, 6, 6])}, "does not ascend"),
        ({"static": np.arange(8) == 3}, "static tokens are not the first"),
        (
            {"index": np.array([0, 1, 2, 3, 4, 5, 4, 6])},
            "does not see the last shared tokens",
        ),
    ],
)
def test_what_is_not_two_runs_of_keys_is_refused_with_a_reason(change, reason):
    assert isinstance(visible_spans(small_pattern(), 4), tuple)
    assert reason in visible_spans(small_pattern(**change), 4)


def reason_of(function, spec):
    """What `unsupported_reason` or `inefficient_reason` says about a spec."""
    q, k, _, _ = spec.arrays()
    return function(q, k, spec.pattern, spec.window)


def test_what_fits_one_tile_is_served_only_when_it_is_named():
    assert "nothing to skip" in reason_of(inefficient_reason, causal_spec(1, 128))
    assert not reason_of(inefficient_reason, causal_spec(1, 129))
    assert not reason_of(unsupported_reason, causal_spec(1, 128))


def test_dtypes_without_a_kernel_are_refused():
    half = causal_spec(200, 200, dtype="float16")
    assert "not float16" in reason_of(unsupported_reason, half)


def test_spans_of_more_bits_than_an_integer_has_are_refused():
    tokens = 1 << 17
    causal = causal_pattern(tokens, tokens)
    # Static tokens see no window's lowest key: depth differs between the queries.
    static = dataclasses.replace(causal, static=np.arange(tokens) < 9)
    wide = AttentionSpec(static, window=1 << 16)
    assert "33 bits" in reason_of(unsupported_reason, wide)
    assert not reason_of(unsupported_reason, wide.replace(window=64))
