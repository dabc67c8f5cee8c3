"""Tries and beam search against brute force: score every item and sort."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import mesh_of
from tokenrec.errors import InputError
from tokenrec.evaluation.beam_search import beam_search
from tokenrec.evaluation.trie import build_trie
from tokenrec.sharding import RULES

CODES = 5


def catalogue(items, levels, seed=0, codes=CODES):
    """Draw distinct semantic ids `[N, L]`, in random order."""
    random = np.random.default_rng(seed)
    every = random.permutation(codes**levels)[:items]
    return np.stack(np.unravel_index(every, (codes,) * levels), axis=1).astype(np.int32)


def prefix_number(codes):
    """Number the prefixes: `[..., l]` -> `[...]`."""
    number = 0
    for level in range(codes.shape[-1]):
        number = number * CODES + codes[..., level]
    return number


def random_model(levels, batch, seed=0, values=None):
    """Make log-probabilities `[B, prefixes, CODES]` for each level.

    `values` are a few numbers to draw from instead, for ties.
    """
    random = np.random.default_rng(seed)
    tables = []
    for level in range(levels):
        shape = (batch, CODES**level, CODES)
        logits = (
            random.normal(size=shape)
            if values is None
            else random.choice(values, shape)
        )
        tables.append(
            np.asarray(
                logits if values is not None else jax.nn.log_softmax(logits), np.float32
            )
        )
    return tables


def next_log_probs(tables, codes, level):
    number = (
        prefix_number(codes) if level else jnp.zeros_like(codes, shape=codes.shape[:2])
    )
    return jnp.take_along_axis(tables[level], number[..., None], axis=1)


def brute_force(tables, codes, width, renormalize=False, allowed=None):
    """Items and scores of the `width` best of each request, `[B, W]` both.

    -1 and -inf where fewer items exist, or are allowed.
    """
    items, scores = [], []
    for b in range(len(tables[0])):
        total = np.zeros(len(codes), np.float32)
        for level, table in enumerate(tables):
            rows = (
                table[b, prefix_number(codes[:, :level])]
                if level
                else np.broadcast_to(table[b, 0], (len(codes), 5))
            )
            gain = rows[np.arange(len(codes)), codes[:, level]]
            if renormalize:
                alike = (codes[:, None, :level] == codes[None, :, :level]).all(axis=-1)
                there = [np.unique(codes[same, level]) for same in alike]
                gain = gain - np.array(
                    [
                        np.logaddexp.reduce(r[t])
                        for r, t in zip(rows, there, strict=True)
                    ]
                )
            total += gain
        order = np.lexsort([np.arange(len(codes)), -total])
        order = order[slice(None) if allowed is None else allowed[b][order]][:width]
        more = width - len(order)
        items.append(np.pad(order, (0, more), constant_values=-1))
        scores.append(np.pad(total[order], (0, more), constant_values=-np.inf))
    return np.array(items), np.array(scores)


@functools.partial(jax.jit, static_argnames=("batch", "width", "renormalize"))
def search(tables, trie, *, batch, width, renormalize=False, allowed=None):
    return beam_search(
        functools.partial(next_log_probs, tables),
        trie,
        batch=batch,
        width=width,
        renormalize=renormalize,
        allowed=allowed,
    )


def assert_brute_force(found, tables, codes, width, allowed=None):
    items, scores = brute_force(tables, codes, width, allowed=allowed)
    assert found.items.dtype == jnp.int32
    assert found.scores.dtype == jnp.float32
    assert np.asarray(found.items).tolist() == items.tolist()
    # The same sums in the same order, which round alike on every processor.
    assert np.array_equal(found.scores, scores)
    assert np.array_equal(
        found.codes, np.where((items >= 0)[..., None], codes[items], -1)
    )


@pytest.mark.parametrize(
    ("items", "levels", "width"),
    [(1, 1, 1), (4, 1, 2), (40, 3, 25), (40, 3, 50), (90, 3, 30)],
)
@pytest.mark.parametrize(
    "values", [None, (-3.0, -2.0, -1.0, -np.inf)], ids=["distinct", "ties"]
)
def test_the_best_items_are_those_of_brute_force(items, levels, width, values):
    assert width >= CODES ** (levels - 1)  # no level but the last is cut
    for seed in range(4):
        codes = catalogue(items, levels, seed)
        tables = random_model(levels, 3, seed, values)
        assert_brute_force(
            search(tables, build_trie(codes), batch=3, width=width),
            tables,
            codes,
            width,
        )


@pytest.mark.parametrize("width", [1, 2, 4])
def test_narrow_beams_find_items_that_exist_with_their_own_scores(width):
    codes = catalogue(60, 3, seed=1)
    tables = random_model(3, 4, seed=2)
    found = search(tables, build_trie(codes), batch=4, width=width)
    items, scores = brute_force(tables, codes, len(codes))
    assert (np.asarray(found.items) >= 0).all()
    assert (np.diff(found.scores, axis=1) <= 0).all()
    assert np.array_equal(found.codes, codes[found.items])
    for b in range(4):
        assert len(set(np.asarray(found.items)[b].tolist())) == width
        where = [items[b].tolist().index(i) for i in np.asarray(found.items)[b]]
        assert np.array_equal(found.scores[b], scores[b][where])


def test_one_beam_is_greedy():
    codes = np.array([[0, 0], [0, 1], [1, 0]])
    tables = [
        np.log([[[0.6, 0.4]]]).astype(np.float32),
        np.log([[[0.5, 0.5], [1.0, 1e-9]]]).astype(np.float32),
    ]

    def model(prefix, level):
        return tables[0] if level == 0 else jnp.asarray(tables[1])[:, prefix[0, :, 0]]

    find = jax.jit(
        lambda trie, width: beam_search(model, trie, batch=1, width=width),
        static_argnums=1,
    )
    one, two = (find(build_trie(codes), width) for width in (1, 2))
    assert one.items.tolist() == [[0]]
    assert two.items.tolist() == [[2, 0]]


def test_equal_scores_go_by_the_lower_item_also_where_beams_are_cut():
    codes = catalogue(CODES**3, 3, seed=3)
    tables = [np.full((1, CODES**level, CODES), -1.0, np.float32) for level in range(3)]
    found = search(tables, build_trie(codes), batch=1, width=CODES**2)
    assert found.items[0].tolist() == list(range(CODES**2))
    narrow = search(tables, build_trie(codes), batch=1, width=2)
    assert (
        narrow.items[0, 0] == 0
    )  # the prefix with the lowest item under it is never cut


def test_chains_of_single_children_lead_to_their_items():
    codes = np.array([[4, 0, 1, 3], [0, 2, 2, 2], [4, 0, 1, 1], [2, 4, 4, 0]])
    tables = random_model(4, 3, seed=5)
    trie = build_trie(codes)
    assert [level.code.shape[0] for level in trie.levels] == [3, 3, 3, 4]
    assert_brute_force(search(tables, trie, batch=3, width=4), tables, codes, 4)


def test_items_that_are_not_there_are_marked_where_beams_outnumber_them():
    codes = catalogue(3, 2, seed=6)
    tables = random_model(2, 2, seed=6)
    found = search(tables, build_trie(codes), batch=2, width=7)
    assert (np.asarray(found.items)[:, 3:] == -1).all()
    assert np.isneginf(found.scores[:, 3:]).all()
    assert (np.asarray(found.codes)[:, 3:] == -1).all()
    assert_brute_force(found, tables, codes, 7)


def test_an_impossible_item_still_comes_before_none():
    codes = np.array([[1, 1], [0, 0], [3, 0]])
    tables = [
        np.full((1, CODES**level, CODES), -np.inf, np.float32) for level in range(2)
    ]
    tables[0][0, 0, 3] = tables[1][0, 3, 0] = -1.0
    found = search(tables, build_trie(codes), batch=1, width=4)
    assert found.items.tolist() == [[2, 0, 1, -1]]
    assert found.scores.tolist() == [[-2.0, -np.inf, -np.inf, -np.inf]]


def test_renormalised_scores_are_log_probabilities_over_the_catalogue():
    codes = catalogue(20, 3, seed=7)
    tables = random_model(3, 2, seed=7)
    found = search(tables, build_trie(codes), batch=2, width=20, renormalize=True)
    items, scores = brute_force(tables, codes, 20, renormalize=True)
    assert np.array_equal(found.items, items)
    # Exponentials in float32, summed in another order: measured 5e-7, with AVX2 and
    # with AVX512; ten times as much for other processors.
    np.testing.assert_allclose(found.scores, scores, atol=5e-6)
    # Sums of 20 such probabilities: measured 1.2e-7.
    np.testing.assert_allclose(np.exp(found.scores).sum(axis=1), 1, atol=5e-6)
    plain = search(tables, build_trie(codes), batch=2, width=20)
    # 20 of the 125 possible codes exist: measured 0.15 and 0.23.
    assert (np.exp(plain.scores).sum(axis=1) < 0.9).all()


@pytest.mark.parametrize("values", [None, (-3.0, -2.0)], ids=["distinct", "ties"])
def test_a_search_among_allowed_items_is_a_full_ranking_less_the_others(values):
    random = np.random.default_rng(0)
    for seed in range(4):
        codes = catalogue(60, 3, seed)
        tables = random_model(3, 5, seed, values)
        # From most items to none.
        shares = np.array([0.9, 0.5, 0.1, 0.02, 0.0])[:, None]
        allowed = random.random((5, 60)) < shares
        found = search(
            tables, build_trie(codes), batch=5, width=CODES**2, allowed=allowed
        )
        assert_brute_force(found, tables, codes, CODES**2, allowed)
    assert (np.asarray(found.items)[4] == -1).all()


def test_narrow_beams_find_the_few_items_that_are_allowed():
    codes = catalogue(100, 3, seed=11)
    tables = random_model(3, 1, seed=11)
    items, _ = brute_force(tables, codes, len(codes))
    # The worst three items of all: what is removed after the search is lost.
    allowed = np.zeros((1, 100), bool)
    allowed[0, items[0, -3:]] = True
    removed = search(tables, build_trie(codes), batch=1, width=3)
    assert not allowed[0, np.asarray(removed.items)[0]].any()
    found = search(tables, build_trie(codes), batch=1, width=3, allowed=allowed)
    assert_brute_force(found, tables, codes, 3, allowed)


def test_what_is_allowed_changes_no_score():
    codes = catalogue(20, 3, seed=12)
    tables = random_model(3, 1, seed=12)
    allowed = np.arange(20)[None] % 3 == 0
    every, some = (
        search(
            tables,
            build_trie(codes),
            batch=1,
            width=25,
            renormalize=True,
            allowed=given,
        )
        for given in (None, allowed)
    )
    kept = (np.asarray(every.items)[0] % 3 == 0) & (np.asarray(every.items)[0] >= 0)
    np.testing.assert_array_equal(some.items[0, :7], every.items[0][kept])
    np.testing.assert_array_equal(some.scores[0, :7], every.scores[0][kept])
    assert (np.asarray(some.items)[0, 7:] == -1).all()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_requests_split_over_a_mesh_find_the_same(shape):
    codes = catalogue(50, 3, seed=8)
    tables = random_model(3, 8, seed=8)
    allowed = np.random.default_rng(8).random((8, 50)) < 0.5
    expected = search(
        tables, build_trie(codes), batch=8, width=CODES**2, allowed=allowed
    )
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        split = [
            jax.device_put(t, jax.NamedSharding(mesh, RULES("batch", None, None)))
            for t in [*tables, allowed[..., None]]
        ]
        found = search(
            split[:-1],
            build_trie(codes),
            batch=8,
            width=CODES**2,
            allowed=split[-1][..., 0],
        )
    assert found.items.sharding.spec == RULES("batch", None)
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a, b)


def test_the_model_is_asked_about_prefixes_that_exist_and_differ():
    codes = catalogue(30, 3, seed=10)
    tables = random_model(3, 2, seed=10)
    asked = []

    def model(prefix, level):
        asked.append(np.asarray(prefix))
        return next_log_probs(tables, prefix, level)

    beam_search(model, build_trie(codes), batch=2, width=7)
    assert [prefix.shape for prefix in asked] == [(2, 1, 0), (2, 5, 1), (2, 7, 2)]
    for level, prefix in enumerate(asked):
        there = set(map(tuple, codes[:, :level].tolist()))
        for found in prefix.tolist():
            assert len(set(map(tuple, found)) & there) == len(found)


def test_a_trie_takes_a_few_integers_an_item():
    codes = catalogue(5**6, 7, seed=9)
    trie = build_trie(codes)
    held = sum(leaf.size for leaf in jax.tree.leaves(trie))
    assert held <= 4 * codes.size
    last = trie.levels[-1]
    assert np.array_equal(np.sort(last.item), np.arange(len(codes)))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            np.array([[1, 2], [0, 3], [1, 2]]),
            r"items 0 and 2 both have \[1, 2\].*last level that tells them apart",
        ),
        (np.array([[1, 2], [0, -3]]), r"codes\[1, 1\]=-3 must lie between 0 and"),
        (np.array([[0.5, 1.0]]), "float64"),
        (np.array([1, 2]), r"\[2\]: expected integers \[N, L\]"),
        (np.zeros((0, 3), int), r"\[0, 3\]: expected"),
    ],
)
def test_codes_that_make_no_trie_are_named(codes, message):
    with pytest.raises(InputError, match=message):
        build_trie(codes)


def test_a_model_with_too_few_codes_is_named():
    trie = build_trie(np.array([[0, 4]]))
    with pytest.raises(
        InputError, match=r"returns \[2, 1, 4\] at level 1: expected \[2, 1, 5\]"
    ):
        beam_search(
            lambda prefix, level: jnp.zeros((*prefix.shape[:2], 4)),
            trie,
            batch=2,
            width=3,
        )
    with pytest.raises(InputError, match="width=0 must be at least 1"):
        beam_search(lambda prefix, level: jnp.zeros((2, 1, 5)), trie, batch=2, width=0)
