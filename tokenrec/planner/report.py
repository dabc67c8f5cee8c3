"""Text of a compiled step and of a sweep over meshes, for `tokenrec compile`."""

from __future__ import annotations

from collections import Counter
from typing import Any

MIB = 2**20


def to_text(result: dict[str, Any]) -> str:
    """Write a compiled step as text: memory, work, traffic, bounds and schedule.

    Args:
      result: of `compile.compile_config`.
    """
    lines = [*_setting_lines(result), "", *_memory_lines(result)]
    if "problem" in result:
        lines += ["", *_largest_lines(result), "", result["problem"]]
        return "\n".join(lines)
    lines += ["", *_time_lines(result)]
    if not result["fits"]:
        lines += ["", *_largest_lines(result)]
    return "\n".join(lines)


def _setting_lines(result: dict[str, Any]) -> list[str]:
    parameters = result["parameters"]
    layers = Counter(
        f"{layer['implementation']} {layer['queries']}x{layer['keys']}"
        for layer in result["attention"]
    )
    attention = ", ".join(f"{count} x {name}" for name, count in layers.items())
    return [
        f"{_pod(result)}, mesh {mesh_text(result['mesh'])}",
        result["schema"],
        f"parameters    {parameters['dense']:,} dense, "
        f"{parameters['tables']:,} in tables",
        f"batch         {result['batch']:,} streams of "
        f"{result['stream_tokens']:,} tokens, "
        f"{result['examples_per_step']:,} examples",
        f"attention     {attention}",
    ]


def _memory_lines(result: dict[str, Any]) -> list[str]:
    lines = ["per device    MiB"]
    for name, size in result["bytes_per_device"].items():
        lines.append(f"  {name:<12}{_mib(size):>12}")
    memory = _mib(result["memory_per_device"])
    lines.append(f"  {'memory':<12}{memory:>12}{_headroom(result['headroom'])}")
    if "problem" not in result:
        padding = sum(result["padding_per_device"].values())
        lines.append(f"  of which padding {_mib(padding)}")
    return lines


def _time_lines(result: dict[str, Any]) -> list[str]:
    moved = _mib(result["bytes_moved_per_device"])
    sent = _mib(sum(result["collective_bytes"].values()))
    lines = [
        f"compute       {_ms(result['compute_seconds'])}  "
        f"{result['flops_per_device'] / 1e12:.3f} TFLOP, "
        f"of which the model's {result['model_flops_per_device'] / 1e12:.3f}",
        f"memory        {_ms(result['memory_seconds'])}  {moved} MiB",
        f"network       {_ms(result['network_seconds'])}  {sent} MiB",
    ]
    for axes, kinds in result["collective_bytes_by_axis"].items():
        traffic = ", ".join(f"{kind} {_mib(size)} MiB" for kind, size in kinds.items())
        lines.append(f"  {axes:<20}{traffic}")
    return [
        *lines,
        "",
        f"step          {_ms(result['roofline_seconds'])}  at least: "
        f"{result['bound']} is the limit",
        f"MFU           {result['mfu_bound']:.1%} at most; "
        f"{result['mfu_by_schedule']:.1%} by schedule",
        f"examples/s    {result['examples_per_second']:,.0f} at most; "
        f"{result['examples_per_second_by_schedule']:,.0f} by schedule, "
        f"on {result['devices']} devices",
        "",
        *_schedule_lines(
            result["schedule"], result["schedule_seconds"], result["sparse_core_calls"]
        ),
        "",
        f"compiled in   {result['compile_seconds']:.0f} s",
    ]


def _schedule_lines(
    schedule: dict[str, Any], seconds: float, calls: dict[str, int]
) -> list[str]:
    """Lines on what the compiler expects of its own schedule."""
    lines = [f"by schedule   {_ms(seconds)}  of which"]
    parts = schedule["work"] | {
        f"waits: {name}": waited for name, waited in schedule["exposed"].items()
    }
    lines += [
        f"  {name:<20}{_ms(part)}" for name, part in parts.items() if part >= 1e-6
    ]
    lines.append(
        f"  network beside work {_ms(schedule['network_hidden'])}  not counted"
    )
    if calls:
        listed = ", ".join(f"{count} x {kind}" for kind, count in calls.items())
        lines.append(f"  on sparse cores     {listed}")
    if schedule["unpriced"]:
        lines.append(f"  of unknown cost     {', '.join(schedule['unpriced'])}")
    lines.append("costliest")
    for cost in schedule["costliest"]:
        source = cost["source"] or cost["name"]
        lines.append(f"  {cost['kind']:<12}{_ms(cost['seconds'])}  {source}")
    return lines


def sweep_text(results: list[dict[str, Any]]) -> str:
    """Write a table of compiled settings, in the order given.

    Args:
      results: of `sweep.compile_best`.
    """
    header = [
        "mesh",
        "remat",
        "batch",
        "schedule ms",
        "MFU",
        "bound ms",
        "limit",
        "memory",
        "examples/s",
        "predicted ms",
    ]
    rows = [header, *map(_sweep_row, results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    title = f"{_pod(results[0])}; {results[0]['schema']}"
    lines = [title, ""]
    for row in rows:
        cells = [c.ljust(width) for c, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def _sweep_row(result: dict[str, Any]) -> list[str]:
    share = "-" if result["headroom"] is None else f"{1 - result['headroom']:.0%}"
    if not result["fits"]:
        share += " (does not fit)"
    known = result["roofline_seconds"] is not None
    return [
        mesh_text(result["mesh"]),
        result["remat"],
        f"{result['batch']:,}",
        f"{1e3 * result['schedule_seconds']:.2f}" if known else "-",
        f"{result['mfu_by_schedule']:.1%}" if known else "-",
        f"{1e3 * result['roofline_seconds']:.2f}" if known else "-",
        result["bound"] or "-",
        share,
        f"{result['examples_per_second_by_schedule']:,.0f}" if known else "-",
        f"{1e3 * result['predicted_seconds']:.2f}",
    ]


def mesh_text(mesh: dict[str, int]) -> str:
    """Write the sizes of a mesh as `--mesh` takes them, without a `context` of 1.

    >>> mesh_text({"data": 4, "fsdp": 8, "context": 1, "tensor": 1})
    'data=4,fsdp=8,tensor=1'
    """
    axes = [axis for axis, size in mesh.items() if (axis, size) != ("context", 1)]
    return ",".join(f"{axis}={mesh[axis]}" for axis in axes)


def _pod(result: dict[str, Any]) -> str:
    slices = f"{result['slices']} slices of " if result["slices"] > 1 else ""
    return (
        f"{slices}{result['topology']}: {result['devices']} x {result['device_kind']}"
    )


def _headroom(share: float | None) -> str:
    if share is None:
        return ""
    return f"  {share:.1%} left over" if share >= 0 else f"  {-share:.1%} too little"


def _largest_lines(result: dict[str, Any]) -> list[str]:
    header = (
        f"DOES NOT FIT; its largest arrays on a device, MiB, {result['largest_by']}"
    )
    return [header, *map(_array_line, result["largest"])]


def _array_line(array: dict[str, Any]) -> str:
    return (
        f"  {_mib(array['bytes']):>12}  {array['shape']}  "
        f"{array['operation']}  {array['source']}"
    )


def _mib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / MIB:,.1f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:10.3f} ms"
