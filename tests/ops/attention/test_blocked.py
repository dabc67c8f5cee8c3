import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.attention.cases import apart, continued, layers, plain, stream
from tokenrec.ops.attention import attention, bands, blocked, choose
from tokenrec.ops.attention.bands import BandPlan, plan_band
from tokenrec.ops.attention.blocked import blocked_attention
from tokenrec.ops.attention.pattern import Pattern, causal_pattern
from tokenrec.ops.attention.tiles import plan_tiles
from tokenrec.tokens.layout import live_positions

# Largest differences measured over all cases below, float32: values 5.4e-7, gradients 3.4e-6.
VALUES, GRADIENTS = 2e-6, 1e-5


def assert_equals_dense(pattern, window, valid=None):
    def attend(q, k, v, valid):
        return attention(
            q,
            k,
            v,
            window=window,
            implementation="blocked",
            pattern=pattern,
            valid=valid,
        )

    values, gradients = apart(attend, pattern, window, valid)
    assert values < VALUES
    assert gradients < GRADIENTS


@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [
        (300, 300, 1),
        (300, 300, 64),
        (300, 300, 300),
        (100, 333, 40),
        (333, 333, None),
        (47, 500, None),
        (9, 9, 4),
    ],
)
def test_plain_causal_order_equals_dense(queries, keys, window):
    assert_equals_dense(*plain(queries, keys, window))


@pytest.mark.parametrize("every_row", [False, True], ids=["needed rows", "every row"])
@pytest.mark.parametrize(
    "kind",
    [
        {"candidates": 1, "fused": True, "events": 150},
        {"candidates": 90, "fused": True, "events": 60},
        {"candidates": 0},
    ],
    ids=["NIO", "many candidates", "UC"],
)
def test_padded_streams_with_static_rows_equal_dense(kind, every_row):
    layout, valid = stream(**kind)
    for pattern, window in layers(layout, every_row=every_row):
        assert_equals_dense(pattern, window, valid[:, pattern.key_positions])


def test_a_bidirectional_prefix_equals_dense():
    rows = np.arange(200)
    pattern = Pattern(
        rows, rows, rows, np.zeros(200, bool), np.full(200, -1), prefix=90
    )
    assert pattern.visible(None)[3, 80]
    assert_equals_dense(pattern, None)


def test_codes_that_continue_every_event_equal_dense():
    layout, valid = continued(events=70)
    rows = [np.arange(layout.rows), *live_positions(layout, (None, 20))[1:]]
    for (keys, queries), window in zip(
        itertools.pairwise(rows), (None, 20), strict=True
    ):
        assert_equals_dense(layout.pattern(queries, keys), window, valid[:, keys])


def test_streams_in_groups_equal_one_group(monkeypatch):
    pattern, window = plain(300, 300, 50)
    q = jax.random.normal(jax.random.key(0), (3, 300, 2, 8))

    def gradients():
        return jax.grad(
            lambda q: jnp.sum(blocked_attention(q, q, q, pattern, window, None) ** 2)
        )(q)

    whole = gradients()
    monkeypatch.setattr(
        blocked, "GROUP_LOGITS", 2 * plan_band(pattern, window).live_logits
    )
    np.testing.assert_allclose(gradients(), whole, atol=1e-5)  # measured 1.9e-6


def test_a_fully_padded_stream_is_finite_with_finite_gradients():
    q = jax.random.normal(jax.random.key(0), (2, 300, 1, 4))
    for window in (None, 20):
        padded = jnp.zeros((2, 300), bool)
        pattern = causal_pattern(300, 300)
        gradient = jax.grad(
            lambda q: blocked_attention(q, q, q, pattern, window, padded).sum()  # noqa: B023
        )(q)
        assert np.isfinite(gradient).all()


def test_bfloat16_keeps_its_dtype_and_comes_close_to_dense():
    q = jax.random.normal(jax.random.key(0), (1, 300, 2, 16), jnp.bfloat16)
    for window in (None, 30):
        got = attention(q, q, q, window=window, implementation="blocked")
        expected = attention(
            *[q.astype(jnp.float32)] * 3, window=window, implementation="dense"
        )
        assert got.dtype == jnp.bfloat16
        # measured .008 at outputs up to 3.6, where numbers of this type are .016 apart
        np.testing.assert_allclose(got.astype(np.float32), expected, atol=0.02)


@pytest.mark.parametrize("window", [16, 64, 256])
def test_a_sliding_layer_computes_a_band_and_not_the_square(window):
    short, long = (plan_band(causal_pattern(n, n), window) for n in (2048, 8192))
    assert isinstance(long, BandPlan)
    assert long.logits == 4 * short.logits
    assert long.logits <= 8192 * (window + 2 * bands.TILE)


def test_full_layers_skip_what_lies_above_the_diagonal():
    assert plan_tiles(causal_pattern(4096, 4096), None).logits < 0.55 * 4096**2


def test_no_array_of_the_program_holds_all_logits():
    rows = 1536
    q = jax.ShapeDtypeStruct((1, rows, 1, 8), jnp.float32)
    for window in (None, 64):
        step = jax.grad(
            lambda q: attention(q, q, q, window=window, implementation="blocked").sum()  # noqa: B023
        )
        text = jax.jit(step).lower(q).as_text()
        assert f"{rows}x{rows}" not in text


def test_short_streams_are_left_to_dense_with_a_reason():
    pattern = causal_pattern(60, 60)
    q = jnp.zeros((1, 60, 1, 4))
    choice = choose(q, q, window=8, pattern=pattern)
    assert choice.name == "dense"
    assert "60 x 60 tokens" in choice.refused["blocked"]
    assert (
        choose(q, q, window=8, pattern=pattern, implementation="blocked").name
        == "blocked"
    )


def test_long_streams_take_the_blocked_path_unasked():
    q = jnp.zeros((1, 600, 1, 4))
    assert choose(q, q, window=32, pattern=causal_pattern(600, 600)).name == "blocked"
