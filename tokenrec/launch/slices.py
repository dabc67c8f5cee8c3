"""TPU slices as they are rented: chips, hosts, and the names that GKE and the TPU VM service have for them.

The figures are those of docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus and of
docs.cloud.google.com/tpu/docs/{v5e, v5p, v6e, tpu7x}.
"""

from __future__ import annotations

import dataclasses
import math

from tokenrec.errors import InputError, suggest

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
)


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU.

    Attributes:
      label: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      sizes: shapes that are named; of those with the same number of chips, the one that an accelerator type means.
      most_chips: of the largest slice.
      one_host: chips of the largest slice that is one host; larger ones have four chips a host.
      devices_per_chip: devices that JAX shows.
      vm_type: of an accelerator type "v5p-1024"; "" where the TPU VM service has none.
      units_per_chip: what the number in an accelerator type counts.
      runtime: software version of a TPU VM.
    """

    label: str
    sizes: tuple[str, ...]
    most_chips: int
    one_host: int
    devices_per_chip: int = 1
    vm_type: str = ""
    units_per_chip: int = 1
    runtime: str = ""


GENERATIONS = {
    "v5e": Generation(
        "tpu-v5-lite-podslice",
        _FLAT,
        256,
        8,
        vm_type="v5litepod",
        runtime="v2-alpha-tpuv5-lite",
    ),
    "v6e": Generation(
        "tpu-v6e-slice", _FLAT, 256, 8, vm_type="v6e", runtime="v2-alpha-tpuv6e"
    ),
    "v5p": Generation(
        "tpu-v5p-slice",
        _DEEP,
        6144,
        4,
        vm_type="v5p",
        units_per_chip=2,
        runtime="v2-alpha-tpuv5",
    ),
    "tpu7x": Generation("tpu7x", ("1x1x1", *_DEEP), 9216, 4, devices_per_chip=2),
}
TOPOLOGIES = tuple(
    f"{name}:{size}"
    for name, generation in GENERATIONS.items()
    for size in generation.sizes
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are joined by their own links. `kind` is a key of `GENERATIONS`, `shape` is "8x8x8"."""

    kind: str
    shape: str

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def chips_per_host(self) -> int:
        return self.chips if self.chips <= self.generation.one_host else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        """What `jax.device_count()` is on it."""
        return self.chips * self.generation.devices_per_chip

    @property
    def accelerator_type(self) -> str:
        """Name of the slice at the TPU VM service, "v5p-1024".

        Raises:
          InputError: that service has no such slice.
        """
        of, named = (
            self.generation,
            f"topology='{self.kind}:{self.shape}' with target='tpu-vm'",
        )
        if not of.vm_type:
            raise InputError(
                f"{named}: the TPU VM service does not serve {self.kind}; use --target gke"
            )
        if self.shape not in of.sizes:
            sizes = ", ".join(of.sizes)
            raise InputError(
                f"{named}: an accelerator type has one shape; use one of {sizes}, or --target gke"
            )
        return f"{of.vm_type}-{self.chips * of.units_per_chip}"


def parse_slice(topology: str) -> Slice:
    """Slice of "v5p:8x8x8".

    >>> parse_slice("v5p:8x8x8").hosts, parse_slice("v5e:2x4").chips_per_host, parse_slice("tpu7x:4x4x4").devices
    (128, 8, 128)

    Raises:
      InputError: no such slice can be rented.
    """
    kind, _, shape = topology.partition(":")
    if kind not in GENERATIONS or not (
        shape in GENERATIONS[kind].sizes or _is_larger(GENERATIONS[kind], shape)
    ):
        raise InputError(
            f"topology='{topology}' is not a slice that can be rented{suggest(topology, TOPOLOGIES)}"
        )
    return Slice(kind, shape)


def _is_larger(of: Generation, shape: str) -> bool:
    """Slices of three dimensions above 64 chips: any ascending multiples of 4."""
    parts = shape.split("x")
    if (
        of.sizes[-1].count("x") != 2
        or len(parts) != 3
        or not all(part.isdecimal() for part in parts)
    ):
        return False
    sides = [int(part) for part in parts]
    return (
        sides == sorted(sides)
        and all(side and side % 4 == 0 for side in sides)
        and math.prod(sides) <= of.most_chips
    )
