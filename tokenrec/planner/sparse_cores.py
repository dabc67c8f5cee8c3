"""Work that the compiler gives to the sparse cores of a TPU.

libtpu moves gathers, scatters and changes of layout there, without being asked. The
main cores go on meanwhile, and wait at the `call-done`:

    %s = ((), (), (s32[1])) call-start(), async_execution_thread="sparsecore", \
to_apply=%f, backend_config={"sparse_core_config":{"offload":"OFFLOAD_GATHER"}}
    %u = ((f32[100,128], s32[3]), f32[3,128]) call-update(%s, %table, %ids)
    %d = f32[3,128] call-done(%u)

The computation `%f` holds another `call-start` of the same thread, without "offload".
"""

from __future__ import annotations

import re

from tokenrec.planner.hlo_bytes import Instruction

_OFFLOAD = re.compile(r'"offload":"OFFLOAD_(\w+)"')


def sparse_core_call(line: Instruction) -> str | None:
    """Name the work that an instruction starts on the sparse cores; None for none.

    >>> rest = '), async_execution_thread="sparsecore", {"offload":"OFFLOAD_GATHER"}'
    >>> sparse_core_call(Instruction("s", "()", "call-start", rest))
    'gather'
    """
    if not line.opcode.endswith("-start") or '"sparsecore"' not in line.rest:
        return None
    offload = _OFFLOAD.search(line.rest)
    return offload[1].lower().replace("_", " ") if offload else None
