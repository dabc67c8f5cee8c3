"""The history segment: events as tokens, soft or textual, compressed or cut."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import Config
from tokenrec.data.schema import Feature, Schema
from tokenrec.errors import InputError, suggest
from tokenrec.ops.layers import flatten_tokens
from tokenrec.tokens.compress import CompressionPlan, Compressor
from tokenrec.tokens.embed import Entity
from tokenrec.tokens.layout import StreamPart, history_part
from tokenrec.tokens.makers import Maker, Values
from tokenrec.tokens.textual import TextMaker, token_count, truncate


def text_features(
    config: Config, entity: str, features: tuple[Feature, ...]
) -> tuple[Feature, ...]:
    """The features of `tokens.text[entity]`, in its order.

    Raises:
      InputError: the entity has no such feature.
    """
    return _chosen(f"tokens.text['{entity}']", config.tokens.text[entity], features)


def soft_features(
    config: Config, entity: str, features: tuple[Feature, ...]
) -> tuple[Feature, ...]:
    """The features of `tokens.soft[entity]`, in its order, or all where it does not name the entity.

    Raises:
      InputError: the entity has no such feature.
    """
    if entity not in config.tokens.soft:
        return features
    return _chosen(f"tokens.soft['{entity}']", config.tokens.soft[entity], features)


def _chosen(
    field: str, names: tuple[str, ...], features: tuple[Feature, ...]
) -> tuple[Feature, ...]:
    known = {f.name: f for f in features}
    for name in names:
        if name not in known:
            raise InputError(
                f"{field} names the feature '{name}'{suggest(name, known)}"
            )
    return tuple(known[name] for name in names)


def compression_plan(config: Config) -> CompressionPlan:
    tokens = config.tokens
    return CompressionPlan(
        config.data.events,
        tokens.compression,
        tokens.recent,
        group=tokens.group,
        compressed=tokens.compressed,
    )


def history_stream_part(config: Config, schema: Schema, events: int) -> StreamPart:
    """Rows of the history of a stream with `events` events."""
    if "history" in config.tokens.text:
        features = text_features(
            config, "history", schema.state + schema.group("action")
        )
        each = token_count(features)
        kept = _kept(config, events * each)
        event = np.repeat(np.arange(events), each)[kept]
        return StreamPart.history("event", event, each)
    if not config.tokens.fused:
        return history_part(events=events, fused=False)
    event = compression_plan(config).of(events).event[_kept(config, events)]
    return StreamPart.history("event", event)


def _kept(config: Config, rows: int) -> slice:
    return truncate(rows, config.tokens.history_cap or rows)


def merged(*entities: Entity) -> tuple[Values, Values]:
    """Values and ids of several parts of a batch together."""
    values = {
        name: value for entity in entities for name, value in entity.values.items()
    }
    return values, {
        name: value for entity in entities for name, value in entity.ids.items()
    }


class History(nnx.Module):
    """Events -> `[B, rows, d]`, the rows of `history_stream_part`.

    `state` is the maker of an event's item and context where events are interleaved; targets may share it.
    """

    def __init__(self, config: Config, schema: Schema, *, rngs: nnx.Rngs):
        self.config = config
        tokens, width = config.tokens, config.model.width
        state, action = schema.state, schema.group("action")
        if not (tokens.fused or action):
            raise InputError(
                "tokens.fused=False, but the schema has no action features: an action token needs at least one; "
                "use fused=True, or drop some of data.exclude"
            )
        # Modules are assigned once: NNX takes an attribute that begins as None for a constant.
        self.event: Maker | TextMaker | None
        if "history" in tokens.text:
            self.event = TextMaker(
                text_features(config, "history", state + action),
                width,
                tokens,
                rngs=rngs,
            )
        else:
            made_of = soft_features(config, "history", state + action)
            self.event = (
                Maker(made_of, 1, width, tokens, rngs=rngs) if tokens.fused else None
            )
        self.state = None if self.event else Maker(state, 1, width, tokens, rngs=rngs)
        self.action = None if self.event else Maker(action, 1, width, tokens, rngs=rngs)
        plan = compression_plan(config)
        self.compressor = (
            None
            if plan.kind == "none"
            else Compressor(plan, width, config.model.heads, rngs=rngs)
        )

    def __call__(
        self,
        entities: dict[str, Entity],
        valid: jax.Array,
        dtype: jnp.dtype,
        items: jax.Array | None = None,
    ) -> jax.Array:
        """`valid: [B, T] bool`; `items: [B, T, d]` is added to the token of each event."""
        state, action = entities["state"], entities["action"]
        if self.event is None:
            assert self.state is not None
            assert self.action is not None
            pairs = [
                self.state(*merged(state), dtype),
                self.action(*merged(action), dtype),
            ]
            return flatten_tokens(jnp.concatenate(pairs, axis=2))
        made = self.event(*merged(state, action), dtype)
        if items is not None:
            made = made + items[:, :, None].astype(dtype)
        rows = flatten_tokens(made)
        rows = rows if self.compressor is None else self.compressor(rows, valid)
        return rows[:, _kept(self.config, rows.shape[1])]
