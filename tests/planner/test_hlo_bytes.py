"""Bytes that a small TPU program moves, against hand-computed values."""

import pytest

from tokenrec.planner.hlo import read_program
from tokenrec.planner.hlo_bytes import Instruction, array_bytes, memory_bytes

# A table of 100 x 16 numbers, a stack of 4 weights of 8 x 8, and a loop over the stack.
# Bytes in float32: a table row 64, a weight 256, the stack 1024, an activation of 2 x 8 64.
HLO = """HloModule m

%pick.1 (p0: f32[4,8,8], p1: s32[]) -> f32[8,8] {
  %p0 = f32[4,8,8]{2,1,0:T(8,128)} parameter(0)
  %p1 = s32[]{:T(128)} parameter(1)
  %zero = s32[] constant(0)
  %cut = f32[1,8,8]{2,1,0:T(8,128)} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %b = f32[8,8]{1,0:T(8,128)} bitcast(%cut)
}

%layer.1 (q0: f32[2,8], q1: f32[4,8,8], q2: s32[]) -> f32[2,8] {
  %q0 = f32[2,8]{1,0:T(8,128)S(1)} parameter(0)
  %q1 = f32[4,8,8]{2,1,0:T(8,128)} parameter(1)
  %q2 = s32[]{:T(128)} parameter(2)
  %w = f32[8,8]{1,0:T(8,128)} fusion(%q1, %q2), kind=kLoop, calls=%pick.1
  ROOT %dot = f32[2,8]{1,0:T(8,128)S(1)} convolution(%q0, %w), dim_labels=bf_io->bf
}

%update.1 (u0: f32[100,16], u1: s32[3], u2: f32[3,16]) -> f32[100,16] {
  %u0 = f32[100,16]{0,1:T(8,128)} parameter(0)
  %u1 = s32[3]{0:T(1024)} parameter(1)
  %u2 = f32[3,16]{1,0:T(8,128)} parameter(2)
  ROOT %s = f32[100,16]{0,1:T(8,128)} scatter(%u0, %u1, %u2), update_window_dims={1}, to_apply=%add.1
}

%body.1 (arg: (s32[], f32[2,8], f32[4,8,8])) -> (s32[], f32[2,8], f32[4,8,8]) {
  %arg = (s32[]{:T(128)}, f32[2,8]{1,0:T(8,128)S(1)}, f32[4,8,8]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)S(6)} get-tuple-element(%arg), index=0
  %x = f32[2,8]{1,0:T(8,128)S(1)} get-tuple-element(%arg), index=1
  %stack = f32[4,8,8]{2,1,0:T(8,128)} get-tuple-element(%arg), index=2
  %y = f32[2,8]{1,0:T(8,128)S(1)} fusion(%x, %stack, %i), kind=kOutput, calls=%layer.1
  ROOT %t = (s32[]{:T(128)}, f32[2,8]{1,0:T(8,128)S(1)}, f32[4,8,8]{2,1,0:T(8,128)}) tuple(%i, %y, %stack)
}

%until.1 (c: (s32[], f32[2,8], f32[4,8,8])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[2,8]{1,0:T(8,128)S(1)}, f32[4,8,8]{2,1,0:T(8,128)}) parameter(0)
  %at = s32[]{:T(128)S(6)} get-tuple-element(%c), index=0
  %four = s32[]{:T(128)S(6)} constant(4)
  ROOT %less = pred[]{:T(512)S(6)} compare(%at, %four), direction=LT
}

ENTRY %main (t: f32[100,16], w: f32[4,8,8], x: f32[2,8], ids: s32[3], g: f32[3,16]) -> (f32[2,8], f32[100,16]) {
  %t = f32[100,16]{0,1:T(8,128)} parameter(0)
  %w = f32[4,8,8]{2,1,0:T(8,128)} parameter(1)
  %x = f32[2,8]{1,0:T(8,128)} parameter(2)
  %ids = s32[3]{0:T(1024)} parameter(3)
  %g = f32[3,16]{1,0:T(8,128)} parameter(4)
  %zero.1 = s32[]{:T(128)S(6)} constant(0)
  %start = (f32[2,8]{1,0:T(8,128)S(1)}, f32[2,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %done = f32[2,8]{1,0:T(8,128)S(1)} copy-done(%start)
  %first = (s32[]{:T(128)S(6)}, f32[2,8]{1,0:T(8,128)S(1)}, f32[4,8,8]{2,1,0:T(8,128)}) tuple(%zero.1, %done, %w)
  %loop = (s32[], f32[2,8]{1,0:T(8,128)S(1)}, f32[4,8,8]{2,1,0}) while(%first), condition=%until.1, body=%body.1
  %out = f32[2,8]{1,0:T(8,128)S(1)} get-tuple-element(%loop), index=1
  %kept = f32[2,8]{1,0:T(8,128)} copy(%out)
  %rows = f32[3,16]{1,0:T(8,128)} gather(%t, %ids), offset_dims={1}, slice_sizes={1,16}
  %sum = f32[3,16]{1,0:T(8,128)} add(%rows, %g)
  %new = f32[100,16]{0,1:T(8,128)} fusion(%t, %ids, %sum), kind=kCustom, calls=%update.1
  ROOT %result = (f32[2,8]{1,0:T(8,128)}, f32[100,16]{0,1:T(8,128)}) tuple(%kept, %new)
}
"""


