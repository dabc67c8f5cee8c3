"""What `compile` found, for a person."""

from __future__ import annotations

from collections import Counter
from typing import Any

MIB = 2**20


def to_text(result: dict[str, Any]) -> str:
    """One compiled step: what lies on a device, what it does, what it sends, and how fast at most."""
    memory, held = result["memory_per_device"], result["bytes_per_device"]
    layers = Counter(
        f"{layer['implementation']} {layer['queries']}x{layer['keys']}"
        for layer in result["attention"]
    )
    lines = [
        f"{_pod(result)}, mesh {mesh_text(result['mesh'])}",
        result["schema"],
        f"parameters    {result['parameters']['dense']:,} dense, {result['parameters']['tables']:,} in tables",
        f"batch         {result['batch']:,} streams of {result['stream_tokens']:,} tokens, "
        f"{result['examples_per_step']:,} examples",
        "attention     "
        + ", ".join(f"{count} x {name}" for name, count in layers.items()),
        "",
        "per device    MiB",
        *(f"  {name:<12}{_mib(size):>12}" for name, size in held.items()),
        f"  {'memory':<12}{_mib(memory):>12}" + _headroom(result["headroom"]),
    ]
    if "problem" in result:
        lines += ["", *_largest(result), "", result["problem"]]
        return "\n".join(lines)
    lines += [
        f"  of which padding {_mib(sum(result['padding_per_device'].values()))}",
        "",
        f"compute       {_ms(result['compute_seconds'])}  {result['flops_per_device'] / 1e12:.3f} TFLOP, "
        f"of which the model's {result['model_flops_per_device'] / 1e12:.3f}",
        f"memory        {_ms(result['memory_seconds'])}  {_mib(result['bytes_moved_per_device'])} MiB",
        f"network       {_ms(result['network_seconds'])}  {_mib(sum(result['collective_bytes'].values()))} MiB",
        *(
            f"  {axes:<20}"
            + ", ".join(f"{kind} {_mib(size)} MiB" for kind, size in kinds.items())
            for axes, kinds in result["collective_bytes_by_axis"].items()
        ),
        "",
        f"step          {_ms(result['roofline_seconds'])}  at least: {result['bound']} is the limit",
        f"MFU           {result['mfu_bound']:.1%} at most; {result['mfu_if_serial']:.1%} if nothing overlaps",
        f"examples/s    {result['examples_per_second']:,.0f} at most, on {result['devices']} devices",
        f"compiled in   {result['compile_seconds']:.0f} s",
    ]
    if not result["fits"]:
        lines += ["", *_largest(result)]
    return "\n".join(lines)


def sweep_text(results: list[dict[str, Any]]) -> str:
    """A table of compiled meshes, in the order given."""
    rows = [
        [
            "mesh",
            "step ms",
            "limit",
            "MFU bound",
            "memory",
            "examples/s",
            "predicted ms",
        ]
    ]
    for result in results:
        share = "-" if result["headroom"] is None else f"{1 - result['headroom']:.0%}"
        if not result["fits"]:
            share += " (does not fit)"
        known = result["roofline_seconds"] is not None
        rows.append(
            [
                mesh_text(result["mesh"]),
                f"{1e3 * result['roofline_seconds']:.2f}" if known else "-",
                result["bound"] or "-",
                f"{result['mfu_bound']:.1%}" if known else "-",
                share,
                f"{result['examples_per_second']:,.0f}" if known else "-",
                f"{1e3 * result['predicted_seconds']:.2f}",
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    head = f"{_pod(results[0])}, {results[0]['batch']:,} streams a step; {results[0]['schema']}"
    return "\n".join(
        [
            head,
            "",
            *(
                "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))
                for row in rows
            ),
        ]
    )


def mesh_text(mesh: dict[str, int]) -> str:
    """
    >>> mesh_text({"data": 4, "fsdp": 8, "tensor": 1})
    'data=4,fsdp=8,tensor=1'
    """
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def _pod(result: dict[str, Any]) -> str:
    slices = f"{result['slices']} slices of " if result["slices"] > 1 else ""
    return (
        f"{slices}{result['topology']}: {result['devices']} x {result['device_kind']}"
    )


def _headroom(share: float | None) -> str:
    if share is None:
        return ""
    return f"  {share:.1%} left over" if share >= 0 else f"  {-share:.1%} too little"


def _largest(result: dict[str, Any]) -> list[str]:
    rows = [
        f"  {_mib(b['bytes']):>12}  {b['shape']}  {b['operation']}  {b['source']}"
        for b in result["largest"]
    ]
    return [
        f"DOES NOT FIT; its largest arrays on a device, MiB, {result['largest_by']}",
        *rows,
    ]


def _mib(size: float | None) -> str:
    return "unknown" if size is None else f"{size / MIB:,.1f}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:10.3f} ms"
