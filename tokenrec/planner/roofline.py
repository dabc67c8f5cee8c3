"""The roofline of a step on a TPU: the least time that its work must take.

A step computes F FLOPs, moves M bytes to and from memory and receives N bytes from
other devices. On a chip with peak f (FLOP/s), memory bandwidth m and network bandwidth
n (bytes/s), its resources are busy for

    compute = F / f,   memory = M / m,   network = N / n       (seconds, of one device)

If the three overlap fully, the step takes the longest of them, and no run is faster:
that is the *bound*. If nothing overlaps it takes their sum. Rates that follow from the
bound are upper bounds; `MFU bound = model FLOPs / (f * bound)`. (Williams, Waterman and
Patterson, Roofline: an insightful visual performance model, CACM 2009.)

Not counted: latency, hops and contention in the network, kernel launches, and work that
is neither a matrix product nor a memory access. Nothing here needs an accelerator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tokenrec.device_kinds import canonical_kind
from tokenrec.errors import InputError, suggest
from tokenrec.planner.collectives import Collective, ring_bytes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of what JAX calls a device.

    That is a whole chip, but half a chip of TPU7x, whose two cores are two devices.

    Attributes:
      flops: peak FLOP/s in bfloat16. Also of float32: by default a TPU rounds float32
        operands of a product to bfloat16 and multiplies once.
      hbm_bytes: bytes of memory that a program may use.
      hbm_bandwidth: bytes/s to and from memory.
      ici_link: bytes/s of one link to a neighbour, one way.
      axes: dimensions of the torus of links.
      ring: an axis whose length is a multiple of this is closed to a ring; others are
        lines.
      dcn_bandwidth: bytes/s of the data-centre network, one way, this device's share of
        its host.
      clock: cycles/s of a core: the peak over the FLOPs of a cycle, which are two for
        each cell of its matrix units.
      cores: of the device, over which a kernel spreads its grid.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_link: float
    axes: int
    ring: int
    dcn_bandwidth: float
    clock: float
    cores: int = 1


# Peak, memory bandwidth, links and data-centre network: the tables of
# docs.cloud.google.com/tpu/docs/{v5e, v5p, v6e, tpu7x}. They give the links of a chip
# together and both ways: divided by 2 directions and by 4 or 6 links. For v5e they give
# 2 x 100 Gbit/s per host of 8 chips. Where axes close to rings:
# jax-ml.github.io/scaling-book/tpus, which has the matrix units of a core: four of
# 128 x 128 cells on v5e and v5p, of 256 x 256 since v6e. Usable memory: what libtpu 0.0.50 reports as
# available when it refuses a program.
CHIPS = {
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 2, 16, 25e9 / 8, 1.5e9),
    "TPU v5": Chip(459e12, 95.73 * GIB, 2765e9, 100e9, 3, 4, 50e9 / 8, 1.75e9, 2),
    "TPU v6 lite": Chip(918e12, 31.24 * GIB, 1638e9, 100e9, 2, 16, 100e9 / 8, 1.75e9),
    "TPU7x": Chip(
        2307e12 / 2, 94.74 * GIB, 7380e9 / 2, 100e9 / 2, 3, 4, 100e9 / 8 / 2, 2.2e9
    ),
}


def chip(device_kind: str) -> Chip:
    """Look up the figures of `jax.Device.device_kind`.

    Raises:
      InputError: there are no figures of this kind.
    """
    kind = canonical_kind(device_kind)
    if kind not in CHIPS:
        raise InputError(
            f"device_kind='{device_kind}': its peak and bandwidths are not in "
            f"tokenrec.planner.roofline.CHIPS{suggest(device_kind, CHIPS)}"
        )
    return CHIPS[kind]


def network_seconds(
    collectives: Sequence[Collective], devices: Sequence[Any], spec: Chip
) -> float:
    """Compute the least time of all collectives, one after another.

    The links that lead into the busiest device are taken as fully used. Hops and
    contention are not counted, so that it is a lower bound.

    Args:
      collectives: of a compiled program, or expected.
      devices: in the mesh's order; `coords` and `slice_index` are their places. Devices
        without coordinates count as one line.
      spec: figures of the devices.

    Returns:
      Seconds.
    """
    return sum(collective_seconds(each, devices, spec) for each in collectives)


def collective_seconds(
    collective: Collective, devices: Sequence[Any], spec: Chip
) -> float:
    """Seconds of one collective, all its trips."""
    if collective.slices > 1:
        return collective.moved / spec.dcn_bandwidth
    one_slice = [device for device in devices if _slice(device) == _slice(devices[0])]
    seconds = []
    for group in collective.groups:
        members = [devices[place] for place in group]
        slices = len({_slice(device) for device in members})
        local = [device for device in members if _slice(device) == _slice(members[0])]
        # Inside its slice a device handles the whole array, between slices its part of
        # it.
        ici_bytes = dcn_bytes = 0.0
        if len(local) > 1:
            ici_bytes = ring_bytes(collective.kind, collective.size, len(local))
        if slices > 1:
            dcn_bytes = ring_bytes(
                collective.kind, collective.size / len(local), slices
            )
        ici_bandwidth = spec.ici_link * _links(local, one_slice, spec)
        seconds.append(ici_bytes / ici_bandwidth + dcn_bytes / spec.dcn_bandwidth)
    return collective.trips * max(seconds)


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def _links(group: Sequence[Any], devices: Sequence[Any], spec: Chip) -> int:
    """Count the links into a corner of a group of devices.

    An axis of the torus that the group fills gives two links if it is a ring; an axis
    that it spans without filling a ring gives one.
    """
    group_places, all_places = (
        np.array([getattr(device, "coords", None) or (0,) for device in some])
        for some in (group, devices)
    )
    links = 0
    for axis in range(group_places.shape[1]):
        length = len(np.unique(group_places[:, axis]))
        full_length = len(np.unique(all_places[:, axis]))
        if length > 1:
            is_ring = length == full_length and full_length % spec.ring == 0
            links += 2 if is_ring else 1
    return max(links, 1)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Least seconds of a step in each resource of a device.

    Attributes:
      compute_seconds: FLOPs of the device over the peak.
      memory_seconds: bytes to and from memory over the memory bandwidth.
      network_seconds: `network_seconds` of the collectives.
    """

    compute_seconds: float
    memory_seconds: float
    network_seconds: float

    def _named(self) -> Iterator[tuple[float, str]]:
        for name in ("compute", "memory", "network"):
            yield getattr(self, f"{name}_seconds"), name

    @property
    def bound(self) -> float:
        """Seconds if the three overlap fully: no run is faster."""
        return max(self._named())[0]

    @property
    def total(self) -> float:
        """Seconds if nothing overlaps."""
        return sum(seconds for seconds, _ in self._named())

    @property
    def limit(self) -> str:
        """The resource that sets the bound: "compute", "memory" or "network"."""
        return max(self._named())[1]

    def mfu_bound(self, model_flops: float, spec: Chip) -> float:
        """Compute the highest share of the peak that model FLOPs of a device reach."""
        return model_flops / (spec.flops * self.bound)
