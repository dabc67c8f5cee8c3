"""Collectives, loops and custom calls in HLO, from XLA for CPU devices and as text."""

import jax
import jax.numpy as jnp
import pytest

from tests.worlds import mesh_of
from tokenrec.errors import InputError
from tokenrec.planner.collectives import Collective, ring_bytes
from tokenrec.planner.hlo import read_program
from tokenrec.sharding import RULES

P = jax.sharding.PartitionSpec


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


# Forms that only the compiler for TPUs writes, cut to what is read.
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
    with pytest.raises(InputError, match="replica groups have an unknown form: cube"):
        read_program(text, 16, slices=2)
    with pytest.raises(InputError, match="not HLO"):
        read_program("module @jit_step {}", 16)


def test_the_costliest_branch_of_a_conditional_counts():
    text = """\
HloModule m

%short (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} negate(%p)
}
%long (p: f32[8]) -> f32[8] {
  %r = f32[800]{0} all-reduce(%y), replica_groups={{0,1}}, to_apply=%add
  ROOT %b = f32[8]{0} negate(%p)
}
ENTRY %main (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} conditional(%i, %p, %p), branch_computations={%short, %long}
}
"""
    found = read_program(text, 2)
    assert [one.size for one in found.collectives] == [3200.0]
    only = read_program(text.replace("%short, %long", "%long"), 2)
    assert found.memory_bytes == only.memory_bytes
