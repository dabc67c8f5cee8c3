"""Arithmetic of the roofline against hand-computed values, and HLO that XLA writes for the eight-device CPU mesh."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.attention_specs import codes_layout
from tests.worlds import mesh_of
from tokenrec.errors import InputError
from tokenrec.ops.attention.pattern import Pattern, causal_pattern
from tokenrec.planner.hlo import Collective, read_program, ring_bytes
from tokenrec.planner.roofline import (
    CHIPS,
    Chip,
    Roofline,
    attention_bytes,
    attention_flops,
    chip,
    network_seconds,
    visible_pairs,
    visible_tiles,
)
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import build_layout

P = jax.sharding.PartitionSpec


def layouts():
    """Interleaved events, a request with candidates of two tokens each, and user-centric streams."""
    yield build_layout(
        user_tokens=3, events=10, fused=False, candidates=1, target_tokens=1
    )
    yield build_layout(
        user_tokens=2, events=9, fused=True, candidates=4, target_tokens=2
    )
    yield build_layout(
        user_tokens=0, events=12, fused=False, candidates=0, target_tokens=1
    )
    yield codes_layout(events=11)


def patterns():
    yield causal_pattern(7, 12)
    random = np.random.default_rng(0)
    for layout in layouts():
        every = np.arange(layout.rows)
        some = np.sort(random.choice(layout.rows, layout.rows // 2, replace=False))
        yield layout.pattern(every, every)
        yield layout.pattern(some, every)
        yield dataclasses.replace(layout, discard=False).pattern(some, every)
        yield Pattern(
            every, every, layout.index, layout.static, layout.candidate, prefix=6
        )


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_are_those_of_the_mask(window):
    for pattern in patterns():
        assert visible_pairs(pattern, window) == pattern.visible(window).sum()


@pytest.mark.parametrize("window", [None, 2, 5])
def test_tiles_are_those_with_a_visible_pair(window):
    for pattern in patterns():
        mask = pattern.visible(window)
        starts = [
            (q, k)
            for q in range(0, mask.shape[0], 4)
            for k in range(0, mask.shape[1], 3)
        ]
        assert visible_tiles(pattern, window, 4, 3) == sum(
            mask[q : q + 4, k : k + 3].any() for q, k in starts
        )


def test_pairs_of_a_long_window_need_no_square():
    window, rows = 64, 1 << 20
    assert (
        visible_pairs(causal_pattern(rows, rows), window)
        == window * rows - window * (window - 1) // 2
    )


def test_attention_costs_by_hand():
    # 10 pairs, 2 heads of 4 numbers: 2 products of 10 x 4 multiply-adds a head.
    assert attention_flops(10, 2, 4, products=2) == 2 * 2 * 10 * 2 * 4
    # One query, three keys, bfloat16: q, o, and three rows of k and of v, of 8 bytes; the logsumexp is 4.
    assert attention_bytes(1, 3, 1, 4, 2, backward=False) == 8 * 8 + 4
    assert attention_bytes(1, 3, 1, 4, 2, backward=True) == 16 * 8 + 4


@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        ("all-gather", 600),
        ("reduce-scatter", 600),
        ("all-to-all", 600),
        ("all-reduce", 1200),
        ("collective-permute", 800),
    ],
)
def test_a_ring_of_four_moves_three_quarters(kind, moved):
    assert ring_bytes(kind, 800, 4) == moved
    assert Collective(kind, 800, ((0, 1, 2, 3),), trips=3).moved == 3 * moved


def compiled(function, mesh, spec, shape=(16, 32)):
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.NamedSharding(mesh, spec)
        )
        return jax.jit(function).lower(x).compile().as_text()


def test_an_all_gather_is_read_with_its_size_and_groups():
    text = compiled(
        lambda x: jax.sharding.reshard(x, RULES(None, None)),
        mesh_of(2, 2, 2),
        P("fsdp", None),
    )
    (one,) = read_program(text, 8).collectives
    assert (one.kind, one.size) == ("all-gather", 16 * 32 * 4)
    assert sorted(map(sorted, one.groups)) == [[0, 2], [1, 3], [4, 6], [5, 7]]


def test_a_collective_in_a_scan_counts_as_often_as_it_runs():
    def loop(x):
        def body(carry, _):
            return jax.lax.psum(carry * 0.5, "tensor"), None

        return jax.lax.scan(body, x, None, length=5)[0]

    def twice(x):
        return jax.shard_map(loop, in_specs=P(), out_specs=P(), check_vma=False)(x)

    program = read_program(compiled(twice, mesh_of(1, 1, 8), P()), 8)
    (one,) = program.collectives
    assert (one.kind, one.size, one.trips, len(one.groups[0])) == (
        "all-reduce",
        16 * 32 * 4,
        5,
        8,
    )
    assert program.loops == (5,)
    assert one.moved == 5 * 2 * 16 * 32 * 4 * 7 / 8


@pytest.mark.parametrize(
    ("kind", "function", "size"),
    [
        (
            "reduce-scatter",
            lambda x: jax.lax.psum_scatter(x, "data", tiled=True),
            16 * 32 * 4,
        ),
        (
            "all-to-all",
            lambda x: jax.lax.all_to_all(x, "data", 1, 0, tiled=True),
            16 * 32 * 4,
        ),
        (
            "collective-permute",
            lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
            16 * 32 * 4,
        ),
    ],
)
def test_the_other_kinds_are_read(kind, function, size):
    def local(x):
        return jax.shard_map(
            function, in_specs=P(None, None), out_specs=P("data", None), check_vma=False
        )(x)

    (one,) = read_program(
        compiled(local, mesh_of(2, 1, 1), P(None, None)), 2
    ).collectives
    assert (one.kind, one.size, sorted(one.groups[0])) == (kind, size, [0, 1])


# What the compiler for TPUs writes and the one for CPUs does not, in its form, cut to what is read.
TPU_TEXT = """\
HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(6)
  %p = (s32[]{:T(128)}, f32[8]{0:T(128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%count, %bound), direction=LT
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = f32[8]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=[4,2]<=[2,2,2]T(0,2,1), to_apply=%add
}

%all-reduce-scatter.1 (p: bf16[4,8]) -> bf16[1,8] {
  %a = bf16[4,8]{1,0:T(8,128)(2,1)} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%start (p: f32[32]) -> (f32[32], f32[64]) {
  %g.1 = f32[64]{0} all-gather(%p), channel_id=3, replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %s = (f32[32]{0}, f32[64]{0}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: f32[32]) -> f32[64] {
  %g.2 = f32[64]{0} all-gather(%p), channel_id=3, replica_groups=mesh['data'=2,'fsdp'=2,'tensor'=2] {'fsdp'}, \
dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %d = f32[64]{0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: f32[32]) -> f32[64] {
  %w = (s32[]{:T(128)}, f32[8]{0:T(128)}) while(%t), condition=%condition, body=%body
  %f = bf16[1,8]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  %begin = (f32[32]{0}, f32[64]{0}) fusion(%p), kind=kCustom, calls=%start
  %kernel_fwd.12 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  %send.1 = (f32[4,8]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) send(%b, %token), channel_id=9, is_host_transfer=true, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %end = f32[64]{0} fusion(%p), kind=kCustom, calls=%done
}
"""


def test_what_only_tpu_programs_have_is_read():
    program = read_program(TPU_TEXT, 16, slices=2)
    looped, scattered, gathered, sent = program.collectives
    assert program.loops == (6,)
    assert (looped.kind, looped.trips, looped.groups) == (
        "all-reduce",
        6,
        ((0, 2), (1, 3), (4, 6), (5, 7)),
    )
    assert (scattered.kind, scattered.size, scattered.moved) == (
        "reduce-scatter",
        64,
        64 * 3 / 4,
    )
    assert (gathered.kind, gathered.size, gathered.groups) == (
        "all-gather",
        256,
        ((0, 2), (1, 3), (4, 6), (5, 7)),
    )
    assert (sent.kind, sent.slices, sent.moved) == ("all-reduce", 2, 128)
    assert program.custom_calls == {
        "AsyncCollectiveDone": 1,
        "AsyncCollectiveStart": 1,
        "kernel_fwd": 1,
    }


def test_replica_groups_of_an_unknown_form_are_refused_not_guessed():
    text = TPU_TEXT.replace("{{0,1,2,3},{4,5,6,7}}", "cube(4)")
    with pytest.raises(
        InputError, match="replica groups in a form that is not known: cube"
    ):
        read_program(text, 16, slices=2)
    with pytest.raises(InputError, match="not HLO"):
        read_program("module @jit_step {}", 16)


# One byte a second on each link and one tenth between slices; axes of four close to rings.
SLOW = Chip(1.0, 1.0, 1.0, ici_link=1.0, axes=2, ring=4, dcn_bandwidth=0.1)


def square(slices=1):
    places = [(s, x, y) for s in range(slices) for x in range(4) for y in range(4)]
    return [
        SimpleNamespace(coords=[x, y, 0], slice_index=s if slices > 1 else None)
        for s, x, y in places
    ]


@pytest.mark.parametrize(
    ("group", "links"),
    [
        ((0, 1, 2, 3), 2),  # a whole axis, a ring
        ((0, 1), 1),  # part of one, a line
        ((0, 1, 4, 5), 2),  # parts of two
        (tuple(range(16)), 4),  # two rings
    ],
)
def test_ici_time_is_by_the_links_that_a_group_has(group, links):
    one = Collective("all-gather", 160.0, (group,))
    assert network_seconds([one], square(), SLOW) == pytest.approx(
        160 * (len(group) - 1) / len(group) / links
    )


def test_between_slices_a_device_moves_its_part_over_the_slow_network():
    every = Collective("all-reduce", 320.0, (tuple(range(32)),), trips=2)
    inside, between = 2 * 320 * 15 / 16 / 4, 2 * (320 / 16) / 2 / 0.1
    assert network_seconds([every], square(slices=2), SLOW) == pytest.approx(
        2 * (inside + between)
    )
    sent = Collective("all-reduce", 20.0, ((0,),), slices=2)
    assert network_seconds([sent], square(slices=2), SLOW) == pytest.approx(between)


def test_the_roofline_names_what_limits():
    roofline = Roofline(compute_seconds=2.0, memory_seconds=3.0, network_seconds=1.0)
    assert (roofline.bound, roofline.total, roofline.limit) == (3.0, 6.0, "memory")
    assert roofline.mfu_bound(150.0, dataclasses.replace(SLOW, flops=100.0)) == 0.5


def test_chips_are_found_by_either_name():
    assert chip("TPU v5e") is chip("TPU v5 lite") is CHIPS["TPU v5 lite"]
    assert chip("TPU v5p").flops == 459e12


def test_a_chip_without_figures_is_an_error_that_names_the_near_one():
    with pytest.raises(
        InputError, match=r"device_kind='TPU v6 light'.*did you mean 'TPU v6 lite'"
    ):
        chip("TPU v6 light")
