"""Model FLOPs utilisation (MFU): the share of a device's peak that a step uses.

    MFU = FLOPs per step and device / (seconds per step * peak FLOPs per second)

The FLOPs are those that the model needs (`tokenrec/planner/flops.py`), without
recomputation, as in PaLM (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from tokenrec.errors import InputError
from tokenrec.planner.roofline import chip

# Dense bfloat16 peaks, FLOPs per second, by `jax.Device.device_kind`. Peaks of TPUs:
# `tokenrec/planner/roofline.py`. NVIDIA's data sheets of the A100, H100 and H200 give
# the Hopper figures with sparsity, twice as high: 1,979 TFLOP/s for H100 SXM and H200,
# 1,671 for H100 NVL, 1,513 for H100 PCIe. 989.4 is the dense figure of the white paper
# "NVIDIA H100 Tensor Core GPU Architecture".
GPU_PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H200": 989.4e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak FLOPs per second of a device in bfloat16; None if it is not known."""
    if device_kind in GPU_PEAK_FLOPS:
        return GPU_PEAK_FLOPS[device_kind]
    try:
        return chip(device_kind).flops
    except InputError:
        return None


def mfu(flops_per_step: float, seconds: float, device_kind: str) -> float | None:
    """Compute the model FLOPs utilisation of one device.

    Args:
      flops_per_step: model FLOPs of one step on one device: those of the whole step,
        divided by the number of devices.
      seconds: duration of a step.
      device_kind: `jax.Device.device_kind`.

    Returns:
      A share of 1, against the bfloat16 peak also if the model computes in float32;
      None if the peak of the device is not known.

    >>> mfu(98.5e12, 1.0, "TPU v5e")
    0.5
    """
    peak = peak_flops(device_kind)
    return None if peak is None else flops_per_step / (seconds * peak)
