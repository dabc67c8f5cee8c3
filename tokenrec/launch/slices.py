"""Describe TPU slices: chips, hosts, and their names in GKE and the TPU VM service.

A *slice* is chips that are connected by their own links. A *host* is a machine with
some of these chips, and runs one process. Several slices train together over the
network of the data center.

The figures are those of docs.cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
and of docs.cloud.google.com/tpu/docs/{v5e, v5p, v6e, tpu7x}.
"""

from __future__ import annotations

import dataclasses
import math

from tokenrec.errors import InputError, suggest

# Shapes with a name: two-dimensional (v5e, v6e) and three-dimensional (v5p, tpu7x).
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
    """A generation of TPUs.

    Attributes:
      label: value of the node label `cloud.google.com/gke-tpu-accelerator`.
      sizes: shapes with a name; of shapes with equally many chips, the one that an
        accelerator type stands for.
      most_chips: chips of the largest slice.
      one_host: chips of the largest slice with one host; larger slices have four chips
        a host.
      devices_per_chip: devices that JAX shows per chip.
      vm_type: prefix of an accelerator type such as "v5p-1024"; empty where the TPU VM
        service has none.
      units_per_chip: what the number in an accelerator type counts, per chip.
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
        most_chips=256,
        one_host=8,
        vm_type="v5litepod",
        runtime="v2-alpha-tpuv5-lite",
    ),
    "v6e": Generation(
        "tpu-v6e-slice",
        _FLAT,
        most_chips=256,
        one_host=8,
        vm_type="v6e",
        runtime="v2-alpha-tpuv6e",
    ),
    "v5p": Generation(
        "tpu-v5p-slice",
        _DEEP,
        most_chips=6144,
        one_host=4,
        vm_type="v5p",
        # The type counts cores, of which a chip has two.
        units_per_chip=2,
        runtime="v2-alpha-tpuv5",
    ),
    "tpu7x": Generation(
        "tpu7x",
        ("1x1x1", *_DEEP),
        most_chips=9216,
        one_host=4,
        devices_per_chip=2,
    ),
}
TOPOLOGIES = tuple(
    f"{name}:{size}"
    for name, generation in GENERATIONS.items()
    for size in generation.sizes
)


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice.

    Attributes:
      kind: generation, a key of `GENERATIONS`.
      shape: chips per dimension, such as "8x8x8".
    """

    kind: str
    shape: str

    # Platform of JAX, and the name of the JobSet's jobs.
    platform = "tpu"
    role = "slice"

    @property
    def topology(self) -> str:
        """Its name, such as "v5p:8x8x8"."""
        return f"{self.kind}:{self.shape}"

    @property
    def generation(self) -> Generation:
        """The generation of its chips."""
        return GENERATIONS[self.kind]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(map(int, self.shape.split("x")))

    @property
    def chips_per_host(self) -> int:
        """Number of chips of each host."""
        return self.chips if self.chips <= self.generation.one_host else 4

    @property
    def hosts(self) -> int:
        """Number of hosts, which is the number of processes."""
        return self.chips // self.chips_per_host

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.chips * self.generation.devices_per_chip

    @property
    def accelerator_type(self) -> str:
        """Name of the slice in the TPU VM service, such as "v5p-1024".

        Raises:
          InputError: that service has no such slice.
        """
        generation = self.generation
        where = f"topology='{self.topology}' with target='tpu-vm'"
        if not generation.vm_type:
            raise InputError(
                f"{where}: the TPU VM service does not serve {self.kind}; use --target "
                "gke"
            )
        if self.shape not in generation.sizes:
            sizes = ", ".join(generation.sizes)
            raise InputError(
                f"{where}: an accelerator type has one shape; use one of {sizes}, or "
                "--target gke"
            )
        return f"{generation.vm_type}-{self.chips * generation.units_per_chip}"


def parse_slice(topology: str) -> Slice:
    """Parse a topology such as "v5p:8x8x8".

    >>> parse_slice("v5p:8x8x8").hosts, parse_slice("v5e:2x4").chips_per_host
    (128, 8)

    Raises:
      InputError: Google Cloud offers no such slice.
    """
    kind, _, shape = topology.partition(":")
    if kind not in GENERATIONS or not (
        shape in GENERATIONS[kind].sizes or _is_larger(GENERATIONS[kind], shape)
    ):
        raise InputError(
            f"topology='{topology}' is not a slice that Google Cloud offers"
            f"{suggest(topology, TOPOLOGIES)}"
        )
    return Slice(kind, shape)


def _is_larger(generation: Generation, shape: str) -> bool:
    """Whether a shape is a large one without a name.

    Above 64 chips, three-dimensional slices may have any ascending multiples of 4.
    """
    parts = shape.split("x")
    if (
        generation.sizes[-1].count("x") != 2
        or len(parts) != 3
        or not all(part.isdecimal() for part in parts)
    ):
        return False
    sides = [int(part) for part in parts]
    return (
        sides == sorted(sides)
        and all(side and side % 4 == 0 for side in sides)
        and math.prod(sides) <= generation.most_chips
    )
