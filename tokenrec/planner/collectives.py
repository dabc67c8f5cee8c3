"""Collectives of a step, and the bytes that each moves."""

from __future__ import annotations

import dataclasses

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all" or
        "collective-permute".
      size: bytes on a device of the longer side: the result of an all-gather, the
        operand of the others.
      groups: positions in the flattened mesh that exchange; those of one slice where
        `slices` is above 1.
      trips: how often a step runs it.
      slices: above 1, the collective is between that many slices, device by device,
        over the data-centre network.
    """

    kind: str
    size: float
    groups: tuple[tuple[int, ...], ...]
    trips: int = 1
    slices: int = 1

    @property
    def moved(self) -> float:
        """Bytes into every device, all trips together, by `ring_bytes`."""
        group = self.slices if self.slices > 1 else len(self.groups[0])
        return self.trips * ring_bytes(self.kind, self.size, group)


def ring_bytes(kind: str, size: float, group: int) -> float:
    """Compute the bytes into every device of a group, by the ring algorithm.

    A group of g devices moves (g - 1) / g of the size, twice for an all-reduce, which
    is a reduce-scatter and an all-gather; a permutation moves it once.

    Args:
      kind: as `Collective.kind`.
      size: as `Collective.size`, bytes.
      group: g, number of devices.

    >>> ring_bytes("all-reduce", 800.0, 4)
    1200.0
    """
    if kind == "collective-permute":
        return float(size)
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) / group
