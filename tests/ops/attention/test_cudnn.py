"""What a machine without a GPU can show: the call that cuDNN gets, computed by XLA, equals dense."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention.cases import apart, layers, plain, stream
from tokenrec.errors import InputError
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.cudnn import cudnn_attention, unsupported_reason
from tokenrec.ops.attention.pattern import Pattern, causal_pattern

# Measured: values 6.6e-7, gradients 1.9e-6.
VALUES, GRADIENTS = 2e-6, 1e-5


def assert_equals_dense(pattern, window, valid=None):
    attend = functools.partial(call, pattern, window)
    values, gradients = apart(attend, pattern, window, valid)
    assert values < VALUES
    assert gradients < GRADIENTS


def call(pattern, window, q, k, v, valid):
    return cudnn_attention(q, k, v, pattern, window, valid, kernels="xla")


@pytest.mark.parametrize("window", [None, 1, 7, 40])
def test_plain_causal_order_equals_dense(window):
    assert_equals_dense(*plain(30, 40, window))


@pytest.mark.parametrize(
    "kind", [{"candidates": 1, "fused": True}, {"candidates": 0}], ids=["NIO", "UC"]
)
def test_padded_streams_equal_dense_where_it_serves(kind):
    layout, valid = stream(**kind, events=20)
    for pattern, window in layers(layout)[1:3]:
        assert window is None or not pattern.static[pattern.key_positions].any()
        assert_equals_dense(pattern, window, valid[:, pattern.key_positions])


def words(pattern, window):
    q, k = (
        jax.ShapeDtypeStruct((2, len(rows), 2, 8), jnp.bfloat16)
        for rows in (pattern.query_positions, pattern.key_positions)
    )
    return unsupported_reason(q, k, pattern, window)


def test_what_it_cannot_serve_is_refused_in_words():
    rows = np.arange(20)
    layout, _ = stream(candidates=3)
    full = layers(layout, every_row=True)[1]
    assert "several candidates" in words(*full)
    assert "bidirectional" in words(
        Pattern(rows, rows, rows, rows < 0, rows * 0 - 1, prefix=5), None
    )
    one, _ = stream(candidates=1)
    assert "static tokens" in words(*layers(one, every_row=True)[2])
    assert "2 queries of 20" in words(causal_pattern(2, 20), None)
    assert "tokens are missing" in words(
        Pattern(rows[:8], rows[:8] * 2, np.arange(40), np.arange(40) < 0, -np.ones(40)),
        3,
    )


def test_without_the_library_cudnn_says_so_itself():
    assert "cuDNN is not detected" in words(causal_pattern(8, 8), None)


def test_asked_for_on_another_platform_it_is_refused():
    q = jnp.zeros((1, 8, 1, 8), jnp.bfloat16)
    with pytest.raises(
        InputError, match="does not run on cpu; use one of: blocked, dense"
    ):
        attention(q, q, q, implementation="cudnn")
