"""The interface of all backbones, and the builder of a config's backbone."""

from __future__ import annotations

from typing import NamedTuple

import jax
from flax import nnx

from tokenrec.config import ModelConfig
from tokenrec.config.backbones import BACKBONES
from tokenrec.config.tuning_config import TuningConfig
from tokenrec.ops.attention.pattern import Pattern
from tokenrec.tokens.layout import Layout


class AttentionLayer(NamedTuple):
    """One attention of a backbone over a stream, from which its FLOPs are counted.

    Attributes:
      pattern: which queries see which keys.
      window: keys that a query of a sliding layer sees; None for full attention.
      implementation: name of an attention that is no softmax, which the chooser of
        `tokenrec.ops.attention` does not know; empty otherwise.
    """

    pattern: Pattern
    window: int | None = None
    implementation: str = ""


class Backbone(nnx.Module):
    """Map tokens `[B, S, d]` to read-outs `[B, R, d]`.

    Padding before a history must not change its result: a backbone takes its sizes
    from `longest`, never from the stream at hand.

    Args:
      config: `model` of the run's config.
      longest: layout of the longest stream that the backbone will read.
    """

    def __init__(self, config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
    ) -> jax.Array:
        """Compute the read-outs.

        Args:
          x: `[B, S, d]`, tokens.
          layout: roles and order of the S tokens.
          events: `[B, T] bool`, False for padding.
          candidates: `[B, C] bool`, False for padding; None without candidates.
          key: `[B]`, PRNG keys of dropout; None in evaluation.
          ages: `[B, T] int32`, seconds between each event and the request, for
            backbones that read `model.time_bias`; None for all others.

        Returns:
          `[B, R, d]`, the tokens of `layout.readout` after the last layer.
        """
        return self.layer_outputs(x, layout, events, candidates, key, ages)[-1]

    def layer_outputs(
        self,
        x: jax.Array,
        layout: Layout,
        events: jax.Array,
        candidates: jax.Array | None,
        key: jax.Array | None,
        ages: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Compute the output of each layer, `[B, n_l, d]`, and the read-outs.

        Args:
          x: as in `__call__`.
          layout: as in `__call__`.
          events: as in `__call__`.
          candidates: as in `__call__`.
          key: as in `__call__`.
          ages: as in `__call__`.

        Returns:
          An array for each layer; the last entry is the result of `__call__`.
        """
        raise NotImplementedError

    def attention_layers(self, layout: Layout) -> tuple[AttentionLayer, ...]:
        """List the attentions of `__call__`, bottom first, for the FLOP count."""
        raise NotImplementedError


def make_backbone(
    config: ModelConfig,
    longest: Layout,
    *,
    tuning: TuningConfig | None = None,
    rngs: nnx.Rngs,
) -> Backbone:
    """Build the backbone of `model.kind`.

    Args:
      config: `model` of the run's config.
      longest: layout of the longest stream that the backbone will read.
      tuning: `tuning` of the run's config, which language models read; None for weights
        that are all trained.
      rngs: source of the initial weights.

    Returns:
      The backbone.
    """
    spec = BACKBONES[config.kind]
    options = {"tuning": tuning} if spec.decoder else {}
    return spec.load()(config, longest, rngs=rngs, **options)
