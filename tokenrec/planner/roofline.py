"""What a compiled program must cost on a TPU at least: our own arithmetic, for compile and benchmarks alike.

FLOPs and bytes of attention by formula, collectives from `hlo.py`, and figures of the chips make a `Roofline`:
three times, none of which a run can beat. Nothing here needs an accelerator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tokenrec.errors import InputError, suggest
from tokenrec.ops.attention.pattern import Pattern
from tokenrec.planner.hlo import Collective, ring_bytes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX calls a device: a whole chip, but half a chip of TPU7x, which shows its two cores as two devices.

    Attributes:
      flops: peak a second in bfloat16. Of float32 too: by default a TPU rounds float32 operands of a product to
        bfloat16 and multiplies once.
      hbm_bytes: memory that a program may use.
      hbm_bandwidth: bytes a second.
      ici_link: bytes a second of one link to a neighbour, one way.
      axes: dimensions of the torus of links.
      ring: an axis whose length is a multiple of this is closed to a ring; others are lines.
      dcn_bandwidth: bytes a second of the data-centre network, one way, this device's share of its host.
    """

    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_link: float
    axes: int
    ring: int
    dcn_bandwidth: float


# Peak, memory bandwidth, links and data-centre network: the tables of docs.cloud.google.com/tpu/docs/{v5e, v5p, v6e,
# tpu7x}. They give the links of a chip together and both ways: divided by 2 directions and by 4 or 6 links. For v5e
# they give 2 x 100 Gbit/s per host of 8 chips. Where axes close to rings: jax-ml.github.io/scaling-book/tpus.
# Usable memory: what libtpu 0.0.50 says is available when it refuses a program.
CHIPS = {
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 819e9, 50e9, 2, 16, 25e9 / 8),
    "TPU v5": Chip(459e12, 95.73 * GIB, 2765e9, 100e9, 3, 4, 50e9 / 8),
    "TPU v6 lite": Chip(918e12, 31.24 * GIB, 1638e9, 100e9, 2, 16, 100e9 / 8),
    "TPU7x": Chip(2307e12 / 2, 94.74 * GIB, 7380e9 / 2, 100e9 / 2, 3, 4, 100e9 / 8 / 2),
}
_ALSO = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def chip(device_kind: str) -> Chip:
    """Figures of `jax.Device.device_kind`.

    Raises:
      InputError: no figures for it.
    """
    kind = _ALSO.get(device_kind, device_kind)
    if kind not in CHIPS:
        raise InputError(
            f"device_kind='{device_kind}': its peak and bandwidths are not in tokenrec.roofline.CHIPS"
            f"{suggest(device_kind, CHIPS)}"
        )
    return CHIPS[kind]


# Products of [Q, h] x [h, K] size. A kernel that keeps no Q x K matrix makes the logits again in its backward pass;
# model FLOPs, what MFU counts, leave that one out.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS, MODEL_BACKWARD_PRODUCTS = 2, 5, 4


def visible_pairs(pattern: Pattern, window: int | None) -> int:
    """Sum of `pattern.visible(window)`, in O((Q + K) log K) time and O(Q + K) memory."""
    query, key = (
        pattern.attributes(pattern.query_positions, window),
        pattern.attributes(pattern.key_positions, window),
    )
    span = int(pattern.index.max(initial=0)) + 2
    # Indices in (low, high] are seen; negative ones would count as another candidate's.
    low = (
        np.full(len(query.index), -1)
        if window is None
        else np.maximum(query.index - window, -1)
    )
    total = 0
    for static in (False, True):
        kept = static and pattern.keeps_static(window)
        seeing = (
            query.static
            if static and window is not None and not kept
            else np.ones(len(query.index), bool)
        )
        least = np.full_like(low, -1) if kept else low
        for own in (False, True):
            some = (key.static == static) & ((key.candidate >= 0) == own)
            place = np.sort(
                key.index[some] + (key.candidate[some] * span if own else 0)
            )
            by = seeing & (query.candidate >= 0) if own else seeing
            start = query.candidate[by] * span if own else 0
            last = (query.index if own else query.reach)[by]
            high = np.searchsorted(place, start + last, side="right")
            total += int(
                (
                    high
                    - np.searchsorted(
                        place, start + np.minimum(least[by], last), side="right"
                    )
                ).sum()
            )
    return total


