"""Schedules whose time is counted by hand, on chips with round figures.

A core does 1,000 cycles a second, memory moves 100 bytes a second, and a link 10.
"""

from pathlib import Path
from types import SimpleNamespace

import pytest

import tokenrec
from tokenrec.planner.roofline import Chip
from tokenrec.planner.schedule import walk_schedule

PACKAGE = Path(tokenrec.__file__).parent
CHIP = Chip(
    1.0, 1.0, 100.0, ici_link=10.0, axes=1, ring=99, dcn_bandwidth=1.0, clock=1000.0
)
LINE = [SimpleNamespace(coords=(place,), slice_index=0) for place in range(4)]
BODIES = """\
%product (p: f32[8]) -> f32[8] {
  ROOT %dot = f32[8]{0} convolution(%p, %p), dim_labels=bf_io->bf
}
%wide (p: f32[8]) -> f32[16] {
  ROOT %pad.1 = f32[16]{0} pad(%p, %zero), padding=0_8
}
%turned (p: f32[8]) -> f32[8] {
  ROOT %t = f32[8]{0} transpose(%p), dimensions={0}
}
%sum (p: f32[8]) -> f32[8] {
  %q = f32[8]{0} pad(%p, %zero), padding=0_0
  ROOT %a = f32[8]{0} add(%q, %p)
}
"""
# Bytes into a device: 400 x 3 / 4, 30 seconds at 10 bytes a second.
GATHER = "f32[100]{0} all-gather(%x), replica_groups={{0,1,2,3}}, dimensions={0}"


def cycles(count):
    return f'backend_config={{"estimated_cycles":"{count}"}}'


def fusion(name, called, count):
    return f"  %{name} = f32[8]{{0}} fusion(%x), calls=%{called}, {cycles(count)}\n"


def walked(entry, bodies="", devices=LINE, **kernels):
    text = f"HloModule m, is_scheduled=true\n\n{BODIES}{bodies}"
    return walk_schedule(
        text + "ENTRY %main (x: f32[8]) -> f32[8] {\n" + entry + "}\n",
        devices,
        CHIP,
        kernels,
    )


def test_the_core_works_by_cycles_and_by_kind():
    found = walked(
        fusion("a", "product", 5000)
        + fusion("b", "wide", 2000)
        + fusion("c", "turned", 1000)
        + fusion("d", "sum", 4000)
        # 32 bytes read and 32 written, without an estimate.
        + "  %e = f32[8]{0} negate(%x)\n  %x = f32[8]{0} copy(%y)\n"
    )
    assert found.work == {
        "matrix": 5.0,
        "padding": 2.0,
        "copies": pytest.approx(1.32),
        "vector": pytest.approx(4.64),
        "kernels": 0.0,
    }
    assert found.seconds == pytest.approx(12.96)
    assert [cost.name for cost in found.costliest[:2]] == ["a", "d"]


def test_the_core_waits_for_a_synchronous_collective():
    found = walked(fusion("a", "product", 5000) + f"  %g = {GATHER}\n")
    assert found.seconds == 35.0
    assert found.exposed["network"] == found.network_seconds == 30.0
    assert found.network_hidden == 0.0


@pytest.mark.parametrize(
    ("start", "done"),
    [
        (
            "  %s = (f32[25]{0}, f32[100]{0}) all-gather-start(%x), "
            "replica_groups={{0,1,2,3}}, dimensions={0}\n",
            "  %g = f32[100]{0} all-gather-done(%s)\n",
        ),
        (
            '  %s = ((), ()) call-start(), async_execution_thread="sparsecore", '
            "to_apply=%offloaded\n"
            "  %u = ((f32[25]{0}), f32[100]{0}) call-update(%s, %x)\n",
            "  %g = f32[100]{0} call-done(%u)\n",
        ),
        (
            "  %s = ((f32[25]{0}), f32[100]{0}) async-start(%x), calls=%offloaded\n",
            "  %g = f32[100]{0} async-done(%s)\n",
        ),
    ],
)
def test_work_beside_an_asynchronous_collective_is_not_waited_for(start, done):
    offloaded = f"%offloaded (x: f32[25]) -> f32[100] {{\n  ROOT %r = {GATHER}\n}}\n"
    entry = start + fusion("a", "product", 12_000) + done
    found = walked(entry, offloaded)
    assert found.seconds == pytest.approx(30.0)
    assert found.exposed["network"] == pytest.approx(18.0)
    assert found.network_hidden == pytest.approx(12.0)


