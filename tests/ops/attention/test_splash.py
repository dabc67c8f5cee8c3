"""The kernels in interpret mode: what they compute, not how fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenrec.ops.attention.dense import dense_attention
from tokenrec.ops.attention.pattern import Pattern, causal_pattern
from tokenrec.ops.attention.splash import (
    block_sizes,
    inefficient_reason,
    pack_spans,
    splash_attention,
    unsupported_reason,
    visible_spans,
    visited_tiles,
)
from tokenrec.tokens.layout import build_layout, live_positions


def every_row(layout):
    rows = np.arange(layout.rows)
    return layout.pattern(rows, rows)


def many_patterns():
    """Patterns of every layer of small models, with and without the short cut of needed rows."""
    for user, (fused, candidates, tokens) in (
        (user, kind) for user in (0, 3) for kind in KINDS
    ):
        layout = build_layout(
            user_tokens=user,
            events=20,
            fused=fused,
            candidates=candidates,
            target_tokens=tokens,
        )
        for windows in (
            (None, None, 6, 5),
            (None, 9, 4, 1),
            (5, 5, 5, 5),
            (1, 1, 40, 3),
        ):
            rows = live_positions(layout, windows)
            for window, keys, queries in zip(windows, rows, rows[1:], strict=False):
                yield layout.pattern(queries, keys), window
                yield every_row(layout), window


KINDS = (
    (True, 1, 1),
    (True, 4, 3),
    (False, 1, 3),
    (False, 4, 1),
    (False, 0, 0),
)  # fused, candidates, target tokens


def with_prefix(rows, prefix):
    plain = causal_pattern(rows, rows)
    return Pattern(
        plain.query_positions,
        plain.key_positions,
        plain.index,
        plain.static,
        plain.candidate,
        prefix,
    )


def test_numbers_of_queries_say_what_the_pattern_says():
    for pattern, window in many_patterns():
        keys = len(pattern.key_positions)
        sight, numbers = pack_spans(visible_spans(pattern, window), keys)
        seen = sight(numbers[:, None], np.arange(keys + 5)[None])
        np.testing.assert_array_equal(seen[:, :keys], pattern.visible(window))
        assert not seen[:, keys:].any()  # fill


def test_visited_tiles_are_those_with_something_visible():
    for pattern, window in many_patterns():
        visible = pattern.visible(window)
        visible = np.pad(
            visible,
            [
                (0, -size % side)
                for size, side in zip(visible.shape, (4, 8), strict=True)
            ],
        )
        tiles = visible.reshape(visible.shape[0] // 4, 4, visible.shape[1] // 8, 8).any(
            (1, 3)
        )
        np.testing.assert_array_equal(
            visited_tiles(
                visible_spans(pattern, window), len(pattern.key_positions), 4, 8
            ),
            tiles,
        )


def test_a_window_computes_a_number_of_tiles_linear_in_length():
    def logits(rows):
        spans = visible_spans(causal_pattern(rows, rows), 64)
        sides = block_sizes(spans, rows)
        return visited_tiles(spans, rows, *sides).sum() * np.prod(sides)

    assert logits(2048) < 0.25 * 2048**2
    assert logits(8192) <= 4.2 * logits(2048)


def results(attend, pattern, valid, dtype=jnp.float32):
    """Output on rows that are no padding, and the gradients of a random sum of it."""
    queries, keys = len(pattern.query_positions), len(pattern.key_positions)
    batch = 1 if valid is None else len(valid)
    shapes = [
        (batch, rows, 2 if batch == 1 else 1, 8)
        for rows in (queries, keys, keys, queries)
    ]
    q, k, v, weights = (
        jax.random.normal(jax.random.key(i), shape).astype(dtype)
        for i, shape in enumerate(shapes)
    )
    if valid is not None:
        weights = (
            weights
            * valid[
                :,
                np.searchsorted(pattern.key_positions, pattern.query_positions),
                None,
                None,
            ]
        )
    out, pullback = jax.vjp(attend, q, k, v)
    return jnp.where(weights == 0, 0, out), *pullback(weights)


def assert_equals_dense(pattern, window, valid=None, blocks=(128, 128)):
    valid = None if valid is None else jnp.asarray(valid)
    got = results(
        lambda *qkv: splash_attention(
            *qkv, pattern, window, valid, blocks=blocks, interpret=True
        ),
        pattern,
        valid,
    )
    expected = results(
        lambda *qkv: dense_attention(*qkv, pattern, window, valid), pattern, valid
    )
    for mine, reference in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            mine, reference, atol=4e-6
        )  # measured: at most 1.2e-6


@pytest.mark.parametrize("window", [None, 1, 64, 300])
def test_windows_count_keys_with_self(window):
    assert_equals_dense(causal_pattern(300, 300), window)


@pytest.mark.parametrize("window", [None, 40])
def test_static_rows_candidates_and_padding(window):
    layout = build_layout(
        user_tokens=5, events=200, fused=True, candidates=4, target_tokens=3
    )
    valid = np.ones((2, layout.rows), bool)
    valid[0, 6:150] = valid[1, -3:] = False
    assert_equals_dense(every_row(layout), window, valid)


def test_every_second_row_asks_in_uc_and_padding_stays_out():
    layout = build_layout(
        user_tokens=3, events=70, fused=False, candidates=0, target_tokens=0
    )
    rows = live_positions(layout, (None, 20))
    valid = np.ones((2, len(rows[1])), bool)
    valid[0, :30] = False
    assert set(np.diff(rows[2])) == {2}
    assert_equals_dense(layout.pattern(rows[2], rows[1]), 20, valid)


def test_few_needed_rows_over_all_keys():
    layout = build_layout(
        user_tokens=5, events=140, fused=True, candidates=4, target_tokens=1
    )
    rows = live_positions(layout, (None, 6))
    assert (len(rows[1]), len(rows[0])) == (9, 151)
    assert_equals_dense(layout.pattern(rows[1], rows[0]), None, blocks=None)


def test_a_prefix_sees_itself_both_ways():
    assert_equals_dense(with_prefix(150, prefix=20), None, blocks=(128, 256))


def test_a_fully_padded_stream_is_finite_with_finite_gradients():
    q, valid = (
        jax.random.normal(jax.random.key(0), (1, 140, 1, 8)),
        jnp.zeros((1, 140), bool),
    )
    pattern = causal_pattern(140, 140)

    def total(x):
        return splash_attention(x, x, x, pattern, 2, valid, interpret=True).sum()

    value, gradient = jax.value_and_grad(total)(q)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_bfloat16_stays_bfloat16():
    pattern = causal_pattern(140, 140)
    got = results(
        lambda *qkv: splash_attention(*qkv, pattern, 9, None, interpret=True),
        pattern,
        None,
        jnp.bfloat16,
    )
    expected = results(
        lambda *qkv: dense_attention(*qkv, pattern, 9, None), pattern, None
    )
    for mine, reference in zip(got, expected, strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_allclose(
            mine.astype(np.float32), reference, atol=0.03
        )  # measured: 0.019, and of dense too


def pattern_of(**change):
    """Two static rows, four events and two candidates of one row, changed."""
    fields = {
        "query_positions": np.arange(8),
        "key_positions": np.arange(8),
        "index": np.array([0, 1, 2, 3, 4, 5, 6, 6]),
        "static": np.arange(8) < 2,
        "candidate": np.array([-1] * 6 + [0, 1]),
    }
    return Pattern(**fields | change)


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
def test_what_is_not_two_runs_of_keys_is_refused_in_words(change, reason):
    assert isinstance(visible_spans(pattern_of(), 4), tuple)
    assert reason in visible_spans(pattern_of(**change), 4)


def ask(
    queries,
    keys,
    window=None,
    pattern=None,
    dtype=jnp.float32,
    question=unsupported_reason,
):
    q, k = (jax.ShapeDtypeStruct((2, rows, 2, 8), dtype) for rows in (queries, keys))
    return question(
        q, k, causal_pattern(queries, keys) if pattern is None else pattern, window
    )


def test_what_fits_one_tile_is_served_only_when_asked_for():
    assert "nothing to skip" in ask(1, 128, question=inefficient_reason)
    assert not ask(1, 129, question=inefficient_reason)
    assert not ask(1, 128)


def test_dtypes_without_a_kernel_are_refused():
    assert "not float16" in ask(200, 200, dtype=jnp.float16)


def test_more_than_a_query_number_holds_is_refused():
    rows = 1 << 17
    pattern = Pattern(
        np.arange(rows),
        np.arange(rows),
        np.arange(rows),
        np.arange(rows) < 9,
        np.full(rows, -1),
    )
    assert "33 bits" in ask(rows, rows, 1 << 16, pattern)
    assert not ask(rows, rows, 64, pattern)
