"""What every rival is to the machine around it."""

from __future__ import annotations

import jax
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.models.backbones.tokenformer import AttentionLayer
from tokenrec.tokens.layout import Layout


class Backbone(nnx.Module):
    """Stands where `Backbone` stands: `[B, S, d]` tokens -> `[B, R, d]` read-outs.

    A rival computes the same for a history however much padding stands before it: sizes come from `longest`, the
    layout of the longest stream of the config, never from the stream at hand.
    """

    def __init__(self, config: ModelConfig, longest: Layout, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        """`events: [B, T] bool`, `candidates: [B, C] bool` or None: which are real; `key` of dropout."""
        return self.layer_outputs(x, layout, events, candidates, key)[-1]

    def layer_outputs(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
    ) -> list[jax.Array]:
        """What comes out of each layer of `__call__`, and last what it returns."""
        raise NotImplementedError

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """The attentions of `__call__`, of which no FLOPs are seen where it is traced (work.py)."""
        raise NotImplementedError
