"""Discrete tokens: their number, their order, and the signals that change them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.worlds import FEATURES, SCHEMA, TABLES, mesh_of, one_device
from tokenrec.config import TokensConfig
from tokenrec.data.schema import Feature
from tokenrec.errors import InputError
from tokenrec.ops.tables.lookup import expand_rows
from tokenrec.sharding import RULES
from tokenrec.tokens.discrete_tokens import (
    BINS,
    DiscreteTokenMaker,
    dense_buckets,
    token_count,
    tokens_per_feature,
    truncate_left,
)

WIDTH = 16
TITLE = Feature("title", "text", "item", length=4, codes=256)
WRITABLE = (*(f for f in FEATURES if f.kind != "embedding"), TITLE)
ROWS = TABLES | {"text": 258}
CONFIG = TokensConfig(
    embedding_dim=8, embedding_dims={"video": WIDTH, "text": 6}
)  # a row as wide as a token, too
AGE = SCHEMA.feature("age")


def tables(seed=0):
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(
            random.normal(size=(rows, CONFIG.embedding_dims.get(name, 8))), jnp.float32
        )
        for name, rows in ROWS.items()
    }


def signals(lead, seed=0):
    """Random ids and numbers by feature name; a tenth of the numbers is missing."""
    random = np.random.default_rng(seed)
    ids = {
        f.name: random.integers(0, ROWS[f.table_name], (*lead, f.length), np.int32)
        for f in WRITABLE
        if f.is_integer
    }
    dense = {
        f.name: random.normal(f.mean, 2 * f.deviation, (*lead, 1))
        for f in WRITABLE
        if not f.is_integer
    }
    numbers = {
        n: np.where(random.random(x.shape) < 0.1, np.nan, x).astype(np.float32)
        for n, x in dense.items()
    }
    return ids, numbers


def write(maker, tables, ids, numbers, dtype=jnp.float32):
    rows = {
        f.name: expand_rows(tables[f.table_name], ids[f.name])
        for f in WRITABLE
        if f.is_integer
    }
    return maker(rows | numbers, ids, dtype)


def maker(features=WRITABLE, seed=0):
    return DiscreteTokenMaker(features, WIDTH, CONFIG, rngs=nnx.Rngs(seed))


@pytest.fixture(autouse=True)
def mesh():
    mesh = one_device()
    with jax.set_mesh(mesh):
        yield mesh


def test_tokens_are_counted_exactly_for_every_kind() -> None:
    assert tokens_per_feature(WRITABLE) == [
        ("gender", 1),
        ("age", 1),
        ("video", 1),
        ("tags", 3),
        ("code", 2),
        ("rate", 1),
        ("tab", 1),
        ("clicked", 1),
        ("watched", 1),
        ("title", 4),
    ]
    assert token_count(WRITABLE) == maker().tokens == 16


def test_counts_are_those_of_the_paper() -> None:
    numbers = tuple(Feature(f"number_{i}", "dense", "item") for i in range(3))
    channel = Feature("channel", "categorical", "item")
    ranking = (
        Feature("sid", "semantic_id", "item", length=8, codes=16384),
        channel,
        *numbers,
    )
    retrieval = (Feature("item", "categorical", "item"), channel, *numbers)
    assert (token_count(ranking), token_count(retrieval)) == (12, 5)


@pytest.mark.parametrize("lead", [(8,), (8, 5)])
def test_shape_is_the_count_for_every_leading_shape_and_dtype(lead) -> None:
    ids, numbers = signals(lead)
    made = write(maker(), tables(), ids, numbers, jnp.bfloat16)
    assert made.shape == (*lead, 16, WIDTH)
    assert made.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(made).all())


def test_an_embedding_cannot_be_written() -> None:
    for refuse in (tokens_per_feature, token_count, lambda features: maker(features)):
        with pytest.raises(
            InputError, match=r"'picture' is an embedding of 5 numbers.*data\.exclude"
        ):
            refuse(FEATURES)


def test_a_maker_without_features_is_refused() -> None:
    with pytest.raises(InputError, match="no features"):
        maker(())


def test_tokens_stand_in_the_order_of_declaration() -> None:
    """Changing one signal changes its own tokens and no others."""
    ids, numbers = signals((2,))
    numbers = {
        name: np.full_like(x, SCHEMA.feature(name).mean) for name, x in numbers.items()
    }
    module, rows = maker(), tables()
    before = write(module, rows, ids, numbers)
    first = 0
    for name, count in tokens_per_feature(WRITABLE):
        changed = {**ids, name: (ids[name] + 1) % 3} if name in ids else ids
        moved = {**numbers, name: numbers[name] + 50} if name in numbers else numbers
        differs = np.any(
            np.asarray(write(module, rows, changed, moved) != before), axis=(0, 2)
        )
        wanted = np.zeros(16, bool)
        wanted[first : first + count] = True
        np.testing.assert_array_equal(differs, wanted, err_msg=name)
        first += count


def test_a_row_as_wide_as_a_token_is_the_token_and_others_share_one_map_per_table() -> (
    None
):
    ids, numbers = signals((3,))
    module, rows = maker(), tables()
    made = write(module, rows, ids, numbers)
    np.testing.assert_array_equal(made[:, 2], rows["video"][ids["video"][:, 0]])
    assert sorted(module.widened) == [
        "clicked",
        "code",
        "gender",
        "tab",
        "tags",
        "text",
    ]
    title = (
        rows["text"][ids["title"]]
        @ module.widen[module.widened.index("text")].kernel[...]
    )
    # The same product, outside of the module. Measured: equal.
    np.testing.assert_allclose(made[:, -4:], title, rtol=0, atol=1e-6)


def test_features_of_one_table_share_its_map() -> None:
    pair = (
        Feature("author", "categorical", "item", table="people"),
        Feature("guest", "categorical", "context", "people"),
    )
    assert maker(pair).widened == ("people",)


def test_gradients_reach_every_table_and_every_weight_that_is_used() -> None:
    ids, numbers = signals((8, 5))
    graph, weights = nnx.split(maker())

    def total(weights, tables):
        return jnp.sum(
            jnp.square(write(nnx.merge(graph, weights), tables, ids, numbers))
        )

    of_weights, of_tables = jax.grad(total, argnums=(0, 1))(weights, tables())
    for name, gradient in of_tables.items():
        used = np.unique(
            np.concatenate(
                [ids[f.name].ravel() for f in WRITABLE if f.table_name == name]
            )
        )
        reached = np.flatnonzero(np.abs(gradient).sum(axis=1))
        np.testing.assert_array_equal(reached, used, err_msg=name)
    leaves = jax.tree.leaves(of_weights)
    assert len(leaves) == 6 + 1
    assert all(np.abs(leaf).sum() > 0 for leaf in leaves)


def test_a_missing_value_is_a_token_of_its_own() -> None:
    ids, numbers = signals((2,))
    blank = {name: np.zeros_like(x) for name, x in ids.items()}
    nothing = {name: np.full_like(x, np.nan) for name, x in numbers.items()}
    average = {
        name: np.full_like(x, SCHEMA.feature(name).mean) for name, x in numbers.items()
    }
    module, rows = maker(), tables()
    made = write(module, rows, blank, nothing)
    assert bool(jnp.isfinite(made).all())
    np.testing.assert_array_equal(
        made[:, 2], np.broadcast_to(rows["video"][0], (2, WIDTH))
    )
    number = [i for i, f in enumerate(WRITABLE) if f.name == "age"]
    assert np.all(
        np.asarray(made != write(module, rows, blank, average)).any(axis=-1)[:, number]
    )


def test_the_bucket_of_a_number_never_falls_and_missing_has_the_last() -> None:
    values = np.linspace(
        AGE.mean - 8 * AGE.deviation,
        AGE.mean + 8 * AGE.deviation,
        2001,
        dtype=np.float32,
    )[:, None]
    buckets = np.asarray(dense_buckets(jnp.asarray(values), AGE))[:, 0]
    assert np.all(np.diff(buckets) >= 0)
    assert sorted(set(buckets)) == list(range(BINS))
    assert dense_buckets(jnp.array([[jnp.nan]]), AGE).tolist() == [[BINS]]


def test_buckets_are_equally_likely_under_a_normal() -> None:
    drawn = (
        np.random.default_rng(0)
        .normal(AGE.mean, AGE.deviation, (64_000, 1))
        .astype(np.float32)
    )
    counts = np.bincount(
        np.asarray(dense_buckets(jnp.asarray(drawn), AGE))[:, 0], minlength=BINS
    )
    # 1,000 are expected in each, with a deviation of 31; the farthest of the 64 was 76
    # off.
    assert np.abs(counts - 1000).max() < 130


def test_a_long_tailed_number_is_bucketed_after_its_transform() -> None:
    long = dataclasses.replace(AGE, transform="log1p", mean=2.0, deviation=1.0)
    buckets = dense_buckets(jnp.array([[0.0], [np.expm1(2.0) + 1e-3], [1e6]]), long)
    assert buckets[:, 0].tolist() == [1, BINS // 2, BINS - 1]


@pytest.mark.parametrize(
    ("tokens", "cap", "kept"),
    [
        (60, 50, range(10, 60)),
        (48, 50, range(48)),
        (50, 50, range(50)),
        (7, 0, range(0)),
        (0, 5, range(0)),
    ],
)
def test_the_oldest_tokens_go_first(tokens: int, cap: int, kept: range) -> None:
    assert np.arange(tokens)[truncate_left(tokens, cap)].tolist() == list(kept)


def test_an_event_may_be_cut_in_two_and_a_negative_cap_is_refused() -> None:
    event = np.repeat(np.arange(5), 12)[truncate_left(5 * 12, 50)]
    assert np.bincount(event).tolist() == [2, 12, 12, 12, 12]
    with pytest.raises(InputError, match="cap=-1"):
        truncate_left(5, -1)


def test_sharded_tokens_and_gradients_equal_unsharded_ones() -> None:
    ids, numbers = signals((8, 5))

    def run(mesh):
        with jax.set_mesh(mesh):
            graph, weights = nnx.split(maker())
            lay = jax.NamedSharding(mesh, RULES("batch", None, None))
            placed = jax.device_put((ids, numbers), lay)
            rows = jax.device_put(tables(), jax.NamedSharding(mesh, RULES()))

            def total(weights, rows):
                made = write(nnx.merge(graph, weights), rows, *placed)
                return jnp.sum(jnp.square(made)), made

            (_, made), gradients = jax.jit(
                jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
            )(weights, rows)
            return jax.device_get((made, jax.tree.leaves(gradients)))

    made, gradients = run(one_device())
    sharded, sharded_gradients = run(mesh_of(2, 2, 2))
    # Products of other shapes sum in another order. Measured: equal, and 3.6e-7 on an
    # older machine.
    np.testing.assert_allclose(sharded, made, rtol=0, atol=2e-6)
    for a, b in zip(sharded_gradients, gradients, strict=True):
        # Gradients are sums over the batch. Measured: 5.2e-7 of the largest entry of an
        # array.
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
