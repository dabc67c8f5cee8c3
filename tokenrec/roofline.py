"""What a compiled program must cost on a TPU at least: our own arithmetic, for compile and benchmarks alike.

FLOPs and bytes of attention by formula, collectives read from HLO text, and figures of the chips make a `Roofline`:
three times, none of which a run can beat. Nothing here needs an accelerator.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tokenrec.errors import InputError, suggest
from tokenrec.ops.pattern import Pattern

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
    query, key = pattern.rows(pattern.query_rows, window), pattern.rows(pattern.key_rows, window)
    span = int(pattern.index.max(initial=0)) + 2
    # Indices in (low, high] are seen; negative ones would count as another candidate's.
    low = np.full(len(query.index), -1) if window is None else np.maximum(query.index - window, -1)
    total = 0
    for static in (False, True):
        seeing = query.static if static and window is not None else np.ones(len(query.index), bool)
        for own in (False, True):
            some = (key.static == static) & ((key.candidate >= 0) == own)
            place = np.sort(key.index[some] + (key.candidate[some] * span if own else 0))
            by = seeing & (query.candidate >= 0) if own else seeing
            start = query.candidate[by] * span if own else 0
            high = np.searchsorted(place, start + query.reach[by], side="right")
            total += int((high - np.searchsorted(place, start + low[by], side="right")).sum())
    return total


def visible_tiles(pattern: Pattern, window: int | None, block_q: int, block_k: int) -> int:
    """Tiles of `block_q x block_k` with a visible pair: what a kernel computes that skips the others.

    Holds `[block_q, K]` booleans.
    """
    starts = np.arange(0, len(pattern.key_rows), block_k)
    count = 0
    for first in range(0, len(pattern.query_rows), block_q):
        strip = dataclasses.replace(pattern, query_rows=pattern.query_rows[first : first + block_q])
        count += int(np.add.reduceat(strip.visible(window).any(axis=0), starts).astype(bool).sum())
    return count


def attention_flops(pairs: int, heads: int, head_dim: int, products: int) -> float:
    """FLOPs of so many products over `pairs` (query, key) pairs; softmax not counted."""
    return 2.0 * products * pairs * heads * head_dim


def attention_bytes(queries: int, keys: int, heads: int, head_dim: int, itemsize: int, *, backward: bool) -> float:
    """Least bytes to and from memory of one stream: every array once.

    Forward q, k, v, o and the float32 logsumexp; backward those, and the gradients of o, q, k and v.
    """
    rows = 4 * queries + 4 * keys if backward else 2 * queries + 2 * keys
    return float(heads * (rows * head_dim * itemsize + 4 * queries))


_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program.

    Attributes:
      kind: one of "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute".
      size: bytes on a device of the longer side: the result of an all-gather, the operand of the others.
      groups: places in the mesh, flattened, that exchange; of one slice where `slices` is above 1.
      trips: how often a step runs it.
      slices: above 1: between the slices, device by device, over the data-centre network.
    """

    kind: str
    size: float
    groups: tuple[tuple[int, ...], ...]
    trips: int = 1
    slices: int = 1

    @property
    def moved(self) -> float:
        """Bytes into every device, all trips, by the ring algorithm: (g - 1) / g of the size, twice for all-reduce."""
        return self.trips * ring_bytes(self.kind, self.size, self.slices if self.slices > 1 else len(self.groups[0]))


def ring_bytes(kind: str, size: float, group: int) -> float:
    """Bytes into every device of a group.

    >>> ring_bytes("all-reduce", 800.0, 4)
    1200.0
    """
    if kind == "collective-permute":
        return float(size)
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) / group


@dataclasses.dataclass(frozen=True)
class Program:
    """What HLO text tells: collectives, custom calls by name (times run), and trips of every loop (None: unknown)."""

    collectives: tuple[Collective, ...]
    custom_calls: dict[str, int]
    loops: tuple[int | None, ...]


def read_program(hlo: str, devices: int, slices: int = 1) -> Program:
    """Reads `compiled.as_text()` of a program for `devices` devices, all slices together.

    Loop bodies count as often as they run: by XLA's `known_trip_count`, or else (TPU text has none) by the bound that
    the condition compares the counter with. A loop of unknown length counts once.
    """
    computations, entry = _computations(hlo)
    collectives: list[Collective] = []
    calls: Counter[str] = Counter()
    loops: list[int | None] = []

    def walk(name: str, trips: int) -> None:
        lines = computations.get(name, [])
        starts = any('"AsyncCollectiveStart"' in rest for *_, rest in lines)
        for label, shape, opcode, rest in lines:
            if "chain_id=" in rest and not starts:
                continue  # an asynchronous one that started elsewhere: every fusion on its way repeats it
            if opcode == "custom-call":
                calls[_custom_name(label, rest)] += trips
            elif opcode == "send" and "_xla_megascale_transfer_type" in rest:
                collectives.append(_between_slices(shape, rest, trips, slices))
            elif opcode.removesuffix("-start") in _KINDS:
                # XLA writes some a reduce-scatter as an all-reduce with a slice, fused; the fusion's name tells.
                scatter = name.startswith("all-reduce-scatter")
                collectives.append(_collective(shape, opcode, rest, trips, devices // slices, scatter=scatter))
            inner = trips
            if opcode == "while":
                count = _trip_count(rest, computations)
                loops.append(count)
                inner *= count or 1
            branches = re.search(r"branch_computations=\{([^}]*)\}", rest)
            called = _CALLED.findall(rest) + (re.findall(r"[\w.-]+", branches[1]) if branches else [])
            for other in called:
                walk(other, inner)

    walk(entry, 1)
    return Program(tuple(collectives), dict(sorted(calls.items())), tuple(loops))


_Instructions = list[tuple[str, str, str, str]]  # name, shape, opcode, what follows its parenthesis


def _computations(hlo: str) -> tuple[dict[str, _Instructions], str]:
    found: dict[str, _Instructions] = {}
    entry = name = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name and (instruction := _INSTRUCTION.match(line)):
            found[name].append((instruction[1], instruction[2], instruction[3], instruction[4]))
    if not entry:
        raise InputError("the text is not HLO: it has no ENTRY computation; pass what compiled.as_text() returns")
    return found, entry


def _custom_name(label: str, rest: str) -> str:
    """The target, or of a Pallas kernel, whose target is one for all, the name that it gave its instruction."""
    found = re.search(r'custom_call_target="([^"]*)"', rest)
    target = found[1] if found else "unnamed"
    return re.sub(r"(\.\d+|\.clone)+$", "", label) if target == "tpu_custom_call" else target


def _trip_count(rest: str, computations: dict[str, _Instructions]) -> int | None:
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.-]+)", rest)
    lines = computations.get(condition[1], []) if condition else []
    bounds = [
        int(value[1]) for *_, opcode, text in lines if opcode == "constant" and (value := re.match(r"(\d+)\)", text))
    ]
    compares = [text for *_, opcode, text in lines if opcode == "compare"]
    if len(bounds) == len(compares) == 1 and "direction=LT" in compares[0]:
        return bounds[0]  # JAX counts its loops from 0
    return None


