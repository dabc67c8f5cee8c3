"""Parse a topology: TPU slices or GPU nodes, and whether a service has them."""

from __future__ import annotations

from typing import Literal

from tokenrec.errors import InputError, suggest
from tokenrec.launch.gpus import GPUS, GpuNodes, parse_gpus
from tokenrec.launch.slices import GENERATIONS, Slice, parse_slice

# Services that run a training job.
TrainingTarget = Literal["gke", "tpu-vm", "slurm"]

# One of several TPU slices, or all GPU nodes.
Machines = Slice | GpuNodes


def parse_machines(topology: str, target: TrainingTarget) -> Machines:
    """Parse a topology such as "v5p:8x8x8" (a slice) or "h100:2x8" (nodes x GPUs).

    Raises:
      InputError: there are no such machines, or the target does not have them.
    """
    kind = topology.partition(":")[0]
    if kind not in GPUS and kind not in GENERATIONS:
        raise InputError(
            f"topology='{topology}' begins with neither a TPU nor a GPU; write TPU "
            "slices as v5e:16x16, and two nodes of eight GPUs as h100:2x8"
            f"{suggest(kind, [*GENERATIONS, *GPUS])}"
        )
    machines = parse_gpus(topology) if kind in GPUS else parse_slice(topology)
    if target == "tpu-vm" and isinstance(machines, GpuNodes):
        raise InputError(
            f"topology='{topology}' with target='tpu-vm': these are GPUs; use --target "
            "gke or slurm"
        )
    if target == "slurm" and isinstance(machines, Slice):
        raise InputError(
            f"topology='{topology}' with target='slurm': these are TPUs; use --target "
            "gke or tpu-vm, or name GPUs, such as h100:2x8"
        )
    return machines


def check_slices(machines: Machines, slices: int) -> None:
    """Check the number of TPU slices.

    Raises:
      InputError: it is 0, or there are several of GPUs or of slices with one host.
    """
    if slices < 1:
        raise InputError(f"slices={slices} must be at least 1")
    if slices > 1 and isinstance(machines, GpuNodes):
        raise InputError(
            f"slices={slices} belongs to TPUs; name more nodes, such as "
            f"--topology={machines.kind}:{machines.nodes * slices}x{machines.per_node}"
        )
    if slices > 1 and machines.hosts == 1:
        raise InputError(
            f"slices={slices} of {machines.topology}, which is one host: several "
            "slices are joined only if each has several hosts; use one larger slice"
        )
