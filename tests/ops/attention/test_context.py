"""Attention over split tokens equals that of one device, in values and gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_specs import causal_spec
from tests.worlds import mesh_of
from tests.ops.attention.patterns import many_patterns
from tokenrec.ops.attention import attention
from tokenrec.ops.attention.context import split_attention, split_splash
from tokenrec.ops.attention.context_plan import plan_split
from tokenrec.ops.attention.dense import dense_attention
from tokenrec.ops.attention.pattern import Pattern, causal_pattern
from tokenrec.sharding import RULES

# Float32 rounding. Measured:
TOLERANCE = 4e-6
BY_HEAD = RULES("batch", "tokens", "heads", None)


def inputs(queries, keys, *, padded=True, batch=2, heads=2, width=8):
    random = np.random.default_rng(0)
    shapes = [(batch, n, heads, width) for n in (queries, keys, keys, queries)]
    q, k, v, gradient = (random.normal(size=s).astype(np.float32) for s in shapes)
    valid = np.ones((batch, keys), bool)
    if padded:
        valid[0, 3 : keys // 3] = False
    return q, k, v, gradient, valid


def values_and_gradients(attend, q, k, v, gradient, valid):
    def loss(q, k, v):
        out = attend(q, k, v, valid)
        shown = jnp.where(gradient == 0, 0, out)
        return jnp.sum(shown * gradient), shown

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    (_, out), gradients = jax.jit(grad)(q, k, v)
    return jax.device_get((out, *gradients))


def difference(attend, pattern, window, mesh, **options):
    queries, keys = len(pattern.query_positions), len(pattern.key_positions)
    q, k, v, gradient, valid = inputs(queries, keys, **options)
    places = np.searchsorted(pattern.key_positions, pattern.query_positions)
    gradient = gradient * valid[:, places, None, None]
    expected = values_and_gradients(
        lambda q, k, v, valid: dense_attention(q, k, v, pattern, window, valid),
        q,
        k,
        v,
        gradient,
        valid,
    )
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(x, jax.NamedSharding(mesh, BY_HEAD))
            for x in (q, k, v, gradient)
        ]
        valid = jax.device_put(valid, jax.NamedSharding(mesh, RULES("batch", None)))
        got = values_and_gradients(
            lambda q, k, v, valid: attend(q, k, v, valid), *arrays, valid
        )
    return [float(np.abs(a - b).max()) for a, b in zip(got, expected, strict=True)]


if __name__ == "__main__":
    import time

    for context, mesh in ((2, mesh_of(2, 1, 2, 2)), (4, mesh_of(1, 2, 1, 4))):
        for window in (None, 5, 16, 40):
            for name in ("dense", "blocked"):
                t = time.time()
                pattern = causal_pattern(64, 64)
                plan = plan_split(pattern, window, context)
                d = difference(
                    lambda q, k, v, valid: attention(
                        q, k, v, window=window, valid=valid, implementation=name
                    ),
                    pattern,
                    window,
                    mesh,
                )
                print(
                    context, window, name, plan.halo, plan.balanced, d, time.time() - t
                )
