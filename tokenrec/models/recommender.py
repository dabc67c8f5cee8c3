"""Makers + layout + backbone + head: one machine that TokenFormer and a Token Factory LRM are configs of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import Config
from tokenrec.config.prompt import Segment, parse_prompt
from tokenrec.data.batch import Batch
from tokenrec.data.schema import Feature, Schema
from tokenrec.models.backbones.interface import make_backbone
from tokenrec.models.heads import CodeHead, ItemHead
from tokenrec.ops.layers import Linear, dropout, flatten_tokens, split_key, weight
from tokenrec.sharding import RULES
from tokenrec.tokens.embed import Entity
from tokenrec.tokens.history import (
    History,
    history_stream_part,
    merged,
    soft_features,
    text_features,
)
from tokenrec.tokens.layout import Layout, StreamPart, lay_out
from tokenrec.tokens.makers import FieldMakers, Maker
from tokenrec.tokens.textual import TextMaker, token_count

# Token ids of each literal text of the prompt, in order.
Literals = tuple[tuple[int, ...], ...]


def user_token_count(config: Config, schema: Schema) -> int:
    """M: tokens of the user, one per static field unless `tokens.user_tokens` says how many."""
    if "user" in config.tokens.text:
        return token_count(text_features(config, "user", schema.group("user")))
    fields = len(soft_features(config, "user", schema.group("user")))
    return (config.tokens.user_tokens or fields) if fields else 0


def query_features(schema: Schema) -> tuple[Feature, ...]:
    """What a request shows before its candidates."""
    return tuple(f for f in schema.state if f.entity == "context")


def candidate_features(
    schema: Schema, segments: tuple[Segment, ...]
) -> tuple[Feature, ...]:
    """Features of the candidate's tokens: item and context, less what other segments of the prompt say."""
    said = {segment.kind for segment in segments}
    return tuple(
        f
        for f in schema.state
        if not ("query" in said and f.entity == "context")
        and not ("title" in said and f.kind == "text")
    )


def title_features(schema: Schema) -> tuple[Feature, ...]:
    return tuple(f for f in schema.group("catalogue") if f.kind == "text")


def stream_layout(
    config: Config,
    schema: Schema,
    events: int,
    literals: Literals = (),
    *,
    serving: bool = False,
    candidates: int | None = None,
    codes: int | None = None,
) -> Layout:
    """The stream of a batch whose histories are `events` long.

    Args:
      literals: token ids of the literal texts of the prompt.
      serving: retrieval is asked at the end of the history only, whatever it learns from.
      candidates: instead of the config's; beams, where codes are generated.
      codes: rows of codes per candidate; by default all that training reads.
    """
    segments = parse_prompt(config)
    words = iter(literals)

    def part(segment: Segment) -> StreamPart:
        if segment.kind == "history":
            return history_stream_part(config, schema, events)
        if segment.kind == "text":
            return StreamPart.of("text", len(next(words)), ordered=True)
        if segment.kind == "user":
            return StreamPart.of("user", user_token_count(config, schema))
        if segment.kind == "title":
            return StreamPart.of(
                "title", token_count(title_features(schema)), ordered=True
            )
        if segment.kind == "query":
            return StreamPart.of("query", _query_tokens(config, schema))
        if segment.kind == "candidate":
            return StreamPart.of("target", _target_tokens(config, schema, segments))
        return StreamPart.of("sep", 1)

    parts = [(segment.own, part(segment)) for segment in segments]
    shared, own = (
        [made for is_own, made in parts if is_own == wanted] for wanted in (False, True)
    )
    prefix, discard = (
        config.model.prefix == "bidirectional",
        config.model.discard_static,
    )
    if config.data.objective == "ranking":
        if config.data.paradigm == "uc":
            return lay_out(
                shared, own, events=events, candidates=0, read="states", discard=discard
            )
        count = config.data.candidates if candidates is None else candidates
        return lay_out(
            shared,
            own,
            events=events,
            candidates=count,
            read="own",
            prefix=prefix,
            discard=discard,
        )
    every = config.data.paradigm == "uc" and not serving
    if candidates is None:
        candidates = events if every else config.data.candidates
    if config.head.retrieval == "semantic_id":
        own.append(
            StreamPart.of(
                "code", len(schema.levels) - 1 if codes is None else codes, ordered=True
            )
        )
    return lay_out(
        shared,
        own,
        events=events,
        candidates=candidates if own else 0,
        read="events" if every else "last",
        prefix=prefix,
        discard=discard,
    )


def _query_tokens(config: Config, schema: Schema) -> int:
    features = query_features(schema)
    if "query" in config.tokens.text:
        return token_count(text_features(config, "query", features))
    return int(bool(features))


def _target_tokens(
    config: Config, schema: Schema, segments: tuple[Segment, ...]
) -> int:
    if "candidate" in config.tokens.text:
        return token_count(
            text_features(config, "candidate", candidate_features(schema, segments))
        )
    return config.tokens.target_tokens


