"""The entry point computes the definition, and names wrong arguments."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenrec.errors import InputError
from tokenrec.ops.attention import PORTABLE, Pattern, api, attention, choose
from tokenrec.ops.attention.pattern import causal_pattern

# Float32 rounding of a softmax over up to 40 keys, against float64. Logits of order 5
# are off by a few units of 6e-8 relative, weights and outputs (up to 4) by some 3e-7.
# Measured: 3.2e-7, so that the margin is 6x.
ATOL = 2e-6


def heads(seed, batch=2, tokens=9, count=3, width=4):
    """Draw queries, keys or values, `[batch, tokens, count, width]`."""
    return jax.random.normal(jax.random.key(seed), (batch, tokens, count, width))


def slow_attention(q, k, v, see):
    """Compute the definition, a query at a time, in float64.

    Args:
      q: `[B, Q, H, h]`.
      k: `[B, K, H, h]`.
      v: `[B, K, H, h]`.
      see: `[B, Q, K] bool`, keys that each query sees.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        keys = np.flatnonzero(see[b, i])
        logits = k[b, keys, h] @ q[b, i, h] / np.sqrt(q.shape[-1])
        weights = np.exp(logits - logits.max())
        out[b, i, h] = weights @ v[b, keys, h] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 9])
def test_causal_window_counts_keys_with_self(window):
    q, k, v = heads(0), heads(1), heads(2)
    i, j = np.arange(9)[:, None], np.arange(9)[None]
    see = (j <= i) & (i - j < (window or 9))
    expected = slow_attention(q, k, v, np.broadcast_to(see, (2, 9, 9)))
    np.testing.assert_allclose(attention(q, k, v, window=window), expected, atol=ATOL)


def test_matches_the_definition_with_static_tokens_candidates_and_padding():
    positions = np.arange(9)
    pattern = Pattern(
        query_positions=positions[3:],
        key_positions=positions,
        index=np.array([0, 1, 2, 3, 4, 5, 6, 7, 7]),
        static=positions < 2,
        candidate=np.array([-1] * 7 + [0, 1]),
    )
    valid = np.ones((2, 9), bool)
    valid[0, 2:5] = False
    q, k, v = heads(0)[:, 3:], heads(1), heads(2)
    see = np.zeros((2, 6, 9), bool)
    for b, a, j in np.ndindex(see.shape):
        i = a + 3
        distance = pattern.index[i] - pattern.index[j]
        seen = (
            valid[b, j]
            and distance >= 0
            and pattern.candidate[j] in (-1, pattern.candidate[i])
        )
        see[b, a, j] = i == j or (
            seen and distance < 4 and (pattern.static[i] or not pattern.static[j])
        )
    got = attention(q, k, v, window=4, pattern=pattern, valid=jnp.asarray(valid))
    np.testing.assert_allclose(got, slow_attention(q, k, v, see), atol=ATOL)


def test_a_fully_padded_stream_is_finite_with_finite_gradients():
    q = heads(0)
    valid = jnp.zeros((2, 9), bool)
    gradient = jax.grad(lambda q: attention(q, q, q, window=2, valid=valid).sum())(q)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"implementation": "dnese"}, "did you mean 'dense'"),
        ({"window": 0}, "window=0 is below 1"),
        ({"v": heads(2, tokens=8)}, r"v \(2, 8, 3, 4\) do not agree"),
        ({"v": heads(2).astype(jnp.bfloat16)}, "v bfloat16 do not agree"),
        ({"pattern": causal_pattern(9, 10)}, "pattern has 9 queries and 10 keys"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(InputError, match=message):
        attention(**{"q": heads(0), "k": heads(1), "v": heads(2)} | change)


@pytest.mark.parametrize(
    "valid",
    [
        jnp.ones((2, 9), jnp.int32),
        jnp.ones((2, 8), bool),
        jnp.ones((1, 9), bool),
        jnp.ones((9,), bool),
        jnp.ones((2, 9, 1), bool),
    ],
    ids=lambda valid: f"{valid.shape} {valid.dtype}",
)
def test_a_padding_mask_of_another_shape_or_dtype_is_an_error(valid):
    message = re.escape(f"valid {valid.shape} {valid.dtype}") + r".*\(2, 9, 3, 4\)"
    with pytest.raises(InputError, match=message):
        attention(heads(0), heads(1), heads(2), valid=valid)


def test_an_unknown_platform_needs_a_portable_implementation(monkeypatch):
    monkeypatch.setattr(api, "current_platform", lambda: "metal")
    q = heads(0)
    with pytest.raises(
        InputError,
        match=r"'metal'.*cpu, gpu, tpu.*model\.attention.*blocked, dense",
    ):
        attention(q, q, q)
    for name in ("splash", "cudnn"):
        with pytest.raises(InputError, match="does not run on metal; use one of"):
            attention(q, q, q, implementation=name)
    expected = slow_attention(
        q, q, q, np.broadcast_to(np.tri(9, dtype=bool), (2, 9, 9))
    )
    for name in PORTABLE:
        np.testing.assert_allclose(
            attention(q, q, q, implementation=name), expected, atol=ATOL
        )


def test_static_tokens_that_stay_visible_are_for_dense_alone():
    positions = np.arange(40)
    static = positions < 2
    pattern = dataclasses.replace(causal_pattern(40, 40), static=static, discard=False)
    q = heads(0, tokens=40)
    with pytest.raises(
        InputError, match="'blocked' cannot serve: static tokens stay visible"
    ):
        attention(q, q, q, window=4, pattern=pattern, implementation="blocked")
    assert choose(q, q, window=4, pattern=pattern).name == "dense"
    distance = positions[:, None] - positions[None]
    see = (distance >= 0) & ((distance < 4) | static[None])
    expected = slow_attention(q, q, q, np.broadcast_to(see, (2, 40, 40)))
    np.testing.assert_allclose(
        attention(q, q, q, window=4, pattern=pattern), expected, atol=ATOL
    )


def test_more_queries_than_keys_is_an_error():
    with pytest.raises(InputError, match="Q <= K"):
        attention(heads(0), heads(1)[:, :4], heads(2)[:, :4])
