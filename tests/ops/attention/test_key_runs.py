"""Runs of keys in parts, and the intervals of blocks that hold them."""

import numpy as np

from benchmarks.attention_specs import codes_specs, stream_specs
from tests.ops.attention.patterns import many_patterns
from tokenrec.ops.attention.key_runs import make_key_runs, visited_pairs
from tokenrec.ops.attention.pattern import causal_pattern
from tokenrec.ops.attention.span_mask import visible_spans

SIDES = (4, 8)


def runs_of(pattern, window, sides=SIDES):
    spans = visible_spans(pattern, window, packable=False)
    return make_key_runs(spans, len(pattern.key_positions), *sides)


def patterns():
    """Patterns of small models, with those of tokens that continue an event each."""
    yield from many_patterns()
    yield from ((spec.pattern, spec.window) for spec in codes_specs(12))


def seen_by_part(runs, keys):
    """Keys that each query sees, `[P, Q', K] bool`."""
    place = np.arange(keys)
    return (place >= runs.start[..., None]) & (place < runs.stop[..., None])


def visited_tiles(runs, tiles):
    """Tiles in the intervals of key blocks and of query blocks, `[P, *tiles] bool`."""
    query_block, key_block = (np.arange(count) for count in tiles)
    first, end = runs.key_blocks[:, 0, :, None], runs.key_blocks[:, 1, :, None]
    by_query = (first <= key_block) & (key_block < end)
    first, end = runs.query_blocks[:, 0, None], runs.query_blocks[:, 1, None]
    query_block = query_block[:, None]
    return by_query, (first <= query_block) & (query_block < end)


def test_the_parts_together_are_the_pattern_and_do_not_overlap():
    for pattern, window in patterns():
        keys, queries = len(pattern.key_positions), len(pattern.query_positions)
        runs = runs_of(pattern, window)
        times_seen = seen_by_part(runs, keys).sum(axis=0)
        np.testing.assert_array_equal(times_seen[:queries], pattern.visible(window))
        # Fill behind the queries sees nothing.
        assert not times_seen[queries:].any()


def test_both_passes_visit_every_tile_with_something_visible():
    for pattern, window in patterns():
        keys = len(pattern.key_positions)
        runs = runs_of(pattern, window)
        seen = seen_by_part(runs, keys)
        seen = np.pad(seen, ((0, 0), (0, 0), (0, -keys % SIDES[1])))
        tiles = seen.shape[1] // SIDES[0], seen.shape[2] // SIDES[1]
        by_tile = seen.reshape(len(seen), tiles[0], SIDES[0], tiles[1], SIDES[1])
        needed = by_tile.any(axis=(2, 4))
        by_query, by_key = visited_tiles(runs, tiles)
        assert (by_query | ~needed).all()
        assert (by_key | ~needed).all()
        # And not more than the interval from the first needed tile to the last.
        assert by_query[:, :, 0].sum() == needed[:, :, 0].sum()
        assert visited_pairs(runs, *SIDES) == by_query.sum() * np.prod(SIDES)


def test_a_window_visits_a_number_of_tiles_linear_in_length():
    def pairs(tokens):
        runs = runs_of(causal_pattern(tokens, tokens), 256, (64, 64))
        backward = np.diff(runs.query_blocks, axis=1).sum() * 64 * 64
        assert backward == visited_pairs(runs, 64, 64)
        return backward

    # A block of 64 queries sees 319 keys, in five or six blocks of 64.
    assert pairs(8192) < 6 * 64 * 8192
    assert pairs(8192) <= 4.2 * pairs(2048)


def test_candidates_do_not_widen_the_intervals_of_events():
    # 200 events, then four candidates of three tokens, in a sliding layer of 32.
    spec = stream_specs("requests", every_token=True)[2]
    runs = runs_of(spec.pattern, spec.window, (16, 16))
    assert len(runs.start) == 3
    backward = np.diff(runs.query_blocks, axis=1).sum()
    forward = visited_pairs(runs, 16, 16) // 256
    # 14 blocks of events see three or four each, the candidates' last block a few more.
    assert forward < 60
    assert backward < 60


def test_parts_that_are_empty_are_left_out():
    assert len(runs_of(causal_pattern(40, 40), None).start) == 1
