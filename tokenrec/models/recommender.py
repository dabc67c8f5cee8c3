"""The recommender: makers, layout, backbone and head, from a batch to what is scored.

    features -makers-> tokens [B, S, d] -backbone-> read-outs [B, R, d] -head-> scores
                                `------ branch ------^   model.branch only

TokenFormer and a Large Recommendation Model of Token Factory are two configs of this
one module (docs/methods.md section 1). The layout of the stream comes from the prompt
(`tokenrec.models.stream_layout`); the order of the tokens made here is the same.

Letters: B batch, S stream length, P prefix length, T events, C candidates, K tokens of
a candidate, R read-outs, d model width."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import Config
from tokenrec.config.backbones import is_decoder
from tokenrec.config.prompt import parse_prompt
from tokenrec.data.batch import Batch
from tokenrec.data.schema import Schema
from tokenrec.data.semantic_id_feature import SEMANTIC_ID
from tokenrec.models.backbones.interface import make_backbone
from tokenrec.models.branch import Branch
from tokenrec.models.entity_makers import (
    EntityMaker,
    make_entity_maker,
    make_target_maker,
)
from tokenrec.models.heads import NextItemHead, SemanticIdHead
from tokenrec.models.present_tokens import fills_up, present_tokens
from tokenrec.models.stream_layout import (
    Literals,
    batch_layout,
    candidate_mask,
    query_features,
    stream_layout,
    title_features,
    user_token_count,
)
from tokenrec.models.words import (
    WordTable,
    own_tables,
    shares_codes,
    word_scale,
    writes_words,
)
from tokenrec.ops.layers import Linear, dropout, flatten_tokens, split_keys, weight
from tokenrec.sharding import RULES, on_mesh, reshard
from tokenrec.tokens.discrete_tokens import DiscreteTokenMaker
from tokenrec.tokens.embed import EntityFeatures
from tokenrec.tokens.history import HistoryMaker, merge_entities
from tokenrec.tokens.layout import Layout, Role
from tokenrec.tokens.output_vectors import output_vectors


def with_word_vectors(config: Config) -> Config:
    """Set the width of the features that a language model reads to its own."""
    own = dict.fromkeys(own_tables(config), config.model.width)
    widths = config.tokens.embedding_dims | own
    tokens = dataclasses.replace(config.tokens, embedding_dims=widths)
    return dataclasses.replace(config, tokens=tokens)


def _first(x: jax.Array) -> jax.Array:
    """The first of the candidates of each sample, `[B, C, ...]` to `[B, 1, ...]`."""
    # JAX cannot tell by itself over which axis a batch of one is split.
    return reshard(x[:, :1], RULES("batch", *[None] * (x.ndim - 1)))


def _learned_tokens(count: int, width: int, rngs: nnx.Rngs) -> nnx.Param | None:
    """Learned tokens `[count, d]`; None for none."""
    return weight(rngs, (count, width), None, None, inputs=width) if count else None


class Recommender(nnx.Module):
    """A recommendation model: tokens of a batch, their backbone, and the head.

    In interleaved streams with one target token, the maker of the history's states
    makes the target too, so that a target differs from an event by its position alone.
    Fused events and longer targets have makers of their own.

    Args:
      config: the run's config.
      schema: features, without the excluded ones.
      outputs: number of logits of ranking: one of each task, and one of each class
        of a task of classes.
      literals: token ids of the literal texts of the prompt.
    """

    def __init__(
        self,
        config: Config,
        schema: Schema,
        outputs: int,
        literals: Literals = (),
        *,
        rngs: nnx.Rngs,
    ):
        if is_decoder(config.model):
            config = with_word_vectors(config)
        self.config = config
        self.schema = schema
        self.literals = literals
        self.segments = parse_prompt(config)
        tokens, width = config.tokens, config.model.width
        kinds = [segment.kind for segment in self.segments]

        # The order of these assignments is the order of the random draws.
        # 1. Makers, in the order of the prompt's parts.
        users = user_token_count(config, schema)
        self.user = make_entity_maker(
            config, "user", schema.group("user"), users, rngs=rngs
        )
        self.history = HistoryMaker(config, schema, rngs=rngs)
        self.query = (
            make_entity_maker(config, "query", query_features(schema), 1, rngs=rngs)
            if "query" in kinds
            else None
        )
        self.target = make_target_maker(config, schema, self.segments, rngs=rngs)
        self.title = (
            DiscreteTokenMaker(title_features(schema), width, tokens, rngs=rngs)
            if "title" in kinds
            else None
        )
        # 2. Separators, and the words of literal texts, each once.
        # Each separator of the prompt has a vector of its own.
        self.separators = _learned_tokens(kinds.count("sep"), width, rngs)
        # Only the words that occur: the tokenizer's whole vocabulary would be a large
        # table. A language model has it.
        self.vocabulary = tuple(sorted({word for text in literals for word in text}))
        self.words: WordTable | nnx.Param | None
        if is_decoder(config.model):
            self.words = WordTable(config.model, scored=writes_words(config), rngs=rngs)
        else:
            self.words = _learned_tokens(len(self.vocabulary), width, rngs)
        # 3. Backbone and head. Sizes of the backbone come from the longest stream,
        # never from the one at hand.
        longest = stream_layout(config, schema, config.data.events, literals)
        self.backbone = make_backbone(
            config.model, longest, tuning=config.tuning, rngs=rngs
        )
        self.head = self._make_head(outputs, rngs)
        # 4. Last, so that the weights above start from the same numbers without it.
        self.branch = (
            None
            if config.model.branch == "none"
            else Branch(config.model, longest, rngs=rngs)
        )

    def _make_head(
        self, outputs: int, rngs: nnx.Rngs
    ) -> Linear | NextItemHead | SemanticIdHead:
        """Create the head of the objective."""
        config, width = self.config, self.config.model.width
        if config.data.objective == "ranking":
            return Linear(width, outputs, rngs=rngs)
        if config.head.retrieval == "next_item":
            return NextItemHead(config.head, width, self.schema.items, rngs=rngs)
        return SemanticIdHead(
            self.schema.levels,
            width,
            tied=config.head.tied,
            copy=config.head.copy,
            scale=self._new_row_scale,
            rngs=rngs,
        )

    def __call__(
        self,
        entities: dict[str, EntityFeatures],
        batch: Batch,
        key: jax.Array | None,
    ) -> jax.Array:
        """Compute the read-outs of a batch, which the head scores.

        Args:
          entities: features of the parts "user", "state" and "action", and "target"
            where there are candidates or a query.
          batch: the batch.
          key: `[B]`, PRNG keys of dropout; None in evaluation.

        Returns:
          `[B, R, d] float32`, the positions of `Layout.readout`.
        """
        token_key, backbone_key, branch_key = self._split_keys(key)
        x, layout = self.make_stream(entities, batch)
        # Tokens and backbone have PRNG keys of their own.
        x = dropout(x, self.config.model.dropout, token_key)
        inputs = self._backbone_inputs(entities, layout, batch, backbone_key)
        readouts = self.backbone(x, *inputs)
        return self._add_branch(x, readouts, layout, batch, branch_key)

    def trace(
        self,
        entities: dict[str, EntityFeatures],
        batch: Batch,
        key: jax.Array | None,
    ) -> tuple[jax.Array, list[jax.Array]]:
        """Compute the read-outs, and return what is computed on the way.

        Args:
          entities: as in `__call__`.
          batch: the batch.
          key: `[B]`, PRNG keys of dropout; None in evaluation.

        Returns:
          The tokens `[B, S, d]` before dropout, and the backbone's `layer_outputs`, the
          last of which is replaced by the result of `__call__`.
        """
        token_key, backbone_key, branch_key = self._split_keys(key)
        tokens, layout = self.make_stream(entities, batch)
        x = dropout(tokens, self.config.model.dropout, token_key)
        inputs = self._backbone_inputs(entities, layout, batch, backbone_key)
        *outputs, readouts = self.backbone.layer_outputs(x, *inputs)
        readouts = self._add_branch(x, readouts, layout, batch, branch_key)
        return tokens, [*outputs, readouts]

    def _split_keys(self, key: jax.Array | None) -> list[jax.Array | None]:
        """PRNG keys `[B]` of the tokens, the backbone and the branch."""
        if self.branch is None:
            return [*split_keys(key, 2), None]
        return split_keys(key, 3)

    def _add_branch(
        self,
        x: jax.Array,
        readouts: jax.Array,
        layout: Layout,
        batch: Batch,
        key: jax.Array | None,
    ) -> jax.Array:
        """Add the branch, if any, to read-outs of the backbone, `[B, R, d] float32`."""
        wide = readouts.astype(jnp.float32)
        if self.branch is None:
            return wide
        added = self.branch(x, readouts, layout, batch.valid, key)
        return wide + added.astype(jnp.float32)

    def _backbone_inputs(
        self,
        entities: dict[str, EntityFeatures],
        layout: Layout,
        batch: Batch,
        key: jax.Array | None,
    ) -> tuple[Any, ...]:
        """Inputs of the backbone besides the tokens."""
        inputs = layout, batch.valid, candidate_mask(batch), key, batch.ages
        if not self.masks_fill:
            return inputs
        left, right = (
            present_tokens(layout, self._makers, entities, batch, own=own)
            for own in (False, True)
        )
        return *inputs, jnp.concatenate([left, right], axis=1)

    @property
    def masks_fill(self) -> bool:
        """Whether tokens that fill a text up are masked: in a language model."""
        return is_decoder(self.config.model) and fills_up(self._makers.values())

    @property
    def _makers(self) -> dict[Role, EntityMaker | None]:
        """Maker of the tokens of each role that may be written as text."""
        return {
            "user": self.user,
            "event": self.history.event,
            "query": self.query,
            "title": self.title,
            "target": self.target,
        }

    def present(
        self,
        entities: dict[str, EntityFeatures],
        batch: Batch,
        layout: Layout,
        *,
        own: bool,
    ) -> jax.Array | None:
        """Which tokens are no fill, `[B, n] bool`; None where none is masked.

        Args:
          entities: as in `__call__`.
          batch: the batch.
          layout: layout of the stream.
          own: the n tokens right of `||`; otherwise those left of it.
        """
        if not self.masks_fill:
            return None
        return present_tokens(layout, self._makers, entities, batch, own=own)

    def with_words(
        self, entities: dict[str, EntityFeatures]
    ) -> dict[str, EntityFeatures]:
        """Add the vectors of the features that a language model reads itself."""
        if not isinstance(self.words, WordTable):
            return entities
        readers: dict[str, Callable[[jax.Array, jnp.dtype], jax.Array]] = {
            f.name: self.words for f in self.schema.features if f.kind == "text"
        }
        if shares_codes(self.config):
            assert isinstance(self.head, SemanticIdHead)
            readers[SEMANTIC_ID] = self.head.read
        return {
            part: EntityFeatures(
                values
                | {
                    name: readers[name](ids[name], self.dtype)
                    for name in sorted(readers.keys() & ids.keys())
                },
                ids,
            )
            for part, (values, ids) in entities.items()
        }

    def make_stream(
        self, entities: dict[str, EntityFeatures], batch: Batch
    ) -> tuple[jax.Array, Layout]:
        """Make the tokens of the whole stream, `[B, S, d]`, and its layout."""
        prefix = self.prefix_tokens(entities, batch)
        candidates = self.candidate_tokens(entities, batch)
        if self.config.tokens.random_tokens:
            # The control whose tokens are not trained. Codes are the head's tokens, not
            # a maker's, and are trained all the same.
            prefix = jax.lax.stop_gradient(prefix)
            if not isinstance(self.head, SemanticIdHead):
                candidates = jax.lax.stop_gradient(candidates)
        tokens = jnp.concatenate([prefix, *candidates], axis=1)
        layout = batch_layout(self.config, self.schema, self.literals, batch)
        return tokens, layout

    def prefix_tokens(
        self, entities: dict[str, EntityFeatures], batch: Batch
    ) -> jax.Array:
        """Make the tokens left of `||`, `[B, P, d]`, in the order of the layout."""
        entities = self.with_words(entities)
        literals = iter(self.literals)
        separator = 0
        parts = []
        for segment in self.segments:
            if segment.own:
                break
            if segment.kind == "sep":
                assert self.separators is not None
                vector = self.separators[...][separator : separator + 1]
                if self._new_row_scale != 1:
                    vector = vector * self._new_row_scale
                parts.append(self._repeat_per_stream(vector, batch))
                separator += 1
            elif segment.kind == "text":
                parts.append(self.literal_tokens(next(literals), batch))
            elif segment.kind == "history":
                item_vectors = self._item_vectors(entities, batch)
                parts.append(
                    self.history(entities, batch.valid, self.dtype, item_vectors)
                )
            elif segment.kind == "user" and self.user is not None:
                user = self.user(*merge_entities(entities["user"]), self.dtype)
                parts.append(flatten_tokens(user))
            elif segment.kind == "query" and self.query is not None:
                # The candidates of a request share its context: take that of the first.
                values, ids = merge_entities(entities["target"])
                first_values, first_ids = (
                    {name: _first(value) for name, value in part.items()}
                    for part in (values, ids)
                )
                query = self.query(first_values, first_ids, self.dtype)
                parts.append(flatten_tokens(query))
        return jnp.concatenate(parts, axis=1)

    def candidate_tokens(
        self, entities: dict[str, EntityFeatures], batch: Batch
    ) -> list[jax.Array]:
        """Make the tokens right of `||`, candidate by candidate.

        Args:
          entities: as in `__call__`.
          batch: the batch.

        Returns:
          One array: `[B, C K, d]`, or the codes of every goal with the semantic-id
          head. An empty list if the stream has no candidates.
        """
        if isinstance(self.head, SemanticIdHead):
            assert batch.codes is not None
            # The code of the last level is predicted, never read.
            return [self.code_tokens(flatten_tokens(batch.codes[..., :-1]))]
        entities = self.with_words(entities)
        # Literal texts of the prefix come first in `literals`.
        prefix_texts = sum(
            segment.kind == "text" and not segment.own for segment in self.segments
        )
        literals = iter(self.literals[prefix_texts:])
        parts = []
        for segment in self.segments:
            if not segment.own:
                continue
            values, ids = merge_entities(entities["target"])
            if segment.kind == "text":
                # The same words for every candidate.
                words = self.literal_tokens(next(literals), batch)[:, None]
                shape = (words.shape[0], batch.weight.shape[1], *words.shape[2:])
                spec = RULES("batch", None, None, None)
                parts.append(jnp.broadcast_to(words, shape, out_sharding=on_mesh(spec)))
            elif segment.kind == "title":
                assert self.title is not None
                parts.append(self.title(values, ids, self.dtype))
            else:
                # A candidate has the features of a state.
                maker = self.history.state if self.target is None else self.target
                assert maker is not None
                parts.append(maker(values, ids, self.dtype))
        return [flatten_tokens(jnp.concatenate(parts, axis=2))] if parts else []

    def code_tokens(self, codes: jax.Array) -> jax.Array:
        """Make the tokens of n goals or beams: codes `[B, n, l]` to `[B, n l, d]`."""
        assert isinstance(self.head, SemanticIdHead)
        return flatten_tokens(self.head.tokens(codes).astype(self.dtype))

    @property
    def _new_row_scale(self) -> float:
        """Factor of vectors that are rows beside the words of a language model."""
        model = self.config.model
        return word_scale(model) if is_decoder(model) else 1.0

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the tokens and of the backbone's activations."""
        return jnp.dtype(self.config.model.dtype)

    def _repeat_per_stream(self, vectors: jax.Array, batch: Batch) -> jax.Array:
        """Give every stream the same tokens, `[n, d]` to `[B, n, d]`."""
        shape = (batch.valid.shape[0], *vectors.shape)
        # Not `broadcast_to` with `out_sharding`, which it drops where the batch is 1.
        return reshard(
            jnp.broadcast_to(vectors.astype(self.dtype), shape),
            RULES("batch", None, None),
        )

    def literal_tokens(self, words: tuple[int, ...], batch: Batch) -> jax.Array:
        """Make the tokens of a literal text of n words, `[B, n, d]`."""
        if isinstance(self.words, WordTable):
            ids = jnp.asarray(words, jnp.int32)
            return self._repeat_per_stream(self.words(ids, self.dtype), batch)
        assert self.words is not None
        places = np.searchsorted(self.vocabulary, words)
        return self._repeat_per_stream(self.words[...][places], batch)

    def _item_vectors(
        self, entities: dict[str, EntityFeatures], batch: Batch
    ) -> jax.Array | None:
        """Output vectors of the events' items, `[B, T, d]`, for a tied next-item head.

        They are added to the tokens of the events. None without a tied head.
        """
        if (
            not isinstance(self.head, NextItemHead)
            or not self.config.head.tied
            or "history" in self.config.tokens.text
        ):
            return None
        return self.event_item_vectors(entities, batch)

    def event_item_vectors(
        self, entities: dict[str, EntityFeatures], batch: Batch
    ) -> jax.Array:
        """Output vectors of the events' items with a next-item head, `[B, T, d]`.

        Args:
          entities: as in `__call__`.
          batch: the batch.

        Returns:
          Zeros for an event without item.
        """
        assert isinstance(self.head, NextItemHead)
        assert batch.items is not None
        if self.head.items is not None:
            return self.head.lookup(batch.items)
        # Sampled softmax: the vectors are rows of a table.
        known = (batch.items >= 0)[..., None]
        vectors = output_vectors(*entities["items"])
        return jnp.where(known, vectors, 0)

    def event_tokens(self, entities: dict[str, EntityFeatures]) -> jax.Array:
        """Tokens of whole events, before the backbone and whatever of them it reads.

        Args:
          entities: as in `__call__`.

        Returns:
          `[B, T, d]`, the mean of the tokens of an event that has several.
        """
        entities = self.with_words(entities)
        tokens = jnp.mean(self.history.event_tokens(entities, self.dtype), axis=2)
        # A batch of 1 has lost its sharding.
        tokens = reshard(tokens, RULES("batch", None, None))
        # As in `make_stream`, for the control whose tokens are not trained.
        random = self.config.tokens.random_tokens
        return jax.lax.stop_gradient(tokens) if random else tokens
