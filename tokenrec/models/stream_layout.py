"""The layout of a prompt: which positions the tokens of a config take in the stream.

A prompt is a list of segments (`tokens.prompt`, `tokenrec.config.prompt`). Those left
of `||` depend on the request alone and form the prefix; those right of it are repeated
for each candidate (docs/methods.md section 2, "Prompt"):

    text  user  history  query  ||  text  title  candidate  |  text  title  candidate ..
    `-------- prefix --------'      `---- candidate 0 ----'   `---- candidate 1 ----'

The candidates of a language model may go on with text.

    task           candidates of the stream       read-outs
    ranking, NIO   impressions of one request     last token of each candidate
    ranking, UC    none                           state of each event
    next item      none                           end of the prefix; in UC each event
    semantic id    codes of the goals or beams    as next item, and each code
"""

from __future__ import annotations

import jax

from tokenrec.config import Config
from tokenrec.config.backbones import is_decoder
from tokenrec.config.prompt import Segment, parse_prompt
from tokenrec.data.batch import Batch
from tokenrec.data.schema import Feature, Schema
from tokenrec.ops.layers import flatten_tokens
from tokenrec.tokens.discrete_tokens import token_count
from tokenrec.tokens.history import history_segment, soft_features, text_features
from tokenrec.tokens.layout import Layout
from tokenrec.tokens.stream_segments import Readout, StreamSegment, make_layout

# Token ids of each literal text of the prompt, in order.
Literals = tuple[tuple[int, ...], ...]


def user_token_count(config: Config, schema: Schema) -> int:
    """M, the number of user tokens: `tokens.user_tokens`, or one per static field.

    A user whose features are written as text has a token per value.
    """
    features = schema.group("user")
    if "user" in config.tokens.text:
        return token_count(text_features(config, "user", features))
    # A user without features has no token, whatever `tokens.user_tokens` says.
    fields = len(soft_features(config, "user", features))
    return (config.tokens.user_tokens or fields) if fields else 0


def query_features(schema: Schema) -> tuple[Feature, ...]:
    """Features of the query: the context of the request."""
    return tuple(f for f in schema.state if f.entity == "context")


def candidate_features(
    schema: Schema, segments: tuple[Segment, ...]
) -> tuple[Feature, ...]:
    """Features of the candidate's tokens: item and context.

    Context features are left to the query, and text features to the title, where the
    prompt has these segments.
    """
    kinds = {segment.kind for segment in segments}
    return tuple(
        f
        for f in schema.state
        if not ("query" in kinds and f.entity == "context")
        and not ("title" in kinds and f.kind == "text")
    )


def title_features(schema: Schema) -> tuple[Feature, ...]:
    """Features of the title: the texts of an item."""
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
    """Lay out the stream of a batch.

    Args:
      config: the run's config.
      schema: features, without the excluded ones.
      events: T of this stream, at most `data.events`.
      literals: token ids of the literal texts of the prompt.
      serving: retrieval reads out the end of the history only, although training in UC
        reads out every event.
      candidates: C; by default that of the config. Beams, where codes are generated.
      codes: semantic-id codes of a candidate; by default those that training reads, all
        levels but the last.

    Returns:
      The layout.
    """
    # 1. The segments of the prompt.
    prefix, candidate = _prompt_segments(config, schema, events, literals)
    # 2. How many candidates, and what is read.
    uc = config.data.paradigm == "uc"
    bidirectional = config.model.prefix == "bidirectional"
    readout: Readout
    if config.data.objective == "ranking" and uc:
        readout, count = "states", 0
        # A state that sees its own action would contain the answer.
        bidirectional = False
    elif config.data.objective == "ranking":
        readout = "candidates"
        count = config.data.candidates if candidates is None else candidates
    else:
        every_event = uc and not serving
        readout = "events" if every_event else "last"
        if config.head.retrieval == "semantic_id":
            # The code of the last level is predicted, never read.
            levels = len(schema.levels) - 1 if codes is None else codes
            candidate.append(StreamSegment.tokens("code", levels, ordered=True))
        goals = events if every_event else config.data.candidates
        count = goals if candidates is None else candidates
        if not candidate:
            # The next-item head scores the read-outs, not tokens of the stream.
            count = 0
    return make_layout(
        prefix,
        candidate,
        events=events,
        candidates=count,
        readout=readout,
        bidirectional=bidirectional,
        discard_static=config.model.discard_static,
        marks_static=not is_decoder(config.model),
    )


