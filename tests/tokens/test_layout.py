import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.stream_layouts import build_layout, history_part
from tokenrec.tokens.layout import ROLES, live_positions, select_positions
from tokenrec.tokens.stream_segments import StreamSegment, make_layout


def names(layout):
    return [ROLES[r] for r in layout.roles]


def test_the_arrays_are_those_of_the_picture_in_the_module():
    layout = build_layout(
        user_tokens=2, events=2, fused=False, candidates=2, target_tokens=1
    )
    assert names(layout) == [
        *("user", "user", "sep"),
        *("state", "action", "state", "action"),
        *("sep", "target", "target"),
    ]
    assert layout.event.tolist() == [-1, -1, -1, 0, 0, 1, 1, -1, -1, -1]
    assert layout.candidate.tolist() == [-1] * 8 + [0, 1]
    assert layout.index.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert layout.reach.tolist() == layout.index.tolist()
    assert layout.static.tolist() == [True] * 3 + [False] * 7
    assert layout.readout.tolist() == [8, 9]
    positions = layout.rope_positions(jnp.ones((1, 2), bool))
    assert positions[0].tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]


def test_live_positions_are_those_of_the_picture_in_bfts():
    layout = build_layout(
        user_tokens=2, events=12, fused=True, candidates=1, target_tokens=1
    )
    live = live_positions(layout, (None, None, 6, 4))
    everything = list(range(17))
    assert [positions.tolist() for positions in live] == [
        everything,
        everything,
        list(range(8, 17)),
        list(range(13, 17)),
        [16],
    ]


def test_nio_stream_is_static_events_target_in_that_order():
    layout = build_layout(
        user_tokens=2, events=2, fused=False, candidates=1, target_tokens=1
    )
    assert names(layout) == [
        "user",
        "user",
        "sep",
        "state",
        "action",
        "state",
        "action",
        "sep",
        "target",
    ]
    assert layout.readout.tolist() == [8]


def test_uc_stream_reads_every_state_and_has_no_target():
    layout = build_layout(
        user_tokens=1, events=3, fused=False, candidates=0, target_tokens=1
    )
    assert names(layout) == [
        "user",
        "sep",
        "state",
        "action",
        "state",
        "action",
        "state",
        "action",
    ]
    assert layout.readout.tolist() == [2, 4, 6]


def test_candidates_repeat_the_index_of_the_first_and_are_read_at_their_last_token():
    layout = build_layout(
        user_tokens=0, events=1, fused=True, candidates=3, target_tokens=2
    )
    assert names(layout) == ["sep", "event", "sep"] + ["target"] * 6
    assert layout.index.tolist() == [0, 1, 2, 3, 4, 3, 4, 3, 4]
    assert layout.readout.tolist() == [4, 6, 8]


def test_positions_count_valid_events_and_put_the_target_after_them():
    layout = build_layout(
        user_tokens=1, events=3, fused=False, candidates=1, target_tokens=1
    )
    valid = jnp.array([[False, True, True], [False, False, False]])
    positions = np.asarray(layout.rope_positions(valid))
    assert positions[0].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert positions[1, -2:].tolist() == [1, 1]


def test_codes_continue_their_event_and_see_none_after_it():
    shared = [StreamSegment.tokens("user", 1), history_part(events=3, fused=True)]
    layout = make_layout(
        shared,
        [StreamSegment.tokens("code", 2, ordered=True)],
        events=3,
        candidates=3,
        readout="events",
    )
    every = np.arange(layout.length)
    seen = layout.pattern(every, every).visible(None)
    user, events, codes = 0, np.array([1, 2, 3]), np.arange(4, 10).reshape(3, 2)
    for number, (first, second) in enumerate(codes):
        assert np.flatnonzero(seen[first]).tolist() == [
            user,
            *events[: number + 1],
            first,
        ]
        assert np.flatnonzero(seen[second]).tolist() == [
            user,
            *events[: number + 1],
            first,
            second,
        ]
    # One real event: it has position 1, the codes behind it 2 and 3.
    real = jnp.array([[False, False, True], [False, False, False]])
    assert layout.rope_positions(real)[0, [3, 8, 9]].tolist() == [1, 2, 3]
    # A request without history: codes beside no event are valid as their goal is.
    assert layout.valid(real, jnp.array([[True] * 3, [False, False, True]]))[
        1
    ].tolist() == [*(True, False, False, False, False, False, False, False, True, True)]


def test_live_positions_of_2f2s_are_those_of_the_documentation():
    layout = build_layout(
        user_tokens=26, events=50, fused=True, candidates=1, target_tokens=1
    )
    assert [len(live) for live in live_positions(layout, (None, None, 32, 16))] == [
        79,
        79,
        47,
        16,
        1,
    ]


def test_live_positions_of_many_candidates_share_the_tail_of_the_history():
    one = build_layout(
        user_tokens=4, events=50, fused=True, candidates=1, target_tokens=1
    )
    many = build_layout(
        user_tokens=4, events=50, fused=True, candidates=20, target_tokens=1
    )
    lengths = [len(live) for live in live_positions(one, (None, None, 32, 16))]
    assert [len(live) for live in live_positions(many, (None, None, 32, 16))] == [
        length + 19 for length in lengths
    ]


def test_live_positions_of_uc_are_states_at_the_top_and_not_static_above_full_layers():
    layout = build_layout(
        user_tokens=4, events=20, fused=False, candidates=0, target_tokens=1
    )
    live = live_positions(layout, (None, None, 8, 4))
    assert live[-1].tolist() == layout.readout.tolist()
    assert not layout.static[live[2]].any()
    # Nothing reads the last action.
    assert len(live[1]) == layout.length - 1


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [1, 3], [2], [0, 1, 4]])
def test_select_positions_is_indexing(chosen):
    x = jnp.arange(10.0).reshape(1, 5, 2)
    among = np.array([10, 11, 12, 13, 14])
    assert np.array_equal(
        select_positions(x, among[chosen], among), np.asarray(x)[:, chosen]
    )
