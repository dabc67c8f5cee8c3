"""Top-k of a sharded catalogue against that of the whole table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.worlds import mesh_of
from tokenrec.evaluation.sharded_top_k import sharded_top_k
from tokenrec.ops.tables.storage import CYCLE, from_storage_index, to_storage_index
from tokenrec.sharding import RULES

ROWS, FIRST, ITEMS, WIDTH, BATCH, COUNT = CYCLE, 5, 900, 4, 8, 6


def test_ids_and_places_are_inverse():
    ids = np.arange(3 * CYCLE)
    assert np.array_equal(
        from_storage_index(to_storage_index(ids, len(ids)), len(ids)), ids
    )


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1)])
@pytest.mark.parametrize("changed", ["nothing", "dropped", "raised"])
def test_answers_and_ranks_are_those_of_the_whole_catalogue(sizes, changed):
    random = np.random.default_rng(0)
    table = random.normal(size=(ROWS, WIDTH)).astype(np.float32)
    # Equal scores share a rank.
    table[FIRST + 7] = table[FIRST + 8]
    queries = random.normal(size=(BATCH, WIDTH)).astype(np.float32)
    goals = np.array([[7, -1], [8, 3]] * (BATCH // 2), np.int32)
    seen = random.integers(-1, ITEMS, (BATCH, 20)).astype(np.int32)
    # A goal that is left out.
    seen[0, 0] = 7
    scores = queries @ (2 * table[FIRST : FIRST + ITEMS]).T
    added = np.full(seen.shape, -np.inf, np.float32)
    if changed == "raised":
        added = random.random(seen.shape).astype(np.float32)
    if changed != "nothing":
        for row, items in enumerate(seen):
            known = items >= 0
            np.add.at(scores[row], items[known], added[row, known])
    expected = -np.sort(-scores, axis=1)[:, :COUNT]
    own = np.take_along_axis(scores, np.maximum(goals, 0), axis=1)
    higher, equal = (
        (scores[:, None] > own[..., None]).sum(2),
        (scores[:, None] == own[..., None]).sum(2),
    )
    ranks = np.where(
        goals < 0, 0, np.where(np.isfinite(own), higher + (equal + 1) / 2, np.inf)
    )

    stored = np.empty_like(table)
    stored[to_storage_index(np.arange(ROWS), ROWS)] = table
    mesh = mesh_of(*sizes)

    def put(x, *axes):
        return jax.device_put(x, jax.NamedSharding(mesh, RULES(*axes)))

    with jax.set_mesh(mesh):
        found = jax.jit(
            lambda queries, table, goals, history: sharded_top_k(
                queries,
                table,
                goals,
                history,
                first=FIRST,
                items=ITEMS,
                count=COUNT,
                key=lambda rows: 2 * rows,
            )
        )(
            *(
                put(queries, "batch", None),
                put(stored, "rows", None),
                put(goals, "batch", None),
            ),
            None
            if changed == "nothing"
            else (put(seen, "batch", None), put(added, "batch", None)),
        )
    # Sums of four products in float32: equal here, with AVX2 and with AVX512; another
    # order rounds by 1e-7.
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)
    np.testing.assert_allclose(
        np.take_along_axis(scores, np.asarray(found.items), axis=1), expected, rtol=1e-5
    )
    # Exact: a goal's score is at least 1e-4 from every other but its tie, and rounding
    # of scores of 24 at most is 1e-6.
    np.testing.assert_array_equal(found.ranks, ranks)


def test_a_short_catalogue_fills_its_answers_with_no_item():
    with jax.set_mesh(mesh_of(1, 1, 1)):
        table = jax.sharding.reshard(jnp.ones((CYCLE, 2)), RULES("rows", None))
        goals = jnp.array([[0]])
        history = jnp.array([[0, 1]]), jnp.full((1, 2), -jnp.inf)
        found = sharded_top_k(
            jnp.ones((1, 2)),
            table,
            goals,
            history,
            first=0,
            items=3,
            count=3,
            key=lambda rows: rows,
        )
    assert found.items.tolist() == [[2, -1, -1]]
    assert found.ranks.tolist() == [[np.inf]]
