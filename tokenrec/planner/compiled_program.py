"""Figures of a compiled program, per device: memory, FLOPs, collectives, times.

Bytes and FLOPs come from XLA where it counts them, and from our own arithmetic
elsewhere: nothing of XLA's counts the inside of a kernel, and a loop body counts once
there. Times are the lower bounds of `roofline.py`, and the compiler's own schedule
(`schedule.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from tokenrec.planner.collectives import Collective
from tokenrec.planner.flops import Work
from tokenrec.planner.hlo import Program, read_program
from tokenrec.planner.roofline import Roofline, chip, network_seconds
from tokenrec.planner.schedule import walk_schedule


def program_figures(
    compiled: Compiled,
    mesh: Mesh,
    work: Work,
    flops: float | None = None,
    kernel_seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Compute the figures of a compiled program on one device.

    Args:
      compiled: the program.
      mesh: mesh that it was compiled for.
      work: work of all devices; its kernel FLOPs and bytes are those of custom calls.
      flops: FLOPs of a device. None is XLA's count, which has a loop body once and
        nothing inside a custom call, plus `work.kernel_flops`.
      kernel_seconds: as in `schedule.walk_schedule`.

    Returns:
      - "devices", "device_kind";
      - "bytes" {"arguments", "outputs", "aliased", "temporaries", "code", "total"};
      - "headroom": share of the memory left over;
      - "flops", "model_flops" (FLOP), "bytes_accessed" (bytes from and to memory, by
        `hlo_bytes.py` and, in custom calls, by `work`);
      - "collective_bytes" {kind, with " across slices" where it is: bytes into a
        device}, "collective_bytes_by_axis" {mesh axes: {kind: bytes}}, "collectives"
        {kind: times run};
      - "custom_calls", "sparse_core_calls", "loops": as in `hlo.Program`;
      - "roofline": `Roofline`, in seconds, and "mfu_bound";
      - "schedule": `Schedule`, and "mfu_by_schedule".
    """
    devices = list(mesh.devices.flat)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    spec = chip(devices[0].device_kind)
    text = compiled.as_text() or ""
    program = read_program(text, len(devices), slices)
    schedule = walk_schedule(text, devices, spec, kernel_seconds)
    memory = _memory_parts(compiled)
    if flops is None:
        counted = (compiled.cost_analysis() or {}).get("flops", 0.0)
        flops = counted + work.kernel_flops / len(devices)
    accessed = program.memory_bytes + work.kernel_bytes / len(devices)
    roofline = Roofline(
        flops / spec.flops,
        accessed / spec.hbm_bandwidth,
        network_seconds(program.collectives, devices, spec),
    )
    model_flops = work.model_flops / len(devices)
    return {
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "bytes": memory,
        "headroom": 1 - memory["total"] / spec.hbm_bytes,
        "flops": flops,
        "bytes_accessed": accessed,
        "model_flops": model_flops,
        **_collective_figures(program, mesh),
        "custom_calls": program.custom_calls,
        "sparse_core_calls": program.sparse_core_calls,
        "loops": list(program.loops),
        "roofline": roofline,
        "mfu_bound": roofline.mfu_bound(model_flops, spec),
        "schedule": schedule,
        "mfu_by_schedule": model_flops / (spec.flops * schedule.seconds),
    }


def _memory_parts(compiled: Compiled) -> dict[str, int]:
    """Bytes of a device by part, and their total."""
    memory: Any = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    # Outputs that lie in donated arguments are not there twice.
    total = sum(parts.values()) - 2 * parts["aliased"]
    return parts | {"total": total}


def _collective_figures(program: Program, mesh: Mesh) -> dict[str, Any]:
    """Bytes into a device and number of collectives, by kind and by mesh axes."""
    moved: Counter[str] = Counter()
    times: Counter[str] = Counter()
    by_axis: dict[str, Counter[str]] = {}
    for each in program.collectives:
        name = each.kind + (" across slices" if each.slices > 1 else "")
        moved[name] += int(each.moved)
        times[name] += each.trips
        axis_bytes = by_axis.setdefault(mesh_axes(each, mesh), Counter())
        axis_bytes[each.kind] += int(each.moved)
    return {
        "collective_bytes": dict(sorted(moved.items())),
        "collective_bytes_by_axis": {
            axes: dict(sorted(kinds.items())) for axes, kinds in sorted(by_axis.items())
        },
        "collectives": dict(sorted(times.items())),
    }


def mesh_axes(collective: Collective, mesh: Mesh) -> str:
    """Name the mesh axes that a collective runs along, such as "data+fsdp".

    They are those along which the devices of a group differ.
    """
    # `data` is the only axis that leaves a slice.
    if collective.slices > 1:
        return "data across slices"
    varies = np.zeros(mesh.devices.ndim, bool)
    for group in collective.groups:
        places = np.array(np.unravel_index(np.array(group), mesh.devices.shape))
        varies |= (places != places[:, :1]).any(axis=1)
    return "+".join(np.array(mesh.axis_names)[varies].tolist()) or "none"
