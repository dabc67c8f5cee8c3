"""BFTS, Bottom-Full-Top-Sliding: the window and the live positions of each layer.

TokenFormer's lower layers use full causal attention and its upper layers causal sliding
windows that shrink (arXiv 2604.13737, 2026; docs/methods.md section 3, "BFTS"). In a
sliding layer no event or target sees a static token (`model.discard_static`). Full
layers first mix the static fields into the events; the windows then keep the read-out
close to the newest events.

A position is *live* in a layer if it can still influence a read-out. Only live
positions are computed, which is exact and the reason for the speed of the windows
(docs/methods.md section 3, "Needed rows"). A stream of two user tokens, 12 fused events
and one target with windows 6 and 4 (2F2S), seen from the read-out downwards:

                        user  sep  events                                sep target
    position            0  1   2   3  4  5  6  7  8  9 10 11 12 13 14    15   16

    output              .  .   .   .  .  .  .  .  .  .  .  .  .  .  .     .    #    1
    layer 4, window 4   .  .   .   .  .  .  .  .  .  .  .  .  .  #  #     #    #    4
    layer 3, window 6   .  .   .   .  .  .  .  .  #  #  #  #  #  #  #     #    #    9
    layer 2, full       #  #   #   #  #  #  #  #  #  #  #  #  #  #  #     #    #   17
    layer 1, full       #  #   #   #  #  #  #  #  #  #  #  #  #  #  #     #    #   17

A line shows the live inputs (#) of its layer, and their number. Layer l computes keys
and values for these, and queries, gate and FFN for those of the line above. Below a
sliding layer of window w at most w - 1 more positions are live than above it; static
tokens (user, sep) leave after the last full layer.

Everything here is static NumPy. Letters: S stream length, P prefix length, w window.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from tokenrec.config import ModelConfig
from tokenrec.config.backbones import BACKBONES, is_decoder
from tokenrec.errors import InputError
from tokenrec.ops.attention.platform import current_platform
from tokenrec.tokens.layout import Layout, live_positions

# Lanes of a vector register of a TPU, and of its matrix unit.
LANES = 128
# Most layers after which the windows of a language model repeat.
MOST_PERIOD = 8
# A run of positions is filled up where that adds at most one in so many.
MOST_FILL = 8
_FILLS = contextvars.ContextVar("fill lanes", default=True)


def layer_windows(config: ModelConfig) -> tuple[int | None, ...]:
    """Window of each layer from the bottom, None for full attention.

    >>> layer_windows(ModelConfig(layers=4, windows=(32, 16)))
    (None, None, 32, 16)
    >>> layer_windows(ModelConfig(layers=4, windows=(32, 16, 0, 0)))
    (32, 16, None, None)
    """
    # A window of 0 is a full layer between sliding ones.
    full_layers = config.layers - len(config.windows)
    windows = (None,) * full_layers + tuple(window or None for window in config.windows)
    own = config.decoder.windows
    if not own:
        return windows
    # The windows of a language model, narrowed by BFTS on top of it.
    return tuple(
        min((w for w in pair if w), default=None)
        for pair in zip(windows, own, strict=True)
    )


def local_layers(config: ModelConfig) -> tuple[bool, ...]:
    """Which layers of a language model have a window of their own.

    These have rotary positions of another base (`model.decoder.local_rope_base`).
    """
    return tuple(bool(w) for w in config.decoder.windows) or (False,) * config.layers


class LayerStack(NamedTuple):
    """Consecutive layers in one entry of `TokenFormer.blocks`.

    Attributes:
      size: number of layers, whose weights are stacked if they are several.
      period: layers of one turn of their loop, after which windows repeat.
    """

    size: int
    period: int = 1


def layer_stacks(config: ModelConfig) -> tuple[LayerStack, ...]:
    """The entries of `TokenFormer.blocks`, from the bottom.

    From `model.scan` layers of one window in a row, their weights are stacked and a
    loop runs them. The top layer of such a run stays alone: a loop needs as many
    positions out as in, and the layers above may need fewer of this one. In a language
    model whose windows repeat after p layers, a turn of the loop has p layers, and the
    top p stay alone.

    >>> layer_stacks(ModelConfig(layers=10, windows=(32, 16), scan=8))[0]
    LayerStack(size=7, period=1)
    """
    alone = LayerStack(1)
    if "scan" not in BACKBONES[config.kind].reads:
        return (alone,) * config.layers
    # Only layers of one window can share a place in a loop body: windows are static.
    kinds = list(zip(layer_windows(config), local_layers(config), strict=True))
    longest_period = MOST_PERIOD if is_decoder(config) else 1
    stacks: list[LayerStack] = []
    first = 0
    while first < len(kinds):
        length, period = _longest_run(kinds[first:], longest_period, config.scan)
        if period:
            size = (length - period) // period * period
            stacks.append(LayerStack(size, period))
            stacks += [alone] * (length - size)
        else:
            length = 1
            stacks.append(alone)
        first += length
    return tuple(stacks)


def _longest_run(kinds: list[Any], longest_period: int, least: int) -> tuple[int, int]:
    """Find the longest run of layers from the bottom whose kinds repeat.

    Returns:
      Its length, at least `least` and two periods, and its period; the shorter period
      of equally long runs. `(0, 0)` without one.
    """
    best = 0, 0
    for period in range(1, longest_period + 1):
        length = next(
            (n for n in range(period, len(kinds)) if kinds[n] != kinds[n - period]),
            len(kinds),
        )
        if 0 < least <= length and length >= 2 * period and length > best[0]:
            best = length, period
    return best


def stack_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Number of layers in each entry of `TokenFormer.blocks`, from the bottom.

    >>> stack_sizes(ModelConfig(layers=14, windows=(32, 16), scan=8))
    (11, 1, 1, 1)
    """
    return tuple(stack.size for stack in layer_stacks(config))


