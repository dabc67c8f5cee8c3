"""Stage 1: the card, its software, and the limits that other stages are divided by.

    python -m benchmarks.gpu.limits --out OUT [--rehearse]

Matrix products are square, on random data. The copy adds 1 to every number of an array:
its bytes are those read and written. Calls are queued, and each takes far longer than
its launch, which is the time of a compiled function that adds 1 to eight numbers.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.clock import launch_seconds
from benchmarks.gpu.record import Recorder, run_stage, stage_flags
from benchmarks.report import PACKAGES, versions
from tokenrec.ops.attention import current_platform
from tokenrec.planner.mfu import peak_flops

# Exit status without a GPU, at which `run.sh` ends: the rest would measure the CPU.
NO_GPU = 3
# Of the CUDA plug-in and of the peers; "torch" includes CUDA's version.
GPU_PACKAGES = (
    *PACKAGES,
    "jax-cuda13-plugin",
    "jax-cuda13-pjrt",
    "nvidia-cudnn-cu13",
    "torch",
    "triton",
)
# dtype and precision of each product. On an H100, a float32 product takes TF32 by
# default and float32 with "highest".
PRODUCTS = {
    "bfloat16": ("bfloat16", None),
    "tf32": ("float32", None),
    "float32": ("float32", "highest"),
}
NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
    "--format=csv,noheader",
)


def driver() -> str:
    """The driver's own account of the card, or why there is none."""
    if shutil.which(NVIDIA_SMI[0]) is None:
        return "no nvidia-smi"
    done = subprocess.run(
        NVIDIA_SMI, capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout.strip() or f"nvidia-smi ended with {done.returncode}"


def device_row() -> dict[str, Any]:
    """Card, driver, memory and versions."""
    device = jax.devices()[0]
    memory = device.memory_stats() or {}
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "driver": driver(),
        "memory_limit_gib": memory.get("bytes_limit", 0) / 2**30 or None,
    } | versions(GPU_PACKAGES)


def product_seconds(side: int, name: str, target: float) -> float:
    """Median seconds of a product of `[side, side]` matrices.

    Args:
      side: rows and columns.
      name: key of `PRODUCTS`.
      target: seconds of a measurement.
    """
    dtype, precision = PRODUCTS[name]
    x = jax.random.normal(jax.random.key(0), (side, side), dtype)
    by = jax.random.normal(jax.random.key(1), (side, side), dtype)
    product = jax.jit(functools.partial(jnp.matmul, precision=precision))
    return launch_seconds(lambda: product(x, by), target=target)


def copy_seconds(numbers: int, target: float) -> float:
    """Median seconds of reading and writing so many float32 numbers."""
    x = jnp.zeros((numbers,), jnp.float32)
    add = jax.jit(lambda x: x + 1)
    return launch_seconds(lambda: add(x), target=target)


def launch_rows(repeats: int) -> dict[str, float]:
    """Microseconds of a launch: queued, and waited for each time."""
    x = jnp.zeros((8,))
    add = jax.jit(lambda x: x + 1)
    jax.block_until_ready(add(x))
    waited = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(add(x))
        waited.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    for _ in range(repeats):
        x = add(x)
    jax.block_until_ready(x)
    queued = (time.perf_counter() - begin) / repeats
    return {"queued_us": 1e6 * queued, "waited_us": 1e6 * float(np.median(waited))}


def measure(recorder: Recorder) -> None:
    """Add the rows of this stage."""
    recorder.add(table="device", **device_row())
    if not recorder.rehearse and current_platform() != "gpu":
        raise RuntimeError(
            f"JAX runs on {current_platform()}, not on a GPU: "
            "install the CUDA plug-in of its version, or rehearse with --rehearse"
        )
    if recorder.rehearse:
        side, numbers, target, repeats = 128, 1 << 16, 0.01, 10
    else:
        side, numbers, target, repeats = 8192, 1 << 28, 0.3, 2000
    sheet = peak_flops(jax.devices()[0].device_kind)
    for name in PRODUCTS:
        with recorder.case(limit=name):
            flops = 2 * side**3 / product_seconds(side, name, target)
            recorder.add(
                limit=name,
                peak=flops,
                unit="FLOP/s",
                tera=flops / 1e12,
                size=f"{side} x {side} x {side}",
                share_of_sheet=flops / sheet if sheet and name == "bfloat16" else None,
            )
    with recorder.case(limit="copy"):
        rate = 8 * numbers / copy_seconds(numbers, target)
        recorder.add(
            limit="copy",
            peak=rate,
            unit="bytes/s",
            tera=rate / 1e12,
            size=f"{4 * numbers / 2**20:g} MiB",
        )
    with recorder.case(table="launch"):
        recorder.add(table="launch", **launch_rows(repeats))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage; the exit status is `NO_GPU` if there is none to measure."""
    status = run_stage("limits", __doc__, measure, argv)
    if stage_flags(__doc__, argv).rehearse:
        return status
    try:
        return status if current_platform() == "gpu" else NO_GPU
    # JAX finds no CUDA; its row says why.
    except RuntimeError:
        return NO_GPU


if __name__ == "__main__":
    sys.exit(main())
