"""The bonus of items of the history, against plain loops."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.worlds import one_device
from tokenrec.config import Config, DataConfig, HeadConfig, TokensConfig
from tokenrec.config.validate import validate
from tokenrec.errors import InputError
from tokenrec.models.copying import START, CopyBonus, CopyBonuses, add_to_partition
from tokenrec.models.heads import CopiedItems, NextItemHead
from tokenrec.sharding import RULES

WIDTH, ITEMS, EVENTS = 8, 7, 6
# Repeats, an item that comes once, and padding at the left.
HISTORY = np.array(
    [[-1, -1, 3, 5, 3, 3], [0, 1, 0, 2, 1, 0], [-1] * 6, [6, 6, 6, 6, 6, 6]], np.int32
)


def make_copy(seed: int = 0) -> CopyBonus:
    copy = CopyBonus(WIDTH, rngs=nnx.Rngs(seed))
    draw = np.random.default_rng(seed)
    copy.kernel[...] = jnp.asarray(draw.normal(size=(WIDTH, 3)) * 0.3, jnp.float32)
    copy.bias[...] = jnp.asarray(draw.normal(size=3) * 0.3, jnp.float32)
    return copy


def make_head(seed: int = 0, **options) -> NextItemHead:
    head = NextItemHead(
        HeadConfig(copy=True, **options), WIDTH, ITEMS, rngs=nnx.Rngs(1)
    )
    head.copy = make_copy(seed)
    return head


def draw_readouts(readouts: int) -> np.ndarray:
    shape = (len(HISTORY), readouts, WIDTH)
    return np.random.default_rng(2).normal(size=shape).astype(np.float32)


def put(x: np.ndarray) -> jax.Array:
    """Lay an array out over the mesh as those of a batch."""
    return jax.sharding.reshard(jnp.asarray(x), RULES("batch", *[None] * (x.ndim - 1)))


def event_vectors(items: np.ndarray) -> np.ndarray:
    """Vectors `[..., d]` of items, 0 for none."""
    table = np.random.default_rng(4).normal(size=(ITEMS, WIDTH)).astype(np.float32)
    return np.where((items >= 0)[..., None], table[items], 0)


def apply(copy: CopyBonus, h: jax.Array, history: np.ndarray) -> CopyBonuses:
    return copy(h, put(history), put(event_vectors(history)))


def slow_bonus(
    copy: CopyBonus,
    h: np.ndarray,
    events: np.ndarray,
    item: int,
    vectors: Callable[[np.ndarray], np.ndarray] = event_vectors,
) -> float:
    """Bonus of an item at a read-out `h: [d]` after `events`, oldest first."""
    kernel, bias = (np.asarray(copy.kernel[...]), np.asarray(copy.bias[...]))
    unit = h / np.sqrt((h**2).mean() + 1e-6)
    a, b, g = unit @ kernel + bias + np.array(START)
    query = unit @ np.asarray(copy.query.kernel[...])
    total = 0.0
    for back, event in enumerate(events[::-1], start=1):
        if event == item:
            key = vectors(event) @ np.asarray(copy.key.kernel[...])
            attention = query @ key / np.sqrt(len(key))
            total += np.exp(attention + a - b * np.log(back))
    return float(np.log1p(np.exp(g)) * np.log1p(total))


def dense_bonuses(copy: CopyBonus, h: np.ndarray) -> np.ndarray:
    """Bonuses of all items, `[B, R, V]`, one at a time."""
    bonuses = np.zeros((*h.shape[:2], ITEMS))
    for b, r, item in np.ndindex(*bonuses.shape):
        end = EVENTS if h.shape[1] == 1 else r + 1
        bonuses[b, r, item] = slow_bonus(copy, h[b, r], HISTORY[b, :end], item)
    return bonuses


@pytest.mark.parametrize("readouts", [1, EVENTS])
def test_bonuses_are_those_of_a_loop(readouts):
    with jax.set_mesh(one_device()):
        copy, h = make_copy(), draw_readouts(readouts)
        found = apply(copy, put(h), HISTORY)
        every = np.broadcast_to(np.arange(ITEMS), (*h.shape[:2], ITEMS))
        by_item = found.at(put(every))
        nothing = found.at(put(np.full((*h.shape[:2], 1), -1)))
    expected = dense_bonuses(copy, h)
    assert (expected > 0).any()
    # float32 against float64: measured 3.1e-6 of 20, 4 % of the bound.
    np.testing.assert_allclose(by_item, expected, rtol=1e-5, atol=1e-6)
    # An item has its bonus once.
    np.testing.assert_allclose(
        found.bonuses.sum(axis=2), expected.sum(axis=2), rtol=1e-5, atol=1e-6
    )
    assert not nothing.any()


def test_the_newest_event_of_a_stream_is_read_as_a_request_is():
    with jax.set_mesh(one_device()):
        copy, h, history = make_copy(), put(draw_readouts(EVENTS)), HISTORY
        stream = apply(copy, h, history).bonuses
        request = apply(copy, h[:, -1:], history).bonuses
        # What follows an event changes nothing before it.
        later = history.copy()
        later[:, 4:] = 2
        changed = apply(copy, h, later).bonuses
        padded = np.pad(history, ((0, 0), (3, 0)), constant_values=-1)
        longer = apply(copy, h[:, -1:], padded).bonuses
    # Products of other shapes: measured 4.8e-7 of 8.5, 1 % of the bound.
    np.testing.assert_allclose(stream[:, -1:], request, rtol=1e-5)
    np.testing.assert_allclose(longer[..., 3:], request, rtol=1e-5)
    assert np.array_equal(stream[:, :4], changed[:, :4])
    assert not longer[..., :3].any()


@pytest.mark.parametrize(("readouts", "sampled"), [(1, True), (EVENTS, False)])
def test_losses_and_gradients_are_those_of_scores_with_bonuses(readouts, sampled):
    """Every item drawn once is the full softmax."""
    goals = np.random.default_rng(3).integers(-1, ITEMS, (len(HISTORY), readouts, 2))
    counts = np.zeros((len(HISTORY), readouts, ITEMS), np.float32)
    for b, r, p in np.ndindex(*goals.shape):
        if goals[b, r, p] >= 0:
            counts[b, r, goals[b, r, p]] += 1
    with jax.set_mesh(one_device()):
        head = make_head(cosine=True, temperature=0.5)
        graph, weights = nnx.split(head)
        items, goals = put(HISTORY), put(goals.astype(np.int32))

        def fast(weights, h):
            head = nnx.merge(graph, weights)
            vectors = head.lookup(items)
            copied = CopiedItems(head.copy(h, items, vectors), vectors)
            if not sampled:
                return jnp.sum(head.full_losses(h, goals, copied))
            every = jnp.arange(ITEMS)
            return jnp.sum(
                head.sampled_losses(
                    h, goals, head.lookup(goals), every, head.vectors(), copied
                )
            )

        def plain(weights, h):
            """Loss of the scores of all items, `[B, R, V]`."""
            head = nnx.merge(graph, weights)
            scores = head.scores(h, head.vectors())
            bonuses = head.copy(h, items, head.lookup(items))
            scores += bonuses.at(put(np.broadcast_to(np.arange(ITEMS), scores.shape)))
            return -jnp.sum(jax.nn.log_softmax(scores) * put(counts))

        h = put(draw_readouts(readouts))
        found = jax.jit(jax.value_and_grad(fast, argnums=(0, 1)))(weights, h)
        expected = jax.jit(jax.value_and_grad(plain, argnums=(0, 1)))(weights, h)
    assert float(expected[0]) > 1
    # Another order of float32 sums: measured 1.5e-5 of 142 and 1.2e-6 of 6, 1 % of the
    # bound.
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_partitions_with_bonuses_are_finite_with_finite_gradients():
    scores = jnp.array([[-200.0, 0.0, 3.0], [0.0, 0.0, 0.0], [-5.0, -5.0, -5.0]])
    bonuses = jnp.array([[300.0, 0.0, 1e-20], [0.0, 0.0, 0.0], [100.0, 100.0, 0.0]])
    total = jnp.full(3, 4.0)
    found = add_to_partition(total, scores, bonuses)
    wide, more = np.float64(scores), np.float64(bonuses)
    expected = np.log(np.exp(4.0) + (np.exp(wide) * np.expm1(more)).sum(axis=1))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    slopes = jax.grad(lambda *x: add_to_partition(*x).sum(), argnums=(0, 1, 2))(
        total, scores, bonuses
    )
    assert all(np.isfinite(slope).all() for slope in slopes)
    # d log Z' / dB = exp(s + B) / Z', also where the bonus is 0.
    np.testing.assert_allclose(
        slopes[2], np.exp(wide + more - expected[:, None]), rtol=1e-4, atol=1e-30
    )


@pytest.mark.parametrize("retrieval", ["next_item", "semantic_id"])
def test_seen_items_are_either_copied_or_left_out(retrieval):
    config = Config(
        data=DataConfig(objective="retrieval", semantic_ids="ids"),
        tokens=TokensConfig(fused=True, maker="linear"),
        head=HeadConfig(copy=True, drop_seen=True, retrieval=retrieval),
    )
    with pytest.raises(InputError) as error:
        validate(config)
    words = ("head.copy=True", "head.drop_seen=True")
    assert all(word in str(error.value) for word in words)
