"""The stack of blocks: full layers below, shrinking windows above (BFTS), only the rows that a read-out can see.

A stream is `[prefix | candidates]`. Rows of the prefix see no candidate, so what they show to the candidates is
computed once (`prefill`) and any number of candidates is scored against it (`extend`); methods.md section 2, "Prompt".
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.config.backbones import BACKBONES
from tokenrec.errors import InputError
from tokenrec.models.backbones.additive_positions import AdditivePositions
from tokenrec.models.backbones.block import Block, KeysValues, Stream
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.models.backbones.stacking import apply_remat, stack_blocks, unstack_blocks
from tokenrec.ops.attention.rotary import rotation
from tokenrec.ops.layers import RMSNorm, split_key
from tokenrec.tokens.layout import Layout, live_positions, select_positions


def layer_windows(config: ModelConfig) -> tuple[int | None, ...]:
    """Window of every layer, None for a full one.

    >>> layer_windows(ModelConfig(layers=4, windows=(32, 16)))
    (None, None, 32, 16)
    >>> layer_windows(ModelConfig(layers=4, windows=(32, 16, 0, 0)))
    (32, 16, None, None)
    """
    return (None,) * (config.layers - len(config.windows)) + tuple(
        window or None for window in config.windows
    )


def stack_sizes(config: ModelConfig) -> tuple[int, ...]:
    """Layers in each entry of `TokenFormer.blocks`; above 1, their weights are stacked and a loop runs them.

    The top layer of a run of equal windows stands alone: the layers above may need fewer rows of it, and a loop needs
    as many rows out as in.

    >>> stack_sizes(ModelConfig(layers=14, windows=(32, 16), scan=8))
    (11, 1, 1, 1)
    """
    if "scan" not in BACKBONES[config.kind].reads:
        return (1,) * config.layers
    runs = [len(list(run)) for _, run in groupby(layer_windows(config))]
    sizes = [(run - 1, 1) if 0 < config.scan <= run else (1,) * run for run in runs]
    return tuple(size for run in sizes for size in run)


def layer_positions(config: ModelConfig, layout: Layout) -> tuple[np.ndarray, ...]:
    """Rows at the input of each layer and at the output of the last."""
    if config.needed_rows:
        return live_positions(layout, layer_windows(config))
    return (np.arange(layout.rows),) * (config.layers + 1)


def prefix_length(layout: Layout) -> int:
    """P: the first rows, which belong to no candidate.

    Raises:
      InputError: a candidate continues a row other than the last of them.
    """
    count = int(np.sum(layout.candidate < 0))
    last, first = (
        layout.index[:count].max(initial=-1),
        layout.index[count:].min(initial=layout.rows),
    )
    if first <= last:
        raise InputError(
            f"layout.index: a candidate begins at {first} and the prefix ends at {last}; a prefix cache serves "
            "candidates that continue the whole prefix, so cut the prefix where they begin"
        )
    return count


def cached_positions(config: ModelConfig, layout: Layout) -> tuple[np.ndarray, ...]:
    """Prefix rows whose keys and values each layer keeps: those that any row behind the prefix may see.

    A function of the prefix alone, however many candidates and rows follow: the first row behind it reaches back
    furthest, over w - 1 indices in a sliding layer of window w, and over everything in a full one. The last row of the
    prefix is always among them, even if hidden, so that no layer has an empty array.
    """
    count = prefix_length(layout)
    if not config.needed_rows:
        return (np.arange(count),) * config.layers
    back = layout.index[:count].max() + 1 - layout.index[:count]
    static = layout.static[:count]
    kept = static & (not layout.discard)
    return tuple(
        np.arange(count)
        if window is None
        else np.flatnonzero((back == 1) | kept | (~static & (back < window)))
        for window in layer_windows(config)
    )


def prefix_positions(config: ModelConfig, layout: Layout) -> tuple[np.ndarray, ...]:
    """Prefix rows at the input of each layer, then those read: what is shown, what is needed above, what they see."""
    every = np.arange(prefix_length(layout))
    read = np.sort(layout.readout[layout.readout < len(every)])
    if not config.needed_rows:
        return (every,) * config.layers + (read,)
    needed = [read]
    for window, shown in zip(
        reversed(layer_windows(config)),
        reversed(cached_positions(config, layout)),
        strict=True,
    ):
        pattern = layout.pattern(needed[0], every)
        seen = np.flatnonzero(
            (pattern.visible(window) | pattern.diagonal()).any(axis=0)
        )
        needed.insert(0, np.union1d(seen, shown))
    return tuple(needed)


class PrefixCache(NamedTuple):
    """What the prefix of a request shows to the rows behind it, by layer: the rows of `cached_positions`."""

    layers: tuple[KeysValues, ...]


class TokenFormer(Backbone):
    """`[B, S, d]` tokens -> `[B, R, d]` normalised read-outs.

    Args:
      longest: the longest stream that it will read, which additive positions need to know.
    """

    def __init__(
        self, config: ModelConfig, longest: Layout | None = None, *, rngs: nnx.Rngs
    ):
        self.config = config
        additive = config.positions == "additive"
        if additive and longest is None:
            raise InputError(
                "longest=None: additive positions are those of the longest stream; pass its layout"
            )
        self.places = (
            AdditivePositions(config.width, longest, rngs=rngs)
            if additive and longest is not None
            else None
        )
        windows, blocks = iter(layer_windows(config)), []
        for size in stack_sizes(config):
            layers = [Block(config, next(windows), rngs=rngs) for _ in range(size)]
            blocks.append(stack_blocks(layers) if size > 1 else layers[0])
        self.blocks = nnx.List(blocks)
        self.norm = RMSNorm(config.width)

    def layers(self) -> list[Block]:
        """The blocks one by one, from the bottom."""
        entries = zip(self.blocks, stack_sizes(self.config), strict=True)
        return [
            layer
            for block, size in entries
            for layer in (unstack_blocks(block, size) if size > 1 else [block])
        ]

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """From the bottom."""
        rows = layer_positions(self.config, layout)
        return tuple(
            AttentionLayer(layout.pattern(queries, keys), window)
            for keys, queries, window in zip(
                rows, rows[1:], layer_windows(self.config), strict=False
            )
        )

    def __call__(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
    ) -> jax.Array:
        """`events: [B, T] bool`, `candidates: [B, C] bool` or None: which are real; `key` of dropout."""
        every = np.arange(layout.rows)
        x, stream = self.start(x, layout, every, events, candidates)
        rows = layer_positions(self.config, layout)
        x = select_positions(x, rows[0], every)
        keys = split_key(key, self.config.layers)
        first = 0
        for block, size in zip(self.blocks, stack_sizes(self.config), strict=True):
            of_layers, of_keys = (
                rows[first : first + size + 1],
                keys[first : first + size],
            )
            if size > 1 and all(len(some) == len(of_layers[0]) for some in of_layers):
                x = self._loop(block, x, of_layers[0], stream, of_keys)
            else:
                layers = unstack_blocks(block, size) if size > 1 else [block]
                for layer, inputs, outputs, one in zip(
                    layers, of_layers, of_layers[1:], of_keys, strict=False
                ):
                    compute = functools.partial(
                        layer, queries=outputs, keys=inputs, stream=stream, key=one
                    )
                    x = apply_remat(compute, self.config.remat)(x)
            first += size
        return self.norm(select_positions(x, layout.readout, rows[-1]))

    def layer_outputs(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
    ) -> list[jax.Array]:
        """What comes out of each layer of `__call__`, `[B, rows needed of it, d]`, and last what it returns."""
        every = np.arange(layout.rows)
        x, stream = self.start(x, layout, every, events, candidates)
        rows, keys = (
            layer_positions(self.config, layout),
            split_key(key, self.config.layers),
        )
        x, made = select_positions(x, rows[0], every), []
        for layer, inputs, outputs, one in zip(
            self.layers(), rows, rows[1:], keys, strict=False
        ):
            x = layer(x, outputs, inputs, stream, one)
            made.append(x)
        return [*made, self.norm(select_positions(x, layout.readout, rows[-1]))]

    def _loop(
        self,
        block: Block,
        x: jax.Array,
        rows: np.ndarray,
        stream: Stream,
        keys: Sequence[jax.Array | None],
    ) -> jax.Array:
        """Layers with stacked weights, all over the same rows: one body in the program, however many there are."""
        graph, weights = nnx.split(block)

        def layer(x: jax.Array, weights: nnx.State, key: jax.Array | None) -> jax.Array:
            return nnx.merge(graph, weights)(x, rows, rows, stream, key)

        compute = apply_remat(layer, self.config.remat, loop=True)
        each = (
            None
            if keys[0] is None
            else jnp.stack([key for key in keys if key is not None])
        )
        return jax.lax.scan(
            lambda x, of_layer: (compute(x, *of_layer), None), x, (weights, each)
        )[0]

    def prefill(
        self, x: jax.Array, layout: Layout, events: jax.Array
    ) -> tuple[PrefixCache, jax.Array]:
        """What the prefix shows to any candidates, and its own read-outs.

        Args:
          x: `[B, P, d]`, the rows of `layout` that belong to no candidate.
          layout: of a stream with this prefix; its candidates do not matter.
          events: `[B, T] bool`, real events.

        Returns:
          The cache, and `[B, R_p, d]`, the R_p read-outs that lie in the prefix (often none).

        Raises:
          InputError: `x` has another number of rows.
        """
        every = np.arange(prefix_length(layout))
        if x.shape[1] != len(every):
            raise InputError(
                f"x {x.shape}: the prefix of the layout has {len(every)} rows; pass those alone"
            )
        x, stream = self.start(x, layout, every, events, None)
        rows, shown = (
            prefix_positions(self.config, layout),
            cached_positions(self.config, layout),
        )
        x = select_positions(x, rows[0], every)
        layers = []
        for block, inputs, outputs, kept in zip(
            self.layers(), rows, rows[1:], shown, strict=False
        ):
            x, made = block.forward_with_kv(x, outputs, inputs, stream)
            layers.append(
                KeysValues(*(select_positions(part, kept, inputs) for part in made))
            )
        readout = layout.readout[layout.readout < len(every)]
        return PrefixCache(tuple(layers)), self.norm(
            select_positions(x, readout, rows[-1])
        )

    def extend(
        self,
        cache: PrefixCache,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array,
    ) -> jax.Array:
        """Read-outs of candidates whose prefix is cached: what `__call__` returns for the whole stream.

        Number and length of the candidates may differ from those of the layout that was prefilled.

        Args:
          cache: of `prefill`, for a layout with the same prefix.
          x: `[B, S - P, d]`, the rows of the candidates.
          layout: of the whole stream, S rows.
          events: `[B, T] bool` and candidates: `[B, C] bool`, which are real.

        Returns:
          `[B, R, d]`, the read-outs that lie behind the prefix.

        Raises:
          InputError: `x` or the cache has another number of rows.
        """
        count = prefix_length(layout)
        behind = np.arange(count, layout.rows)
        if x.shape[1] != len(behind):
            raise InputError(
                f"x {x.shape}: {len(behind)} rows of the layout lie behind its prefix; pass those alone"
            )
        shown = cached_positions(self.config, layout)
        held, expected = (
            [past.keys.shape[1] for past in cache.layers],
            [len(kept) for kept in shown],
        )
        if held != expected:
            raise InputError(
                f"cache holds {held} rows by layer and the prefix shows {expected}; prefill it again"
            )
        x, stream = self.start(x, layout, behind, events, candidates)
        rows = [
            needed[np.searchsorted(needed, count) :]
            for needed in layer_positions(self.config, layout)
        ]
        x = select_positions(x, rows[0], behind)
        for block, inputs, outputs, past, past_rows in zip(
            self.layers(), rows, rows[1:], cache.layers, shown, strict=False
        ):
            x, _ = block.forward_with_kv(
                x, outputs, np.concatenate([past_rows, inputs]), stream, past=past
            )
        return self.norm(
            select_positions(x, layout.readout[layout.readout >= count], rows[-1])
        )

    def start(
        self,
        x: jax.Array,
        layout: Layout,
        rows: np.ndarray,
        events: jax.Array,
        candidates: jax.Array | None,
    ) -> tuple[jax.Array, Stream]:
        """What goes into the first layer, `[B, rows, d]`, and what all layers share.

        Args:
          x: `[B, rows, d]`, tokens of some rows of the layout; events, candidates: as in `__call__`.
        """
        positions = select_positions(
            layout.positions(events), rows, np.arange(layout.rows)
        )
        if self.places is not None:
            x = x + self.places(positions, layout.roles[rows]).astype(x.dtype)
            positions = jnp.zeros_like(positions)  # which turn nothing
        turn = rotation(
            positions, self.config.width // self.config.heads, self.config.rope_base
        )
        return x, Stream(layout, rows, turn, layout.valid(events, candidates))