def _parts(shape: str) -> list[float]:
    """Bytes of the arrays of a shape."""
    sizes = []
    for kind, dims in _SHAPE.findall(shape):
        bits = _ITEM_BITS[kind] if kind in _ITEM_BITS else int(re.findall(r"\d+", kind)[0])
        sizes.append(bits / 8 * math.prod(int(n) for n in dims.split(",") if n))
    return sizes


def _collective(shape: str, opcode: str, rest: str, trips: int, devices: int, *, scatter: bool) -> Collective:
    kind = opcode.removesuffix("-start")
    groups = _pairs(rest) if kind == "collective-permute" else _groups(rest, devices)
    parts = _parts(shape)
    size, group = sum(parts), len(groups[0])
    if opcode == "all-gather-start":  # operand and result, and the operand is 1 / g of the result
        size *= group / (group + 1)
    elif opcode == "collective-permute-start":  # operand, result and two counters
        size = parts[0]
    if kind == "reduce-scatter":
        size *= group
    return Collective("reduce-scatter" if scatter else kind, size, groups, trips)


def _between_slices(shape: str, rest: str, trips: int, slices: int) -> Collective:
    """The compiler splits a collective over several slices into parts inside each and a transfer between them."""
    found = re.search(r'_xla_megascale_transfer_type="([A-Z_]+)"', rest)
    kind = found[1].lower().replace("_", "-") if found else ""
    size = _parts(shape)[0] * (slices if kind == "all-gather" else 1)
    return Collective(kind if kind in _KINDS else "collective-permute", size, ((0,),), trips, slices)


def _groups(rest: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """The three forms of `replica_groups`: lists, an iota with a transpose, and axes of a mesh."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{((?:'\w+',?)+)\}", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        grouped = re.findall(r"'(\w+)'", mesh[2])
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        order = [name for name in sizes if name not in grouped] + grouped
        ids = places.transpose([list(sizes).index(name) for name in order])
        return _tuples(ids.reshape(-1, math.prod(sizes[name] for name in grouped)))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, source = ([int(n) for n in iota[i].split(",")] for i in (1, 2))
        axes = [int(n) for n in iota[3].split(",")] if iota[3] else None
        return _tuples(np.arange(math.prod(source)).reshape(source).transpose(axes).reshape(shape))
    listed = re.search(r"replica_groups=\{((?:\{[\d,]*\},?)+)\}", rest)
    if listed:
        return tuple(tuple(int(n) for n in one.split(",")) for one in re.findall(r"\{([\d,]+)\}", listed[1]))
    if "replica_groups=" in rest and "replica_groups={}" not in rest:
        raise InputError(f"replica groups in a form that is not known: {rest.partition('replica_groups=')[2][:80]}")
    return (tuple(range(devices)),)


def _pairs(rest: str) -> tuple[tuple[int, ...], ...]:
    return tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", rest.partition("source_target_pairs=")[2]))


def _tuples(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(n) for n in group) for group in ids)


def network_seconds(collectives: Sequence[Collective], devices: Sequence[Any], of: Chip) -> float:
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
        seconds.append(ici / (of.ici_link * _links(local, inside, of)) + dcn / of.dcn_bandwidth)
    return one.trips * max(seconds)


def _slice(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def _links(group: Sequence[Any], devices: Sequence[Any], of: Chip) -> int:
    """Links into a corner of the group: an axis that it fills gives two if it is a ring; an axis it spans, one."""
    places, every = (np.array([getattr(d, "coords", None) or (0,) for d in some]) for some in (group, devices))
    links = 0
    for axis in range(places.shape[1]):
        length, full = len(np.unique(places[:, axis])), len(np.unique(every[:, axis]))
        links += 0 if length == 1 else 2 if length == full and full % of.ring == 0 else 1
    return max(links, 1)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at least in each resource of a device."""

    compute_seconds: float
    memory_seconds: float
    network_seconds: float

    def _named(self) -> Iterator[tuple[float, str]]:
        yield from ((getattr(self, f"{name}_seconds"), name) for name in ("compute", "memory", "network"))

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