def visible_tiles(
    pattern: Pattern, window: int | None, block_q: int, block_k: int
) -> int:
    """Tiles of `block_q x block_k` with a visible pair: what a kernel computes that skips the others.

    Holds `[block_q, K]` booleans.
    """
    starts = np.arange(0, len(pattern.key_positions), block_k)
    count = 0
    for first in range(0, len(pattern.query_positions), block_q):
        strip = dataclasses.replace(
            pattern, query_positions=pattern.query_positions[first : first + block_q]
        )
        count += int(
            np.add.reduceat(strip.visible(window).any(axis=0), starts)
            .astype(bool)
            .sum()
        )
    return count


def attention_flops(pairs: int, heads: int, head_dim: int, products: int) -> float:
    """FLOPs of so many products over `pairs` (query, key) pairs; softmax not counted."""
    return 2.0 * products * pairs * heads * head_dim


def attention_bytes(
    queries: int, keys: int, heads: int, head_dim: int, itemsize: int, *, backward: bool
) -> float:
    """Least bytes to and from memory of one stream: every array once.

    Forward q, k, v, o and the float32 logsumexp; backward those, and the gradients of o, q, k and v.
    """
    rows = 4 * queries + 4 * keys if backward else 2 * queries + 2 * keys
    return float(heads * (rows * head_dim * itemsize + 4 * queries))


def network_seconds(
    collectives: Sequence[Collective], devices: Sequence[Any], of: Chip
) -> float:
    """Time of all collectives, one after another, at full use of the links that lead into the busiest device.

    Hops and contention are not counted, so that it is a lower bound.

    Args:
      devices: in the mesh's order; their `coords` and `slice_index` say where they lie. Devices without coordinates
        count as one line.
    """
    return sum(_collective_seconds(one, devices, of) for one in collectives)


def _collective_seconds(one: Collective, devices: Sequence[Any], of: Chip) -> float:
    if one.slices > 1:
        return one.moved / of.dcn_bandwidth
    inside = [device for device in devices if _slice(device) == _slice(devices[0])]
    seconds = []
    for group in one.groups:
        members = [devices[n] for n in group]
        slices = len({_slice(device) for device in members})
        local = [device for device in members if _slice(device) == _slice(members[0])]
        # Inside its slice a device handles the whole, between slices its part of it.
        ici = ring_bytes(one.kind, one.size, len(local)) if len(local) > 1 else 0.0
        dcn = ring_bytes(one.kind, one.size / len(local), slices) if slices > 1 else 0.0
        seconds.append(
            ici / (of.ici_link * _links(local, inside, of)) + dcn / of.dcn_bandwidth
        )
    return one.trips * max(seconds)


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def _links(group: Sequence[Any], devices: Sequence[Any], of: Chip) -> int:
    """Links into a corner of the group: an axis that it fills gives two if it is a ring; an axis it spans, one."""
    places, every = (
        np.array([getattr(d, "coords", None) or (0,) for d in some])
        for some in (group, devices)
    )
    links = 0
    for axis in range(places.shape[1]):
        length, full = len(np.unique(places[:, axis])), len(np.unique(every[:, axis]))
        links += (
            0 if length == 1 else 2 if length == full and full % of.ring == 0 else 1
        )
    return max(links, 1)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least in each resource of a device."""

    compute_seconds: float
    memory_seconds: float
    network_seconds: float

    def _named(self) -> Iterator[tuple[float, str]]:
        yield from (
            (getattr(self, f"{name}_seconds"), name)
            for name in ("compute", "memory", "network")
        )

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
        """ "compute", "memory" or "network": what sets the bound."""
        return max(self._named())[1]

    def mfu_bound(self, model_flops: float, of: Chip) -> float:
        """Highest share of the peak that a device can reach with `model_flops` of its own."""
        return model_flops / (of.flops * self.bound)