def test_a_program_costs_what_it_touches_and_a_loop_as_often_as_it_runs():
    row, activation, weight, ids = 64, 64, 256, 12
    expected = (
        # The activation is copied to the chip.
        activation
        # One weight of the stack a trip; the activation stays on the chip.
        + 4 * weight
        # The activation is copied back.
        + activation
        # The gather reads and writes three rows.
        + (2 * 3 * row + ids)
        # The sum reads two operands and writes one result of three rows.
        + 3 * 3 * row
        # The update reads three rows of the table and three of gradients.
        + (3 * row + ids + 3 * row)
    )
    assert read_program(HLO, 1).memory_bytes == expected


# A gather that libtpu moves to the sparse cores: a call without operands, which an update
# brings, around a call that has them.
SPARSE_CORES = """HloModule m

%rows.1 (r0: f32[100,128], r1: s32[3]) -> f32[3,128] {
  %r0 = f32[100,128] parameter(0)
  %r1 = s32[3] parameter(1)
  ROOT %gather.1 = f32[3,128] gather(%r0, %r1), offset_dims={1}, slice_sizes={1,128}
}

%called.1 (p0: f32[100,128], p1: s32[3]) -> f32[3,128] {
  %p0 = f32[100,128] parameter(0)
  %p1 = s32[3] parameter(1)
  ROOT %f.1 = f32[3,128] fusion(%p0, %p1), kind=kCustom, calls=%rows.1
}, execution_thread="sparsecore"

%called (q0: f32[100,128], q1: s32[3]) -> f32[3,128] {
  %q0 = f32[100,128] parameter(0)
  %q1 = s32[3] parameter(1)
  %in.call-start = ((f32[100,128], s32[3]), f32[3,128], u32[]) call-start(%q0, %q1), THREAD, to_apply=%called.1
  ROOT %in.call-done = f32[3,128] call-done(%in.call-start)
}, execution_thread="sparsecore"

ENTRY %main (t: f32[100,128], ids: s32[3]) -> f32[3,128] {
  %t = f32[100,128] parameter(0)
  %ids = s32[3] parameter(1)
  %start = ((), (), (s32[1])) call-start(), THREAD, to_apply=%called, backend_config={"offload":"OFFLOAD_GATHER"}
  %start.update = ((f32[100,128], s32[3]), f32[3,128]) call-update(%start, %t, %ids)
  ROOT %done = f32[3,128] call-done(%start.update)
}
""".replace("THREAD", 'async_execution_thread="sparsecore"')


def test_work_on_the_sparse_cores_counts_once_and_by_its_name():
    program = read_program(SPARSE_CORES, 1)
    line, ids = 128 * 4, 12
    # Three lines are read and written, and the ids read: never the table.
    assert program.memory_bytes == 2 * 3 * line + ids
    assert program.sparse_core_calls == {"gather": 1}


@pytest.mark.parametrize(
    ("shape", "whole", "in_memory"),
    [
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30, 30),
        ("bf16[3,5]{1,0:T(8,128)(2,1)S(1)}", 30, 0),
        ("(s32[]{:S(2)}, (pred[7]{0:T(256)}, f8e4m3fn[2]{0}))", 13, 9),
    ],
)
def test_arrays_of_a_shape(shape, whole, in_memory):
    assert sum(array_bytes(shape)) == whole
    assert memory_bytes(shape) == in_memory


def test_operands_end_with_the_parenthesis():
    one = Instruction(
        "a", "f32[2]", "fusion", "%b, /*index=1*/%c.2), kind=kLoop, calls=%d"
    )
    assert one.operands == ["b", "c.2"]
