"""Makers + layout + backbone + head: one machine that TokenFormer and a Token Factory LRM are configs of."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from tokenrec.config import Config
from tokenrec.data.schema import Feature, Schema
from tokenrec.errors import InputError
from tokenrec.models.backbone import Backbone
from tokenrec.ops.layers import Linear, dropout, split_key, weight
from tokenrec.sharding import RULES
from tokenrec.tokens.embed import Entity
from tokenrec.tokens.layout import Layout, build_layout
from tokenrec.tokens.makers import FieldMakers, Maker


def user_token_count(config: Config, schema: Schema) -> int:
    """M: tokens in front of the history, one per static field unless `tokens.user_tokens` says how many."""
    fields = len(schema.group("user"))
    return (config.tokens.user_tokens or fields) if fields else 0


def stream_layout(config: Config, schema: Schema, events: int) -> Layout:
    """The stream of a batch whose histories are `events` long."""
    return build_layout(
        user_tokens=user_token_count(config, schema),
        events=events,
        fused=config.tokens.fused,
        candidates=config.data.candidates if config.data.paradigm == "nio" else 0,
        target_tokens=config.tokens.target_tokens,
    )


def _user_maker(features: tuple[Feature, ...], config: Config, rngs: nnx.Rngs) -> Maker | FieldMakers:
    if config.tokens.user_tokens:
        return Maker(features, config.tokens.user_tokens, config.model.width, config.tokens, rngs=rngs)
    return FieldMakers(features, config.model.width, config.tokens, rngs=rngs)


class Recommender(nnx.Module):
    """Streams of soft tokens to one logit per task at every read-out.

    In interleaved streams with one target token the target is made by the state maker, so that a target and an event
    are told apart by their place alone; fused events and longer targets have makers of their own.
    """

    def __init__(self, config: Config, schema: Schema, tasks: int, *, rngs: nnx.Rngs):
        self.config, self.schema = config, schema
        tokens, width = config.tokens, config.model.width
        user, state, action = schema.group("user"), schema.state, schema.group("action")
        if not action:
            raise InputError(
                "the schema has no action features: an event needs at least one; drop some of data.exclude"
            )
        self.user = None if not user else _user_maker(user, config, rngs)
        if tokens.fused:
            self.event = Maker(state + action, 1, width, tokens, rngs=rngs)
        else:
            self.state = Maker(state, 1, width, tokens, rngs=rngs)
            self.action = Maker(action, 1, width, tokens, rngs=rngs)
        own_target = config.data.paradigm == "nio" and (tokens.fused or tokens.target_tokens > 1)
        self.target = Maker(state, tokens.target_tokens, width, tokens, rngs=rngs) if own_target else None
        separators = 2 if config.data.paradigm == "nio" else 1
        self.separators = weight(rngs, (separators, width), None, None, inputs=width)
        self.backbone = Backbone(config.model, rngs=rngs)
        self.head = Linear(width, tasks, rngs=rngs)

    def __call__(
        self, entities: dict[str, Entity], events: jax.Array, candidates: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """Logits `[B, R, K] float32`; R = C candidates (NIO) or T events (UC).

        Args:
          entities: values of "user", "state", "action" and, in NIO, "target".
          events: `[B, T] bool`, real events; candidates: `[B, C] bool` or None.
          key: of dropout; None in evaluation.
        """
        token_key, backbone_key = split_key(key, 2)
        layout = stream_layout(self.config, self.schema, events.shape[1])
        x = dropout(self.tokens(entities, events), self.config.model.dropout, token_key)
        read = self.backbone(x, layout, events, candidates, backbone_key)
        return self.head(read.astype(jnp.float32))

    def tokens(self, entities: dict[str, Entity], events: jax.Array) -> jax.Array:
        """The stream `[B, S, d]` in the order of `stream_layout`."""
        dtype = jnp.dtype(self.config.model.dtype)
        batch, length = events.shape
        width = self.config.model.width

        def make(maker: Maker | FieldMakers, *names: str) -> jax.Array:
            values = {k: v for name in names for k, v in entities[name].values.items()}
            ids = {k: v for name in names for k, v in entities[name].ids.items()}
            made = maker(values, ids, dtype)
            rows = made.size // (batch * width)
            return made.reshape(batch, rows, width)

        def separator(number: int) -> jax.Array:
            one = self.separators[...][number].astype(dtype)
            return jnp.broadcast_to(one, (batch, 1, width), out_sharding=RULES("batch", None, None))

        parts = [] if self.user is None else [make(self.user, "user")]
        parts.append(separator(0))
        if self.config.tokens.fused:
            parts.append(make(self.event, "state", "action"))
        else:
            pairs = jnp.stack([make(self.state, "state"), make(self.action, "action")], axis=2)
            parts.append(pairs.reshape(batch, 2 * length, width))
        if self.config.data.paradigm == "nio":
            parts += [separator(1), make(self.state if self.target is None else self.target, "target")]
        return jnp.concatenate(parts, axis=1)