def test_two_collectives_share_the_links():
    start = (
        "  %s{0} = (f32[25]{{0}}, f32[100]{{0}}) all-gather-start(%x), "
        "replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}\n"
    )
    done = "  %g{0} = f32[100]{{0}} all-gather-done(%s{0})\n"
    entry = start.format(1) + start.format(2) + fusion("a", "product", 40_000)
    found = walked(entry + done.format(1) + done.format(2))
    assert (found.seconds, found.exposed["network"]) == (60.0, pytest.approx(20.0))


def test_a_collective_fused_to_products_ends_with_the_fusion_that_says_so():
    def step(end):
        call = f'  ROOT %e = f32[8]{{0}} custom-call(%g), custom_call_target="{end}"\n'
        return (
            f"%step{end} (x: f32[25]) -> f32[8] {{\n"
            f'  %g = {GATHER}, frontend_attributes={{chain_id="0"}}\n'
            f"  %d = f32[8]{{0}} convolution(%x, %x)\n{call}}}\n"
        )

    found = walked(
        fusion("a", "stepAsyncCollectiveStart", 10_000)
        + fusion("b", "stepAsyncCollectiveDone", 5000),
        step("AsyncCollectiveStart") + step("AsyncCollectiveDone"),
    )
    assert found.work["matrix"] == 15.0
    assert (found.seconds, found.exposed["network"]) == (30.0, 15.0)


def test_a_loop_costs_as_often_as_it_runs():
    bodies = (
        "%condition (p: s32[]) -> pred[] {\n"
        "  %bound = s32[] constant(10)\n"
        "  %lt = pred[] compare(%p, %bound), direction=LT\n}\n"
        f"%body (p: s32[]) -> s32[] {{\n{fusion('a', 'product', 3000)}"
        f"  %g = {GATHER}\n}}\n"
    )
    loop = "  %w = s32[] while(%x), condition=%condition, body=%body"
    found = walked(f"{loop}\n", bodies)
    assert found.seconds == pytest.approx(330.0)
    assert found.work["matrix"] == pytest.approx(30.0)
    assert found.network_seconds == pytest.approx(300.0)
    assert {cost.name: round(cost.seconds) for cost in found.costliest} == {
        "g": 300,
        "a": 30,
    }
    # Rounds on overflow are not counted.
    text = 'metadata={op_name="jit(f)/on_overflow/while"}'
    assert walked(f"{loop}, {text}\n", bodies).seconds == 0.0


def test_a_collective_that_began_before_a_loop_is_not_put_off_by_it():
    bodies = (
        "%condition (p: s32[]) -> pred[] {\n"
        "  %bound = s32[] constant(100)\n"
        "  %lt = pred[] compare(%p, %bound), direction=LT\n}\n"
        f"%body (p: s32[]) -> s32[] {{\n{fusion('a', 'product', 1000)}}}\n"
    )
    start = (
        "  %s = (f32[25]{0}, f32[100]{0}) all-gather-start(%x), "
        "replica_groups={{0,1,2,3}}, dimensions={0}\n"
    )
    loop = "  %w = s32[] while(%x), condition=%condition, body=%body\n"
    done = "  %g = f32[100]{0} all-gather-done(%s)\n"
    found = walked(start + loop + done, bodies)
    assert (found.seconds, found.exposed["network"]) == (100.0, 0.0)


