"""Beams and items of the history in one ranking, against a plain loop."""

import jax.numpy as jnp
import numpy as np

from tokenrec.evaluation.beam_search import Beams
from tokenrec.evaluation.copied_beams import unite
from tokenrec.models.copy_mixture import NEVER, CopyMixture

ITEMS, WIDTH, EVENTS = 9, 5, 6


def slow_unite(beams, items, log_copied, log_rest, log_generated):
    """The best items of one request and their scores."""
    scores = {}
    for item, score in zip(beams.items, beams.scores, strict=True):
        if item >= 0:
            scores[int(item)] = log_rest + score
    for t, item in enumerate(items):
        if log_copied[t] > NEVER:
            mixed = np.exp(log_copied[t]) + np.exp(log_rest + log_generated[t])
            scores[int(item)] = np.log(mixed)
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[:WIDTH]


def test_the_union_is_ranked_by_the_mixture():
    draw = np.random.default_rng(0)
    generated = draw.normal(-3, 1, (40, ITEMS)).astype(np.float32)
    # Some requests have few events, none, or fewer items than beams.
    items = draw.integers(0, ITEMS, (40, EVENTS)).astype(np.int32)
    items[:, :3] = np.where(draw.random((40, 1)) < 0.5, -1, items[:, :3])
    items[:5] = -1
    first = np.array(
        [[i >= 0 and i not in row[:t] for t, i in enumerate(row)] for row in items]
    )
    log_copied = np.where(first, draw.normal(-3, 1, items.shape), NEVER)
    # The weight of a whole item may be too small for a number.
    log_copied[8] = NEVER
    log_rest = -draw.random(40)
    order = np.argsort(-generated, axis=1)[:, :WIDTH].astype(np.int32)
    order[3, 2:] = -1
    scores = np.take_along_axis(generated, order, axis=1)
    scores = np.where(order < 0, -np.inf, scores)
    at_events = np.take_along_axis(generated, np.maximum(items, 0), axis=1)

    def codes_of(items):
        """One code a level, which tells whose codes they are."""
        return np.stack([items, items + 100], axis=-1)

    found = unite(
        Beams(jnp.asarray(order), jnp.asarray(scores), jnp.asarray(codes_of(order))),
        CopyMixture(
            jnp.asarray(items),
            jnp.asarray(log_copied[:, None], jnp.float32),
            jnp.asarray(log_rest[:, None], jnp.float32),
        ),
        jnp.asarray(codes_of(items)),
        jnp.asarray(at_events),
    )
    for n in range(40):
        expected = slow_unite(
            Beams(order[n], scores[n], None),
            items[n],
            log_copied[n],
            log_rest[n],
            at_events[n],
        )
        count = len(expected)
        assert found.items[n, :count].tolist() == [item for item, _ in expected]
        np.testing.assert_allclose(
            found.scores[n, :count], [score for _, score in expected], rtol=1e-5
        )
        assert (found.items[n, count:] == -1).all()
        assert (found.scores[n, count:] == -np.inf).all()
        assert np.array_equal(found.codes[n, :count], codes_of(found.items[n, :count]))
        assert (found.codes[n, count:] == -1).all()


def test_of_equal_items_the_lower_one_is_the_better():
    items = jnp.array([[7, 2, -1]])
    copied = CopyMixture(items, jnp.array([[[-1.0, -1.0, NEVER]]]), jnp.array([[-0.5]]))
    beams = Beams(
        jnp.array([[4, 1]]), jnp.array([[-9.0, -9.0]]), jnp.zeros((1, 2, 1), int)
    )
    never = jnp.full((1, 3), NEVER)
    found = unite(beams, copied, jnp.zeros((1, 3, 1), int), never)
    assert found.items.tolist() == [[2, 7]]
