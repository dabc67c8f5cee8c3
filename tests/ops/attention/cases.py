"""Patterns that every implementation of attention must serve, and how one is compared with the reference."""

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.attention import attention
from tokenrec.ops.attention.pattern import Pattern, causal_pattern
from tokenrec.tokens.layout import (
    Layout,
    StreamPart,
    build_layout,
    history_part,
    lay_out,
    live_positions,
)

WINDOWS = (None, None, 32, 16)


def stream(
    *, candidates: int, fused: bool = False, events: int = 70
) -> tuple[Layout, jax.Array]:
    """A layout with static rows, and `valid: [2, S]` of one stream that is a third padding and one of three events."""
    layout = build_layout(
        user_tokens=5,
        events=events,
        fused=fused,
        candidates=candidates,
        target_tokens=2 if candidates else 1,
    )
    real = np.zeros((2, events), bool)
    real[0, events // 3 :] = True
    real[1, -3:] = True
    known = np.ones((2, candidates), bool)
    known[1, 1:] = False
    return layout, layout.valid(
        jnp.asarray(real), jnp.asarray(known) if candidates else None
    )


def continued(*, events: int) -> tuple[Layout, jax.Array]:
    """A stream whose every event is continued by three rows of its own, at the end: rows are not in order of index."""
    shared = [
        StreamPart.of("user", 3),
        StreamPart.of("sep", 1),
        history_part(events=events, fused=True),
    ]
    layout = lay_out(
        shared,
        [StreamPart.of("code", 3)],
        events=events,
        candidates=events,
        read="events",
    )
    real = np.arange(events)[None] >= np.array([[events // 3], [events - 3]])
    return layout, layout.valid(jnp.asarray(real), jnp.asarray(real))


def layers(
    layout: Layout, *, every_row: bool = False
) -> list[tuple[Pattern, int | None]]:
    """Pattern and window of two full and two sliding layers, over the needed rows or over all."""
    rows = (
        [np.arange(layout.rows)] * 5 if every_row else live_positions(layout, WINDOWS)
    )
    return [
        (layout.pattern(queries, keys), window)
        for keys, queries, window in zip(rows, rows[1:], WINDOWS, strict=False)
    ]


def plain(queries: int, keys: int, window: int | None) -> tuple[Pattern, int | None]:
    return causal_pattern(queries, keys), window


def inputs(
    pattern: Pattern,
    *,
    batch: int = 2,
    heads: int = 2,
    width: int = 8,
    dtype: str = "float32",
):
    """q, k, v, and a gradient of the output."""
    sizes = [
        len(pattern.query_positions),
        len(pattern.key_positions),
        len(pattern.key_positions),
        len(pattern.query_positions),
    ]
    return [
        jax.random.normal(
            jax.random.key(i), (batch, size, heads, width), jnp.dtype(dtype)
        )
        for i, size in enumerate(sizes)
    ]


def apart(
    attend,
    pattern: Pattern,
    window: int | None,
    valid: jax.Array | None = None,
    **sizes,
) -> tuple[float, float]:
    """Largest difference from `dense`, of values and of gradients, over the rows that are not padding.

    `attend(q, k, v, valid)`; `valid: [B, K]`.
    """
    q, k, v, pull = inputs(pattern, **sizes)
    if valid is not None:
        real = valid[:, np.searchsorted(pattern.key_positions, pattern.query_positions)]
        pull = pull * real[..., None, None]

    def made(function):
        def loss(q, k, v):
            out = function(q, k, v, valid).astype(jnp.float32)
            return jnp.sum(out * pull), out * (pull != 0)

        (_, out), gradients = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        )(q, k, v)
        return out, gradients

    def dense(q, k, v, valid):
        return attention(
            q, k, v, window=window, implementation="dense", pattern=pattern, valid=valid
        )

    (out, gradients), (expected, expected_gradients) = made(attend), made(dense)
    pairs = zip(gradients, expected_gradients, strict=True)
    return float(jnp.max(jnp.abs(out - expected))), max(
        float(jnp.max(jnp.abs(a - b))) for a, b in pairs
    )