def served_layout(
    config: Config, schema: Schema, events: int, literals: Literals = ()
) -> Layout:
    """Lay out the stream of a request with one candidate, for `extend_folded` and `extend_decoder`.

    A candidate of a model that was trained on streams (UC) is the state of the event
    that follows the history: what it sees is what that state sees in a stream.

    Args:
      config: the config of a ranking run.
      schema: features, without the excluded ones.
      events: T of the history.
      literals: token ids of the literal texts of the prompt.
    """
    if config.data.paradigm == "nio":
        return stream_layout(config, schema, events, literals, candidates=1)
    prefix, _ = _prompt_segments(config, schema, events, literals)
    return make_layout(
        prefix,
        [StreamSegment.tokens("state", 1)],
        events=events,
        candidates=1,
        readout="candidates",
        discard_static=config.model.discard_static,
        marks_static=not is_decoder(config.model),
    )


def _prompt_segments(
    config: Config, schema: Schema, events: int, literals: Literals
) -> tuple[list[StreamSegment], list[StreamSegment]]:
    """Segments of the prefix and of one candidate, in the order of the prompt."""
    segments = parse_prompt(config)
    texts = iter(literals)
    prefix: list[StreamSegment] = []
    candidate: list[StreamSegment] = []
    for segment in segments:
        if segment.kind == "history":
            positions = history_segment(config, schema, events)
        elif segment.kind == "text":
            # Words have RoPE positions one after another.
            positions = StreamSegment.tokens("text", len(next(texts)), ordered=True)
        elif segment.kind == "user":
            positions = StreamSegment.tokens("user", user_token_count(config, schema))
        elif segment.kind == "title":
            words = token_count(title_features(schema))
            positions = StreamSegment.tokens("title", words, ordered=True)
        elif segment.kind == "query":
            positions = StreamSegment.tokens("query", _query_tokens(config, schema))
        elif segment.kind == "candidate":
            count = _target_tokens(config, schema, segments)
            positions = StreamSegment.tokens("target", count)
        else:
            positions = StreamSegment.tokens("sep", 1)
        # `own`: the segment stands right of `||`.
        (candidate if segment.own else prefix).append(positions)
    return prefix, candidate


def _query_tokens(config: Config, schema: Schema) -> int:
    features = query_features(schema)
    if "query" in config.tokens.text:
        return token_count(text_features(config, "query", features))
    # One soft token for all context features; none without any.
    return int(bool(features))


def _target_tokens(
    config: Config, schema: Schema, segments: tuple[Segment, ...]
) -> int:
    if "candidate" in config.tokens.text:
        features = candidate_features(schema, segments)
        return token_count(text_features(config, "candidate", features))
    return config.tokens.target_tokens


def batch_layout(
    config: Config, schema: Schema, literals: Literals, batch: Batch
) -> Layout:
    """Lay out the streams of a batch.

    Args:
      config: the run's config.
      schema: features, without the excluded ones.
      literals: token ids of the literal texts of the prompt.
      batch: the batch, `valid: [B, T]`.

    Returns:
      The layout of its T events and C candidates.
    """
    # With the goals of one read-out, a stream is read at its end, as in serving.
    serving = batch.goals is not None and batch.goals.shape[1] == 1
    return stream_layout(
        config,
        schema,
        batch.valid.shape[1],
        literals,
        serving=serving,
        candidates=_candidate_count(batch),
    )


def candidate_mask(batch: Batch) -> jax.Array | None:
    """The real candidates or goals of a batch, `[B, C] bool`; None without any.

    The others are padding, which no other position sees.
    """
    if batch.codes is not None:
        # A goal that fills up has code -1 at every level.
        return flatten_tokens(batch.codes[..., :1])[..., 0] >= 0
    if batch.target is not None and batch.goals is None:
        return batch.weight > 0
    return None


def _candidate_count(batch: Batch) -> int | None:
    """C as in `candidate_mask`; None if streams have no candidates."""
    if batch.codes is not None:
        return batch.codes.shape[1] * batch.codes.shape[2]
    if batch.target is not None and batch.goals is None:
        return batch.weight.shape[1]
    return None