def test_the_sparse_cores_move_rows_beside_the_core():
    bodies = (
        "%rows (t: f32[90,10], i: s32[5]) -> f32[5,10] {\n"
        "  ROOT %r = f32[5,10]{1,0} gather(%t, %i), slice_sizes={1,10}\n}\n"
    )
    entry = (
        '  %s = ((), (), s32[]) call-start(), async_execution_thread="sparsecore", '
        "to_apply=%rows\n"
        "  %u = ((f32[90,10], s32[5]), f32[5,10]) call-update(%s, %t, %i)\n"
        + fusion("a", "product", 1000)
        + "  %g = f32[5,10]{1,0} call-done(%u)\n"
    )
    found = walked(entry, bodies)
    assert found.seconds > 1.0
    assert found.exposed["sparse cores"] == pytest.approx(found.seconds - 1.0)


def test_the_longest_branch_counts():
    bodies = (
        f"%short (p: f32[8]) -> f32[8] {{\n{fusion('a', 'product', 1000)}}}\n"
        f"%long (p: f32[8]) -> f32[8] {{\n{fusion('b', 'sum', 3000)}}}\n"
    )
    found = walked(
        "  %c = f32[8]{0} conditional(%x), branch_computations={%short, %long}\n",
        bodies,
    )
    assert (found.seconds, found.work["matrix"]) == (3.0, 0.0)


def test_copies_between_memories_run_beside_the_core():
    copied = "  %s = (f32[100]{0:S(1)}, f32[100]{0}, u32[]) copy-start(%x)\n"
    done = "  %d = f32[100]{0:S(1)} copy-done(%s)\n"
    found = walked(copied + fusion("a", "product", 3000) + done)
    # 400 bytes and the four of the counter.
    assert found.seconds == pytest.approx(4.04)
    assert found.exposed["memory"] == pytest.approx(1.04)


def test_kernels_cost_what_they_are_said_to():
    call = '  %{0} = f32[8]{{0}} custom-call(%x), custom_call_target="{1}"\n'
    entry = call.format("splash.1", "tpu_custom_call") + call.format("b.2", "Mystery")
    found = walked(entry, splash=2.5)
    assert (found.seconds, found.work["kernels"]) == (2.5, 2.5)
    assert found.unpriced == ("Mystery",)


def test_slices_exchange_beside_the_core():
    two = [SimpleNamespace(coords=(0,), slice_index=number) for number in (0, 1)]
    sent = (
        "  %s = (f32[10]{0}, u32[], token[]) send(%x, %t), "
        'frontend_attributes={_xla_megascale_transfer_type="ALL_GATHER"}\n'
    )
    done = "  %r = (f32[10]{0}, u32[], token[]) recv(%t)\n"
    done += "  %d = (f32[10]{0}, token[]) recv-done(%r)\n"
    found = walked(sent + fusion("a", "product", 30_000) + done, devices=two)
    # The gathered 80 bytes, half of which come in, at a byte a second.
    assert (found.seconds, found.exposed["slices"]) == (40.0, 10.0)


def test_costs_name_the_line_of_the_package_that_made_them():
    tables = (
        f'FileNames\n1 "{PACKAGE}/models/block.py"\n'
        f'2 "{PACKAGE.parent}/.venv/jax/lax.py"\n\n'
        "FileLocations\n"
        "1 {file_name_id=1 function_name_id=1 line=60 end_line=61 column=1}\n"
        "2 {file_name_id=2 function_name_id=2 line=7 end_line=8 column=1}\n\n"
        "StackFrames\n1 {file_location_id=1 parent_frame_id=1}\n"
        "2 {file_location_id=2 parent_frame_id=2}\n\n"
    )
    entry = (
        f"  %a = f32[8]{{0}} add(%x, %x), metadata={{stack_frame_id=2}}, {cycles(5)}\n"
        f"  %b = f32[8]{{0}} add(%x, %x), {cycles(4)}\n"
    )
    text = f"HloModule m, is_scheduled=true\n\n{tables}ENTRY %main (x: f32[8]) -> f32[8] {{\n"
    found = walk_schedule(f"{text}{entry}}}\n", LINE, CHIP)
    assert [cost.source for cost in found.costliest] == [
        "tokenrec/models/block.py:60",
        "",
    ]
