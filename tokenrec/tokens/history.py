"""History maker: the events of a user as tokens, soft or discrete, compressed or cut.

An event has a state (item and context) and an action (feedback such as a click). Its
tokens are, by config (docs/methods.md sections 2 and 3):

    interleaved  s_1 a_1 s_2 a_2 ..    state and action token     tokens.fused=False
    fused        e_1 e_2 ..            one soft token per event   tokens.fused=True
    compressed   m_1 m_2 e_7 e_8       fewer for older events     tokens.compression
    discrete     w_11 w_12 .. w_21 ..  one token per value        tokens.text["history"]

Letters: B batch, T events, d model width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import Config
from tokenrec.data.schema import Feature, Schema
from tokenrec.errors import InputError, suggest
from tokenrec.ops.layers import flatten_tokens
from tokenrec.tokens.compression_plan import CompressionPlan
from tokenrec.tokens.discrete_tokens import (
    DiscreteTokenMaker,
    token_count,
    truncate_left,
)
from tokenrec.tokens.embed import EntityFeatures
from tokenrec.tokens.history_compression import HistoryCompressor
from tokenrec.tokens.layout import Role
from tokenrec.tokens.makers import FeatureArrays, Maker
from tokenrec.tokens.stream_segments import StreamSegment


def text_features(
    config: Config, entity: str, features: tuple[Feature, ...]
) -> tuple[Feature, ...]:
    """Select the features of an entity that are written as discrete tokens.

    Args:
      config: the run's config.
      entity: a key of `tokens.text`.
      features: all features of the entity.

    Returns:
      The features of `tokens.text[entity]`, in its order.

    Raises:
      InputError: the entity has no such feature.
    """
    names = config.tokens.text[entity]
    return _select_features(f"tokens.text['{entity}']", names, features)


def soft_features(
    config: Config, entity: str, features: tuple[Feature, ...]
) -> tuple[Feature, ...]:
    """Select the features of an entity that its soft tokens are made of.

    Args:
      config: the run's config.
      entity: "user", "history", "query" or "candidate".
      features: all features of the entity.

    Returns:
      The features of `tokens.soft[entity]`, in its order; all, if it is not named
      there.

    Raises:
      InputError: the entity has no such feature.
    """
    if entity not in config.tokens.soft:
        return features
    names = config.tokens.soft[entity]
    return _select_features(f"tokens.soft['{entity}']", names, features)


def _select_features(
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
    """The history compression of a config, for its longest history."""
    tokens = config.tokens
    return CompressionPlan(
        config.data.events,
        tokens.compression,
        tokens.recent,
        group=tokens.group,
        compressed=tokens.compressed,
    )


def history_segment(config: Config, schema: Schema, events: int) -> StreamSegment:
    """The positions of the history in a stream.

    Args:
      config: the run's config.
      schema: features, without the excluded ones.
      events: T of this stream, at most `data.events`.

    Returns:
      The positions of the tokens that `HistoryMaker` makes of T events.
    """
    if "history" in config.tokens.text:
        all_features = schema.state + schema.group("action")
        # Every token of an event represents that event, also after the cut.
        per_event = token_count(text_features(config, "history", all_features))
        event = np.repeat(np.arange(events), per_event)
        event = event[_cap(config, len(event))]
        return StreamSegment.history("event", event, per_event)
    if not config.tokens.fused:
        # State and action of an event share its RoPE position: the stride is 1.
        pair: tuple[Role, ...] = ("state", "action")
        return StreamSegment(pair * events, np.repeat(np.arange(events), 2))
    event = compression_plan(config).for_length(events).event
    return StreamSegment.history("event", event[_cap(config, events)])


def _cap(config: Config, tokens: int) -> slice:
    """The tokens that `tokens.history_cap` keeps of a history of so many."""
    return truncate_left(tokens, config.tokens.history_cap or tokens)


def merge_entities(
    *entities: EntityFeatures,
) -> tuple[FeatureArrays, FeatureArrays]:
    """Merge parts of a batch that one maker reads: values and ids, `[B, T, ...]`."""
    values: FeatureArrays = {}
    ids: FeatureArrays = {}
    for entity in entities:
        values.update(entity.values)
        ids.update(entity.ids)
    return values, ids


class HistoryMaker(nnx.Module):
    """Make the tokens of the history.

    Attributes:
      event: the maker of whole events; None where events are interleaved.
      state: the maker of state tokens; None where they are not interleaved. A target of
        one token may be made by it too (`Recommender`).
      action: the maker of action tokens, likewise.
      compressor: history compression; None without it.

    Raises:
      InputError: events are interleaved, but have no action features.
    """

    def __init__(self, config: Config, schema: Schema, *, rngs: nnx.Rngs):
        self.config = config
        tokens, width = config.tokens, config.model.width
        state, action = schema.state, schema.group("action")
        if not (tokens.fused or action):
            raise InputError(
                "tokens.fused=False, but the schema has no action features: an action "
                "token needs at least one; use fused=True, or drop some of data.exclude"
            )
        # Each attribute is assigned once: NNX takes one that begins as None for a
        # constant.
        self.event: Maker | DiscreteTokenMaker | None
        if "history" in tokens.text:
            features = text_features(config, "history", state + action)
            self.event = DiscreteTokenMaker(features, width, tokens, rngs=rngs)
        elif tokens.fused:
            features = soft_features(config, "history", state + action)
            self.event = Maker(features, 1, width, tokens, rngs=rngs)
        else:
            # `tokens.soft` may name a feature that does not exist.
            soft_features(config, "history", state + action)
            self.event = None
        self.state = None if self.event else Maker(state, 1, width, tokens, rngs=rngs)
        self.action = None if self.event else Maker(action, 1, width, tokens, rngs=rngs)
        plan = compression_plan(config)
        self.compressor = (
            None
            if plan.kind == "none"
            else HistoryCompressor(plan, width, config.model.heads, rngs=rngs)
        )

    def __call__(
        self,
        entities: dict[str, EntityFeatures],
        valid: jax.Array,
        dtype: jnp.dtype,
        items: jax.Array | None = None,
    ) -> jax.Array:
        """Make the tokens, oldest event first.

        Args:
          entities: features of the parts "state" and "action", `[B, T, ...]`.
          valid: `[B, T] bool`, real events.
          dtype: of the computation and the tokens.
          items: `[B, T, d]`, added to the token of each event (`head.tied`).

        Returns:
          `[B, n, d]`, the n tokens of `history_segment`.
        """
        # Padding events are computed too; attention and compression mask them.
        if self.event is None:
            state, action = entities["state"], entities["action"]
            assert self.state is not None
            assert self.action is not None
            # [B, T, 2, d]: state and action of an event lie side by side.
            pairs = [
                self.state(*merge_entities(state), dtype),
                self.action(*merge_entities(action), dtype),
            ]
            return flatten_tokens(jnp.concatenate(pairs, axis=2))
        event_tokens = self.event_tokens(entities, dtype)
        if items is not None:
            # [B, T, 1, d] + [B, T, n, d]: tied item vectors reach every token of the
            # event.
            event_tokens = event_tokens + items[:, :, None].astype(dtype)
        tokens = flatten_tokens(event_tokens)
        if self.compressor is not None:
            tokens = self.compressor(tokens, valid)
        return tokens[:, _cap(self.config, tokens.shape[1])]

    def event_tokens(
        self, entities: dict[str, EntityFeatures], dtype: jnp.dtype
    ) -> jax.Array:
        """Make the n tokens of every whole event, neither compressed nor cut.

        Args:
          entities: features of the parts "state" and "action", `[B, T, ...]`.
          dtype: of the computation and the tokens.

        Returns:
          `[B, T, n, d]`, n = 1 for soft tokens.
        """
        assert self.event is not None
        features = merge_entities(entities["state"], entities["action"])
        return self.event(*features, dtype)