class Recommender(nnx.Module):
    """Streams of soft tokens to what the heads read, and the heads.

    In interleaved streams with one target token the target is made by the state maker, so that a target and an event
    are told apart by their place alone; fused events and longer targets have makers of their own.
    """

    def __init__(
        self,
        config: Config,
        schema: Schema,
        tasks: int,
        literals: Literals = (),
        *,
        rngs: nnx.Rngs,
    ):
        self.config, self.schema, self.literals = config, schema, literals
        self.segments = parse_prompt(config)
        tokens, width = config.tokens, config.model.width
        kinds = [segment.kind for segment in self.segments]
        self.user = self._maker(
            "user", schema.group("user"), user_token_count(config, schema), rngs
        )
        self.history = History(config, schema, rngs=rngs)
        self.query = (
            self._maker("query", query_features(schema), 1, rngs)
            if "query" in kinds
            else None
        )
        features = candidate_features(schema, self.segments)
        named = "candidate" in tokens.text or "candidate" in tokens.soft
        own_target = (
            tokens.fused
            or tokens.target_tokens > 1
            or named
            or features != schema.state
        )
        has_own = "candidate" in kinds and own_target
        self.target = (
            self._maker("candidate", features, tokens.target_tokens, rngs)
            if has_own
            else None
        )
        self.title = (
            TextMaker(title_features(schema), width, tokens, rngs=rngs)
            if "title" in kinds
            else None
        )
        seps = kinds.count("sep")
        self.separators = (
            weight(rngs, (seps, width), None, None, inputs=width) if seps else None
        )
        ids = sorted({word for text in literals for word in text})
        self.vocabulary = tuple(ids)
        self.words = (
            weight(rngs, (len(ids), width), None, None, inputs=width) if ids else None
        )
        longest = stream_layout(config, schema, config.data.events, literals)
        self.backbone = make_backbone(config.model, longest, rngs=rngs)
        self.head: Linear | ItemHead | CodeHead
        if config.data.objective == "ranking":
            self.head = Linear(width, tasks, rngs=rngs)
        elif config.head.retrieval == "next_item":
            self.head = ItemHead(config.head, width, schema.items, rngs=rngs)
        else:
            self.head = CodeHead(schema.levels, width, tied=config.head.tied, rngs=rngs)

    def _maker(
        self, entity: str, features: tuple[Feature, ...], count: int, rngs: nnx.Rngs
    ) -> Maker | FieldMakers | TextMaker | None:
        tokens, width = self.config.tokens, self.config.model.width
        if entity in tokens.text:
            return TextMaker(
                text_features(self.config, entity, features), width, tokens, rngs=rngs
            )
        features = soft_features(self.config, entity, features)
        if not features and entity in ("user", "query"):
            return None
        if entity == "user" and not tokens.user_tokens:
            return FieldMakers(features, width, tokens, rngs=rngs)
        return Maker(features, count, width, tokens, rngs=rngs)

    def __call__(
        self, entities: dict[str, Entity], batch: Batch, key: jax.Array | None
    ) -> jax.Array:
        """What the head reads, `[B, R', d] float32`: rows of `Layout.readout`.

        Args:
          entities: values of "user", "state", "action" and, where there are candidates or a query, "target".
          key: of dropout; None in evaluation.
        """
        token_key, backbone_key = split_key(key, 2)
        x, layout = self.stream(entities, batch)
        x = dropout(x, self.config.model.dropout, token_key)
        return self.backbone(
            x, *self._backbone_inputs(layout, batch, backbone_key)
        ).astype(jnp.float32)

    def trace(
        self, entities: dict[str, Entity], batch: Batch, key: jax.Array | None
    ) -> tuple[jax.Array, list[jax.Array]]:
        """What `__call__` computes on its way: the tokens, `[B, S, d]`, and the backbone's `layer_outputs`, the last of
        which it returns.
        """
        token_key, backbone_key = split_key(key, 2)
        tokens, layout = self.stream(entities, batch)
        x = dropout(tokens, self.config.model.dropout, token_key)
        outputs = self.backbone.layer_outputs(
            x, *self._backbone_inputs(layout, batch, backbone_key)
        )
        return tokens, [*outputs[:-1], outputs[-1].astype(jnp.float32)]

    def _backbone_inputs(
        self, layout: Layout, batch: Batch, key: jax.Array | None
    ) -> tuple[Any, ...]:
        """Inputs of the backbone besides the tokens."""
        return layout, batch.valid, candidate_mask(batch), key, batch.ages

    def stream(
        self, entities: dict[str, Entity], batch: Batch
    ) -> tuple[jax.Array, Layout]:
        """Tokens of the whole stream, `[B, S, d]`, and their order."""
        shared, own = (
            self.shared_tokens(entities, batch),
            self.own_tokens(entities, batch),
        )
        if self.config.tokens.random_tokens:
            shared = jax.lax.stop_gradient(shared)
            # Codes are no makers' tokens but the head's.
            own = own if isinstance(self.head, CodeHead) else jax.lax.stop_gradient(own)
        return jnp.concatenate([shared, *own], axis=1), batch_layout(
            self.config, self.schema, self.literals, batch
        )

    def shared_tokens(self, entities: dict[str, Entity], batch: Batch) -> jax.Array:
        """The rows left of `||`, `[B, P, d]`, in the order of `stream_layout`."""
        literals, seps, parts = iter(self.literals), 0, []
        for segment in self.segments:
            if segment.own:
                break
            if segment.kind == "sep":
                assert self.separators is not None
                parts.append(
                    self._repeated(self.separators[...][seps : seps + 1], batch)
                )
                seps += 1
            elif segment.kind == "text":
                parts.append(self._literal(next(literals), batch))
            elif segment.kind == "history":
                parts.append(
                    self.history(
                        entities,
                        batch.valid,
                        self._dtype,
                        self._item_vectors(entities, batch),
                    )
                )
            elif segment.kind == "user" and self.user is not None:
                parts.append(
                    flatten_tokens(self.user(*merged(entities["user"]), self._dtype))
                )
            elif segment.kind == "query" and self.query is not None:
                values, ids = merged(entities["target"])
                first = (
                    {name: value[:, :1] for name, value in values.items()},
                    {n: v[:, :1] for n, v in ids.items()},
                )
                parts.append(flatten_tokens(self.query(*first, self._dtype)))
        return jnp.concatenate(parts, axis=1)

    def own_tokens(self, entities: dict[str, Entity], batch: Batch) -> list[jax.Array]:
        """The rows right of `||` of every candidate, `[B, C K, d]`, or of the codes of every goal; none in UC."""
        if isinstance(self.head, CodeHead):
            assert batch.codes is not None
            read = batch.codes[..., :-1]  # the last level is only said
            return [self.code_tokens(flatten_tokens(read))]
        shared = sum(
            segment.kind == "text" and not segment.own for segment in self.segments
        )
        literals, parts = iter(self.literals[shared:]), []
        for segment in self.segments:
            if not segment.own:
                continue
            values, ids = merged(entities["target"])
            if segment.kind == "text":
                words = self._literal(next(literals), batch)[:, None]
                shape = (words.shape[0], batch.weight.shape[1], *words.shape[2:])
                parts.append(
                    jnp.broadcast_to(
                        words, shape, out_sharding=RULES("batch", None, None, None)
                    )
                )
            elif segment.kind == "title":
                assert self.title is not None
                parts.append(self.title(values, ids, self._dtype))
            else:
                maker = self.history.state if self.target is None else self.target
                assert maker is not None
                parts.append(maker(values, ids, self._dtype))
        return [flatten_tokens(jnp.concatenate(parts, axis=2))] if parts else []

    def code_tokens(self, codes: jax.Array) -> jax.Array:
        """`[B, n, l] int32` codes of n goals or beams -> `[B, n l, d]`."""
        assert isinstance(self.head, CodeHead)
        return flatten_tokens(self.head.tokens(codes).astype(self._dtype))

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.model.dtype)

    def _repeated(self, rows: jax.Array, batch: Batch) -> jax.Array:
        shape = (batch.valid.shape[0], *rows.shape)
        # `broadcast_to` would forget its `out_sharding` where the batch is of one.
        return jax.sharding.reshard(
            jnp.broadcast_to(rows.astype(self._dtype), shape),
            RULES("batch", None, None),
        )

    def _literal(self, words: tuple[int, ...], batch: Batch) -> jax.Array:
        assert self.words is not None
        return self._repeated(
            self.words[...][np.searchsorted(self.vocabulary, words)], batch
        )

    def _item_vectors(
        self, entities: dict[str, Entity], batch: Batch
    ) -> jax.Array | None:
        """`[B, T, d]`: what a tied head adds to the tokens of the events."""
        if (
            not isinstance(self.head, ItemHead)
            or not self.config.head.tied
            or "history" in self.config.tokens.text
        ):
            return None
        assert batch.items is not None
        if self.head.items is not None:
            return self.head.rows(batch.items)
        return jnp.where(
            (batch.items >= 0)[..., None],
            entities["items"].values["catalogue_item"][..., 0, :],
            0,
        )


def batch_layout(
    config: Config, schema: Schema, literals: Literals, batch: Batch
) -> Layout:
    """The streams of a batch."""
    serving = batch.goals is not None and batch.goals.shape[1] == 1
    return stream_layout(
        config,
        schema,
        batch.valid.shape[1],
        literals,
        serving=serving,
        candidates=_count(batch),
    )


def candidate_mask(batch: Batch) -> jax.Array | None:
    """`[B, C] bool`: real candidates, or goals; others are padding, which no row sees. None where there are none."""
    if batch.codes is not None:
        return flatten_tokens(batch.codes[..., :1])[..., 0] >= 0
    return (
        batch.weight > 0 if batch.target is not None and batch.goals is None else None
    )


def _count(batch: Batch) -> int | None:
    """Candidates of a stream, as `candidate_mask` counts them."""
    if batch.codes is not None:
        return batch.codes.shape[1] * batch.codes.shape[2]
    return (
        batch.weight.shape[1]
        if batch.target is not None and batch.goals is None
        else None
    )
