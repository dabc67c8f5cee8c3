"""History compression: static lengths, events of the tokens, and padding invariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.worlds import mesh_of, one_device
from tokenrec.errors import InputError
from tokenrec.sharding import RULES
from tokenrec.tokens.compression_plan import CompressionPlan
from tokenrec.tokens.history_compression import AttentionPooling, HistoryCompressor

WIDTH, HEADS = 8, 2
PLANS = {
    "none": CompressionPlan(30),
    "mlp": CompressionPlan(30, "mlp", recent=5, compressed=4),
    "attention": CompressionPlan(30, "attention", recent=5, group=4),
    "attention of all": CompressionPlan(30, "attention", group=7),
}


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


@functools.cache
def build(plan):
    """The graph of a compressor, and weights off their starting values."""
    graph, weights = nnx.split(
        HistoryCompressor(plan, WIDTH, HEADS, rngs=nnx.Rngs(params=jax.random.key(0)))
    )
    random = np.random.default_rng(1)

    def moved(leaf):
        noise = 0.3 * random.normal(size=leaf.shape).astype(np.float32)
        return jax.device_put(np.asarray(leaf[...]) + noise, leaf[...].sharding)

    return graph, {path: moved(leaf) for path, leaf in nnx.to_flat_state(weights)}


def apply(graph, weights, x, valid):
    state = nnx.from_flat_state(
        [(path, nnx.Param(value)) for path, value in weights.items()]
    )
    return nnx.merge(graph, state)(x, valid)


_compiled = jax.jit(apply, static_argnums=0)


def compress(graph, weights, x, valid):
    return np.asarray(_compiled(graph, weights, x, valid))


def _weighed(graph, weights, x, valid, toward):
    return jnp.sum(apply(graph, weights, x, valid) * toward)


gradients = jax.jit(jax.grad(_weighed, argnums=(1, 2)), static_argnums=0)


def toward(plan, histories=3):
    return (
        np.random.default_rng(5)
        .normal(size=(histories, plan.tokens, WIDTH))
        .astype(np.float32)
    )


def histories(events, lengths, seed=0, newest=60):
    """Right-aligned histories that agree in their newest events.

    They agree for any number of events. Padding holds noise.
    """
    random = np.random.default_rng(seed)
    x = random.normal(size=(len(lengths), newest, WIDTH)).astype(np.float32)[
        :, newest - events :
    ]
    valid = np.arange(events)[None] >= events - np.asarray(lengths)[:, None]
    noise = np.random.default_rng(seed + events).normal(size=x.shape).astype(np.float32)
    return laid(np.where(valid[..., None], x, noise)), laid(valid)


def laid(x):
    """Split an array by its batch over the mesh in use."""
    return jax.device_put(
        x,
        jax.NamedSharding(
            jax.sharding.get_mesh(), RULES("batch", *[None] * (x.ndim - 1))
        ),
    )


@pytest.mark.parametrize(
    ("plan", "wanted"),
    [
        (CompressionPlan(4), [0, 1, 2, 3]),
        (
            CompressionPlan(9, "attention", recent=2, group=3),
            [0, 3, 6, 7, 8],
        ),  # groups {0}, {1, 2, 3}, {4, 5, 6}
        (CompressionPlan(8, "attention", recent=2, group=3), [2, 5, 6, 7]),
        (CompressionPlan(3, "attention", recent=1, group=9), [1, 2]),
        (CompressionPlan(10, "mlp", recent=2, compressed=3), [1, 4, 7, 8, 9]),
        (CompressionPlan(4, "mlp", compressed=4), [0, 1, 2, 3]),
    ],
)
def test_token_stands_for_the_newest_event_of_its_group(plan, wanted):
    assert plan.event.tolist() == wanted
    assert plan.tokens == len(wanted)


def test_published_recency_split_makes_230_tokens_of_500_events():
    assert CompressionPlan(500, "attention", recent=200, group=10).tokens == 230
    assert CompressionPlan(500, "mlp", recent=200, compressed=30).tokens == 230


@pytest.mark.parametrize("plan", [p for p in PLANS.values() if p.kind == "attention"])
@pytest.mark.parametrize("length", [0, 1, 6, 25, 26, 30])
def test_token_of_a_right_aligned_history_is_valid_where_its_group_holds_an_event(
    plan, length
):
    valid = np.arange(plan.events) >= plan.events - length
    starts = np.concatenate([[-1], plan.event[:-1]]) + 1
    wanted = [
        valid[start : end + 1].any()
        for start, end in zip(starts, plan.event, strict=True)
    ]
    assert valid[plan.event].tolist() == wanted


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("length", [1, 5, 6, 13, 30])
def test_plan_of_a_shorter_stream_keeps_the_tokens_of_the_events_it_has(name, length):
    plan = PLANS[name]
    short = plan.for_length(length)
    absent = plan.events - length
    assert (short.event + absent).tolist() == plan.event[plan.event >= absent].tolist()
    assert short.event[-1] == length - 1


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("length", [3, 5, 17, 30])
def test_number_of_tokens_is_that_of_the_plan(name, length):
    plan = PLANS[name]
    graph, weights = build(plan)
    x, valid = histories(length, [length, 0])
    out = jax.eval_shape(functools.partial(apply, graph), weights, x, valid)
    assert out.shape == (2, plan.for_length(length).tokens, WIDTH)


@pytest.mark.parametrize("name", PLANS)
def test_recent_events_are_untouched_and_come_last(name):
    plan = PLANS[name]
    x, valid = histories(30, [30, 3])
    out = compress(*build(plan), x, valid)
    kept = plan.recent or (30 if name == "none" else 0)
    assert np.array_equal(out[:, out.shape[1] - kept :], x[:, 30 - kept :])


@pytest.mark.parametrize("name", ["attention", "attention of all"])
def test_pooled_tokens_of_20_events_are_the_same_in_30_and_50_slots(name):
    plan = PLANS[name]
    graph, weights = build(plan)
    wide = CompressionPlan(50, "attention", recent=plan.recent, group=plan.group)
    narrow = compress(graph, weights, *histories(30, [20, 1]))
    in_wide = compress(build(wide)[0], weights, *histories(50, [20, 1]))
    known = np.asarray(histories(30, [20, 1])[1])[:, plan.event]
    # The same sums, shaped otherwise; values are of order 1. Measured: 4.8e-7 with AVX2
    # and AVX-512, 1.1e-6 in an earlier measurement.
    np.testing.assert_allclose(
        narrow[known], in_wide[:, -plan.tokens :][known], rtol=0, atol=5e-6
    )


@pytest.mark.parametrize("name", PLANS)
def test_stream_without_the_padding_at_its_old_end_gives_the_same_tokens(name):
    slots = 21  # cuts into a group
    plan = PLANS[name]
    graph, weights = build(plan)
    whole, short = (
        compress(graph, weights, *histories(length, [20, 7, 0]))
        for length in (30, slots)
    )
    known = np.asarray(histories(slots, [20, 7, 0])[1])[:, plan.for_length(slots).event]
    whole = whole[:, plan.tokens - short.shape[1] :]
    # The same sums, shaped otherwise; values are of order 1. Measured: 7.2e-7 with AVX2
    # and AVX-512, 1.2e-6 in an earlier measurement.
    np.testing.assert_allclose(whole[known], short[known], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "attention", "attention of all"])
def test_content_of_padding_never_matters_not_even_nan(name):
    plan = PLANS[name]
    graph, weights = build(plan)
    x, valid = histories(30, [20, 2, 0])
    spoilt = laid(np.where(np.asarray(valid)[..., None], x, np.nan))
    tokens = plan.tokens - plan.recent
    first, second = (
        compress(graph, weights, each, valid)[:, :tokens] for each in (x, spoilt)
    )
    assert np.array_equal(first, second)


def test_empty_group_gives_zeros():
    plan = PLANS["attention"]
    out = np.asarray(compress(*build(plan), *histories(30, [0, 12])))
    old = plan.event < 25
    assert (out[0, old] == 0).all()
    assert ((out[1] != 0).any(axis=-1) == (plan.event >= 18))[old].all()


@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_gradients_are_finite_for_empty_and_short_histories(name):
    plan = PLANS[name]
    for lengths in ([0, 0, 0], [0, 1, 26]):
        found = gradients(*build(plan), *histories(30, lengths), toward(plan))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("name", ["mlp", "attention", "attention of all"])
def test_gradients_reach_every_weight_and_every_valid_event_and_no_padding(name):
    plan = PLANS[name]
    older = plan.events - plan.recent
    x, valid = histories(30, [30, 17, 1])
    by_weight, by_event = gradients(*build(plan), x, valid, toward(plan))
    for path, gradient in by_weight.items():
        # An idle weight has gradient 0; used ones are of order 1.
        assert np.abs(gradient).max() > 1e-6, path
        if path[-1] in ("kernel", "place"):  # rows that belong to a place: all are used
            assert (np.abs(gradient).max(axis=1) > 1e-6).all(), path
    moved = np.abs(np.asarray(by_event)).max(axis=-1) > 1e-6
    assert np.array_equal(moved[:, :older], np.asarray(valid)[:, :older])


def test_pooled_token_depends_on_its_own_group_alone():
    plan = PLANS["attention"]
    graph, weights = build(plan)
    x, valid = histories(30, [30])
    other = laid(np.where(np.arange(30)[:, None] == 10, np.cos(x), x))
    changed = compress(graph, weights, other, valid) - compress(
        graph, weights, x, valid
    )
    group = np.searchsorted(plan.event, 10)
    assert np.flatnonzero(np.abs(changed[0]).max(axis=-1)).tolist() == [group]


def test_pooled_token_depends_on_the_order_in_its_group():
    plan = CompressionPlan(4, "attention", group=4)
    x, valid = histories(4, [4])
    graph, weights = build(plan)
    # By far more than rounding.
    assert (
        np.abs(
            compress(graph, weights, x, valid)
            - compress(graph, weights, x[:, ::-1], valid)
        ).max()
        > 1e-3
    )


def silenced(plan, *names):
    graph, weights = build(plan)
    return graph, {
        path: value * (not {*names} & {*path}) for path, value in weights.items()
    }


def test_pooling_without_layer_and_with_even_queries_is_the_mean_of_the_events():
    x, valid = histories(6, [5])
    made = compress(
        *silenced(
            CompressionPlan(6, "attention", group=4), "output", "outer", "reader"
        ),
        x,
        valid,
    )
    wanted = np.stack([np.asarray(x)[0, 1:2].mean(0), np.asarray(x)[0, 2:].mean(0)])
    # Means of up to four events in float32. Measured: equal.
    np.testing.assert_allclose(made[0], wanted, rtol=0, atol=1e-6)


def test_mlp_adds_to_the_mean_of_the_valid_events_of_each_span():
    x, valid = histories(7, [5])
    made = compress(
        *silenced(CompressionPlan(7, "mlp", compressed=2), "output"), x, valid
    )
    wanted = np.stack(
        [np.asarray(x)[0, 2:3].mean(0), np.asarray(x)[0, 3:].mean(0)]
    )  # spans [0, 2] and [3, 6]
    # Means of up to four events in float32. Measured: equal.
    np.testing.assert_allclose(made[0], wanted, rtol=0, atol=1e-6)


def test_bfloat16_stays_bfloat16():
    x, valid = histories(30, [30, 4])
    for name in ("mlp", "attention"):
        graph, weights = build(PLANS[name])
        out = jax.eval_shape(
            functools.partial(apply, graph), weights, x.astype(jnp.bfloat16), valid
        )
        assert out.dtype == jnp.bfloat16


@functools.cache
def fresh(name, shape):
    """Tokens and gradients of a compressor made on a mesh of this shape."""
    with jax.set_mesh(mesh_of(*shape)):
        graph, weights = nnx.split(
            HistoryCompressor(
                PLANS[name], WIDTH, HEADS, rngs=nnx.Rngs(params=jax.random.key(3))
            )
        )
        x, valid = histories(30, [0, 1, 4, 5, 6, 13, 29, 30])

        def loss(weights, x):
            tokens = nnx.merge(graph, weights)(x, valid)
            assert jax.typeof(tokens).sharding.spec == RULES("batch", None, None)
            return jnp.sum(tokens * toward(PLANS[name], 8)), tokens

        return jax.device_get(
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(weights, x)
        )


@pytest.mark.parametrize("name", ["mlp", "attention"])
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_split_over_devices_equals_one_device(name, shape):
    # float32 sums in another order. Measured: 2.3e-6 of the largest entry of an array
    # with AVX2 and AVX-512, 4.5e-6 with SSE4.2.
    for a, b in zip(
        jax.tree.leaves(fresh(name, shape)),
        jax.tree.leaves(fresh(name, (1, 1, 1))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, np.abs(b).max()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CompressionPlan(10, "pool"), "compression='pool' is not known"),
        (
            lambda: CompressionPlan(10, "attention", recent=10, group=2),
            "recent=10 of events=10 leaves nothing",
        ),
        (
            lambda: CompressionPlan(10, "attention", group=0),
            "group=0 .* must be at least 1",
        ),
        (
            lambda: CompressionPlan(10, "mlp", recent=4, compressed=7),
            "compressed=7 .* must be 1 to 6",
        ),
        (
            lambda: CompressionPlan(10).for_length(11),
            "a stream of 11 events is not within 0 to events=10",
        ),
        (
            lambda: AttentionPooling(8, 3, 2, rngs=nnx.Rngs(params=jax.random.key(0))),
            "heads=3 does not divide width=8",
        ),
    ],
)
def test_lengths_that_do_not_fit_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
