"""Attention over tokens that are split over `mesh.context`, against one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.stream_layouts import build_layout
from tests.ops.attention.patterns import many_patterns
from tests.worlds import mesh_of
from tokenrec.errors import InputError
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.context import split_splash
from tokenrec.ops.attention.context_plan import plan_split
from tokenrec.ops.attention.dense import dense_attention
from tokenrec.ops.attention.pattern import causal_pattern
from tokenrec.sharding import RULES

# Float32 rounding: softmax and sums in another order. Measured: values 4.8e-7,
# gradients 1.9e-6. The margin is 2x.
TOLERANCE = 4e-6


def stream_pattern(candidates):
    """User tokens, 20 fused events and candidates, filled up for four parts."""
    layout = build_layout(
        user_tokens=3,
        events=20,
        fused=True,
        candidates=candidates,
        target_tokens=2 if candidates else 0,
    )
    every = np.arange(layout.length)
    filled = layout.with_fill(-layout.length % 8)
    np.testing.assert_array_equal(
        filled.pattern(every, every).visible(6), layout.pattern(every, every).visible(6)
    )
    every = np.arange(filled.length)
    pattern = filled.pattern(every, every)
    # No token sees the fill.
    assert not pattern.visible(None)[: layout.length, layout.length :].any()
    return pattern


def needed(pattern, queries):
    return dataclasses.replace(
        pattern, query_positions=pattern.query_positions[-queries:]
    )


# Patterns and windows; with four parts of 8 tokens a window of 6 needs a halo, and one
# of 20 more than the part before.
CASES = {
    "full": (causal_pattern(32, 32), None, "blocked"),
    "longer than a part": (causal_pattern(32, 32), 20, "dense"),
    "static tokens and a halo": (stream_pattern(0), 6, "blocked"),
    "candidates": (stream_pattern(3), 6, "dense"),
}


def test_plans_show_every_part_what_its_queries_see():
    for pattern, window in many_patterns():
        queries, keys = len(pattern.query_positions), len(pattern.key_positions)
        if queries % 4 or keys % 4:
            continue
        seen = pattern.visible(window) | pattern.diagonal()
        plan = plan_split(pattern, window, 4)
        found = []
        for part in plan.parts:
            own = part.cut(window).pattern
            rows = np.searchsorted(pattern.query_positions, own.query_positions)
            places = np.searchsorted(pattern.key_positions, own.key_positions)
            of_part = np.zeros((len(rows), keys), bool)
            of_part[:, places] = own.visible(window) | own.diagonal()
            np.testing.assert_array_equal(of_part, seen[rows])
            found.append(rows)
        np.testing.assert_array_equal(np.sort(np.concatenate(found)), range(queries))


@pytest.mark.parametrize("parts", [2, 4, 16])
def test_chunks_of_queries_balance_causal_work(parts):
    plan = plan_split(causal_pattern(256, 256), None, parts)
    work = [part.pattern.visible(None).sum() for part in plan.parts]
    assert max(work) == min(work)


@pytest.mark.parametrize(("window", "halo"), [(6, 5), (9, 8), (10, None), (None, None)])
def test_a_window_within_a_part_needs_a_halo_only(window, halo):
    assert plan_split(causal_pattern(32, 32), window, 4).halo == halo


def test_a_halo_and_a_gather_see_what_a_candidate_or_fewer_queries_need():
    assert plan_split(CASES["static tokens and a halo"][0], 6, 4).halo == 5
    assert plan_split(CASES["candidates"][0], 6, 4).halo is None
    assert plan_split(needed(causal_pattern(32, 32), 16), 6, 4).halo is None


def arguments(pattern, heads=2, width=4):
    """q, k, v, gradient and padding `[2, ...]`; gradients of padding are 0."""
    queries, keys = len(pattern.query_positions), len(pattern.key_positions)
    random = np.random.default_rng(0)
    shapes = [(2, n, heads, width) for n in (queries, keys, keys, queries)]
    q, k, v, gradient = (random.normal(size=s).astype(np.float32) for s in shapes)
    valid = np.ones((2, keys), bool)
    valid[0, 3 : keys // 3] = False
    places = np.searchsorted(pattern.key_positions, pattern.query_positions)
    return q, k, v, gradient * valid[:, places, None, None], valid


def values_and_gradients(attends, inputs):
    """Outputs and gradients of several attentions, `attend(q, k, v, valid)`."""

    def one(attend, q, k, v, gradient, valid):
        out, backward = jax.vjp(lambda q, k, v: attend(q, k, v, valid), q, k, v)
        return jnp.where(gradient == 0, 0, out), *backward(gradient)

    def every(inputs):
        return [one(a, *each) for a, each in zip(attends, inputs, strict=True)]

    return jax.device_get(jax.jit(every)(inputs))


def largest_difference(attends, mesh, cases, **sizes):
    """Largest difference of outputs and gradients from those of `dense`, by case."""
    inputs = [arguments(pattern, **sizes) for pattern, _ in cases]
    expected = values_and_gradients(
        [
            lambda q, k, v, valid, pattern=pattern, window=window: dense_attention(
                q, k, v, pattern, window, valid
            )
            for pattern, window in cases
        ],
        inputs,
    )
    by_head = RULES("batch", "tokens", "heads", None)
    specs = (by_head,) * 4 + (RULES("batch", None),)
    with jax.set_mesh(mesh):
        placed = [
            tuple(
                jax.device_put(x, jax.NamedSharding(mesh, spec))
                for x, spec in zip(each, specs, strict=True)
            )
            for each in inputs
        ]
        got = values_and_gradients(attends, placed)
    return [
        max(float(np.abs(a - b).max()) for a, b in zip(*pair, strict=True))
        for pair in zip(got, expected, strict=True)
    ]


def test_values_and_gradients_are_those_of_one_device():
    def attend(pattern, window, name):
        return lambda q, k, v, valid: attention(
            q, k, v, window=window, pattern=pattern, valid=valid, implementation=name
        )

    found = largest_difference(
        [attend(*case) for case in CASES.values()],
        mesh_of(1, 1, 1, 4),
        [case[:2] for case in CASES.values()],
    )
    assert max(found) < TOLERANCE, dict(zip(CASES, found, strict=True))


def test_splash_serves_all_parts_by_one_program():
    """In interpret mode: a balanced full layer, and static tokens with a halo."""
    layout = build_layout(
        user_tokens=3, events=508, fused=True, candidates=0, target_tokens=0
    )
    every = np.arange(layout.length)
    pattern = layout.pattern(every, every)
    cases = [(pattern, None), (pattern, 70)]

    def attend(pattern, window):
        plan = plan_split(pattern, window, 2)
        return lambda q, k, v, valid: split_splash(
            plan, q, k, v, valid, window=window, blocks=(128, 128), interpret=True
        )

    found = largest_difference(
        [attend(*case) for case in cases],
        mesh_of(1, 1, 1, 2),
        cases,
        heads=1,
        width=8,
    )
    assert max(found) < TOLERANCE, found


def test_a_named_implementation_that_cannot_serve_a_part_is_refused():
    pattern = CASES["candidates"][0]
    q = jnp.zeros((2, len(pattern.query_positions), 2, 4))
    mesh = mesh_of(1, 1, 1, 4)
    with jax.set_mesh(mesh):
        q = jax.device_put(
            q, jax.NamedSharding(mesh, RULES("batch", "tokens", "heads", None))
        )
        with pytest.raises(InputError, match="does not run on cpu"):
            attention(q, q, q, pattern=pattern, implementation="splash")