def layer_positions(config: ModelConfig, layout: Layout) -> tuple[np.ndarray, ...]:
    """Positions at the input of each layer, and at the output of the last.

    Returns:
      `layers + 1` ascending arrays: the live positions, or all of them without
      `model.needed_rows`. On a TPU, runs of live positions go on to whole lanes.
    """
    if not config.needed_rows:
        return (np.arange(layout.length),) * (config.layers + 1)
    live = live_positions(layout, layer_windows(config))
    if current_platform() == "tpu" and _FILLS.get():
        return fill_lanes(live, layout.length)
    return live


@contextlib.contextmanager
def live_positions_alone() -> Iterator[None]:
    """Leave out dead positions within: the model's own work is counted without them."""
    token = _FILLS.set(False)
    try:
        yield
    finally:
        _FILLS.reset(token)


def fill_lanes(live: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, ...]:
    """Add positions until the runs of live ones are multiples of `LANES` long.

    A TPU lays tokens out in groups of 128 lanes, and its attention kernels take whole
    tiles of them: 2,047 live positions are copied into arrays of 2,048 before and after
    every kernel. One dead position more, which changes no read-out, costs less. A run
    stays as it is where the rest would be more than 1 / `MOST_FILL` of it, as a few
    read-outs are.

    Args:
      live: ascending arrays, each a part of the one before.
      length: S, positions of the stream.

    Returns:
      As many ascending arrays, each a part of the one before.
    """
    filled: list[np.ndarray] = []
    for positions in reversed(live):
        # What is computed above is needed here too.
        if filled:
            positions = np.union1d(positions, filled[0])
        count, first = len(positions), int(positions[0])
        whole = -(-count // LANES) * LANES
        is_run = int(positions[-1]) - first == count - 1
        if is_run and whole <= length and MOST_FILL * (whole - count) <= count:
            # On to later positions, and where the stream ends, to earlier ones.
            first = min(first, length - whole)
            positions = np.arange(first, first + whole)
        filled.insert(0, positions)
    return tuple(filled)


def part_multiple(count: int, parts: int) -> int:
    """Choose what a number of tokens is rounded up to, to be split over devices.

    Args:
      count: number of tokens.
      parts: devices along `mesh.context`.

    Returns:
      Two chunks of queries a part (`tokenrec.ops.attention.context_plan`); on a TPU
      whole lanes a part, where that adds at most one token in `MOST_FILL`.
    """
    lanes = LANES * parts
    if current_platform() == "tpu" and MOST_FILL * (-count % lanes) <= count:
        return lanes
    return 2 * parts


def is_split(count: int, length: int, parts: int) -> bool:
    """Whether so many positions of a stream are split over `mesh.context`.

    Positions that number no more than one part of the whole stream are not: every
    device computes them all, at no more than the cost of its part of a bottom layer,
    and nothing has to be exchanged.

    Args:
      count: number of positions.
      length: S, positions of the stream.
      parts: devices along `mesh.context`.
    """
    return parts > 1 and count > length // parts


def split_positions(
    positions: Sequence[np.ndarray], length: int, parts: int
) -> tuple[np.ndarray, ...]:
    """Add positions to those of a layer, where its tokens are split over devices.

    Args:
      positions: positions at the input of each layer, and at the output of the last,
        each a part of the one before.
      length: S, a multiple of `2 * parts`.
      parts: devices along `mesh.context`.

    Returns:
      As many ascending arrays, each a part of the one before.
    """
    rounded: list[np.ndarray] = []
    for needed in reversed(positions):
        # What is computed above is needed here too.
        if rounded:
            needed = np.union1d(needed, rounded[0])
        if is_split(len(needed), length, parts):
            others = np.setdiff1d(np.arange(length), needed)
            more = -len(needed) % part_multiple(len(needed), parts)
            if more > len(others):
                more = -len(needed) % (2 * parts)
            needed = np.union1d(needed, others[len(others) - more :])
        rounded.insert(0, needed)
    return tuple(rounded)


def prefix_length(layout: Layout) -> int:
    """P, the number of positions that belong to no candidate; they come first.

    Raises:
      InputError: a candidate does not continue the last position of the prefix, so that
        a prefix cache cannot serve it.
    """
    count = int(np.sum(layout.candidate < 0))
    # Compare indices, not positions: each candidate starts again behind the prefix.
    last = layout.index[:count].max(initial=-1)
    first = layout.index[count:].min(initial=layout.length)
    if first <= last:
        raise InputError(
            f"layout.index: a candidate begins at {first} and the prefix ends at "
            f"{last}; a prefix cache serves candidates that continue the whole prefix, "
            "so cut the prefix where they begin"
        )
    return count


def cached_positions(config: ModelConfig, layout: Layout) -> tuple[np.ndarray, ...]:
    """Prefix positions whose keys and values each layer caches.

    These are the positions that any token behind the prefix may see: all of them in a
    full layer, and the last w - 1 indices in a sliding layer, as the first token behind
    the prefix looks back furthest. They depend on the prefix alone, not on the number
    or length of the candidates.

    Returns:
      An ascending array for each layer. It always holds the last position of the
      prefix, even if that is hidden, so that no layer has an empty cache.
    """
    count = prefix_length(layout)
    if not config.needed_rows:
        return (np.arange(count),) * config.layers
    # Distance from the first token behind the prefix.
    distance = layout.index[:count].max() + 1 - layout.index[:count]
    static = layout.static[:count]
    visible_static = static & (not layout.discard)
    positions = []
    for window in layer_windows(config):
        if window is None:
            positions.append(np.arange(count))
        else:
            # Distance 1 is the last position, which stays even if it is hidden.
            in_window = ~static & (distance < window)
            positions.append(
                np.flatnonzero((distance == 1) | visible_static | in_window)
            )
    return tuple(positions)


def prefix_positions(config: ModelConfig, layout: Layout) -> tuple[np.ndarray, ...]:
    """Prefix positions at the input of each layer, and those that are read out.

    A prefix position is needed at the input of a layer if the layer caches its keys and
    values, or if a position that is needed above sees it.

    Returns:
      `layers + 1` ascending arrays; the last one holds the read-outs in the prefix.
    """
    prefix = np.arange(prefix_length(layout))
    read = np.sort(layout.readout[layout.readout < len(prefix)])
    if not config.needed_rows:
        return (prefix,) * config.layers + (read,)
    # As in `live_positions`, from the top down, plus what a layer caches.
    needed = [read]
    for window, cached in zip(
        reversed(layer_windows(config)),
        reversed(cached_positions(config, layout)),
        strict=True,
    ):
        pattern = layout.pattern(needed[0], prefix)
        seen = (pattern.visible(window) | pattern.diagonal()).any(axis=0)
        needed.insert(0, np.union1d(np.flatnonzero(seen), cached))
    return tuple(needed)
