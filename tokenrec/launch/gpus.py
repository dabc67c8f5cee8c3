"""Describe GPU nodes: equal machines, joined by a network, with one process each.

The labels are those of docs.cloud.google.com/kubernetes-engine/docs/concepts/gpus.
"""

from __future__ import annotations

import dataclasses
import re

from tokenrec.errors import InputError, suggest


@dataclasses.dataclass(frozen=True)
class GpuKind:
    """A kind of GPU.

    Attributes:
      label: value of the node label `cloud.google.com/gke-accelerator`.
      per_node: numbers of GPUs that a machine may have.
      gke_per_node: those that a machine type of Google Cloud has.
    """

    label: str
    per_node: tuple[int, ...] = (1, 2, 4, 8)
    gke_per_node: tuple[int, ...] = (8,)


GPUS = {
    "a100": GpuKind("nvidia-tesla-a100", (1, 2, 4, 8, 16), (1, 2, 4, 8, 16)),
    "a100-80gb": GpuKind("nvidia-a100-80gb", gke_per_node=(1, 2, 4, 8)),
    "h100": GpuKind("nvidia-h100-80gb", gke_per_node=(1, 2, 4, 8)),
    "h100-mega": GpuKind("nvidia-h100-mega-80gb"),
    "h200": GpuKind("nvidia-h200-141gb"),
    "b200": GpuKind("nvidia-b200"),
}


@dataclasses.dataclass(frozen=True)
class GpuNodes:
    """Equal GPU nodes.

    JAX takes all GPUs of a node in one process, as it takes all chips of a TPU host.

    Attributes:
      kind: kind of GPU, a key of `GPUS`.
      nodes: number of nodes, which is the number of processes.
      per_node: GPUs of each node.
    """

    kind: str
    nodes: int
    per_node: int

    # Platform of JAX, and the name of the JobSet's job.
    platform = "cuda"
    role = "node"

    @property
    def hosts(self) -> int:
        """Number of hosts, which is the number of processes."""
        return self.nodes

    @property
    def devices(self) -> int:
        """Number of JAX devices."""
        return self.nodes * self.per_node

    @property
    def topology(self) -> str:
        """Its name, such as "h100:2x8"."""
        return f"{self.kind}:{self.nodes}x{self.per_node}"

    @property
    def gke_label(self) -> str:
        """Value of the node label of GKE.

        Raises:
          InputError: Google Cloud has no machine with so many GPUs.
        """
        kind = GPUS[self.kind]
        if self.per_node not in kind.gke_per_node:
            raise InputError(
                f"topology='{self.topology}' with target='gke': no machine of Google "
                f"Cloud has {self.per_node} {self.kind}; use "
                f"{_either(kind.gke_per_node)} GPUs a node"
            )
        return kind.label


def parse_gpus(topology: str) -> GpuNodes:
    """Parse a topology such as "h100:2x8": two nodes of eight GPUs.

    >>> parse_gpus("h100:2x8").devices
    16

    Raises:
      InputError: it is not KIND:NODESxGPUS.
    """
    kind, _, shape = topology.partition(":")
    if kind not in GPUS:
        raise InputError(
            f"topology='{topology}' does not begin with a kind of GPU"
            f"{suggest(kind, GPUS)}"
        )
    match = re.fullmatch(r"([1-9]\d{0,3})x(\d{1,2})", shape)
    per_node = GPUS[kind].per_node
    if match is None or int(match[2]) not in per_node:
        raise InputError(
            f"topology='{topology}' is not {kind}:NODESxGPUS, such as {kind}:2x8: two "
            f"nodes of eight GPUs; a node has {_either(per_node)} GPUs"
        )
    return GpuNodes(kind, int(match[1]), int(match[2]))


def _either(numbers: tuple[int, ...]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
