"""The stack of blocks: full layers below, shrinking windows above (BFTS), only the rows that a read-out can see."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from tokenrec.config import ModelConfig, Remat
from tokenrec.models.block import Block
from tokenrec.ops.attention import ATTENTION_RESULT
from tokenrec.ops.layers import RMSNorm, split_key
from tokenrec.ops.rotary import rotation
from tokenrec.tokens.layout import Layout, needed_rows, take_rows


def layer_windows(config: ModelConfig) -> tuple[int | None, ...]:
    """Window of every layer, None for a full one.

    >>> layer_windows(ModelConfig(layers=4, windows=(32, 16)))
    (None, None, 32, 16)
    """
    return (None,) * (config.layers - len(config.windows)) + tuple(config.windows)


def layer_rows(config: ModelConfig, layout: Layout) -> tuple[np.ndarray, ...]:
    """Rows at the input of each layer and at the output of the last."""
    if config.needed_rows:
        return needed_rows(layout, layer_windows(config))
    return (np.arange(layout.rows),) * (config.layers + 1)


def remember(compute: Callable[[jax.Array], jax.Array], remat: Remat) -> Callable[[jax.Array], jax.Array]:
    """A block as a function of its input, of which the backward pass finds kept what `model.remat` says."""
    if remat == "none":
        return compute
    keep = jax.checkpoint_policies
    dots = keep.save_from_both_policies(
        keep.dots_with_no_batch_dims_saveable, keep.save_only_these_names(ATTENTION_RESULT)
    )
    return jax.checkpoint(compute, policy=dots if remat == "dots" else keep.nothing_saveable)


class Backbone(nnx.Module):
    """`[B, S, d]` tokens -> `[B, R, d]` normalised read-outs."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.blocks = nnx.List([Block(config, window, rngs=rngs) for window in layer_windows(config)])
        self.norm = RMSNorm(config.width)

    def __call__(
        self, x: jax.Array, layout: Layout, events: jax.Array, candidates: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """`events: [B, T] bool`, `candidates: [B, C] bool` or None: which are real; `key` of dropout."""
        valid = layout.valid(events, candidates)
        turn = rotation(layout.positions(events), self.config.width // self.config.heads, self.config.rope_base)
        rows = layer_rows(self.config, layout)
        x = take_rows(x, rows[0], np.arange(layout.rows))
        keys = split_key(key, len(self.blocks))
        for block, inputs, outputs, layer_key in zip(self.blocks, rows, rows[1:], keys, strict=False):
            compute = functools.partial(
                block, queries=outputs, keys=inputs, layout=layout, valid=valid, turn=turn, key=layer_key
            )
            x = remember(compute, self.config.remat)(x)
        return self.norm(take_rows(x, layout.readout, rows[-1]))
