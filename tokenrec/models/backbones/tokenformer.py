"""TokenFormer: a stack of gated blocks with BFTS attention, and its prefix cache.

*TokenFormer: Unify the Multi-Field and Sequential Recommendation Worlds* (arXiv
2604.13737, 2026; docs/methods.md section 3):

    X_0     = tokens                                 [B, S, d], makers and layout
    X_l     = Block_l(X_{l-1}, window_l)             block.py, windows by bfts.py
    output  = RMSNorm(X_L)[readout]                  [B, R, d]

The same class is the Large Recommendation Model of Token Factory: a Transformer without
gate and windows (`model.gate=False`, `model.windows=()`).

*Prefix cache.* A stream is `[prefix | candidates]`. The prefix sees no candidate, so
its keys and values can be computed once per request (`prefill`) and any number of
candidates scored against them (`extend`); docs/methods.md section 2, "Prompt".

Ours: live positions (bfts.py), the prefix cache, stacked layers (`model.scan`) and
additive positions as an option (`model.positions`).

Letters: B batch, S stream length, P prefix length, R read-outs, T events, C candidates,
d model width, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.errors import InputError
from tokenrec.models.backbones.additive_positions import AdditivePositions
from tokenrec.models.backbones.bfts import (
    cached_positions,
    layer_positions,
    layer_stacks,
    layer_windows,
    part_multiple,
    prefix_length,
    prefix_positions,
    split_positions,
    stack_sizes,
)
from tokenrec.models.backbones.block import Block
from tokenrec.models.backbones.interface import AttentionLayer, Backbone
from tokenrec.models.backbones.rope_attention import KeysValues, Stream
from tokenrec.models.backbones.split_tokens import context_parts, select_split
from tokenrec.models.backbones.stacking import (
    apply_remat,
    make_blocks,
    split_first_axis,
    take_apart,
    unstack_blocks,
)
from tokenrec.ops.attention.rotary import rotation
from tokenrec.ops.layers import RMSNorm, split_keys
from tokenrec.tokens.layout import Layout, select_positions


class PrefixCache(NamedTuple):
    """Keys and values of the prefix of a request.

    Attributes:
      layers: keys and values of each layer, bottom first, at its `cached_positions`.
      present: `[B, P] bool`, real tokens of the prefix, for language models; else None.
    """

    layers: tuple[KeysValues, ...]
    present: jax.Array | None = None


class TokenFormer(Backbone):
    """A stack of TokenFormer blocks.

    Args:
      config: `model` of the run's config.
      longest: layout of the longest stream that it will read; needed for additive
        positions only.

    Raises:
      InputError: positions are additive and `longest` is None.
    """

    def __init__(
        self, config: ModelConfig, longest: Layout | None = None, *, rngs: nnx.Rngs
    ):
        self.config = config
        additive = config.positions == "additive"
        if additive and longest is None:
            raise InputError(
                "longest=None: additive positions are those of the longest stream; "
                "pass its layout"
            )
        # Names of weights on disk follow the attributes: "places", "blocks", "norm".
        self.places = (
            AdditivePositions(config.width, longest, rngs=rngs)
            if additive and longest is not None
            else None
        )
        windows = layer_windows(config)
        self.blocks = make_blocks(
            config, lambda layer: Block(config, windows[layer], rngs=rngs)
        )
        self.norm: Callable[[jax.Array], jax.Array] = RMSNorm(config.width)

    # The layers of a language model (decoder.py) are called as blocks are.

    def layers(self) -> list[Any]:
        """The blocks of all layers, bottom first, stacked ones taken apart."""
        layers: list[Any] = []
        for block, size in zip(self.blocks, stack_sizes(self.config), strict=True):
            layers += self._take_apart(block, len(layers), size)
        return layers

    def _take_apart(self, block: Any, first: int, size: int) -> list[Any]:
        """Take an entry of `blocks` apart into the layers from number `first` on."""
        if size == 1:
            return [block]
        layers = unstack_blocks(block, size)
        return [self._as_layer(layer, first + n) for n, layer in enumerate(layers)]

    def _as_layer(self, block: Any, layer: int) -> Any:
        """Give a block of a stack what sets its layer apart, besides its weights.

        Here nothing: the layers of a stack have one window.
        """
        return block

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """The attention of each layer, bottom first."""
        layout, positions = self._split(layout)
        return tuple(
            AttentionLayer(layout.pattern(outputs, inputs), window)
            for inputs, outputs, window in zip(
                positions, positions[1:], layer_windows(self.config), strict=False
            )
        )

    def _split(self, layout: Layout) -> tuple[Layout, tuple[np.ndarray, ...]]:
        """Fill the stream up, so that its tokens split over `mesh.context`.

        Returns:
          The layout with its fill, and the positions of each layer.
        """
        positions, parts = layer_positions(self.config, layout), context_parts()
        if parts == 1:
            return layout, positions
        fill = -layout.length % part_multiple(layout.length, parts)
        layout = layout.with_fill(fill)
        return layout, split_positions(positions, layout.length, parts)

    def __call__(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
        present: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the read-outs `[B, R, d]` from tokens `[B, S, d]`.

        Args:
          x: `[B, S, d]`, tokens.
          layout: roles and order of the S tokens.
          events: `[B, T] bool`, real events.
          candidates: `[B, C] bool`, real candidates; None without candidates.
          key: `[B]`, PRNG keys of dropout; None in evaluation.
          ages: not read.
          present: as in `prepare_inputs`.

        Returns:
          `[B, R, d]`.
        """
        # positions[l] enter layer l; positions[l + 1] leave it.
        layout, positions = self._split(layout)
        x = jnp.pad(x, ((0, 0), (0, layout.fill), (0, 0))) if layout.fill else x
        stream_positions = np.arange(layout.length)
        x, stream = self.prepare_inputs(
            x, layout, stream_positions, events, candidates, present
        )
        stream = stream._replace(parts=context_parts())
        x = stream.select(x, positions[0], stream_positions)
        dropout_keys = split_keys(key, self.config.layers)
        first = 0
        for block, stack in zip(self.blocks, layer_stacks(self.config), strict=True):
            size, bottom = stack.size, first
            run_positions = positions[first : first + size + 1]
            run_keys = dropout_keys[first : first + size]
            first += size
            lengths = {len(layer) for layer in run_positions}
            # Live positions only shrink on the way up: equal lengths are equal
            # positions.
            if size > 1 and len(lengths) == 1:
                turn = [bottom + n for n in range(stack.period)]
                x = self._loop(block, x, run_positions[0], stream, run_keys, turn)
                continue
            layers = self._take_apart(block, bottom, size)
            for layer, inputs, outputs, layer_key in zip(
                layers, run_positions, run_positions[1:], run_keys, strict=False
            ):
                compute = functools.partial(
                    layer,
                    query_positions=outputs,
                    key_positions=inputs,
                    stream=stream,
                    dropout_key=layer_key,
                )
                x = apply_remat(compute, self.config.remat)(x)
        # Heads read whole read-outs, whichever device computed them.
        x = select_split(x, layout.readout, positions[-1], split=False)
        return self.norm(x)

    def layer_outputs(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
        present: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Compute the output of each layer at its live positions, `[B, n_l, d]`.

        Args:
          x: `[B, S, d]`, tokens.
          layout: roles and order of the S tokens.
          events: `[B, T] bool`, real events.
          candidates: `[B, C] bool`, real candidates; None without candidates.
          key: `[B]`, PRNG keys of dropout; None in evaluation.
          ages: not read.
          present: as in `prepare_inputs`.

        Returns:
          The outputs of the L layers, then the read-outs `[B, R, d]`.
        """
        stream_positions = np.arange(layout.length)
        x, stream = self.prepare_inputs(
            x, layout, stream_positions, events, candidates, present
        )
        positions = layer_positions(self.config, layout)
        dropout_keys = split_keys(key, self.config.layers)
        x = select_positions(x, positions[0], stream_positions)
        layer_outputs = []
        for layer, inputs, outputs, layer_key in zip(
            self.layers(), positions, positions[1:], dropout_keys, strict=False
        ):
            x = layer(x, outputs, inputs, stream, layer_key)
            layer_outputs.append(x)
        read = self.norm(select_positions(x, layout.readout, positions[-1]))
        return [*layer_outputs, read]

    def _loop(
        self,
        block: Block,
        x: jax.Array,
        positions: np.ndarray,
        stream: Stream,
        keys: Sequence[jax.Array | None],
        turn: Sequence[int],
    ) -> jax.Array:
        """Run layers with stacked weights as a loop, so that the program has one body.

        Args:
          block: the layers' weights, `[layers, ...]` each.
          x: `[B, n, d]`.
          positions: `[n]`, the positions at the input and the output of all layers.
          stream: the stream.
          keys: PRNG key of dropout of each layer; all None in evaluation.
          turn: numbers of the layers of the first turn of the loop. Those of the other
            turns are like them, but for their weights.

        Returns:
          `[B, n, d]`.
        """
        # One graph serves all layers: they differ in their weights only.
        graph, weights = nnx.split(block)
        # Layers of one turn stand side by side in the program, and a short loop has no
        # turns left: there XLA would merge what remat computes again.
        alone = self.config.scan_unroll == 1 and len(turn) == 1

        def layer_at(number: int) -> Callable[..., jax.Array]:
            def layer(
                x: jax.Array, weights: nnx.State, key: jax.Array | None
            ) -> jax.Array:
                layer = self._as_layer(nnx.merge(graph, weights), number)
                return layer(x, positions, positions, stream, key)

            return apply_remat(layer, self.config.remat, loop=alone)

        layers = [layer_at(number) for number in turn]
        # In evaluation the loop scans over the weights alone.
        stacked_keys = (
            None
            if keys[0] is None
            else jnp.stack([key for key in keys if key is not None])
        )
        scanned = (weights, stacked_keys)
        if len(layers) > 1:
            scanned = split_first_axis(scanned, len(layers))

        def run_turn(x: jax.Array, scanned: Any) -> tuple[jax.Array, None]:
            parts = [scanned] if len(layers) == 1 else take_apart(scanned, len(layers))
            for layer, part in zip(layers, parts, strict=True):
                x = layer(x, *part)
            return x, None

        return jax.lax.scan(run_turn, x, scanned, unroll=self.config.scan_unroll)[0]

    def prefill(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        present: jax.Array | None = None,
    ) -> tuple[PrefixCache, jax.Array]:
        """Compute the prefix cache of a request, without dropout.

        Args:
          x: `[B, P, d]`, tokens of the prefix.
          layout: layout of any stream with this prefix; its candidates do not matter.
          events: `[B, T] bool`, real events.
          present: as in `prepare_inputs`.

        Returns:
          The cache, and `[B, R_p, d]`, the R_p read-outs in the prefix (often none).

        Raises:
          InputError: `x` has another number of tokens.
        """
        prefix = np.arange(prefix_length(layout))
        if x.shape[1] != len(prefix):
            raise InputError(
                f"x {x.shape}: the prefix of the layout has {len(prefix)} tokens; pass "
                "those alone"
            )
        x, stream = self.prepare_inputs(x, layout, prefix, events, None, present)
        positions = prefix_positions(self.config, layout)
        cached = cached_positions(self.config, layout)
        x = select_positions(x, positions[0], prefix)
        # A layer computes keys and values at all of its inputs; those that nothing
        # behind the prefix can see are dropped.
        cache = []
        for block, inputs, outputs, kept in zip(
            self.layers(), positions, positions[1:], cached, strict=False
        ):
            x, keys_values = block.forward_with_kv(x, outputs, inputs, stream)
            cache.append(
                KeysValues(
                    *(select_positions(part, kept, inputs) for part in keys_values)
                )
            )
        # Read-outs in the prefix: the end of the history in retrieval.
        readout = layout.readout[layout.readout < len(prefix)]
        read = self.norm(select_positions(x, readout, positions[-1]))
        return PrefixCache(tuple(cache), self.kept_of(stream)), read

    def kept_of(self, stream: Stream) -> jax.Array | None:
        """What `extend` needs of a prefix besides keys and values; here nothing."""
        return None

    def extend(
        self,
        cache: PrefixCache,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array,
        present: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the read-outs of candidates from the cache of their prefix.

        The result is that of `__call__` for the whole stream. Number and length of the
        candidates may differ from those of the layout that was prefilled.

        Args:
          cache: the result of `prefill` for a layout with the same prefix.
          x: `[B, S - P, d]`, tokens of the candidates.
          layout: layout of the whole stream, S positions.
          events: `[B, T] bool`, real events.
          candidates: `[B, C] bool`, real candidates.
          present: as in `prepare_inputs`.

        Returns:
          `[B, R, d]`, the read-outs behind the prefix.

        Raises:
          InputError: `x` or the cache has another number of tokens.
        """
        count = prefix_length(layout)
        behind = np.arange(count, layout.length)
        if x.shape[1] != len(behind):
            raise InputError(
                f"x {x.shape}: {len(behind)} tokens of the layout lie behind its "
                "prefix; pass those alone"
            )
        cached = cached_positions(self.config, layout)
        lengths = [past.keys.shape[1] for past in cache.layers]
        expected = [len(kept) for kept in cached]
        if lengths != expected:
            raise InputError(
                f"the cache holds {lengths} tokens by layer and the prefix needs "
                f"{expected}; prefill it again"
            )
        x, stream = self.prepare_inputs(
            x, layout, behind, events, candidates, present, cache.present
        )
        # The live positions behind the prefix.
        positions = [
            live[np.searchsorted(live, count) :]
            for live in layer_positions(self.config, layout)
        ]
        x = select_positions(x, positions[0], behind)
        for block, inputs, outputs, past, kept in zip(
            self.layers(), positions, positions[1:], cache.layers, cached, strict=False
        ):
            # Keys are the cached positions, then the live ones behind the prefix.
            key_positions = np.concatenate([kept, inputs])
            x, _ = block.forward_with_kv(x, outputs, key_positions, stream, past=past)
        readout = layout.readout[layout.readout >= count]
        return self.norm(select_positions(x, readout, positions[-1]))

    def prepare_inputs(
        self,
        x: jax.Array,
        layout: Layout,
        positions: np.ndarray,
        events: jax.Array,
        candidates: jax.Array | None,
        present: jax.Array | None = None,
        prefix: jax.Array | None = None,
    ) -> tuple[jax.Array, Stream]:
        """Prepare the inputs of the first layer, and those that all layers share.

        Args:
          x: `[B, n, d]`, tokens of some positions of the layout.
          layout: layout of the whole stream.
          positions: `[n]`, the stream positions of `x`, ascending.
          events: `[B, T] bool`, real events.
          candidates: `[B, C] bool`, real candidates; None without candidates.
          present: `[B, n] bool`, for language models: tokens that are none of those that
            fill a text up. None: all of them.
          prefix: `PrefixCache.present`, where `x` continues a cached prefix.

        Returns:
          `[B, n, d]`, the tokens with additive positions, if any, and the stream.
        """
        rope_positions = select_positions(
            layout.rope_positions(events), positions, np.arange(layout.length)
        )
        if self.places is not None:
            places = self.places(rope_positions, layout.roles[positions])
            x = x + places.astype(x.dtype)
            # RoPE by an angle of zero is the identity.
            rope_positions = jnp.zeros_like(rope_positions)
        # RoPE angles are the same in all layers and heads: compute them once.
        head_width = self.config.width // self.config.heads
        turn = rotation(rope_positions, head_width, self.config.rope_base)
        valid = layout.valid(events, candidates)
        return x, Stream(layout, positions, turn, valid)
